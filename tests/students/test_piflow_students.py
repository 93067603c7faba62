"""Folders of pi-Flow's students, right, damaged and of something else."""

import itertools
import json
import os
from contextlib import suppress

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import write
from student_files import altered, load, state, written

import flowdistill
from flowdistill import FLOW_MAPS, CheckpointError, Condition, ConfigError
from flowdistill.algorithms.piflow import PiFlowStudent, PolicyFlowMap
from flowdistill.cli import main
from flowdistill.interfaces import Jumps
from flowdistill.plumbing.dry import without_files
from flowdistill.runs.pretrained import save_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


def drawn(flow_map):
    x = torch.randn(3, *flow_map.sample_shape, generator=torch.Generator().manual_seed(0))
    return flow_map(x, torch.tensor([1.0, 1.0, 0.5]), torch.zeros(3), Condition(torch.tensor([1, 5, 9])))


def refused(path, kind=CheckpointError, **kwargs):
    with pytest.raises(kind) as error:
        load(path, **kwargs)
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.fixture
def folder(tmp_path):
    return written("piflow_repa", tmp_path)


def test_a_folder_alone_and_by_name(folder, monkeypatch):
    student = load(folder)
    assert isinstance(student, PiFlowStudent)
    assert not any(p.requires_grad for p in student.parameters())
    monkeypatch.chdir(folder)
    for path in (folder, folder / WEIGHTS, folder / "config.json", "."):
        assert torch.equal(drawn(load("piflow_repa", checkpoint=path)), drawn(student))
    with pytest.warns(RuntimeWarning, match=r"is a student of pi-Flow .*: Apache-2.0 licence"):
        flowdistill.load_flow_map(folder)
    assert {"piflow_repa-xl/2-256", "piflow_fm-xl/2-256"} <= set(FLOW_MAPS.all_names())


def test_what_the_name_of_the_folder_says(folder, tmp_path):
    student = load(folder)
    assert (student.segments, student.jumps) == (2, Jumps.ANY)
    assert student.wide.network.time_factor == 1.0
    one = load(written("piflow_fm", tmp_path))
    assert (one.segments, one.jumps) == (1, Jumps.FROM_NOISE)
    assert one.wide.network.time_factor == one.head.time_factor == 1000.0
    assert load(folder, segments=3).segments == 3
    with pytest.raises(ConfigError, match="unknown variant 'piflow'"):
        PiFlowStudent(folder, variant="piflow")
    with without_files(), pytest.raises(ConfigError, match="a plan reads no checkpoint"):
        load("piflow_repa-xl/2-256", checkpoint="nowhere")
    renamed = folder.rename(tmp_path / "other")
    assert "does not tell which teacher" in refused(renamed, ConfigError)
    assert torch.equal(drawn(load("piflow_repa", checkpoint=renamed, segments=2)), drawn(student))


def test_the_steps_of_a_jump(folder):
    """Each row has its own number, as if it stood alone."""
    student = load(folder)
    student.substeps = 5
    together = drawn(student)
    x = torch.randn(3, *student.sample_shape, generator=torch.Generator().manual_seed(0))
    policy = student.policy(x[2:], torch.tensor([0.5]), Condition(torch.tensor([9])))
    state, times = x[2:], [0.5, 1 / 3, 1 / 6, 0.0]  # ceil(5 * 0.5) steps
    for t, end in itertools.pairwise(times):
        state = state - (t - end) * policy.velocity(state, torch.tensor([t]))
    torch.testing.assert_close(together[2:], state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_precisions(folder, dtype):
    student = load(folder)
    safetensors.torch.save_file({k: v.to(dtype) for k, v in state("piflow_repa").items()}, folder / WEIGHTS)
    rounded = load(folder)
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}
    assert 0 < (drawn(student) - drawn(rounded)).abs().max() < 1.0


def test_sampled_and_fetched(folder, monkeypatch):
    student = load(folder)
    samples = flowdistill.sample(student, 3, labels=[1, 2, 3], steps=2)
    assert samples.shape == (3, 4, 8, 8)
    assert student.evaluations == 6  # the steps of the policy cost none
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda _, file: str(folder.parent / file))
    fetched = load("piflow_repa", checkpoint=f"hf://someone/students/{folder.name}")
    assert torch.equal(drawn(fetched), drawn(student))


