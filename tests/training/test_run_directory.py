"""A run directory of which parts are damaged or removed, and streams that cannot be written: the training ends well."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
import torch
from runs import RING, command, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import flowdistill
from flowdistill import ConfigError, NonFiniteError
from flowdistill.runs.checkpoints import checkpoint_paths
from flowdistill.runs.records import read_records


def records(run):
    """All but the speeds."""
    return [{k: v for k, v in record.items() if k != "steps_per_second"} for record in read_records(run)]


def same(a, b):
    newest = [checkpoint_paths(run)[-1] for run in (a, b)]
    names = ["student.safetensors", "ema.safetensors", "optimizers.safetensors"]
    return all((newest[0] / name).read_bytes() == (newest[1] / name).read_bytes() for name in names)


# The log.

BAD = [
    b'{"step": 3, "lo',
    b'\xff\xfe{"step": 2}',
    b'{"loss": 1.0}',
    b'{"step": "2", "loss": 1.0}',
    b'{"step": 2.0}',
    b'{"step": true}',
    b'{"step": 2, "loss": null}',
    b'{"step": 2, "loss": [1]}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b"[1, 2]",
    b"null",
    b"7",
    b"[" * 100_000,
]


def test_lines_that_are_no_records_are_set_aside(tmp_path):
    gin_file, run = write(tmp_path / "ring.gin"), tmp_path / "run"
    flowdistill.train(gin_file, workdir=run, report=False)
    path = run / "metrics.jsonl"
    good = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*BAD[:5], *good, b"", *BAD[5:]]))
    assert len(read_records(run)) == len(good)
    with pytest.warns(RuntimeWarning, match=f"{len(BAD)} lines of .*metrics.jsonl are no records") as caught:
        flowdistill.train(gin_file, workdir=run)
    assert len(caught) == 1
    assert path.read_bytes().splitlines() == good
    assert (run / "metrics.rejected").read_bytes().splitlines() == BAD


def test_a_record_of_little_is_enough_for_a_report(tmp_path):
    gin_file, run = write(tmp_path / "ring.gin"), tmp_path / "run"
    flowdistill.train(gin_file, workdir=run, report=False)
    (run / "metrics.jsonl").write_text('{"step": 12}\n')
    flowdistill.train(gin_file, workdir=run)
    assert "12 steps" in (run / "report.md").read_text()


def test_the_first_record_after_a_resume_averages_all_its_steps(tmp_path):
    """Records each 3 steps, checkpoints each 7: the record at 9 begins before the checkpoint to go on from."""
    gin_file = write(tmp_path / "ring.gin", log_every=3, checkpoint_every=7)
    run = tmp_path / "run"
    flowdistill.train(gin_file, workdir=run, report=False)
    whole = records(run)
    assert [record["step"] for record in whole] == [3, 6, 9, 12]
    shutil.rmtree(run / "checkpoints" / "step_00000012")
    flowdistill.train(gin_file, workdir=run, report=False)
    assert records(run) == whole


def test_tensorboard_reads_the_records(tmp_path):
    gin_file, run = write(tmp_path / "ring.gin"), tmp_path / "run"
    flowdistill.train(gin_file, gin_bindings=["train.steps = 6"], workdir=run, report=False)
    flowdistill.train(gin_file, workdir=run, report=False)
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    losses = [(event.step, event.value) for event in board.Scalars("loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in read_records(run)]


# Parts that go while it runs.


@flowdistill.register_objective("removing")
@attrs.define(kw_only=True)
class Removing(flowdistill.Objective):
    """Regression onto the noise, which removes something at step 5."""

    path: str

    def loss(self, states, step):
        path = os.path.expandvars(self.path)
        if step.number == 5:
            while list(Path(os.environ["RUN"], "checkpoints").glob(".*")):  # the checkpoint of step 4 is on its way
                time.sleep(0.01)
            shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)
        return flowdistill.ObjectiveOutput((self.student.average_velocity(*states.to(0.0)) - states.x).square().mean())


def plain(folder, objective, **changes):
    """A configuration of an objective without networks of its own."""
    text = "\n".join(line for line in RING.splitlines() if "freeflow" not in line and "online_network" not in line)
    return write(folder / "ring.gin", f"{text}\n{objective}", **changes)


@pytest.mark.parametrize(
    "part",
    ["", "config.gin", "metrics.jsonl", "tensorboard", "checkpoints", "samples", ".lock", "checkpoints/step_00000004"],
)
def test_what_is_removed_while_it_runs_is_made_again(tmp_path, monkeypatch, part):
    monkeypatch.setenv("RUN", str(tmp_path / "run"))
    gin_file = plain(tmp_path, f"train.objective = @removing()\nremoving.path = '$RUN/{part}'", sample_every=4)
    flowdistill.train(gin_file, workdir=tmp_path / "run")
    assert flowdistill.sample(tmp_path / "run", 2).shape == (2, 2)
    assert read_records(tmp_path / "run")[-1]["step"] == 12
    assert (tmp_path / "run" / "report.md").is_file()


def test_a_log_that_cannot_be_written_does_not_end_a_training(tmp_path):
    """Also TensorBoard's and the pictures: each warns once."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("tensorboard", "samples"):
        (run / name).write_text("a file")
    (run / "metrics.jsonl").mkdir()
    with pytest.warns(RuntimeWarning, match="goes on without") as caught:
        result = flowdistill.train(write(tmp_path / "ring.gin", sample_every=4), workdir=run)
    assert result.steps == 12
    assert len(caught) == 3


