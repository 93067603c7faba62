"""Model folders: written, read, damaged, converted, and distilled."""

import json
import math
import os
import shutil

import pytest
import safetensors.torch
import torch
from runs import FLOW_MATCHING, command, write
from tiny_teachers import NETWORKS, SIT, checkpoint, python, teacher_of, velocity

import flowdistill
from flowdistill import CheckpointError, CheckpointWriteError, Condition, ConfigError, load_teacher
from flowdistill.decoders import StableDiffusionVae
from flowdistill.flow_maps import from_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import Decoder, Jumps
from flowdistill.networks import SiT
from flowdistill.runs.pretrained import is_model, load_model, save_model
from flowdistill.wrapped_teachers import FlowMapTeacher, NetworkTeacher

# Written and read.


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_teacher_comes_back_from_its_folder(tmp_path, kind):
    teacher = teacher_of(kind)
    assert save_model(teacher, tmp_path / "new" / "model") == tmp_path / "new" / "model"
    assert {path.name for path in (tmp_path / "new" / "model").iterdir()} == {"config.json", "model.safetensors"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    again = load_model(tmp_path / "new" / "model")
    assert torch.equal(velocity(again), velocity(teacher))
    assert velocity(again).std() > 0.01
    assert again.decoder == teacher.decoder
    assert type(again.network) is type(teacher.network)
    assert not any(v.is_meta for v in again.state_dict().values())
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_may_be_stored_in_half_precision(tmp_path, kind):
    teacher = teacher_of(kind)
    save_model(teacher, tmp_path / "whole")
    save_model(teacher, tmp_path / "half", dtype="float16")
    stored = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert {v.dtype for v in stored.values()} == {torch.float16}
    again = load_model(tmp_path / "half")
    assert again.dtype == torch.float32
    rounded = {name: v.half().float() for name, v in teacher.network.state_dict().items()}
    assert not torch.equal(velocity(again), velocity(teacher))
    teacher.network.load_state_dict(rounded)
    assert torch.equal(velocity(again), velocity(teacher))
    assert (tmp_path / "half" / "config.json").read_text() == (tmp_path / "whole" / "config.json").read_text()


def test_a_teacher_of_double_precision_is_stored_in_single(tmp_path):
    teacher = teacher_of("mlp").double()
    again = load_model(save_model(teacher, tmp_path / "model"))
    assert again.dtype == torch.float32
    torch.testing.assert_close(velocity(again), velocity(teacher.float()))


def test_a_model_that_was_loaded_can_be_written_and_trained(tmp_path):
    first = load_model(save_model(teacher_of(), tmp_path / "first"))
    second = load_model(save_model(first, tmp_path / "second"))
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    student = from_teacher(second, "anchored")
    x, one = torch.randn(2, 2, 4, 4), torch.ones(2)
    student.average_velocity(x, one, 0 * one, Condition(torch.tensor([0, 1]))).square().mean().backward()
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    optimizer.step()
    assert torch.equal(velocity(second), velocity(first))


def test_the_decoder_alone_tells_two_models_apart(tmp_path):
    teacher = teacher_of("repa")
    teacher.decoder = None
    assert load_model(save_model(teacher, tmp_path / "bare")).decoder is None
    teacher.decoder = StableDiffusionVae(vae="owner/vae")
    decoder = load_model(save_model(teacher, tmp_path / "latents")).decoder
    assert decoder.ready
    assert not load_model(save_model(teacher_of("repa"), tmp_path / "not_ready")).decoder.ready


def test_a_teacher_outlives_the_file_that_it_came_from(tmp_path):
    """Memory that is mapped to a file changes with it, and ends the process where the file becomes shorter."""
    save_model(teacher_of(), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    shutil.copy(path, tmp_path / "sit.safetensors")
    teachers = load_model(tmp_path / "model"), load_teacher(tmp_path / "sit.safetensors", num_heads=2, num_classes=3)
    for file in (path, tmp_path / "sit.safetensors"):
        size = file.stat().st_size
        with file.open("r+b") as opened:
            opened.write(b"\1" * size)
    for teacher in teachers:
        assert torch.equal(velocity(teacher), velocity(teacher_of()))


def test_a_place_that_is_taken_stays_as_it_was(tmp_path):
    teacher = teacher_of()
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("text")
    (tmp_path / "empty").mkdir()
    for place in ("file", "folder"):
        with pytest.raises(ConfigError, match="is taken"):
            save_model(teacher, tmp_path / place)
    assert (tmp_path / "file").read_text() == "text"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "folder"]
    assert is_model(save_model(teacher, tmp_path / "empty"))


def test_the_empty_folder_in_which_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    os.symlink("here", "link")
    save_model(teacher_of(), "link")
    assert is_model(tmp_path / "here")
    shutil.rmtree(tmp_path / "here")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_model(teacher_of(), ".")
    assert is_model(tmp_path / "here")


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flowdistill.plumbing.files.stream_tensors", full)
    with pytest.raises(CheckpointWriteError, match="No space left on device; nothing was left there") as error:
        save_model(teacher_of(), tmp_path / "model")
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointWriteError):
        save_model(teacher_of(), tmp_path / "file" / "model")


