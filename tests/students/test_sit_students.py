"""Files of SiT-shaped students: the forms in which they lie on disk, what they leave open, damage, and use.

All files are made here, from the tensors of tests/golden/students, under the authors' names.
"""

import argparse
import os
from collections import OrderedDict
from contextlib import suppress

import pytest
import safetensors.torch
import torch
from golden_files import golden
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from student_files import ARGUMENTS, altered, drawn, file_of, load, saved, state, written

import flowdistill
from flowdistill import FLOW_MAPS, NULL_LABEL, CheckpointError, Condition, ConfigError
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Jumps
from flowdistill.networks import SiT
from flowdistill.students import FAMILIES, SiTStudent

FAMILY = {"dmf": "dmf", "dmf512": "dmf", "meanflow": "meanflow", "secant": "secant", "stee": "secant"}
FAMILY |= {name: name for name in ("alphaflow", "imm_ts", "imm_s", "tvm")}
NAMES = [name for name in FAMILY if not name.startswith(("imm", "tvm"))]  # which have tests of their own beside these


def refused(path, kind=CheckpointError, name=None, **kwargs):
    """The message of a file that cannot be read, which names the file; any other exception is an error of the test."""
    with pytest.raises(kind) as error:
        load(path, **kwargs) if name is None else load(name, checkpoint=path, **kwargs)
    assert str(path) in str(error.value)
    return str(error.value)


# Forms on disk.


@pytest.mark.parametrize("name", FAMILY)
def test_a_file_alone_tells_its_family(tmp_path, name):
    path = written(name, tmp_path)
    alone, named = load(path, **ARGUMENTS[name]), load(FAMILY[name], checkpoint=path, **ARGUMENTS[name])
    assert isinstance(alone, SiTStudent)
    assert torch.equal(drawn(alone), drawn(named))
    assert not alone.training
    assert not any(p.requires_grad for p in alone.parameters())
    assert {p.dtype for p in alone.parameters()} == {torch.float32}


def forms(tensors):
    """What the authors and their users save."""
    options = argparse.Namespace(num_classes=11, num_heads=4, path_type="edm", learning_rate=1e-4, output_dir="runs")
    other = {k: v + 1 for k, v in tensors.items()}
    return {
        "bare": tensors,
        "average": {"ema": tensors},
        "model": {"model": tensors},
        "both": {"model": other, "ema": tensors},
        "training": {"model": other, "ema": tensors, "opt": {"state": {0: {"step": torch.ones(3)}}}, "args": options},
        "compiled": {"ema": OrderedDict({f"_orig_mod.{k}": v for k, v in tensors.items()})},
        "parallel": {"ema": {f"module.{k}": v for k, v in tensors.items()}, "steps": 7},
        "projectors": tensors | {"projectors.0.0.weight": torch.ones(2, 2)},
    }


@pytest.mark.parametrize("form", forms({}))
@pytest.mark.parametrize("suffix", ["pt", "pth"])
def test_forms(tmp_path, form, suffix):
    expected = drawn(load(written("meanflow", tmp_path), **ARGUMENTS["meanflow"]))
    path = saved(tmp_path / f"form.{suffix}", forms(state("meanflow"))[form])
    told = {} if form == "training" else ARGUMENTS["meanflow"]  # a training's options tell what shapes leave open
    assert torch.equal(drawn(load(path, **told)), expected)


