"""SiT files of other people: wrappers' names, options that contradict what is assumed, relatives, and what is beside.

All files are made here, with the names and the shapes of the authors' files.
"""

import argparse
import datetime
import itertools
import json
import pathlib
import types

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import flowdistill
from flowdistill import NULL_LABEL, CheckpointError, Condition, ConfigError, load_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.networks.embeddings import position_table
from flowdistill.networks.sit import SiT
from flowdistill.runs.pretrained import load_model, save_model

SIZES = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 8, "depth": 2, "num_heads": 2}
X = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.1, 0.5, 1.0])
LABELS = torch.tensor([0, 3, 4])


def network(seed=0, **changes):
    """A SiT whose output depends on everything."""
    torch.manual_seed(seed)
    built = SiT(**{**SIZES, "num_classes": 5, **changes})
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter is not built.pos_embed:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return built.eval()


def saved(path, content):
    torch.save(content, path)
    return path


def load(path, **kwargs):
    return load_teacher(path, **{"num_heads": 2, "num_classes": 5, **kwargs})


def same(teacher, net, labels=LABELS):
    return torch.equal(teacher.velocity(X, T, Condition(labels)), net.velocity(X, T, labels))


def refused(path, kind=CheckpointError, **kwargs):
    with pytest.raises(kind) as error:
        load(path, **kwargs)
    assert str(path) in str(error.value)
    return str(error.value)


# Wrappers.

PREFIXES = ["module.", "_orig_mod.", "ema_model.", "model.", "_forward_module.", "net.module._orig_mod."]


def renamed(net, prefix):
    return {prefix + name: v for name, v in net.state_dict().items()}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_wrappers_prefixes_are_taken_away(tmp_path, prefix, suffix):
    net, path = network(), tmp_path / f"sit.{suffix}"
    if suffix == "pt":
        torch.save(renamed(net, prefix), path)
    else:
        safetensors.torch.save_file(renamed(net, prefix), path)
    assert same(load(path), net)


@settings(max_examples=30, deadline=None)
@given(st.permutations(PREFIXES), st.integers(1, 4))
def test_wrappers_in_wrappers(tmp_path_factory, order, count):
    net, path = network(), tmp_path_factory.mktemp("nested") / "sit.pt"
    assert same(load(saved(path, renamed(net, "".join(order[:count])))), net)


def test_real_wrappers(tmp_path):
    """Of torch, around the network and around its blocks; their counters are left out."""
    net = network()
    wrapped = torch.optim.swa_utils.AveragedModel(torch.compile(net))
    assert {"n_averaged", "module._orig_mod.pos_embed"} <= wrapped.state_dict().keys()
    assert same(load(saved(tmp_path / "averaged.pt", wrapped.state_dict())), net)
    inner = network()
    for number in range(2):
        inner.blocks[number] = torch.compile(inner.blocks[number])
    inner.final_layer = nn.ModuleDict({"module": inner.final_layer})
    names = inner.state_dict().keys()
    assert {"blocks.0._orig_mod.attn.qkv.weight", "final_layer.module.linear.weight"} <= names
    assert same(load(saved(tmp_path / "inner.pt", inner.state_dict())), net)


CONTAINERS = ["ema", "model", "state_dict", "module", "ema_model"]


@pytest.mark.parametrize("outer", CONTAINERS)
@pytest.mark.parametrize("inner", CONTAINERS)
def test_containers_in_containers(tmp_path, outer, inner):
    net = network()
    content = {outer: {inner: renamed(net, "module."), "epoch": 3}, "epoch": 3, "optimizer": {"lr": 1.0}}
    assert same(load(saved(tmp_path / "sit.pt", content)), net)


def test_containers_in_a_circle(tmp_path):
    content = {}
    content["model"] = content
    assert "no state dictionary" in refused(saved(tmp_path / "sit.pt", content))


def test_of_several_networks_the_average_is_taken(tmp_path):
    raw, average = network(0), network(1)
    content = renamed(raw, "model.") | renamed(average, "ema_model.") | {"step": torch.tensor(3)}
    assert same(load(saved(tmp_path / "sit.pt", {"state_dict": content})), average)
    content = renamed(raw, "student.") | renamed(average, "teacher.")
    message = refused(saved(tmp_path / "two.pt", content))
    assert "several such networks, under student. and teacher." in message


def test_what_lies_beside_a_wrapped_network_is_left_out(tmp_path):
    net = network()
    content = renamed(net, "model.") | {"encoder.weight": torch.zeros(3), "model_step": torch.tensor(3)}
    assert same(load(saved(tmp_path / "sit.pt", content)), net)