def test_checkpoints_without_their_configuration_are_not_continued(tmp_path):
    gin_file, run = write(tmp_path / "ring.gin"), tmp_path / "run"
    flowdistill.train(gin_file, workdir=run, report=False)
    (run / "config.gin").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.gin is no gin file"):
        flowdistill.train(gin_file, workdir=run)
    (run / "config.gin").unlink()
    with pytest.raises(ConfigError, match=r"checkpoints and no config\.gin"):
        flowdistill.train(gin_file, workdir=run)


# Streams.


@pytest.mark.parametrize(
    "streams",
    [">/dev/full 2>/dev/full", *(pytest.param(s, marks=pytest.mark.slow) for s in (">&-", "2>&-", ">&- 2>&-"))],
)
def test_streams_that_cannot_be_written_do_not_end_a_training(tmp_path, streams):
    write(tmp_path / "ring.gin", steps=2)
    line = f"exec {sys.executable} -m flowdistill train ring.gin --workdir run {streams}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0
    assert (tmp_path / "run" / "report.md").is_file()


def test_a_warning_is_one_line_of_the_command(tmp_path):
    gin_file = write(tmp_path / "ring.gin", steps=2)
    flowdistill.train(gin_file, workdir=tmp_path / "run", report=False)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write("half a li")
    done = command("train", "ring.gin", "--workdir", "run", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0].startswith("flowdistill: 1 lines of run/metrics.jsonl are no records")


# Infinite numbers.


def test_infinite_values_are_kept_in_the_configuration(tmp_path):
    """A limit that no gradient reaches: with the default, 1.0, the weights are others."""
    bindings = ["train.gradient_clip = 1e999"]
    flowdistill.train(write(tmp_path / "ring.gin"), gin_bindings=bindings, workdir=tmp_path / "first", report=False)
    flowdistill.train(tmp_path / "first" / "config.gin", workdir=tmp_path / "second", report=False)
    flowdistill.train(write(tmp_path / "ring.gin"), workdir=tmp_path / "third", report=False)
    assert same(tmp_path / "first", tmp_path / "second")
    assert not same(tmp_path / "first", tmp_path / "third")
    flowdistill.train(tmp_path / "first" / "config.gin", workdir=tmp_path / "first", report=False)


# What is not finite.


@pytest.mark.parametrize("ema", ["@ema()", None])
@pytest.mark.parametrize(("rate", "what"), [("1e25", "samples of the student"), ("1e38", "the update of student")])
def test_a_student_that_overflows_is_neither_saved_nor_reported(tmp_path, rate, what, ema):
    gin_file = plain(tmp_path, "train.objective = @freeflow_prediction()", steps=1, ema=ema)
    with pytest.raises(NonFiniteError, match=f"{what}.*lower learning rate"):
        flowdistill.train(gin_file, gin_bindings=[f"AdamW.lr = {rate}"], workdir=tmp_path / "run")
    assert checkpoint_paths(tmp_path / "run") == []
    assert not (tmp_path / "run" / "report.md").exists()


@flowdistill.register_objective("overflowing")
@attrs.define(kw_only=True)
class Overflowing(flowdistill.Objective):
    """Its loss and gradient are finite, and after step 3 a weight is infinite."""

    def loss(self, states, step):
        return flowdistill.ObjectiveOutput((self.student.average_velocity(*states.to(0.0)) - states.x).square().mean())

    def after_step(self, number):
        if number == 3:
            with torch.no_grad():
                next(p for p in self.student.parameters() if p.requires_grad).fill_(torch.inf)


def test_infinite_weights_are_not_saved(tmp_path):
    with pytest.raises(NonFiniteError, match="weights of student became NaN or infinite by step 4"):
        flowdistill.train(plain(tmp_path, "train.objective = @overflowing()", log_every=9), workdir=tmp_path / "run")
    assert checkpoint_paths(tmp_path / "run") == []