@pytest.mark.parametrize("name", ["dmf512", "secant"])
def test_safetensors(tmp_path, name):
    safetensors.torch.save_file(state(name), tmp_path / "student.safetensors")
    expected = drawn(load(written(name, tmp_path), **ARGUMENTS[name]))
    assert torch.equal(drawn(load(tmp_path / "student.safetensors", **ARGUMENTS[name])), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_single(tmp_path, dtype):
    tensors = {k: v.to(dtype) for k, v in state("secant").items()}
    student = load(saved(tmp_path / "secant.pt", tensors), **ARGUMENTS["secant"])
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    close = load(written("secant", tmp_path), **ARGUMENTS["secant"])
    assert (drawn(student) - drawn(close)).abs().max() < 0.1


class EasyDict(dict):
    """As in alpha-Flow's records, which are of a class that is not at hand."""


def test_alphaflow_with_all_that_lies_beside_it(tmp_path):
    """Its autoencoder, statistics, configuration, and records of classes that nobody has."""
    tensors = state("alphaflow")
    beside = {"autoencoder.decoder.conv_in.weight": torch.ones(4, 4, 3, 3), "autoencoder.encoder.bias": torch.ones(4)}
    content = {
        "net": {k: v + 1 for k, v in tensors.items()},
        "ema": tensors | beside | {"are_ldm_stats_inited": torch.tensor(True)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]},
        "cfg": {"model": {"network": {"num_heads": 4}, "num_classes": 10}, "training": {"path_type": "none"}},
        "vis": EasyDict(noise=torch.ones(2)),
        "stats": EasyDict(step=3),
    }
    student = load(saved(tmp_path / "alphaflow.pt", content), **ARGUMENTS["alphaflow"])
    plain = load(written("alphaflow", tmp_path), **ARGUMENTS["alphaflow"])
    assert torch.equal(drawn(student), drawn(plain))
    assert student.decoder == plain.decoder
    mean, variance = golden(file_of("alphaflow")).part("state_dict")["autoencoder_mean"], tensors["autoencoder_var"]
    raw = student.decoder.latents(torch.ones(2, *student.sample_shape))
    torch.testing.assert_close(raw.double(), (mean + variance.sqrt()).expand_as(raw), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["lacking", "of a channel", "negative", "infinite"])
def test_statistics_of_latents_that_cannot_be(tmp_path, change):
    tensors = state("alphaflow")
    variance = tensors["autoencoder_var"]
    tensors["autoencoder_var"] = {
        "lacking": None,
        "of a channel": variance.mean((2, 3), keepdim=True),
        "negative": -variance,
        "infinite": variance / 0,
    }[change]
    path = saved(tmp_path / "alphaflow.pt", {k: v for k, v in tensors.items() if v is not None})
    assert "statistics of the latents" in refused(path, **ARGUMENTS["alphaflow"])


def test_labels_without_a_null_label(tmp_path):
    """Those that were trained without guidance have a row for each of 1000 classes and no more."""
    tensors = state("alphaflow")
    table = tensors["model.y_embedder.embedding_table.weight"]
    tensors["model.y_embedder.embedding_table.weight"] = table[:1].repeat(1000, 1)
    student = load(saved(tmp_path / "alphaflow.pt", tensors), num_heads=4)
    assert student.num_classes == 1000
    assert drawn(student, Condition(torch.tensor([0, 7, 999]))).isfinite().all()
    with pytest.raises(ConfigError, match="no null label"):
        drawn(student, Condition(torch.tensor([0, NULL_LABEL, 999])))
    with pytest.raises(ConfigError, match="null label"):
        load(tmp_path / "alphaflow.pt", num_heads=4, guidance=1.5)


# What the families are.


def test_what_the_families_say(tmp_path):
    students = {name: load(written(name, tmp_path), **ARGUMENTS[name]) for name in NAMES}
    assert {name: s.conditioning for name, s in students.items()} == {
        "dmf": "decoupled",
        "dmf512": "decoupled",
        "meanflow": "two_time",
        "secant": "end_time",
        "stee": "end_time",
        "alphaflow": "two_time",
    }
    assert {s.jumps for s in students.values()} == {Jumps.ANY}
    assert students["dmf"].decoder.scale == 0.18215
    assert students["meanflow"].decoder.scale == 0.18125
    assert students["dmf"].decoder.rounding == "down"
    assert students["secant"].decoder.rounding == "nearest"
    assert {name: s.guidance for name, s in students.items() if s.guidance} == {"secant": 1.0, "stee": 1.0}
    assert students["secant"].guidance_range == (1.0, 2.5)
    assert students["secant"].guidance_embedding is not None
    assert students["stee"].guidance_input == "null_label"