class Foreign(Decoder):
    """A decoder that is not registered."""

    def decode(self, samples):
        return samples

    def to_uint8(self, images):
        return images


def test_what_no_model_folder_can_hold(tmp_path):
    two_time = FlowMapTeacher(from_teacher(teacher_of()))
    foreign = NetworkTeacher(teacher_of().network, Foreign())
    for teacher in (load_teacher("ring"), GuidedTeacher(teacher_of(), 2.0), two_time, foreign):
        with pytest.raises(ConfigError, match=r"not a velocity network alone|not a registered decoder"):
            save_model(teacher, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


# Damaged.


@pytest.fixture
def model(tmp_path):
    return save_model(teacher_of(), tmp_path / "model")


def refused(folder):
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def configured(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return refused(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", "{}", '{"format": 1}', '"format"', "\x00", "[" * 100_000, '{"format": {}}']
)
def test_a_configuration_that_is_none(model, text):
    (model / "config.json").write_text(text)
    refused(model)


def test_a_configuration_that_is_no_text(model):
    (model / "config.json").write_bytes(bytes(range(256)))
    refused(model)


def test_a_configuration_of_another_time_or_program(model):
    assert "has format 2, this version reads 1" in configured(model, format=2)
    configured(model, format="1")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"network": "sitt"}, "did you mean sit"),
        ({"network": None}, "None"),
        ({"network": ["sit"]}, ""),
        ({"arguments": {"wdith": 3}}, "wdith"),
        ({"arguments": {**SIT, "patch_size": 0}}, ""),
        ({"arguments": {**SIT, "patch_size": 3}}, "does not divide"),
        ({"arguments": {**SIT, "hidden_size": -8}}, ""),
        ({"arguments": {**SIT, "hidden_size": 4 * 10**18}}, ""),
        ({"arguments": {**SIT, "hidden_size": "8"}}, ""),
        ({"arguments": {**SIT, "mlp_ratio": math.inf}}, ""),
        ({"arguments": {**SIT, "depth": None}}, ""),
        ({"arguments": [1, 2]}, ""),
        ({"decoder": "pixel"}, "did you mean pixels"),
        ({"decoder_arguments": {"zoom": 3}}, "zoom"),
        ({"decoder_arguments": {"scale": -1.0}}, "scale"),
        ({"decoder_arguments": {"scale": "large"}}, ""),
        ({"decoder_arguments": 3}, ""),
        ({"decoder": "stable_diffusion_vae", "decoder_arguments": {"pixel_range": 3}}, ""),
    ],
)
def test_a_configuration_that_describes_nothing(model, changes, says):
    assert says in configured(model, **changes)


def test_a_configuration_without_one_of_its_parts(model):
    config = json.loads((model / "config.json").read_text())
    for missing in config:
        (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != missing}))
        assert missing in refused(model)


def test_weights_that_are_missing_damaged_or_of_another_network(model):
    path = model / "model.safetensors"
    data = path.read_bytes()
    tensors = safetensors.torch.load(data)
    for damaged in (b"", b"\0" * 8, data[:100], data[:-1], data + b"\0", b"\xff" * 1000):
        path.write_bytes(damaged)
        assert "is not a whole safetensors file" in refused(model)
    less = {name: v for name, v in tensors.items() if name != "blocks.1.attn.qkv.bias"}
    safetensors.torch.save_file(less, path)
    assert "blocks.1.attn.qkv.bias: absent in the file, (24,) in the model" in refused(model)
    safetensors.torch.save_file(tensors | {"more": torch.zeros(2)}, path)
    assert "more: (2,) in the file, absent in the model" in refused(model)
    safetensors.torch.save_file(tensors | {"blocks.0.attn.qkv.bias": torch.zeros(25)}, path)
    assert "blocks.0.attn.qkv.bias: (25,) in the file, (24,) in the model" in refused(model)
    path.unlink()
    assert "there is no file" in refused(model)
    path.write_bytes(data)
    assert "of another architecture" in configured(model, arguments={**SIT, "depth": 1})


