"""Signals: the step is finished and saved, the message says how to continue, and a second signal ends at once."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import attrs
import pytest
from runs import RING, command, write

import flowdistill
from flowdistill import ConfigError, TrainingInterrupted
from flowdistill.plumbing import files
from flowdistill.plumbing.files import locked
from flowdistill.runs.checkpoints import checkpoint_paths
from flowdistill.training import stopping

SIGNALS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]


@flowdistill.register_objective("signalled")
@attrs.define(kw_only=True)
class Signalled(flowdistill.Objective):
    """Regression onto the noise, which sends its process signals at a step."""

    signals: tuple[str, ...] = ()
    at: int = 5

    def loss(self, states, step):
        if step.number == self.at:
            for name in self.signals:
                signal.raise_signal(getattr(signal, name))
        return flowdistill.ObjectiveOutput((self.student.average_velocity(*states.to(0.0)) - states.x).square().mean())


def signalled(folder, *signals, **changes):
    text = "\n".join(line for line in RING.splitlines() if "freeflow" not in line and "online_network" not in line)
    return write(
        folder / "ring.gin", f"{text}\ntrain.objective = @signalled()\nsignalled.signals = {signals}", **changes
    )


@pytest.fixture
def handlers():
    """Handlers of the caller's, and the signals that reach them."""
    seen = []
    numbers = [getattr(signal, name) for name in SIGNALS]
    before = {number: signal.signal(number, lambda number, _: seen.append(number)) for number in numbers}
    ours = {number: signal.getsignal(number) for number in numbers}
    yield seen
    assert {number: signal.getsignal(number) for number in numbers} == ours
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_stops_a_training_after_its_step(tmp_path, handlers, name):
    run = tmp_path / "run"
    message = rf"{name} stopped the training after step 6 of 12, .*step_00000006: run the same command again"
    with pytest.raises(TrainingInterrupted, match=message):
        flowdistill.train(signalled(tmp_path, name), workdir=run)
    assert handlers == []
    assert checkpoint_paths(run)[-1].name == "step_00000006"
    assert not (run / "report.md").exists()
    flowdistill.train(signalled(tmp_path, name), workdir=run, report=False)
    assert checkpoint_paths(run)[-1].name == "step_00000012"


def test_a_second_signal_does_what_it_did_before(tmp_path, handlers):
    with pytest.raises(TrainingInterrupted, match="SIGTERM stopped"):
        flowdistill.train(signalled(tmp_path, "SIGTERM", "SIGUSR1"), workdir=tmp_path / "run")
    assert handlers == [signal.SIGUSR1]


def test_a_signal_in_the_last_step_leaves_the_report_for_later(tmp_path, handlers):
    gin_file = signalled(tmp_path, "SIGTERM", steps=6)
    with pytest.raises(TrainingInterrupted, match="after step 6 of 6"):
        flowdistill.train(gin_file, workdir=tmp_path / "run")
    assert not (tmp_path / "run" / "report.md").exists()
    assert flowdistill.train(gin_file, workdir=tmp_path / "run").steps == 6
    assert (tmp_path / "run" / "report.md").is_file()


def test_signals_that_are_ignored_stay_so(tmp_path, handlers):
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert flowdistill.train(signalled(tmp_path, "SIGHUP"), workdir=tmp_path / "run", report=False).steps == 12
    signal.signal(signal.SIGHUP, before)


def test_another_thread_trains_without_handlers(tmp_path, handlers):
    done = []
    thread = threading.Thread(
        target=lambda: done.append(flowdistill.train(signalled(tmp_path), workdir=tmp_path / "run", report=False))
    )
    thread.start()
    thread.join()
    assert done[0].steps == 12


SLOW = """
import time
import attrs, flowdistill
@flowdistill.register_objective("slow")
@attrs.define(kw_only=True)
class Slow(flowdistill.Objective):
    def loss(self, states, step):
        open(f"at_{step.number}", "w").close()
        until = time.monotonic() + (60 if step.number == 7 else 0.01)
        while time.monotonic() < until:
            time.sleep(0.01)
        return flowdistill.ObjectiveOutput((self.student.average_velocity(*states.to(0.0)) - states.x).square().mean())
"""


@pytest.fixture
def slow(tmp_path):
    """The command line that trains 40 steps, of which the eighth takes a minute."""
    (tmp_path / "slow.py").write_text(SLOW)
    signalled(tmp_path, steps=40, checkpoint_every=40)
    text = (tmp_path / "ring.gin").read_text().replace("@signalled()", "@slow()")
    lines = [line for line in text.splitlines() if not line.startswith("signalled")]
    (tmp_path / "ring.gin").write_text("\n".join(["import slow", *lines]))
    return [sys.executable, "-m", "flowdistill", "train", "ring.gin", "--workdir", "run"]


def start(arguments, folder, until):
    """A process that has come to a step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        arguments, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 120
    while not (folder / f"at_{until}").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)
    return process


def test_the_command_ends_well_and_says_how_to_continue(tmp_path, slow):
    (tmp_path / "slow.py").write_text(SLOW.replace("60", "1"))
    process = start(slow, tmp_path, 7)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert err.splitlines()[-1].startswith("flowdistill: SIGTERM stopped the training after step 8 of 40")
    assert [p.name for p in checkpoint_paths(tmp_path / "run")] == ["step_00000008"]


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", -signal.SIGTERM), pytest.param("SIGINT", 130, marks=pytest.mark.slow)]
)
def test_a_second_signal_ends_the_command_at_once(tmp_path, slow, name, code):
    process = start(slow, tmp_path, 7)
    process.send_signal(getattr(signal, name))
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in err


# The lock, whose owner is a process of its own.


def test_a_second_process_in_the_same_directory_is_refused(tmp_path, slow):
    first = start(slow, tmp_path, 7)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    second = command(*slow[3:], cwd=tmp_path)
    assert second.returncode == 2
    assert second.stderr.startswith(f"flowdistill: error: process {first.pid} on ")
    assert "is using run" in second.stderr
    assert "Traceback" not in second.stderr
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    first.kill()
    first.communicate()
    with locked(tmp_path / "run"):  # which the operating system has released
        pass


def test_one_process_cannot_own_a_directory_twice(tmp_path):
    with (
        locked(tmp_path / "run"),
        pytest.raises(ConfigError, match=f"process {os.getpid()} on .* is using .*run"),
        locked(tmp_path / "run"),
    ):
        pass


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.warns(RuntimeWarning, match="No locks available"), locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("owner", [b"", b"\xff\x00", b"process 1 on \x1b[2J\n", b"process 99\n" * 999])
def test_the_owner_is_named_only_where_the_lock_says_it(tmp_path, owner):
    with locked(tmp_path):
        (tmp_path / ".lock").write_bytes(owner)
        with pytest.raises(ConfigError, match=r"^another process is using"), locked(tmp_path):
            pass


def test_several_processes_take_the_same_signal_from_launcher_and_scheduler_for_one(handlers, monkeypatch):
    monkeypatch.setattr(stopping, "rank_and_world", lambda: (0, 2))
    with stopping.StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert handlers == []
        assert signals.asked()
        monkeypatch.setattr(stopping, "_ECHO", 0.0)
        signal.raise_signal(signal.SIGTERM)
        assert handlers == [signal.SIGTERM]