def test_the_grid_of_decoupled_meanflow_at_512_pixels(tmp_path):
    """Only the published shape is shifted: 512 pixels are latents of 64."""
    tensors = state("dmf512")
    tensors["pos_embed"] = flowdistill.networks.embeddings.position_table(32, 48)
    student = load(saved(tmp_path / "dmf.pt", tensors), **ARGUMENTS["dmf512"])
    assert student.sample_shape == (4, 64, 64)
    torch.testing.assert_close(student.grid(2), torch.tensor([1.0, 0.6, 0.0]))
    small = load(written("dmf512", tmp_path), **ARGUMENTS["dmf512"])
    torch.testing.assert_close(small.grid(2), torch.tensor([1.0, 0.5, 0.0]))


def test_a_range_of_scales_of_ones_own(tmp_path):
    path, labels = written("secant", tmp_path), torch.tensor([1, 5, 9])
    wide = load(path, **ARGUMENTS["secant"], guidance_range=(0.5, 4.5))
    narrow = load(path, **ARGUMENTS["secant"])
    same = [(wide, 2.5), (narrow, 1.75)]  # both in the middle
    first, second = (drawn(s, Condition(labels, torch.full((3,), scale))) for s, scale in same)
    torch.testing.assert_close(first, second)
    assert not torch.allclose(first, drawn(narrow, Condition(labels, torch.full((3,), 2.5))))
    with pytest.raises(ConfigError, match="low < high"):
        load(path, **ARGUMENTS["secant"], guidance_range=(2.0, 1.0))


def test_guidance_by_the_null_label(tmp_path):
    path = written("meanflow", tmp_path)
    plain, guided = load(path, **ARGUMENTS["meanflow"]), load(path, **ARGUMENTS["meanflow"], guidance=1.5)
    labels = torch.tensor([1, 5, 9])
    null = drawn(plain, Condition(torch.full((3,), NULL_LABEL)))
    assert plain.evaluations == 3
    torch.testing.assert_close(drawn(guided), null + 1.5 * (drawn(plain) - null))
    assert guided.evaluations == 6
    condition = Condition(labels).guided(interval=(0.6, 1.0))  # t = 1 and 0.8, and not 0.5
    torch.testing.assert_close(drawn(guided, condition)[2], drawn(plain)[2])
    torch.testing.assert_close(drawn(guided, condition)[:2], drawn(guided)[:2])
    with pytest.raises(ConfigError, match="not trained with guidance scales"):
        flowdistill.sample(plain, 2, guidance=1.5)


@pytest.mark.parametrize("name", FAMILY)
def test_the_licence_is_said(tmp_path, name):
    path = written(name, tmp_path)
    with pytest.warns(RuntimeWarning, match=f"{path.name} is a student of .*: .*licence"):
        flowdistill.load_flow_map(path, **ARGUMENTS[name])


def test_every_family_says_its_licence_and_where_it_is_from():
    assert all("licence" in f.licence and "github.com/" in f.title and f.sizes for f in FAMILIES.values())
    assert {"dmf-xl/2-256", "dmf-xl/2-512", "meanflow-l/2-256", "secant-xl/2-256"} <= set(FLOW_MAPS.all_names())


# FreeFlow, whose names are not known.

FREEFLOW = {"num_heads": 2, "num_classes": 5}


def freeflow():
    """A student as our own training makes it: anchored, and told the guidance scale."""
    torch.manual_seed(0)
    network = SiT(8, 2, hidden_size=16, depth=2, num_heads=2, num_classes=5, learn_sigma=True)
    student = NetworkFlowMap(network, "anchored", 1.5)
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter is not network.pos_embed:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return student.eval()


def under_names(student, duration, guidance):
    names = {"network": "", "duration_embedding": duration, "guidance_embedding": guidance}
    tensors = {}
    for name, value in student.state_dict().items():
        module, _, rest = name.partition(".")
        tensors[f"{names[module]}.{rest}".removeprefix(".")] = value
    return tensors