def test_prefixes_are_named_where_the_rest_does_not_fit(tmp_path):
    tensors = renamed(network(), "module._orig_mod.")
    del tensors["module._orig_mod.t_embedder.mlp.0.bias"]
    tensors["module._orig_mod.blocks.0.attn.scale"] = torch.zeros(7)
    message = refused(saved(tmp_path / "sit.pt", tensors))
    assert "read without module._orig_mod. in its names" in message
    assert "t_embedder.mlp.0.bias: absent in the file, (8,) in the model" in message
    assert "blocks.0.attn.scale: (7,) in the file, absent in the model" in message


def test_names_that_become_the_same(tmp_path):
    tensors = renamed(network(), "module.") | {"module.blocks.0.module.attn.qkv.bias": torch.zeros(24)}
    assert "have the same name" in refused(saved(tmp_path / "sit.pt", tensors))


@pytest.mark.parametrize("prefix", PREFIXES)
def test_wrapped_weights_in_a_model_folder(tmp_path, prefix):
    teacher = load(saved(tmp_path / "sit.pt", network().state_dict()))
    path = save_model(teacher, tmp_path / "model") / "model.safetensors"
    safetensors.torch.save_file(renamed(teacher.network, prefix), path)
    assert same(load_model(tmp_path / "model"), teacher.network)
    tensors = renamed(teacher.network, prefix)
    del tensors[f"{prefix}pos_embed"]
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"read without {prefix} in its names") as error:
        load_model(tmp_path / "model")
    assert "pos_embed: absent in the file" in str(error.value)


# Labels.


def test_a_table_without_a_null_label(tmp_path):
    """class_dropout_prob = 0: a row for each class, and no more."""
    net = network(null_label=False)
    assert len(net.state_dict()["y_embedder.embedding_table.weight"]) == 5
    for said in ({"num_classes": 5}, {"class_dropout_prob": 0.0}, {"num_classes": 5, "class_dropout_prob": 0}):
        content = {"ema": net.state_dict(), "args": argparse.Namespace(**said)}
        teacher = load_teacher(saved(tmp_path / "sit.pt", content), num_heads=2)
        assert teacher.num_classes == 5
        assert not teacher.null_label
        assert same(teacher, net)
    flowdistill.testing.check_teacher(teacher)
    with pytest.raises(ConfigError, match="its null label means nothing"):
        GuidedTeacher(teacher, scale=1.5)
    assert GuidedTeacher(teacher, scale=1.5, guide=teacher).num_classes == 5
    for labels in (None, torch.tensor([0, NULL_LABEL, 1]), torch.tensor([0, 5, 1])):
        with pytest.raises(ConfigError, match="no null label"):
            teacher.velocity(X, T, Condition(labels))
    again = load_model(save_model(teacher, tmp_path / "model"))
    assert not again.null_label
    assert same(again, net)


def test_a_table_with_a_null_label(tmp_path):
    net = network()
    for said in ({"num_classes": 5}, {"class_dropout_prob": 0.1}, {"num_classes": 5, "cfg_prob": 0.1}):
        content = {"ema": net.state_dict(), "args": argparse.Namespace(**said)}
        teacher = load_teacher(saved(tmp_path / "sit.pt", content), num_heads=2)
        assert (teacher.num_classes, teacher.null_label) == (5, True)
        assert same(teacher, net, torch.tensor([0, NULL_LABEL, 4]))


def test_a_table_with_two_readings(tmp_path):
    path = saved(tmp_path / "sit.pt", network().state_dict())
    message = refused(path, ConfigError, num_classes=None)
    assert "6 labels, which may be 6 classes (num_classes=6), or 5 and a null label (num_classes=5)" in message
    assert (load(path, num_classes=5).num_classes, load(path, num_classes=5).null_label) == (5, True)
    assert (load(path, num_classes=6).num_classes, load(path, num_classes=6).null_label) == (6, False)
    for wrong in (4, 7, 0, 1000):
        assert "num_classes must be 6 or 5" in refused(path, ConfigError, num_classes=wrong)


def test_tables_with_one_reading(tmp_path):
    published = load(saved(tmp_path / "sit.pt", network(num_classes=1000).state_dict()), num_classes=None)
    assert (published.num_classes, published.null_label) == (1000, True)
    one = load(saved(tmp_path / "one.pt", network(num_classes=1, null_label=False).state_dict()), num_classes=None)
    assert (one.num_classes, one.null_label) == (1, False)


@pytest.mark.parametrize(
    "said", [{"num_classes": 7}, {"num_classes": 6, "class_dropout_prob": 0.1}, {"num_classes": 4}]
)
def test_a_table_that_contradicts_the_options(tmp_path, said):
    path = saved(tmp_path / "sit.pt", {"ema": network().state_dict(), "args": argparse.Namespace(**said)})
    assert "contradicts itself" in refused(path, num_classes=None)
    assert load(path, num_classes=5).num_classes == 5


