"""Checkpoints of SiT and REPA in every form in which they are published; damaged and hostile ones end in one message.

All files are made here, with the names and the shapes of the authors' files.
"""

import argparse
import copy
import functools
import io
import math
import os
import pickle
import warnings
import zipfile
from contextlib import suppress

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import flowdistill
from flowdistill import NULL_LABEL, CheckpointError, Condition, ConfigError, load_teacher
from flowdistill.decoders import StableDiffusionVae
from flowdistill.networks.sit import SIZES, SiT
from flowdistill.teachers.sit import VARIANTS, SiTTeacher

TINY = {
    "input_size": 6,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 16,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2.5,
    "num_classes": 5,
}
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
T = torch.tensor([0.1, 0.4, 0.75, 1.0])
LABELS = torch.tensor([0, 3, NULL_LABEL, 4])


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """No code of any file that a test reads has run: it would have left a file."""
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    yield path
    assert not path.exists()


def network(seed=0, **changes):
    """A SiT whose output depends on everything."""
    torch.manual_seed(seed)
    built = SiT(**{**TINY, **changes})
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter is not built.pos_embed:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return built.eval()


def projectors(hidden=16, encoder=10, width=12):
    """REPA's projector, under its names."""
    layers = nn.Sequential(
        nn.Linear(hidden, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, encoder)
    )
    return {f"projectors.0.{name}": v for name, v in layers.state_dict().items()}


def options(**values):
    """The options in training checkpoints."""
    return argparse.Namespace(model="SiT-XL/2", results_dir="results", image_size=256, lr=1e-4, ckpt=None, **values)


def velocity(teacher):
    return teacher.velocity(X, T, Condition(LABELS))


def sit_velocity(net):
    """-v(x, 1 - t) of the authors, whose null label is the number of classes."""
    return -net(X, 1 - T, LABELS.masked_fill(LABELS == NULL_LABEL, 5))


def repa_velocity(net):
    return net(X, T, LABELS.masked_fill(LABELS == NULL_LABEL, 5))


def load(path, **kwargs):
    return load_teacher(path, **{"num_heads": 2, "num_classes": 5, **kwargs})


# Every form.


def test_a_bare_state_dictionary(tmp_path):
    net = network()
    torch.save(net.state_dict(), tmp_path / "sit.pt")
    teacher = load(tmp_path / "sit.pt")
    assert torch.equal(velocity(teacher), sit_velocity(net))
    by_name = load_teacher("sit_teacher", checkpoint=tmp_path / "sit.pt", num_heads=2, num_classes=5)
    assert torch.equal(velocity(by_name), velocity(teacher))
    assert isinstance(teacher, SiTTeacher)
    assert teacher.sample_shape == (3, 6, 6)
    assert teacher.num_classes == 5
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    flowdistill.testing.check_teacher(teacher)


@pytest.mark.parametrize("extra", [{}, {"steps": 100}])
def test_of_a_training_checkpoint_the_average_is_taken(tmp_path, extra):
    raw, average = network(seed=0), network(seed=1)
    optimizer = torch.optim.AdamW(raw.parameters())
    raw(X, T, LABELS.clamp_min(0)).square().mean().backward()
    optimizer.step()
    content = {"model": raw.state_dict(), "ema": average.state_dict(), "opt": optimizer.state_dict(), "args": options()}
    torch.save(content | extra, tmp_path / "0400000.pt")
    assert torch.equal(velocity(load(tmp_path / "0400000.pt")), sit_velocity(average))
    del content["ema"]
    torch.save(content, tmp_path / "raw.pt")
    assert torch.equal(velocity(load(tmp_path / "raw.pt")), sit_velocity(raw))
    assert not torch.allclose(sit_velocity(raw), sit_velocity(average))


def test_a_state_dictionary_of_repa(tmp_path):
    """Its projectors tell what it is: the time and the sign are this library's; they themselves are dropped."""
    net = network(learn_sigma=False)
    torch.save(net.state_dict() | projectors(), tmp_path / "last.pt")
    teacher = load(tmp_path / "last.pt")
    assert torch.equal(velocity(teacher), repa_velocity(net))
    assert teacher.network.noise_time == 1
    assert teacher.state_dict().keys() == {f"network.{name}" for name in net.state_dict()}


def test_a_training_checkpoint_of_repa(tmp_path):
    raw, average = network(seed=0, learn_sigma=False), network(seed=1, learn_sigma=False)
    content = {
        "model": raw.state_dict() | projectors(),
        "ema": average.state_dict() | projectors(),
        "opt": {},
        "args": options(encoder_depth=8, qk_norm=False),
        "steps": 400000,
    }
    torch.save(content, tmp_path / "0400000.pt")
    assert torch.equal(velocity(load(tmp_path / "0400000.pt")), repa_velocity(average))