def test_freeflow(tmp_path):
    own = freeflow()
    path = saved(tmp_path / "freeflow.pt", under_names(own, "duration_embedder", "guidance_embedder"))
    student = load(path, **FREEFLOW)
    assert student.jumps is Jumps.FROM_NOISE
    z, one, labels = torch.randn(3, 4, 8, 8), torch.ones(3), torch.tensor([0, 3, 4])
    for scale in (None, torch.tensor([1.0, 1.5, 2.0])):
        condition = Condition(labels, scale)
        assert torch.equal(student(z, one, 0 * one, condition), own(z, one, 0 * one, condition))


def test_freeflow_under_other_names(tmp_path):
    """The message lists them, and says how to name them."""
    path = saved(tmp_path / "freeflow.pt", under_names(freeflow(), "dt_embedder", "model.w_embedder"))
    message = refused(path, name="freeflow", **FREEFLOW)
    assert "it lacks duration_embedder, guidance_embedder, and has dt_embedder, model that is not known" in message
    assert "names={'THEIRS': 'OURS', ...}" in message
    names = {"dt_embedder": "duration_embedder", "model.w_embedder": "guidance_embedder"}
    student = load("freeflow", checkpoint=path, names=names, **FREEFLOW)
    z, one, condition = torch.randn(3, 4, 8, 8), torch.ones(3), Condition(torch.tensor([0, 3, 4]))
    assert torch.equal(student(z, one, 0 * one, condition), freeflow()(z, one, 0 * one, condition))
    turned = load("freeflow", checkpoint=path, names=names, noise_time=1, **FREEFLOW)
    assert not torch.allclose(turned(z, one, 0 * one, condition), student(z, one, 0 * one, condition))


# What a file leaves open, and what it is not.


@pytest.mark.parametrize(
    ("name", "left_out", "said"),
    [
        ("dmf", "num_heads", "is 48 wide, which no published SiT is: give num_heads"),
        ("dmf", "early_blocks", "has 5 blocks: give early_blocks"),
        ("meanflow", "num_classes", "12 labels, which may be 12 classes (num_classes=12), or 11 and a null label"),
    ],
)
def test_what_is_left_open(tmp_path, name, left_out, said):
    told = {k: v for k, v in ARGUMENTS[name].items() if k != left_out}
    assert said in refused(written(name, tmp_path), ConfigError, **told)


def test_heads_are_told_by_the_norms_of_queries_and_keys(tmp_path):
    assert load(written("dmf512", tmp_path), early_blocks=3).network.arguments["num_heads"] == 3


def test_a_sit_without_a_second_time_is_no_student_by_itself(tmp_path):
    tensors = {k: v for k, v in state("dmf").items() if not k.startswith("logvar_linear.")}
    path = saved(tmp_path / "sit.pt", tensors)
    message = refused(path, ConfigError, **ARGUMENTS["dmf"])
    assert "say which, as in load_flow_map('dmf', checkpoint=...)" in message
    plain = load("dmf", checkpoint=path, **ARGUMENTS["dmf"])
    assert torch.equal(drawn(plain), drawn(load(written("dmf", tmp_path), **ARGUMENTS["dmf"])))
    teacher = flowdistill.load_teacher(path, num_heads=4, noise_time=1)
    x, t, labels = torch.randn(3, 4, 8, 8), torch.rand(3), Condition(torch.tensor([1, 5, 9]))
    torch.testing.assert_close(teacher.velocity(x, t, labels), plain.velocity(x, t, labels))


def test_a_teacher_with_norms_by_root_mean_square(tmp_path):
    """As Decoupled MeanFlow's at 512 pixels."""
    tensors = {k: v for k, v in state("dmf512").items() if not k.startswith("logvar_linear.")}
    path = saved(tmp_path / "sit.pt", tensors | {"projectors.0.0.weight": torch.ones(2, 2)})
    teacher = flowdistill.load_teacher(path)
    student = load(written("dmf512", tmp_path), early_blocks=3)
    x, t, labels = torch.randn(3, 4, 12, 12), torch.rand(3), Condition(torch.tensor([1, 5, 9]))
    torch.testing.assert_close(teacher.velocity(x, t, labels), student.velocity(x, t, labels))
    flowdistill.testing.check_teacher(teacher)