def test_the_command_line_and_model_folders(folder, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(folder), "--num_samples", "2", "--steps", "2", "--out", str(tmp_path / "x.npz"), "--raw"])
    assert ended.value.code == 0
    raw = np.load(tmp_path / "x.npz")["samples"]
    assert np.array_equal(raw, flowdistill.sample(load(folder), 2, steps=2).numpy())
    model = save_model(flowdistill.load_teacher("digits_teacher"), tmp_path / "model")
    with pytest.raises(CheckpointError, match="is neither a run directory nor a checkpoint"):
        load(model)


TRAINING = """
train.teacher = @load_teacher()
load_teacher.name_or_path = 'sit_teacher'
load_teacher.checkpoint = '{folder}/sit.pt'
load_teacher.num_heads = 4
load_teacher.num_classes = 11
load_teacher.noise_time = 1
train.flow_map = @piflow_student()
piflow_student.checkpoint = '{folder}/gmrepa_k6_2step'
train.objective = @piflow()
train.optimizer = @AdamW
AdamW.lr = 1e-4
train.steps = 2
train.batch_size = 4
train.sample_every = 0
"""


@pytest.mark.filterwarnings("ignore:.*licence")
def test_training_starts_from_a_released_student(folder, tmp_path):
    tensors = {k: v for k, v in state("meanflow").items() if not k.startswith("r_embedder.")}
    tensors["y_embedder.embedding_table.weight"] = tensors["y_embedder.embedding_table.weight"][:11]
    torch.save(tensors, tmp_path / "sit.pt")
    text = TRAINING.format(folder=tmp_path).replace("num_classes = 11", "num_classes = 10")
    bindings = ["piflow.dropout = 0.0", "train.states = @prior()"]
    flowdistill.train(
        gin_file=write(tmp_path / "x.gin", text), gin_bindings=bindings, workdir=tmp_path / "run", report=False
    )
    after = load(tmp_path / "run")
    assert isinstance(after, PolicyFlowMap)
    assert not torch.equal(drawn(after), drawn(load(folder)))


# Damage.


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: config.update(_class_name="DiTTransformer2DModel"), "does not describe a GMDiT"),
        (lambda config: config.pop("_class_name"), "does not describe a GMDiT"),
        (lambda config: config.pop("sample_size"), "does not say sample_size"),
        (lambda config: config.update(sample_size=7), "do not fit each other"),
        (lambda config: config.update(sample_size=2**16), "do not fit each other"),
        (lambda config: config.update(num_attention_heads=5), "do not fit each other"),
        (lambda config: config.update(num_attention_heads="4"), "does not say num_attention_heads"),
        (lambda config: config.update(num_embeds_ada_norm=-1), "does not say num_embeds_ada_norm"),
        (lambda config: config.update(num_embeds_ada_norm=99), "contradicts itself"),
    ],
)
def test_configurations_that_cannot_be(folder, change, said):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    assert said in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"_class_name": 3}'])
def test_files_that_are_no_configuration(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder)


def test_weights_of_something_else(folder):
    with pytest.raises(CheckpointError, match="is not piflow_repa-xl/2-256: it has hidden_size 48"):
        load("piflow_repa-xl/2-256", checkpoint=folder)
    data = (folder / WEIGHTS).read_bytes()
    for part in (0, 7, 100, len(data) // 2, len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:part])
        refused(folder)
    safetensors.torch.save_file(state("dmf"), folder / WEIGHTS)
    refused(folder)
    os.remove(folder / WEIGHTS)
    assert "there is no file" in refused(folder)
    with pytest.raises(CheckpointError, match="there is no folder nowhere"):
        load("piflow_repa", checkpoint="nowhere")


def test_other_tensors_are_named(folder):
    tensors = state("piflow_repa")
    del tensors["proj_out_logstds.3.bias"], tensors["transformer_blocks.1.attn1.to_k.bias"]
    safetensors.torch.save_file(tensors | {"proj_out_3.weight": torch.ones(2)}, folder / WEIGHTS)
    message = refused(folder)
    assert "read as a student of pi-Flow" in message
    assert "head.log_std.2.bias: absent in the file, (1,) in the model" in message
    assert "wide.network.blocks.1.attn.qkv.bias: absent in the file" in message


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_altered_tensors_are_read_or_refused(folder, data):
    tensors = state("piflow_repa")
    altered(data, tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    with suppress(CheckpointError, ConfigError):
        load(folder)