@pytest.mark.parametrize("encoder_depth", [1, 2])
def test_the_names_that_repa_once_gave_its_later_blocks(tmp_path, encoder_depth):
    """decoder_blocks are counted from 0 after the blocks of the encoder."""
    net = network(learn_sigma=False)
    tensors = {}
    for name, v in net.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind == "blocks":
            number, _, rest = rest.partition(".")
            later = int(number) - encoder_depth
            name = f"blocks.{number}.{rest}" if later < 0 else f"decoder_blocks.{later}.{rest}"
        tensors[name] = v
    torch.save(tensors | projectors(), tmp_path / "legacy.pt")
    teacher = load(tmp_path / "legacy.pt")
    assert teacher.network.arguments["depth"] == 3
    assert torch.equal(velocity(teacher), repa_velocity(net))


def test_normalised_queries_and_keys(tmp_path):
    net = network(learn_sigma=False, qk_norm=True)
    torch.save(net.state_dict() | projectors(), tmp_path / "last.pt")
    teacher = load(tmp_path / "last.pt")
    assert torch.equal(velocity(teacher), repa_velocity(net))
    assert teacher.network.arguments["qk_norm"] is True


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_become_float32(tmp_path, dtype):
    net = network().to(dtype)
    torch.save(net.state_dict(), tmp_path / "other.pt")
    teacher = load(tmp_path / "other.pt")
    assert {v.dtype for v in teacher.state_dict().values()} == {torch.float32}
    assert torch.equal(velocity(teacher), sit_velocity(net.float()))


def test_safetensors(tmp_path):
    net = network()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "sit.safetensors")
    assert torch.equal(velocity(load(tmp_path / "sit.safetensors")), sit_velocity(net))


def test_the_format_of_old_versions_of_torch(tmp_path):
    net = network()
    torch.save(net.state_dict(), tmp_path / "sit.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(velocity(load(tmp_path / "sit.pth")), sit_velocity(net))


# What the file tells, and what it does not.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_size": 12, "patch_size": 4, "in_channels": 1, "depth": 1, "num_classes": 1},
        {"hidden_size": 32, "num_heads": 4, "mlp_ratio": 4.0, "learn_sigma": False, "noise_time": 1},
        {"hidden_size": 28, "num_heads": 7, "mlp_ratio": 61.5 / 28},  # 28 * (61 / 28) is less than 61
        {"in_channels": 2, "patch_size": 1, "input_size": 3, "qk_norm": True},
    ],
)
def test_the_architecture_is_read_from_the_shapes(tmp_path, changes):
    net = network(**changes)
    extra = {} if net.learn_sigma else projectors(net.arguments["hidden_size"])
    torch.save(net.state_dict() | extra, tmp_path / "sit.pt")
    said = {name: net.arguments[name] for name in ("num_heads", "num_classes")}
    read = load(tmp_path / "sit.pt", **said).network.arguments
    ratio = read.pop("mlp_ratio")
    assert int(ratio * read["hidden_size"]) == int(net.arguments["mlp_ratio"] * read["hidden_size"])
    assert read == {name: v for name, v in net.arguments.items() if name != "mlp_ratio"}


def test_no_shape_tells_the_number_of_heads(tmp_path):
    torch.save(network().state_dict(), tmp_path / "sit.pt")
    with pytest.raises(ConfigError, match="16 wide, which no published SiT is: give num_heads"):
        load_teacher(tmp_path / "sit.pt", num_classes=5)
    four = load(tmp_path / "sit.pt", num_heads=4)
    assert torch.equal(velocity(four), sit_velocity(network(num_heads=4)))
    assert not torch.allclose(velocity(four), sit_velocity(network()))
    with pytest.raises(ConfigError, match="num_heads 3"):
        load(tmp_path / "sit.pt", num_heads=3)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'heads'"):
        load_teacher(tmp_path / "sit.pt", heads=2)


def test_without_doubled_output_and_projectors_nothing_tells_the_time(tmp_path):
    net = network(learn_sigma=False)
    torch.save(net.state_dict(), tmp_path / "sit.pt")
    with pytest.raises(ConfigError, match=r"SiT \(noise_time=0\) or of REPA \(noise_time=1\)"):
        load(tmp_path / "sit.pt")
    assert torch.equal(velocity(load(tmp_path / "sit.pt", noise_time=0)), sit_velocity(net))
    assert torch.equal(velocity(load(tmp_path / "sit.pt", noise_time=1)), repa_velocity(net))