def test_folders_that_are_no_models(tmp_path, model):
    (tmp_path / "nothing").mkdir()
    assert "No such file" in refused(tmp_path / "nothing")
    assert "is not a model folder" in refused(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="neither a run directory"):
        load_teacher(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="unknown teacher"):
        load_teacher(tmp_path / "missing")
    with pytest.raises(ConfigError, match="takes no checkpoint"):
        load_teacher(model, checkpoint="x")
    (tmp_path / "weights.zip").write_text("")
    with pytest.raises(ConfigError, match=r"no suffix of a known checkpoint \(\.pkl, \.pt, \.pth, \.safetensors\)"):
        load_teacher(tmp_path / "weights.zip")


# Converted.

RING = ["mlp.hidden_size = 8", "mlp.depth = 1", "train.batch_size = 8", "train.steps = 3", "train.sample_every = 0"]

STUDENT = """
train.teacher = @load_teacher()
train.flow_map = @from_teacher
from_teacher.conditioning = 'anchored'
train.objective = @freeflow_prediction()
train.optimizer = @AdamW
AdamW.lr = 1e-5
train.steps = 3
train.batch_size = 4
train.sample_every = 0
"""


def test_a_checkpoint_of_others_is_converted(tmp_path):
    teacher = checkpoint(tmp_path / "sit.pt")
    folder = flowdistill.convert(tmp_path / "sit.pt", tmp_path / "model", num_heads=2)
    again = load_teacher(folder)
    assert type(again) is NetworkTeacher
    assert torch.equal(velocity(again), velocity(teacher))
    assert again.decoder == StableDiffusionVae()
    half = flowdistill.convert(folder, tmp_path / "half", dtype="float16")
    torch.testing.assert_close(velocity(load_teacher(half)), velocity(teacher), rtol=0.05, atol=0.05)
    with pytest.raises(CheckpointError, match=r"is not sit-s/2-256: it has .*hidden_size 8 in place of 384"):
        flowdistill.convert(tmp_path / "sit.pt", tmp_path / "other", teacher="sit-s/2-256")
    assert not (tmp_path / "other").exists()


def test_a_run_of_flow_matching_is_converted(tmp_path):
    flowdistill.train(gin_file=write(tmp_path / "ring.gin", FLOW_MATCHING), gin_bindings=RING, workdir=tmp_path / "run")
    of_run, again = (
        load_teacher(tmp_path / "run"),
        load_teacher(flowdistill.convert(tmp_path / "run", tmp_path / "model")),
    )
    assert torch.equal(velocity(again), velocity(of_run))
    assert velocity(again).abs().max() > 0


