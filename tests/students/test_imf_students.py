"""Files of improved MeanFlow's students: forms, what they leave open, and damage."""

import os
from contextlib import suppress

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from student_files import ARGUMENTS, altered, drawn, load, saved, state, written

import flowdistill
from flowdistill import NULL_LABEL, CheckpointError, Condition, ConfigError
from flowdistill.plumbing.dry import without_files
from flowdistill.students import IMFStudent, SiTStudent, imf
from flowdistill.testing import check_flow_map

TOLD = ARGUMENTS["imf"]
LABELS = torch.tensor([1, 5, 9])


def refused(path, kind=CheckpointError, **kwargs):
    with pytest.raises(kind) as error:
        load(path, **{**TOLD, **kwargs})
    assert str(path) in str(error.value)
    return str(error.value)


def test_a_file_alone_and_by_name(tmp_path):
    path = written("imf", tmp_path)
    student = load(path, **TOLD)
    assert isinstance(student, IMFStudent)
    assert torch.equal(drawn(student), drawn(load("imf", checkpoint=path, **TOLD)))
    with pytest.warns(RuntimeWarning, match=r"is a student of improved MeanFlow .*: MIT licence"):
        flowdistill.load_flow_map(path, **TOLD)
    sit = load(written("meanflow", tmp_path), **ARGUMENTS["meanflow"])
    assert isinstance(sit, SiTStudent)  # which has the same suffix


@pytest.mark.parametrize("form", ["average", "with the head of v", "parallel", "safetensors"])
def test_forms(tmp_path, form):
    tensors = state("imf")
    extra = {k.replace("u_heads", "v_heads"): v + 1 for k, v in tensors.items() if "u_heads" in k}
    if form == "safetensors":
        path = tmp_path / "imf.safetensors"
        safetensors.torch.save_file(tensors, path)
    else:
        content = {
            "average": {"ema": tensors, "model": {k: v + 1 for k, v in tensors.items()}},
            "with the head of v": tensors | extra,
            "parallel": {f"module.{k}": v for k, v in tensors.items()},
        }[form]
        path = saved(tmp_path / "imf.pt", content)
    assert torch.equal(drawn(load(path, **TOLD)), drawn(load(written("imf", tmp_path), **TOLD)))


def test_guidance_and_its_interval_are_told(tmp_path):
    student = load(written("imf", tmp_path), **TOLD)
    said = Condition(LABELS, torch.full((3,), 8.0)).guided(interval=(0.4, 0.65))
    assert torch.equal(drawn(student), drawn(student, said))
    for change in ({"scale": torch.full((3,), 2.0)}, {"interval": (0.4, 0.7)}, {"interval": (0.3, 0.65)}):
        assert not torch.allclose(drawn(student), drawn(student, said.guided(**change)))
    assert student.evaluations == 24
    assert torch.equal(drawn(student, Condition()), drawn(student, Condition(torch.full((3,), NULL_LABEL))))
    samples = flowdistill.sample(student, 3, labels=[1, 5, 9], guidance=2.0)
    assert not torch.allclose(samples, flowdistill.sample(student, 3, labels=[1, 5, 9]))


def test_what_is_recommended_for_a_published_size(tmp_path, monkeypatch):
    path = written("imf", tmp_path)
    open_ = {"input_size": 8, "num_classes": 10}
    assert "which no published one has: give guidance and interval" in refused(path, ConfigError, guidance=None)
    monkeypatch.setattr(imf, "_SIZES", {"b": (5, 48, 7.0, (0.1, 0.2)), "m": (6, 48, 9.0, (0.0, 1.0))})
    assert (load(path, **open_).guidance, load(path, **open_).interval) == (7.0, (0.1, 0.2))
    assert load("imf-b/2-256", checkpoint=path, **open_).guidance == 7.0
    assert load(path, **open_, guidance=2.0).guidance == 2.0
    with pytest.raises(CheckpointError, match="is not imf-m/2-256: it has 5 blocks of the width 48"):
        load("imf-m/2-256", checkpoint=path, **open_)
    with pytest.raises(ConfigError, match="unknown student 'imf-s/2-256': did you mean"):
        load("imf-s/2-256", checkpoint=path)


def test_the_latents_are_whitened(tmp_path):
    student = load(written("imf", tmp_path), **TOLD)
    raw = student.decoder.latents(torch.ones(1, 4, 8, 8))[0, :, 0, 0]
    assert raw.tolist() == pytest.approx([0.86488 + 4.85503674, 5.04137, 4.15342, 4.36084], rel=1e-4)
    assert student.decoder.rounding == "nearest"


def test_a_plan_needs_no_file():
    with without_files():
        student = load("imf-b/2-256", checkpoint="nowhere.pth")
        assert student.guidance == 8.0
        assert sum(p.numel() for p in student.parameters()) > 80_000_000
        with pytest.raises(ConfigError, match=r"give imf_student\.variant"):
            load("imf", checkpoint="nowhere.pth")


def test_the_conformance_kit(tmp_path):
    check_flow_map(load(written("imf", tmp_path), **TOLD))


# Damage.


class Hostile:
    """Is pickled as a call of os.system."""

    def __reduce__(self):
        return os.system, ('touch "$CANARY"',)


@pytest.mark.parametrize("named", [False, True])
def test_files_that_would_run_a_command(tmp_path, named):
    for content in (state("imf") | {"net.class_tokens": Hostile()}, {"ema": state("imf"), "x": Hostile()}, Hostile()):
        path = saved(tmp_path / "hostile.pth", content)
        with pytest.raises(CheckpointError, match="system"):
            load("imf", checkpoint=path, **TOLD) if named else load(path)


def test_truncated_at_many_points(tmp_path):
    data = written("imf", tmp_path).read_bytes()
    for part in (0, 1, 100, len(data) // 3, len(data) - 1000, len(data) - 1):
        (tmp_path / "cut.pth").write_bytes(data[:part])
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            load("imf", checkpoint=tmp_path / "cut.pth", **TOLD)


def test_another_network(tmp_path):
    tensors = state("imf")
    del tensors["net.u_heads.0.attn_scale"]
    message = refused(saved(tmp_path / "x.pth", tensors | {"net.pos_embed": torch.ones(2)}))
    assert "read as a student of improved MeanFlow" in message
    assert "u_heads.0.attn_scale: absent in the file, (48,) in the model" in message
    assert "pos_embed: (2,) in the file, absent in the model" in message
    with pytest.raises(CheckpointError, match="improved MeanFlow"):
        load("imf", checkpoint=written("dmf", tmp_path), **{**TOLD, "num_classes": None})
    with pytest.raises(ConfigError, match="patch_size must divide input_size"):
        load(written("imf", tmp_path), **{**TOLD, "input_size": 7})


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_altered_tensors_are_read_or_refused(tmp_path, data):
    tensors = state("imf")
    altered(data, tensors)
    with suppress(CheckpointError, ConfigError):
        load("imf", checkpoint=saved(tmp_path / "altered.pth", tensors), **TOLD)