def test_what_is_said_of_the_time_is_believed(tmp_path):
    net = network()
    torch.save(net.state_dict(), tmp_path / "sit.pt")
    assert torch.equal(velocity(load(tmp_path / "sit.pt", noise_time=1)), repa_velocity(net))


def test_the_decoder_is_that_of_the_authors(tmp_path):
    torch.save(network().state_dict(), tmp_path / "sit.pt")
    torch.save(network(learn_sigma=False).state_dict() | projectors(), tmp_path / "repa.pt")
    assert load(tmp_path / "sit.pt").decoder == StableDiffusionVae(scale=0.18215, rounding="nearest")
    assert load(tmp_path / "repa.pt", vae="here").decoder == StableDiffusionVae(vae="here", rounding="down")


# Published architectures. S/8 is the one to build: 33 million parameters.


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """SiT-S/8 for 256 pixels, of zeros, and the same with the projectors of REPA."""
    folder = tmp_path_factory.mktemp("small")
    with torch.device("meta"):
        shapes = SiT(input_size=32, patch_size=8, **SIZES["s"]).state_dict()
    tensors = {name: torch.zeros(v.shape, dtype=torch.float16) for name, v in shapes.items()}
    torch.save(tensors, folder / "sit.pt")
    tensors["final_layer.linear.weight"] = tensors["final_layer.linear.weight"][: 8 * 8 * 4].clone()
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"][: 8 * 8 * 4].clone()
    torch.save(tensors | projectors(384), folder / "repa.pt")
    return folder


def test_a_published_architecture_by_its_name(small):
    teacher = load_teacher("sit-s/8-256", checkpoint=small / "sit.pt")
    assert teacher.sample_shape == (4, 32, 32)
    assert teacher.num_classes == 1000
    assert teacher.network.arguments["num_heads"] == 6
    assert teacher.network.noise_time == 0
    assert sum(p.numel() for p in teacher.parameters()) == 33_148_160
    repa = load_teacher("sit-s/8-repa-256", checkpoint=small / "repa.pt")
    assert repa.network.noise_time == 1
    assert load_teacher("sit-s/8-256", checkpoint=small / "sit.pt", noise_time=1).network.noise_time == 1


@pytest.mark.parametrize(
    ("variant", "file", "differs"),
    [
        ("sit-b/8-256", "sit.pt", "hidden_size 384 in place of 768"),
        ("sit-l/8-256", "sit.pt", "depth 12 in place of 24"),
        ("sit-s/4-256", "sit.pt", "patch_size 8 in place of 4"),
        ("sit-s/8-512", "sit.pt", "input_size 32 in place of 64"),
        ("sit-s/8-repa-256", "sit.pt", "a doubled output, which REPA never has"),
        ("sit-s/8-256", "repa.pt", "the projectors of REPA"),
    ],
)
def test_another_architecture_than_the_one_that_was_named(small, variant, file, differs):
    with pytest.raises(CheckpointError) as refused:
        load_teacher(variant, checkpoint=small / file)
    assert f"{file} is not {variant}: it has " in str(refused.value)
    assert differs in str(refused.value)


def test_an_architecture_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown teacher 'sit-xl-2-256': did you mean .*sit-xl/2-256"):
        load_teacher("sit-xl-2-256")
    torch.save(network().state_dict(), tmp_path / "sit.pt")
    with pytest.raises(ConfigError, match=r"unknown variant 'sit-xxl/2-256': did you mean .*sit-xl/2-256"):
        SiTTeacher(tmp_path / "sit.pt", variant="sit-xxl/2-256")
    with pytest.raises(ConfigError, match="checkpoint"):
        load_teacher("sit-xl/2-256")


COUNTS = {  # at 256 pixels, with learn_sigma; the table of positions counts
    2: {"s": 32_963_360, "b": 130_512_416, "l": 458_102_816, "xl": 675_129_632},
    4: {"s": 32_945_024, "b": 130_475_648, "l": 458_053_760, "xl": 675_074_432},
    8: {"s": 33_148_160, "b": 130_881_536, "l": 458_594_816, "xl": 675_683_072},
}


def size_of(hidden_size, depth, num_heads, **arguments):
    with torch.device("meta"):
        net = SiT(hidden_size=hidden_size, depth=depth, num_heads=num_heads, **arguments)
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("patch", COUNTS)
def test_parameters_of_the_published_sizes(patch):
    assert {size: size_of(**SIZES[size], patch_size=patch) for size in SIZES} == COUNTS[patch]