def test_an_anchored_student_is_not_converted(tmp_path):
    save_model(teacher_of(), tmp_path / "model")
    write(tmp_path / "student.gin", STUDENT, steps=1)
    bindings = [f"load_teacher.name_or_path = {str(tmp_path / 'model')!r}"]
    for conditioning, message in (("anchored", "anchored"), ("two_time", "not a velocity network alone")):
        more = [*bindings, f"from_teacher.conditioning = {conditioning!r}"]
        flowdistill.train(gin_file=tmp_path / "student.gin", gin_bindings=more, workdir=tmp_path / conditioning)
        with pytest.raises(ConfigError, match=message):
            flowdistill.convert(tmp_path / conditioning, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


@pytest.mark.slow
def test_the_command_line_converts_and_a_fresh_process_loads(tmp_path):
    teacher = teacher_of("repa")
    projector = {"projectors.0.0.weight": torch.zeros(3, 8)}
    # Nothing in the file tells the heads of a network of this width: so one that is wide enough for its name.
    wide = SiT(**{**SIT, "hidden_size": 384, "num_heads": 6, "depth": 1, "learn_sigma": False, "noise_time": 1})
    torch.nn.init.normal_(wide.final_layer.linear.weight)
    torch.save(wide.state_dict() | projector, tmp_path / "last.pt")
    done = command("convert", "last.pt", "model", cwd=tmp_path)
    assert done.returncode == 2
    assert "4 labels, which may be 4 classes (num_classes=4), or 3 and a null label (num_classes=3)" in done.stderr
    done = command("convert", "last.pt", "model", "--dtype", "float16", "--num_classes", "3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "model\n"), done.stderr
    before = [(path, path.read_bytes()) for path in sorted((tmp_path / "model").iterdir())]
    done = command("convert", "last.pt", "model", "--num_classes", "3", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "flowdistill: error: model is taken: choose another place\n"
    assert before == [(path, path.read_bytes()) for path in sorted((tmp_path / "model").iterdir())]
    (tmp_path / "torn.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:5000])
    done = command("convert", "torn.pt", "other", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("flowdistill: error: torn.pt cannot be read as a checkpoint of SiT: ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "other").exists()
    code = (
        "import torch, flowdistill; teacher = flowdistill.load_teacher('model'); torch.manual_seed(0); "
        "x, t, labels = torch.randn(3, 2, 4, 4), torch.tensor([0.2, 0.7, 1.0]), torch.tensor([0, 2, -1]); "
        "torch.save([x, t, labels, teacher.velocity(x, t, flowdistill.Condition(labels))], 'velocity.pt')"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    x, t, labels, computed = torch.load(tmp_path / "velocity.pt")
    wide.load_state_dict({name: v.half().float() for name, v in wide.state_dict().items()})
    assert torch.equal(computed, wide.eval().velocity(x, t, labels))
    assert computed.std() > 0.01
    assert teacher.num_classes == 3


# Distilled, from gin files.


def test_a_model_folder_is_distilled_by_its_name_in_a_gin_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = teacher_of()
    save_model(teacher, "model folder")
    write(tmp_path / "student.gin", STUDENT)
    bindings = ["load_teacher.name_or_path = 'model folder'"]
    result = flowdistill.train(gin_file="student.gin", gin_bindings=bindings, workdir="run")
    assert "load_teacher.name_or_path = 'model folder'" in (tmp_path / "run" / "config.gin").read_text()
    student = flowdistill.load_flow_map("run")
    assert student.jumps is Jumps.FROM_NOISE
    assert student.decoder == teacher.decoder
    x, one = torch.randn(3, 2, 4, 4), torch.ones(3)
    condition = Condition(torch.tensor([0, 1, 2]))
    moved = student.average_velocity(x, one, 0 * one, condition)
    assert torch.equal(moved, result.flow_map.average_velocity(x, one, 0 * one, condition))
    assert not torch.equal(moved, teacher.velocity(x, one, condition))
    start = teacher.velocity(x, one, condition)
    assert (moved - start).norm() < 0.1 * start.norm()
    assert flowdistill.sample("run", 4).shape == (4, 2, 4, 4)


def test_a_checkpoint_file_is_distilled_with_guidance(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "sit.pt")
    guided = STUDENT.replace("train.teacher = @load_teacher()", "train.teacher = @guided()")
    named = """
guided.teacher = @load_teacher()
guided.scale = 1.5
guided.channels = 1
load_teacher.name_or_path = 'sit_teacher'
load_teacher.checkpoint = 'sit.pt'
load_teacher.num_heads = 2
"""
    write(tmp_path / "student.gin", guided + named)
    flowdistill.train(gin_file="student.gin", workdir="run")
    assert flowdistill.load_flow_map("run").decoder == StableDiffusionVae()


def test_mistakes_in_a_gin_file_are_located(tmp_path):
    save_model(teacher_of(), tmp_path / "model")
    write(tmp_path / "student.gin", STUDENT)

    def message(*bindings):
        with pytest.raises((ConfigError, CheckpointError)) as error:
            flowdistill.train(gin_file=tmp_path / "student.gin", gin_bindings=bindings, workdir=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return str(error.value)

    place = f"load_teacher.name_or_path = {str(tmp_path / 'model')!r}"
    assert "takes no checkpoint" in message(place, "load_teacher.checkpoint = 'x.pt'")
    assert "did you mean sit-xl/2-256" in message("load_teacher.name_or_path = 'sit-xl/2-265'")
    missing = message("load_teacher.name_or_path = 'sit-xl/2-256'", "load_teacher.checkpoint = 'x.pt'")
    assert "there is no file x.pt" in missing
