"""What another thread does to a checkpoint while the training goes on."""

import os
import sys
import threading
import time
from pathlib import Path

import attrs
import pytest
import torch
from runs import RING, write

import flowdistill
from flowdistill import CheckpointWriteError, NonFiniteError
from flowdistill.plumbing import files
from flowdistill.runs.checkpoints import checkpoint_path, save_checkpoint
from flowdistill.runs.records import read_records

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc names the files")


class Disk:
    """Stands for fsync, which waits for leave, and then does something to the file."""

    def __init__(self, monkeypatch, do):
        self.leave, self.do, self.sync = threading.Event(), do, os.fsync
        monkeypatch.setattr(files.os, "fsync", self)

    def __call__(self, file):
        assert self.leave.wait(60)
        self.sync(file)
        self.do(Path(os.readlink(f"/proc/self/fd/{file}")))


def linger(path):
    time.sleep(0.05)


def full(path):
    raise OSError(28, "No space left on device")


def alter(path):
    if path.name == "student.safetensors":
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 4)


def test_a_checkpoint_holds_the_weights_of_its_save_and_has_its_name_last(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"student": network().state_dict()}, {}, {}, keep=1).result()
    disk, student = Disk(monkeypatch, linger), network()
    saving = save_checkpoint(tmp_path, 2, {"student": student.state_dict()}, {}, {}, keep=1)
    with torch.no_grad():
        student.weight.zero_()
    time.sleep(0.1)
    assert names(tmp_path) == [".step_00000002.partial", "step_00000001"]
    disk.leave.set()
    assert saving.result(60) == checkpoint_path(tmp_path, 2)
    assert names(tmp_path) == ["step_00000002"]
    found = files.load_tensors(checkpoint_path(tmp_path, 2) / "student.safetensors")
    assert torch.equal(found["weight"], network().weight)


@pytest.mark.parametrize(("deed", "reason"), [(alter, "student.safetensors is .*altered.*"), (full, "No space .*")])
def test_a_checkpoint_that_the_disk_refuses_or_alters_never_has_its_name(tmp_path, monkeypatch, deed, reason):
    before = save_checkpoint(tmp_path, 1, {"student": network().state_dict()}, {}, {}, keep=1).result()
    Disk(monkeypatch, deed).leave.set()
    saving = save_checkpoint(tmp_path, 2, {"student": network().state_dict()}, {}, {}, keep=1)
    with pytest.raises(CheckpointWriteError, match=f"step_00000002: .*{reason}; the last one, {before}, is untouched"):
        saving.result(60)
    assert names(tmp_path) == ["step_00000001"]


@flowdistill.register_objective("troubled")
@attrs.define(kw_only=True)
class Troubled(flowdistill.Objective):
    """Regression onto the noise, with a factor that a test computes at step 5."""

    def factor(self):
        return 1.0

    def loss(self, states, step):
        loss = (self.student.average_velocity(*states.to(0.0)) - states.x).square().mean()
        return flowdistill.ObjectiveOutput(loss * (self.factor() if step.number == 5 else 1.0))


def troubled(folder, **changes):
    text = "\n".join(line for line in RING.splitlines() if "freeflow" not in line and "online_network" not in line)
    return write(folder / "ring.gin", f"{text}\ntrain.objective = @troubled()", **changes)


def test_one_checkpoint_is_on_its_way_at_a_time_and_the_end_waits_for_the_last(tmp_path, monkeypatch):
    on_their_way = set()

    def look(path):
        linger(path)
        on_their_way.add(tuple(name for name in names(tmp_path / "run") if name.startswith(".")))

    Disk(monkeypatch, look).leave.set()
    result = flowdistill.train(troubled(tmp_path, steps=4, checkpoint_every=1), workdir=tmp_path / "run", report=False)
    assert on_their_way == {(f".step_{step:08d}.partial",) for step in range(1, 5)}
    assert names(tmp_path / "run")[-1] == result.checkpoint.name == "step_00000004"


def test_a_training_goes_on_until_a_record_says_that_the_disk_has_failed(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, full)

    def factor(_):
        disk.leave.set()
        for thread in threading.enumerate():
            if thread.name.endswith("(run)"):  # as in_thread calls it
                thread.join(60)
        return 1.0

    monkeypatch.setattr(Troubled, "factor", factor)
    with pytest.raises(CheckpointWriteError, match=r"step_00000004: No space left on device; there is none"):
        flowdistill.train(troubled(tmp_path, checkpoint_every=4, log_every=2, steps=50), workdir=tmp_path / "run")
    assert [record["step"] for record in read_records(tmp_path / "run")] == [2, 4]
    assert names(tmp_path / "run") == []


def test_the_end_of_a_training_tells_that_the_disk_has_failed(tmp_path, monkeypatch):
    Disk(monkeypatch, full).leave.set()
    with pytest.raises(CheckpointWriteError, match="step_00000004: No space left on device"):
        flowdistill.train(troubled(tmp_path, steps=4), workdir=tmp_path / "run")


def test_a_loss_that_is_not_finite_names_the_checkpoint_on_its_way(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, linger)

    def factor(_):
        disk.leave.set()
        return float("nan")

    monkeypatch.setattr(Troubled, "factor", factor)
    with pytest.raises(NonFiniteError, match=r"at step 5; the last good checkpoint is .*step_00000004"):
        flowdistill.train(troubled(tmp_path, log_every=2), workdir=tmp_path / "run")
    assert names(tmp_path / "run") == ["step_00000004"]


def test_an_error_of_a_training_waits_for_the_checkpoint_on_its_way(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, linger)

    def factor(_):
        disk.leave.set()
        raise ZeroDivisionError

    monkeypatch.setattr(Troubled, "factor", factor)
    with pytest.raises(ZeroDivisionError):
        flowdistill.train(troubled(tmp_path), workdir=tmp_path / "run")
    assert names(tmp_path / "run") == ["step_00000004"]


def test_a_checkpoint_that_fails_beside_another_error_is_a_warning(tmp_path, monkeypatch):
    disk = Disk(monkeypatch, full)

    def factor(_):
        disk.leave.set()
        raise ZeroDivisionError

    monkeypatch.setattr(Troubled, "factor", factor)
    with pytest.warns(RuntimeWarning, match="step_00000004: No space left"), pytest.raises(ZeroDivisionError):
        flowdistill.train(troubled(tmp_path), workdir=tmp_path / "run")
    assert names(tmp_path / "run") == []
