"""Files of FACM's students: forms, what they leave open, and damage."""

from contextlib import suppress

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from student_files import altered, load, saved, state, written

import flowdistill
from flowdistill import CheckpointError, Condition, ConfigError, Jumps
from flowdistill.networks import LightningDiT
from flowdistill.plumbing.dry import without_files
from flowdistill.students import FACMStudent, IMFStudent
from flowdistill.testing import check_flow_map

LABELS = torch.tensor([1, 5, 9])


def jumps(student, condition=None):
    x = torch.randn(3, *student.sample_shape, generator=torch.Generator().manual_seed(0))
    return student(x, torch.tensor([1.0, 0.8, 0.5]), torch.zeros(3), condition or Condition(LABELS))


def test_a_file_alone_and_by_name(tmp_path):
    path = written("facm", tmp_path)
    student = load(path)
    assert isinstance(student, FACMStudent)
    assert student.jumps is Jumps.TO_DATA
    assert torch.equal(jumps(student), jumps(load("facm", checkpoint=path)))
    with pytest.warns(RuntimeWarning, match=r"is a student of FACM .*: Apache-2.0 licence"):
        flowdistill.load_flow_map(path)
    (tmp_path / "imf").mkdir()
    other = load(written("imf", tmp_path / "imf"), num_classes=10, input_size=8, guidance=1.0, interval=(0.0, 1.0))
    assert isinstance(other, IMFStudent)  # which has the same suffixes


def test_a_file_that_may_be_of_a_teacher_is_not_taken_for_a_student(tmp_path):
    path = saved(tmp_path / "lightningdit-xl-imagenet256-800ep.pt", {"ema": state("facm")})
    with pytest.raises(ConfigError, match="may be of FACM's student or of a teacher"):
        load(path)
    assert load("facm", checkpoint=path).sample_shape == (16, 4, 4)


@pytest.mark.parametrize("form", ["average", "bare", "parallel", "safetensors"])
def test_forms(tmp_path, form):
    tensors = state("facm")
    if form == "safetensors":
        safetensors.torch.save_file(tensors, tmp_path / "facm.safetensors")
        path = tmp_path / "facm.safetensors"
    else:
        content = {
            "average": {"ema": tensors, "model": {k: v + 1 for k, v in tensors.items()}},
            "bare": tensors,
            "parallel": {"ema": {f"module.{k}": v for k, v in tensors.items()}},
        }[form]
        path = saved(tmp_path / "facm.pt", content)
    assert torch.equal(jumps(load("facm", checkpoint=path)), jumps(load(written("facm", tmp_path))))


def test_several_steps_go_to_data_and_back_to_noise(tmp_path):
    student = load(written("facm", tmp_path))
    samples = flowdistill.sample(student, 3, labels=[1, 5, 9], steps=2, device="cpu")
    assert not torch.equal(samples, flowdistill.sample(student, 3, labels=[1, 5, 9], device="cpu"))
    assert student.evaluations == 9


def test_guidance_by_the_null_label_is_an_argument(tmp_path):
    path = written("facm", tmp_path)
    plain, guided = load(path), load(path, guidance=1.6)
    assert not torch.allclose(jumps(plain), jumps(guided))
    torch.testing.assert_close(jumps(plain), jumps(guided, Condition(LABELS, torch.ones(3))))
    with pytest.raises(ConfigError, match="was not trained with guidance scales"):
        flowdistill.sample(plain, 2, guidance=2.0)


def test_its_latents_are_standardised_by_the_authors_file(tmp_path):
    path = written("facm", tmp_path)
    assert load(path).decoder is None
    mean, std = torch.arange(16.0).reshape(1, 16, 1, 1), torch.full((1, 16, 1, 1), 2.0)
    statistics = saved(tmp_path / "latents_stats.pt", {"mean": mean, "std": std})
    decoder = load(path, statistics=statistics).decoder
    x = torch.randn(2, 16, 4, 4)
    torch.testing.assert_close(decoder.latents(x), x * std + mean)
    with pytest.raises(ConfigError, match=r"give statistics, its authors' latents_stats\.pt"):
        load(path, vae="folder")
    for content in ({"mean": mean}, {"mean": mean, "std": 0 * std}, {"mean": mean[:, :3], "std": std[:, :3]}, 3):
        with pytest.raises(CheckpointError, match="cannot be read as the statistics of latents"):
            load(path, statistics=saved(tmp_path / "wrong.pt", content))


def test_what_it_is_not(tmp_path):
    path = written("facm", tmp_path)
    with pytest.raises(CheckpointError, match="is not facm-xl/1-256: it has 4 blocks of the width 48"):
        load("facm-xl/1-256", checkpoint=path)
    with pytest.raises(ConfigError, match="unknown student 'facm-b/1-256': did you mean"):
        load("facm-b/1-256", checkpoint="nowhere.pt")
    tensors = state("facm")
    del tensors["blocks.2.mlp.w3.bias"]
    with pytest.raises(CheckpointError, match="read as a student of FACM, is of another architecture"):
        load("facm", checkpoint=saved(tmp_path / "lacks.pt", {"ema": tensors}))


def test_a_plan_has_the_published_size():
    with without_files(), torch.device("meta"):
        student = FACMStudent("400ep-stg2.pt", "facm-xl/1-256")
    count = sum(p.numel() for name, p in student.named_parameters() if "pos_embed" not in name)
    assert count == pytest.approx(675e6, rel=0.01)


def test_it_keeps_the_contract_and_trains_further(tmp_path):
    student = load(written("facm", tmp_path))
    check_flow_map(student)
    flowdistill.export(student, tmp_path / "folder")
    again = flowdistill.load_flow_map(tmp_path / "folder")
    assert torch.equal(jumps(student), jumps(again))


@given(data=st.data())
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_tensors_are_refused_or_load(tmp_path, data):
    tensors = state("facm")
    altered(data, tensors)
    with suppress(CheckpointError, ConfigError):
        jumps(load("facm", checkpoint=saved(tmp_path / "altered.pt", {"ema": tensors})))


@given(place=st.integers(0, 2**20))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_files_are_refused(tmp_path, place):
    data = written("facm", tmp_path).read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: place % len(data)])
    with pytest.raises(CheckpointError):
        load("facm", checkpoint=tmp_path / "cut.pt")


def test_hostile_files_are_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    for content in (
        {"ema": state("facm"), "x": Hostile()},
        {"emas": {"ema_models.1.ema_model.a": Hostile()}},
        Hostile(),
    ):
        with suppress(CheckpointError):
            load("facm", checkpoint=saved(tmp_path / "hostile.pt", content))
        assert not (tmp_path / "executed").exists()


def test_the_network_turns_rows_and_columns_apart():
    """A jump depends on where a token stands beyond the table of positions."""
    torch.manual_seed(0)
    network = LightningDiT(input_size=4, in_channels=2, hidden_size=16, depth=1, num_heads=1, num_classes=3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(torch.zeros_like(parameter) if name == "pos_embed" else 0.5 * torch.randn_like(parameter))
    network.requires_grad_(False)
    x, t = torch.randn(1, 2, 4, 4), torch.tensor([0.5])
    turned = network.velocity(x.transpose(-1, -2), t, torch.tensor([1])).transpose(-1, -2)
    assert float((turned - network.velocity(x, t, torch.tensor([1]))).abs().max()) > 1e-3