# Options.

LINEAR = {"path_type": "Linear", "prediction": "velocity"}


class DictConfig:
    """As omegaconf keeps options: in nodes."""

    def __init__(self, **values):
        self._content = {k: DictConfig.node(v) for k, v in values.items()}

    @staticmethod
    def node(value):
        made = types.SimpleNamespace()
        made._val, made._parent = value, None
        return made


KEPT = {
    "namespace": lambda said: {"args": argparse.Namespace(**said)},
    "dictionary": lambda said: {"args": said},
    "a simple namespace": lambda said: {"config": types.SimpleNamespace(**said)},
    "lightning": lambda said: {"hyper_parameters": {"model": said}},
    "a section": lambda said: {"args": {"transport": said, "lr": 1e-4}},
    "omegaconf": lambda said: {"cfg": DictConfig(**said)},
    "other spelling": lambda said: {"args": {name.replace("_", "-"): v for name, v in said.items()}},
}


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"path_type": "GVP"}, "path_type 'GVP'"),
        ({"path_type": "VP"}, "path_type 'VP'"),
        ({"path_type": "cosine"}, "path_type 'cosine'"),
        ({"prediction": "noise"}, "prediction 'noise'"),
        ({"prediction": "score"}, "prediction 'score'"),
        ({"prediction": ["noise"]}, "prediction 'a list'"),
    ],
)
def test_networks_of_other_paths_and_predictions_are_not_taken_for_velocities(tmp_path, kept, change, named):
    net, path = network(), tmp_path / "sit.pt"
    assert same(load(saved(path, {"ema": net.state_dict(), **KEPT[kept](LINEAR)})), net)
    message = refused(saved(path, {"ema": net.state_dict(), **KEPT[kept](LINEAR | change)}))
    assert named in message
    assert "Your own network" in message


def test_options_in_the_metadata_of_safetensors(tmp_path):
    net, path = network(), tmp_path / "sit.safetensors"
    for metadata in ({"num_classes": "5", "prediction": "velocity"}, {"config": json.dumps({"num_classes": 5})}):
        safetensors.torch.save_file(net.state_dict(), path, metadata)
        assert same(load(path, num_classes=None), net)
    for metadata in ({"path_type": "GVP"}, {"args": json.dumps({"path_type": "GVP"})}):
        safetensors.torch.save_file(net.state_dict(), path, metadata)
        assert "path_type 'GVP'" in refused(path)


def test_options_beside_a_bare_state_dictionary(tmp_path):
    path = saved(tmp_path / "sit.pt", network().state_dict() | {"args": argparse.Namespace(path_type="GVP")})
    assert "path_type 'GVP'" in refused(path)


@pytest.mark.parametrize("said", [{"learn_sigma": False}, {"qk_norm": True}, {"use_rope": True}])
def test_options_of_what_no_tensor_shows(tmp_path, said):
    path = saved(tmp_path / "sit.pt", {"ema": network().state_dict(), "args": argparse.Namespace(**said)})
    assert f"was trained with {next(iter(said))}" in refused(path)


def test_the_heads_are_those_of_the_options_or_of_the_norms(tmp_path):
    net = network(num_heads=4)
    path = saved(tmp_path / "sit.pt", {"ema": net.state_dict(), "args": argparse.Namespace(num_heads=4)})
    assert same(load_teacher(path, num_classes=5), net)
    normed = network(num_heads=4, qk_norm=True)
    assert same(load_teacher(saved(tmp_path / "normed.pt", normed.state_dict()), num_classes=5), normed)


def test_options_of_repa_tell_the_time_of_its_noise(tmp_path):
    net = network(noise_time=1, learn_sigma=False)
    args = argparse.Namespace(encoder_depth=8, path_type="linear", prediction="v", cfg_prob=0.1, num_classes=5)
    teacher = load_teacher(saved(tmp_path / "sit.pt", {"ema": net.state_dict(), "args": args}), num_heads=2)
    assert same(teacher, net)


# Beside the weights.


def test_harmless_things_beside_the_weights(tmp_path):
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    beside = {
        "best": np.float64(3.5),
        "step": np.int64(7),
        "when": datetime.datetime(2024, 1, 2),
        "where": pathlib.Path("x"),
        "args": argparse.Namespace(lr=np.float32(1e-4), num_classes=np.int64(5), path=pathlib.Path("y")),
        "opt": optimizer.state_dict(),
        "cfg": DictConfig(a=1),
        "random": np.random.get_state(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3).state_dict(),
        "module": nn.Linear(2, 2),
    }
    assert same(load(saved(tmp_path / "training.pt", {"ema": net.state_dict(), **beside})), net)
    assert same(load(saved(tmp_path / "flat.pt", net.state_dict() | beside | {"model": {"name": "SiT"}})), net)