@pytest.mark.parametrize("theirs", ["meanflow", "secant", "alphaflow", "dmf"])
@pytest.mark.parametrize("named", FAMILIES)
def test_a_family_that_it_is_not(tmp_path, theirs, named):
    path = written(theirs, tmp_path)
    if named != theirs:
        assert "is no student of" in refused(path, name=named, **{**ARGUMENTS[theirs], "early_blocks": 3})


def test_an_architecture_that_it_is_not(tmp_path):
    message = refused(written("dmf", tmp_path), name="dmf-xl/2-256", **ARGUMENTS["dmf"])
    assert "is not dmf-xl/2-256: it has " in message
    assert "hidden_size 48 in place of 1152" in message
    assert "depth 5 in place of 28" in message
    with pytest.raises(ConfigError, match=r"unknown student 'dmf-xl-2-256': did you mean .*dmf-xl/2-256"):
        load("dmf-xl-2-256", checkpoint=tmp_path / "dmf.pt")
    with pytest.raises(ConfigError, match=r"unknown variant 'dmf-xl/2-128': did you mean .*dmf-xl/2-256"):
        SiTStudent(tmp_path / "dmf.pt", variant="dmf-xl/2-128")
    with pytest.raises(ConfigError, match="checkpoint"):
        load("dmf-xl/2-256")
    with pytest.raises(CheckpointError, match="neither a run directory nor a checkpoint"):
        load("dmf-xl-2-256")


def test_other_tensors_are_named(tmp_path):
    tensors = state("meanflow")
    del tensors["r_embedder.mlp.2.bias"]
    tensors["blocks.0.attn.scale"] = torch.ones(3)
    message = refused(saved(tmp_path / "x.pt", tensors), **ARGUMENTS["meanflow"])
    assert "read as a student of MeanFlow" in message
    assert "duration_embedding.mlp.2.bias: absent in the file, (48,) in the model" in message
    assert "network.blocks.0.attn.scale: (3,) in the file, absent in the model" in message
    del tensors["final_layer.linear.weight"], tensors["pos_embed"], tensors["blocks.0.attn.scale"]
    refused(saved(tmp_path / "x.pt", tensors), **ARGUMENTS["meanflow"])
    refused(saved(tmp_path / "x.pt", {"r_embedder.mlp.0.weight": torch.ones(2)}), name="meanflow")
    assert "suffix of a known checkpoint" in refused(saved(tmp_path / "x.bin", tensors), ConfigError)


# Damaged and hostile files.


class Hostile:
    """Is pickled as a call of os.system."""

    def __reduce__(self):
        return os.system, ('touch "$CANARY"',)


@pytest.mark.parametrize("place", ["value", "args", "whole", "key"])
@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("named", [None, "meanflow"])
def test_a_file_that_would_run_a_command(tmp_path, place, new_format, named):
    tensors = state("meanflow")
    content = {
        "value": tensors | {"pos_embed": Hostile()},
        "args": {"ema": tensors, "args": Hostile()},
        "whole": Hostile(),
        "key": {"ema": tensors, Hostile(): 3},
    }[place]
    torch.save(content, tmp_path / "hostile.pt", _use_new_zipfile_serialization=new_format)
    assert "system" in refused(tmp_path / "hostile.pt", name=named, **ARGUMENTS["meanflow"])


@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_at_many_points(tmp_path, new_format):
    path = tmp_path / "cut.pt"
    torch.save(state("meanflow"), path, _use_new_zipfile_serialization=new_format)
    data = path.read_bytes()
    for part in (0, 1, 3, 100, 1000, len(data) // 3, len(data) // 2, len(data) - 1000, len(data) - 40, len(data) - 1):
        path.write_bytes(data[:part])
        refused(path, **ARGUMENTS["meanflow"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_altered_tensors_are_read_or_refused(tmp_path, data):
    """Of other shapes, kinds and names, or lacking."""
    tensors = state("secant")
    altered(data, tensors)
    with suppress(CheckpointError, ConfigError):
        load(saved(tmp_path / "altered.pt", tensors), **ARGUMENTS["secant"])
