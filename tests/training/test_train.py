"""Runs: what they leave, that they repeat and resume bit for bit, and the parts of the loop."""

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from typing import ClassVar

import attrs
import pytest
import torch
from runs import RING, command, write
from safetensors.torch import load_file
from torch import nn

import flowdistill
from flowdistill import Condition, ConfigError, NonFiniteError
from flowdistill.ema import AveragedModel, Ema, PowerEma
from flowdistill.flow_maps import from_teacher
from flowdistill.networks import MLP
from flowdistill.plumbing.config import parsed
from flowdistill.plumbing.precision import tf32
from flowdistill.runs.checkpoints import fill, save_checkpoint
from flowdistill.training.loop import configured_loop
from flowdistill.training.optimization import Schedule


def tensors(run):
    """All tensors of a run's last checkpoint."""
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    return {
        f"{file.stem}.{name}": value
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def same(a, b):
    left, right = tensors(a), tensors(b)
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


def test_what_a_run_leaves(tmp_path):
    config = write(tmp_path / "ring.gin", sample_every=6, evaluation="@evaluation()")
    bindings = ["evaluation.metrics = ('w2',)", "evaluation.num_samples = 50", "evaluation.teacher_steps = (1, 4)"]
    result = flowdistill.train(gin_file=config, gin_bindings=bindings, workdir=tmp_path / "run")
    run = result.workdir
    assert result.steps == 12
    assert result.checkpoint.name == "step_00000012"
    assert {"loss", "w2"} <= result.metrics.keys()
    assert [p.name for p in sorted((run / "samples").glob("*"))] == ["step_00000006.png", "step_00000012.png"]
    assert (run / "plots" / "samples.png").is_file()
    assert (run / "plots" / "curves.png").is_file()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert records[-1]["teacher_evaluations"] == 12 * 16
    assert list((run / "tensorboard").glob("events*"))
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert {name: row["evaluations"] for name, row in rows.items()} == {
        "teacher, 1 step": 1,
        "teacher, 4 steps": 4,
        "noise floor": 4,
        "student, 1 step": 1,
    }
    assert rows["student, 1 step"]["w2"] == result.metrics["w2"]
    report = (run / "report.md").read_text()
    assert "student, 1 step" in report
    assert "noise floor" in report
    flow_map = flowdistill.load_flow_map(run)
    noise = torch.randn(3, 2)
    assert torch.equal(flow_map.sample(noise), result.flow_map.sample(noise))
    assert flowdistill.sample(run, 5).shape == (5, 2)
    assert torch.equal(flowdistill.sample(run, 5, batch_size=2), flowdistill.sample(run, 5))
    assert flowdistill.evaluate(run, metrics=("w2",), num_samples=50).keys() == {"w2", "w2_noise_floor"}


def test_the_report_of_a_run_may_follow_later(tmp_path):
    config = write(tmp_path / "ring.gin", evaluation="@evaluation()")
    few = ["evaluation.metrics = ('w2',)", "evaluation.num_samples = 20"]
    result = flowdistill.train(gin_file=config, gin_bindings=few, workdir=tmp_path / "run", report=False)
    assert "w2" not in result.metrics
    assert not any((result.workdir / name).exists() for name in ("report.md", "evaluation.json", "plots"))
    again = flowdistill.train(gin_file=config, gin_bindings=few, workdir=tmp_path / "run")
    assert again.metrics["w2"] > 0
    assert (result.workdir / "report.md").is_file()
    noise = torch.randn(3, 2)
    assert torch.equal(again.flow_map.sample(noise), result.flow_map.sample(noise))


@pytest.mark.parametrize("extra", [{}, {"accumulation": 3, "precision": "'bf16'", "ema": "@power_ema()"}])
def test_the_configuration_of_a_run_repeats_it_bit_for_bit(extra, tmp_path):
    flowdistill.train(gin_file=write(tmp_path / "ring.gin", **extra), workdir=tmp_path / "first")
    flowdistill.train(gin_file=tmp_path / "first" / "config.gin", workdir=tmp_path / "second")
    assert same(tmp_path / "first", tmp_path / "second")
    other = flowdistill.train(
        gin_file=tmp_path / "first" / "config.gin", gin_bindings=["train.seed = 1"], workdir=tmp_path / "third"
    )
    assert not same(tmp_path / "first", other.workdir)
    first, second = ((tmp_path / name / "config.gin").read_text() for name in ("first", "second"))
    assert first == second


def test_global_random_state_does_not_matter_and_is_left_alone(tmp_path):
    config = write(tmp_path / "ring.gin")
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    flowdistill.train(gin_file=config, workdir=tmp_path / "first")
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    flowdistill.train(gin_file=config, workdir=tmp_path / "second")
    assert same(tmp_path / "first", tmp_path / "second")


@pytest.mark.parametrize("steps", [4, 8, 9])
def test_a_run_continues_bit_for_bit(steps, tmp_path):
    """Stopped after any step and continued: what was done after the last checkpoint is done again, the same."""
    config = write(tmp_path / "ring.gin")
    flowdistill.train(gin_file=config, workdir=tmp_path / "whole")
    flowdistill.train(gin_file=config, gin_bindings=[f"train.steps = {steps}"], workdir=tmp_path / "parts")
    flowdistill.train(gin_file=config, workdir=tmp_path / "parts")
    assert same(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    assert [r["step"] for r in parts if r["step"] % 2 == 0] == [r["step"] for r in whole]
    assert parts[-1]["teacher_evaluations"] == whole[-1]["teacher_evaluations"]


UNET = """
train.objective = @flow_matching()
train.flow_map = @network()
network.network = @edm2()
network.conditioning = 'instantaneous'
edm2.img_resolution = 8
edm2.img_channels = 1
edm2.label_dim = 10
edm2.model_channels = 8
edm2.channel_mult = (1, 2)
edm2.num_blocks = 1
edm2.dropout = 0.5
train.states = @noised_data()
noised_data.dataset = @digits()
train.optimizer = @Adam
Adam.lr = 1e-2
train.steps = 6
train.batch_size = 8
train.sample_every = 3
train.checkpoint_every = 3
"""


@pytest.mark.slow
def test_dropout_and_normalised_weights_continue_bit_for_bit(tmp_path):
    """In training mode, whatever was done in between, such as pictures in evaluation mode."""
    config = write(tmp_path / "unet.gin", UNET)
    whole = flowdistill.train(gin_file=config, workdir=tmp_path / "whole")
    flowdistill.train(gin_file=config, gin_bindings=["train.steps = 4"], workdir=tmp_path / "parts")
    flowdistill.train(gin_file=config, workdir=tmp_path / "parts")
    assert same(tmp_path / "whole", tmp_path / "parts")
    assert not any(module.training for module in whole.flow_map.modules())
    config = write(tmp_path / "without.gin", UNET.replace("dropout = 0.5", "dropout = 0.0"))
    flowdistill.train(gin_file=config, workdir=tmp_path / "without")
    assert not same(tmp_path / "whole", tmp_path / "without")


def test_a_killed_process_continues_bit_for_bit(tmp_path):
    config = write(tmp_path / "ring.gin", steps=300, checkpoint_every=20)
    arguments = [sys.executable, "-m", "flowdistill", "train", "--gin_file", str(config), "--workdir"]
    process = subprocess.Popen([*arguments, "killed"], cwd=tmp_path, stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed" / "checkpoints"
    while process.poll() is None and not list(folder.glob("step_*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = int(sorted(folder.glob("step_*"))[-1].name[5:])
    assert 20 <= reached < 300
    assert command("train", "--gin_file", config, "--workdir", "killed", cwd=tmp_path).returncode == 0
    assert command("train", "--gin_file", config, "--workdir", "whole", cwd=tmp_path).returncode == 0
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_metrics_are_averaged_over_the_steps_that_have_them(tmp_path):
    """The correction starts at the last of four steps: its metrics are that step's, the loss is the mean of four."""
    bindings = ["freeflow.correction_start = 0.75", "train.steps = 4"]
    records = {}
    for every in (1, 4):
        config = write(tmp_path / f"{every}.gin", log_every=every)
        run = flowdistill.train(gin_file=config, gin_bindings=bindings, workdir=tmp_path / str(every)).workdir
        records[every] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (together,) = records[4]
    assert ["lambda" in record for record in records[1]] == [False, False, False, True]
    assert together["lambda"] == pytest.approx(records[1][-1]["lambda"])
    assert together["loss"] == pytest.approx(sum(record["loss"] for record in records[1]) / 4)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    config = write(tmp_path / "ring.gin", keep_checkpoints=2)
    flowdistill.train(gin_file=config, workdir=tmp_path / "run")
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000008", "step_00000012"]


def test_another_configuration_is_not_continued(tmp_path):
    config = write(tmp_path / "ring.gin")
    flowdistill.train(gin_file=config, workdir=tmp_path / "run")
    before = (tmp_path / "run" / "config.gin").read_text()
    with pytest.raises(ConfigError, match=r"AdamW\.lr"):
        flowdistill.train(gin_file=config, gin_bindings=["AdamW.lr = 1.0"], workdir=tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a run of 12 steps"):
        flowdistill.train(gin_file=config, gin_bindings=["train.steps = 6"], workdir=tmp_path / "run")
    with pytest.raises(ConfigError, match="already holds a run"):
        flowdistill.train(gin_file=config, workdir=tmp_path / "run", resume="never")
    assert (tmp_path / "run" / "config.gin").read_text() == before


@flowdistill.register_objective("counted")
@attrs.define(kw_only=True)
class Counted(flowdistill.Objective):
    """Regression onto the noise, on states that it remembers; NaN from a given step on."""

    nan_from: int | None = None
    seen: ClassVar[list[torch.Tensor]] = []

    def loss(self, states, step):
        self.seen.append(states.x.clone())
        loss = (self.student.average_velocity(*states.to(0.0)) - states.x).square().mean()
        if self.nan_from is not None and step.number >= self.nan_from:
            loss = loss * math.nan
        return flowdistill.ObjectiveOutput(loss)


def custom(tmp_path, **changes):
    text = "\n".join(line for line in RING.splitlines() if "freeflow" not in line and "online_network" not in line)
    return write(tmp_path / "custom.gin", text + "\ntrain.objective = @counted()", **changes)


def test_accumulation_is_a_larger_batch(tmp_path):
    """Two backward passes of 8 states give the update of one pass over the same 16."""
    Counted.seen.clear()
    few = flowdistill.train(
        gin_file=custom(tmp_path, steps=1, batch_size=8, accumulation=2, ema=None), workdir=tmp_path / "few"
    )
    first, second = Counted.seen
    assert not torch.equal(first, second)
    student = flowdistill.load_flow_map(few.workdir)
    torch.manual_seed(0)
    again = from_teacher(flowdistill.load_teacher("ring"), "anchored", network=MLP(dim=2, hidden_size=16, depth=1))
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-3)
    x = torch.cat([first, second])
    (again.average_velocity(x, torch.ones(16), torch.zeros(16), Condition()) - x).square().mean().backward()
    nn.utils.clip_grad_norm_(again.parameters(), 1.0)
    optimizer.step()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("nan_from", [0, 5])
def test_a_loss_that_is_not_finite(tmp_path, nan_from):
    with pytest.raises(NonFiniteError) as error:
        flowdistill.train(
            gin_file=custom(tmp_path), gin_bindings=[f"counted.nan_from = {nan_from}"], workdir=tmp_path / "run"
        )
    message = str(error.value)
    assert "Counted" in message
    assert f"step {nan_from}" in message
    assert ("step_00000004" in message) == (nan_from == 5)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("*"))
    assert kept == (["step_00000004"] if nan_from == 5 else [])


@flowdistill.register_objective("poisoned")
@attrs.define(kw_only=True)
class Poisoned(Counted):
    """Has an auxiliary network whose loss is finite and whose gradient is not, at step 5."""

    def setup(self, student, teacher):
        super().setup(student, teacher)
        self.network = nn.Linear(2, 2)

    def modules(self):
        return {"auxiliary": self.network}

    def auxiliary_loss(self, name, states, step):
        output = self.network(states.x)
        return flowdistill.ObjectiveOutput((output - output.detach() + (step.number != 5)).abs().pow(0.5).mean())


def test_an_auxiliary_gradient_that_is_not_finite_is_noticed(tmp_path):
    config = custom(tmp_path)
    config.write_text(config.read_text().replace("@counted()", "@poisoned()"))
    with pytest.raises(NonFiniteError, match=r"at step 5; the last good checkpoint is .*step_00000004"):
        flowdistill.train(gin_file=config, workdir=tmp_path / "run")


def test_weights_that_are_shared_are_saved_and_loaded(tmp_path):
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    network[1].weight = network[0].weight
    checkpoint = save_checkpoint(tmp_path, 1, {"student": network.state_dict()}, {}, {}, keep=1).result()
    again = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    again[1].weight = again[0].weight
    fill(checkpoint, {"student": again.state_dict()})
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_plain_average_is_the_recursion():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = AveragedModel(model, Ema(decay=0.9))
    wanted = model.weight.detach().clone()
    for update in range(30):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        average.update(update)
        decay = min(0.9, (1 + update) / (10 + update))
        wanted = decay * wanted + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(average.module.weight, wanted)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_power_average_has_its_width(width):
    """The weights that the recursion gives to each update have the stated standard deviation, relative to the run."""
    steps, averaging = 4000, PowerEma(relative_width=width)
    decays = torch.tensor([averaging.decay_at(k) for k in range(steps)], dtype=torch.float64)
    later = torch.cat([decays.flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=torch.float64)])
    weights = (1 - decays) * later
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-9)
    time = torch.arange(steps, dtype=torch.float64) / steps
    mean = (weights * time).sum()
    assert float(((weights * (time - mean) ** 2).sum()).sqrt()) == pytest.approx(width, rel=0.02)


def test_schedules():
    schedule = Schedule(warmup=10 / 110, decay="cosine", final=0.1)
    factors = [schedule.factor(step, 110) for step in range(110)]
    assert factors[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert factors[60] == pytest.approx(0.55, abs=0.02)
    assert factors[-1] == pytest.approx(0.1, abs=0.01)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    linear = Schedule(decay="linear")
    assert linear.factor(50, 100) == pytest.approx(0.5, abs=0.02)
    assert Schedule().factor(99, 100) == 1.0


@pytest.mark.parametrize(
    ("optimizer", "flag"),
    [
        ("AdamW", "capturable = True"),
        ("RMSprop", "differentiable = True"),
        ("SparseAdam", "lr = 1e-3"),
        ("LBFGS", "lr = 1"),
    ],
)
def test_an_optimiser_that_refuses_its_first_step_is_named(tmp_path, optimizer, flag):
    config = write(tmp_path / "ring.gin", RING.replace("AdamW", optimizer), steps=1)
    with pytest.raises(ConfigError, match=f"{optimizer} cannot update these parameters: "):
        flowdistill.train(config, gin_bindings=[f"{optimizer}.{flag}"], workdir=tmp_path / "run", report=False)


def test_an_augmentation_that_is_a_class_is_refused(tmp_path):
    bindings = ["train.steps = 1", "noised_data.augment = @mlp"]
    with pytest.raises(ConfigError, match=r"augment must map images to images, as @random_affine\(\) does, not <class"):
        flowdistill.train("meanflow", on="plane", gin_bindings=bindings, workdir=tmp_path / "run", report=False)


def test_a_number_too_large_for_tensors_is_told(tmp_path):
    bindings = ["train.steps = 1", "consistency.sigma_max = 1e308"]
    with pytest.raises(ConfigError, match="a number of the configuration is too large"):
        flowdistill.train("cd", on="plane", gin_bindings=bindings, workdir=tmp_path / "run", report=False)


def test_a_number_that_overflows_is_told_with_its_binding(tmp_path):
    config = write(tmp_path / "ring.gin")
    with pytest.raises(ConfigError, match=r"ring: Numerical result out of range\n  ring.std: "):
        flowdistill.train(config, gin_bindings=["ring.std = 1e308"], workdir=tmp_path / "run", report=False)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_float32_products_are_in_tf32_beside_bfloat16_alone(tmp_path, precision, monkeypatch):
    """As a flag of PyTorch, which means nothing on a CPU, and is afterwards as it was."""
    seen, flag = [], torch.backends.cuda.matmul
    config = write(tmp_path / "ring.gin", precision=f"'{precision}'")
    with parsed([config], []):
        loop = configured_loop(tmp_path / "run", "cpu")
    loss = loop.loss
    monkeypatch.setattr(loop, "loss", lambda *given: seen.append(flag.allow_tf32) or loss(*given))
    with tf32(False):
        loop.train_step()
        assert flag.allow_tf32 is False
    assert seen == [precision == "bf16"]