@pytest.mark.parametrize("grid", [(2, 8), (8, 2)])
def test_positions_of_a_rectangle_of_as_many_patches_as_a_square(tmp_path, grid):
    net = network(input_size=8)
    path = saved(tmp_path / "square.pt", net.state_dict())
    assert load(path).sample_shape == (2, 8, 8)
    rows, columns = grid
    line = position_table(8, 8)[0]  # of 8 x 8: columns in the first half, rows in the second
    table = torch.stack([torch.cat([line[c, :4], line[8 * r, 4:]]) for r in range(rows) for c in range(columns)])
    message = refused(saved(tmp_path / "sit.pt", net.state_dict() | {"pos_embed": table[None]}))
    assert f"not square: 16 patches in rows of {columns}" in message
    learned = torch.randn(1, 16, 8)
    assert load(saved(tmp_path / "learned.pt", net.state_dict() | {"pos_embed": learned})).sample_shape == (2, 8, 8)


def test_a_module_is_not_a_state_dictionary(tmp_path):
    assert "no state dictionary, as network.state_dict() gives it, but model" in refused(
        saved(tmp_path / "module.pt", {"model": network()})
    )
    assert "but flowdistill.networks.sit.SiT" in refused(saved(tmp_path / "module.pt", network()))


# Relatives.


def relatives():
    net = network()
    tensors = net.state_dict()

    def changed(drop, **extra):
        kept = {name: v for name, v in tensors.items() if drop not in name}
        return kept | {f"blocks.{i}.{name}": v for i, (name, v) in itertools.product(range(2), extra.items())}

    yield (
        "qk-norm by root mean square",
        changed("nothing", **{"attn.q_norm.weight": torch.ones(4), "attn.k_norm.weight": torch.ones(4)}),
        ["blocks.0.attn.k_norm.bias: absent in the file, (4,) in the model"],
    )
    yield (
        "qk-norm by another name",
        changed("nothing", **{"attn.q_norm.gain": torch.ones(4)}),
        ["blocks.0.attn.q_norm.gain: (4,) in the file, absent in the model"],
    )
    yield (
        "qk-norm of queries alone",
        changed("nothing", **{"attn.q_norm.scale": torch.ones(4)}),
        ["blocks.0.attn.k_norm.scale: absent in the file, (4,) in the model"],
    )
    yield (
        "SwiGLU",
        changed(".mlp.fc", **{"mlp.w12.weight": torch.ones(42, 8), "mlp.w3.weight": torch.ones(8, 21)}),
        [
            "blocks.0.mlp.fc1.bias: absent in the file, (32,) in the model",
            "blocks.0.mlp.w12.weight: (42, 8) in the file, absent in the model",
        ],
    )
    yield (
        "no labels",
        changed("y_embedder"),
        ["y_embedder.embedding_table.weight: absent in the file, (1001, 8) in the model"],
    )
    yield (
        "rectangular",
        tensors | {"pos_embed": torch.zeros(1, 6, 8)},
        ["pos_embed: (1, 6, 8) in the file, (1, 4, 8) in the model"],
    )
    yield "no table of positions", changed("pos_embed"), ["pos_embed: absent in the file, (1, 256, 8) in the model"]
    yield (
        "other patches",
        changed("x_embedder") | {"x_embedder.weight": torch.zeros(8, 8)},
        [
            "x_embedder.proj.bias: absent in the file, (8,) in the model",
            "x_embedder.weight: (8, 8) in the file, absent in the model",
        ],
    )
    yield (
        "tables of positions in two other networks",
        {"encoder.pos_embed": torch.zeros(3), "decoder.pos_embed": torch.zeros(3)},
        ["decoder.pos_embed: (3,) in the file, absent in the model"],
    )
    yield (
        "another network",
        nn.Linear(3, 4).state_dict(),
        ["final_layer.adaLN_modulation.1.bias: absent in the file", "weight: (4, 3) in the file, absent in the model"],
    )


@pytest.mark.parametrize(("kind", "tensors", "named"), [pytest.param(*item, id=item[0]) for item in relatives()])
@pytest.mark.parametrize("told", [{}, {"num_heads": None, "num_classes": None}])
def test_relatives_are_told_apart_by_their_tensors(tmp_path, kind, tensors, named, told):
    message = refused(saved(tmp_path / "sit.pt", tensors), **told)
    for line in named:
        assert line in message