@pytest.mark.parametrize(("size", "count"), [("b", 137_845_008), ("l", 465_955_600), ("xl", 683_242_512)])
def test_parameters_of_repa_with_one_projector(size, count):
    hidden = SIZES[size]["hidden_size"]
    projector = sum((n_in + 1) * n_out for n_in, n_out in ((hidden, 2048), (2048, 2048), (2048, 768)))
    assert size != "xl" or projector == 8_131_328
    assert size_of(**SIZES[size], learn_sigma=False) + projector == count


def test_there_is_a_name_for_every_published_architecture():
    assert len(set(VARIANTS)) == 2 * 4 * 3 * 2
    assert {"sit-xl/2-256", "sit-xl/2-repa-256", "sit-s/8-512"} <= set(VARIANTS)
    assert all(variant in flowdistill.TEACHERS for variant in VARIANTS)


# Damaged and hostile files.


class Hostile:
    """Is pickled as a call of os.system."""

    def __reduce__(self):
        return os.system, ('touch "$CANARY"',)


def refused(path, **kwargs):
    """The message of a file that cannot be read, which names the file; any other exception is an error of the test."""
    with pytest.raises(CheckpointError) as error:
        load_teacher("sit_teacher", checkpoint=path, **{"num_heads": 2, "noise_time": 0, **kwargs})
    assert str(path) in str(error.value)
    return str(error.value)


def test_this_test_knows_hostile_files(tmp_path, canary):
    torch.save({"pos_embed": Hostile()}, tmp_path / "hostile.pt")
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert canary.exists()
    canary.unlink()


@pytest.mark.parametrize("place", ["value", "args", "state", "whole"])
@pytest.mark.parametrize("new_format", [True, False])
def test_a_file_that_would_run_a_command(tmp_path, place, new_format):
    tensors = network().state_dict()
    content = {
        "value": tensors | {"pos_embed": Hostile()},
        "args": {"ema": tensors, "args": Hostile()},
        "state": {"ema": tensors, "args": options(path=Hostile())},
        "whole": Hostile(),
    }[place]
    torch.save(content, tmp_path / "hostile.pt", _use_new_zipfile_serialization=new_format)
    message = refused(tmp_path / "hostile.pt")
    assert "system" in message
    assert "weights_only" not in message  # torch's advice to load it nevertheless


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_plain_pickle_that_would_run_a_command(tmp_path):
    for protocol in range(6):
        (tmp_path / "hostile.pt").write_bytes(pickle.dumps(Hostile(), protocol))
        refused(tmp_path / "hostile.pt")


@pytest.mark.parametrize("new_format", [True, False])
def test_truncated_at_many_points(tmp_path, new_format):
    path = tmp_path / "cut.pt"
    torch.save(network().state_dict(), path, _use_new_zipfile_serialization=new_format)
    data = path.read_bytes()
    for part in (0, 1, 3, 100, 1000, len(data) // 3, len(data) // 2, len(data) - 1000, len(data) - 40, len(data) - 1):
        path.write_bytes(data[:part])
        refused(path)


@functools.cache
def in_the_old_format():
    """A file, and how many of its bytes come before the weights."""
    buffer, tensors = io.BytesIO(), network(depth=1).state_dict()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue(), len(buffer.getvalue()) - 4 * sum(v.numel() for v in tensors.values())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_altered_bytes_are_read_or_refused(tmp_path, data):
    path, (original, structure) = tmp_path / "altered.pt", in_the_old_format()
    altered = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, structure - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(altered))
    with warnings.catch_warnings(), suppress(CheckpointError):
        warnings.simplefilter("ignore")
        load(path)


@pytest.mark.parametrize("suffix", ["pt", "pth", "safetensors"])
def test_random_bytes_and_nothing(tmp_path, suffix):
    path = tmp_path / f"noise.{suffix}"
    for content in (b"", b"\0", bytes(1000), torch.randint(256, (5000,)).to(torch.uint8).numpy().tobytes(), b"PK\3\4"):
        path.write_bytes(content)
        refused(path)


def test_no_file(tmp_path):
    assert "there is no file" in refused(tmp_path / "missing.pt")
    assert "directory" in refused(tmp_path)


