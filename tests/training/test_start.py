"""A run that starts from the student of another."""

import math
import re
import shutil

import attrs
import pytest
import torch
from runs import RING, write
from safetensors.torch import load_file

import flowdistill
from flowdistill import CheckpointError, NonFiniteError
from flowdistill.plumbing import config
from flowdistill.runs.checkpoints import checkpoint_paths
from flowdistill.training.loop import configured_loop

PLAIN = "\n".join(line for line in RING.splitlines() if "freeflow" not in line and "online_network" not in line)
SHORTCUT = """
train.objective = @shortcut()
shortcut.target_decay = 0.9
from_teacher.conditioning = 'two_time'
train.states = @noised_data()
noised_data.dataset = @exact_samples()
exact_samples.teacher = @ring()
"""


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    flowdistill.train(write(folder / "ring.gin"), workdir=folder / "run", report=False)
    return folder / "run"


def networks(run):
    checkpoint = checkpoint_paths(run)[-1]
    return {name: load_file(checkpoint / f"{name}.safetensors") for name in ("student", "ema", "online")}


def equal(module, tensors):
    return all(torch.equal(value, tensors[name]) for name, value in module.state_dict().items())


def begun(gin_file, *bindings):
    """The loop of a configuration before its first step."""
    with config.parsed([gin_file], bindings):
        return configured_loop("begun", "cpu")


@pytest.mark.parametrize("path", ["", "checkpoints/step_00000012"])
def test_all_networks_are_taken(first, tmp_path, path):
    gin_file = write(tmp_path / "ring.gin", start=repr(str(first / path)), seed=1)
    loop, saved = begun(gin_file, "AdamW.lr = 1e-4"), networks(first)
    assert equal(loop.student, saved["student"])
    assert equal(loop.averages["ema"].module, saved["ema"])
    assert equal(loop.objective.modules()["online"], saved["online"])
    assert not torch.equal(next(iter(saved["student"].values())), next(iter(saved["ema"].values())))
    assert (loop.step, loop.trained.optimizer.state_dict()["state"]) == (0, {})
    assert loop.origin == f"started from {checkpoint_paths(first)[-1]}: student, ema, online"


def test_a_run_without_an_average_gives_its_student(tmp_path):
    flowdistill.train(write(tmp_path / "one.gin", ema=None), workdir=tmp_path / "one", report=False)
    loop = begun(write(tmp_path / "two.gin", start=repr(str(tmp_path / "one"))))
    assert equal(loop.averages["ema"].module, dict(loop.student.state_dict()))
    assert "ema" not in loop.origin


def test_another_objective_begins_with_copies_of_the_student_that_is_taken(first, tmp_path):
    """Its average of targets is that of the student; the online network of the first run has no place in it."""
    gin_file = write(tmp_path / "ring.gin", f"{PLAIN}\n{SHORTCUT}", start=repr(str(first)))
    loop = begun(gin_file)
    assert equal(loop.student, networks(first)["student"])
    assert equal(loop.objective.modules()["target"], networks(first)["student"])


def test_such_a_run_repeats_and_continues_without_the_first(first, tmp_path):
    source = shutil.copytree(first, tmp_path / "source")
    gin_file = write(tmp_path / "ring.gin", start=repr(str(source)))
    flowdistill.train(gin_file, workdir=tmp_path / "whole", report=False)
    flowdistill.train(tmp_path / "whole" / "config.gin", workdir=tmp_path / "again", report=False)
    flowdistill.train(gin_file, gin_bindings=["train.steps = 4"], workdir=tmp_path / "parts", report=False)
    shutil.rmtree(source)
    flowdistill.train(gin_file, workdir=tmp_path / "parts", report=False)
    for name, tensors in networks(tmp_path / "whole").items():
        for other in ("again", "parts"):
            assert all(torch.equal(v, networks(tmp_path / other)[name][key]) for key, v in tensors.items())


def test_what_cannot_be_started_from_is_refused(first, tmp_path):
    def refused(**changes):
        with pytest.raises(CheckpointError) as error:
            flowdistill.train(write(tmp_path / "ring.gin", **changes), workdir=tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return str(error.value)

    assert "neither a run directory nor a checkpoint" in refused(start="'nowhere'")
    wider = write(tmp_path / "wider.gin", RING + "mlp.hidden_size = 24\n", steps=1)
    flowdistill.train(wider, workdir=tmp_path / "wider", report=False)
    assert "of another architecture" in refused(start=repr(str(tmp_path / "wider")))
    source = shutil.copytree(first, tmp_path / "source")
    (checkpoint_paths(source)[-1] / "student.safetensors").write_bytes(b"")
    assert "step_00000008, which is whole" in refused(start=repr(str(source)))


@flowdistill.register_objective("fragile")
@attrs.define(kw_only=True)
class Fragile(flowdistill.Objective):
    """Regression onto the noise; NaN from a step on."""

    until: int | None = None

    def loss(self, states, step):
        loss = (self.student.average_velocity(*states.to(0.0)) - states.x).square().mean()
        return flowdistill.ObjectiveOutput(loss * (math.nan if step.number == self.until else 1))


def test_after_a_loss_that_is_not_finite_the_message_leads_on(tmp_path):
    """The run goes on from its last good checkpoint, otherwise set up."""
    gin_file = write(tmp_path / "ring.gin", f"{PLAIN}\ntrain.objective = @fragile()")
    with pytest.raises(NonFiniteError, match="at step 6; the last good checkpoint is") as error:
        flowdistill.train(gin_file, gin_bindings=["fragile.until = 6"], workdir=tmp_path / "diverged")
    binding = re.search(r"train\.start = '.*?'", str(error.value))[0]
    loop = begun(gin_file, binding, "AdamW.lr = 1e-5")
    saved = load_file(tmp_path / "diverged" / "checkpoints" / "step_00000004" / "student.safetensors")
    assert equal(loop.student, saved)
    result = flowdistill.train(gin_file, gin_bindings=[binding], workdir=tmp_path / "again", report=False)
    assert result.steps == 12