def test_a_storage_that_claims_to_be_larger_than_the_file(tmp_path):
    """The sizes lie in the pickle, the numbers after it: 4096 becomes 2^31 - 1."""
    path = tmp_path / "lying.pt"
    for claimed in (10_000, 2**31 - 1):
        torch.save({"pos_embed": torch.zeros(4096)}, path, _use_new_zipfile_serialization=False)
        data = path.read_bytes()
        stored = b"M" + (4096).to_bytes(2, "little")  # BININT2
        assert data.count(stored) >= 1
        path.write_bytes(data.replace(stored, b"J" + claimed.to_bytes(4, "little")))  # BININT
        refused(path)
        with zipfile.ZipFile(path, "w") as archive:
            inner = io.BytesIO()
            torch.save({"pos_embed": torch.zeros(4096)}, inner)
            for name in zipfile.ZipFile(inner).namelist():
                content = zipfile.ZipFile(inner).read(name)
                changed = content.replace(stored, b"J" + claimed.to_bytes(4, "little"))
                assert (content != changed) == name.endswith("data.pkl")
                archive.writestr(name, changed)
        refused(path)


def contents():
    """Files that hold something else than the state dictionary of a SiT."""
    tensors = network().state_dict()

    def replaced(name, value):
        return tensors | {name: value}

    yield "a list", [1, 2, 3]
    yield "a tensor", torch.zeros(3)
    yield "nothing", {}
    yield "numbers", {"a": 1, "b": 2.0}
    yield "a number in place of a tensor", replaced("pos_embed", 3)
    yield "a list in ema", {"ema": [torch.zeros(3)], "args": options()}
    yield "another network", nn.Linear(3, 4).state_dict()
    yield "one tensor less", {name: v for name, v in tensors.items() if name != "blocks.1.mlp.fc2.bias"}
    yield "one tensor more", replaced("blocks.1.mlp.fc3.bias", torch.zeros(3))
    yield "one block less", {name: v for name, v in tensors.items() if not name.startswith("blocks.0.")}
    yield "a number in place of a name", replaced(5, torch.zeros(3))
    yield "a block without a number", replaced("blocks.x", torch.zeros(3))
    for layer in ("pos_embed", "x_embedder.proj", "final_layer.linear", "y_embedder.embedding_table"):
        name = layer if layer in tensors else f"{layer}.weight"
        yield f"{name} without dimensions", replaced(name, torch.zeros(()))
        yield f"{name} of one dimension", replaced(name, torch.zeros(7))
        yield f"{name} of no elements", replaced(name, torch.zeros(0, 0, 0, 0))
    yield "patches of no size", replaced("x_embedder.proj.weight", torch.zeros(16, 3, 0, 2))
    yield "a width of nothing", replaced("x_embedder.proj.weight", torch.zeros(0, 3, 2, 2))
    yield "a width that four does not divide", replaced("x_embedder.proj.weight", torch.zeros(14, 3, 2, 2))
    yield "a sparse tensor", replaced("blocks.0.mlp.fc1.bias", torch.zeros(40).to_sparse())
    yield "a tensor without memory", replaced("blocks.0.mlp.fc1.bias", torch.zeros(40, device="meta"))
    one = torch.zeros(1, dtype=torch.float16)
    yield "numbers that share their memory", replaced("blocks.0.mlp.fc1.bias", one.expand(40))
    yield "more numbers than fit into any memory", replaced("blocks.0.mlp.fc1.bias", one.expand(10**12))
    yield "a huge network", replaced("x_embedder.proj.weight", one.expand(4 * 10**17, 3, 2, 2))


@pytest.mark.parametrize(("kind", "content"), [pytest.param(*item, id=item[0]) for item in contents()])
def test_something_else(tmp_path, kind, content):
    path = tmp_path / "else.pt"
    torch.save(content, path)
    refused(path)


def test_the_first_tensors_that_differ_are_named(tmp_path):
    tensors = network().state_dict()
    tensors["blocks.2.attn.proj.weight"] = torch.zeros(16, 15)
    del tensors["t_embedder.mlp.0.bias"]
    torch.save(tensors, tmp_path / "other.pt")
    message = refused(tmp_path / "other.pt")
    assert "blocks.2.attn.proj.weight: (16, 15) in the file, (16, 16) in the model" in message
    assert "t_embedder.mlp.0.bias: absent in the file" in message


def test_teachers_from_one_file_are_their_own(tmp_path):
    """Weights that were assigned, not copied, are shared with nothing."""
    net = network()
    torch.save(net.state_dict(), tmp_path / "sit.pt")
    first, second = load(tmp_path / "sit.pt"), load(tmp_path / "sit.pt")
    kept = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(velocity(second), velocity(kept))
    assert math.isclose(float(velocity(first).abs().sum()), 0.0)
