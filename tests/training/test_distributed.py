"""Training by several processes, as torchrun starts them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from runs import write

import flowdistill
from flowdistill import ConfigError, FlowDistillError
from flowdistill.networks import SiT
from flowdistill.plumbing import distributed
from flowdistill.plumbing.files import locked
from flowdistill.runs.checkpoints import checkpoint_paths, load_tensors_of

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 13), reason="processes share networks from PyTorch 2.13 on")

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def torchrun(*arguments):
    """Two processes, told nothing but torchrun's variables."""
    command = [sys.executable, *TORCHRUN, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def training(gin_file, run):
    """The command line, on the CPU."""
    return torchrun("-m", "flowdistill", "train", "--gin_file", gin_file, "--workdir", run, "--device", "cpu")


def finish(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out, err


def tensors(run):
    checkpoint = run / "checkpoints" / "step_00000012"
    names = {file.name.partition(".")[0] for file in checkpoint.glob("*.safetensors")} - {"optimizers"}
    return {(name, key): value for name in names for key, value in load_tensors_of(checkpoint, name).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A configuration of four backward passes a step, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    gin_file = write(folder / "ring.gin", accumulation=4, keep_checkpoints=1000, evaluation="@evaluation()")
    gin_file.write_text(
        gin_file.read_text()
        + "evaluation.metrics = ('w2',)\nevaluation.num_samples = 50\nevaluation.teacher_steps = (1,)\n"
    )
    flowdistill.train(gin_file=gin_file, workdir=folder / "run", device="cpu")
    return gin_file, folder / "run"


def agree(run, other):
    ours, theirs = tensors(run), tensors(other)
    assert {name for name, _ in ours} == {"student", "ema", "online"}
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], msg=str(name))
    records, expected = (
        [json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, other)
    )
    assert len(records) == 6
    for left, right in zip(records, expected, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {"steps_per_second"}:
            assert left[name] == pytest.approx(right[name], rel=1e-3), name
    rows, expected_rows = (json.loads((r / "evaluation.json").read_text())["rows"] for r in (run, other))
    assert rows.keys() == expected_rows.keys()
    for name, row in rows.items():
        assert row == pytest.approx(expected_rows[name], rel=1e-3), name


def test_two_processes_train_what_one_does_with_the_same_configuration(alone, tmp_path):
    gin_file, expected = alone
    out, err = finish(training(gin_file, tmp_path / "run"))
    assert out.split() == [str(tmp_path / "run" / "report.md")]
    assert err.count("step 12/12") == 1
    agree(tmp_path / "run", expected)


def test_one_process_continues_what_two_began(alone, tmp_path):
    gin_file, expected = alone
    slow = tmp_path / "slow.gin"
    slow.write_text(gin_file.read_text().replace("train.steps = 12", "train.steps = 2000"))
    process, checkpoint = training(slow, tmp_path / "run"), tmp_path / "run" / "checkpoints" / "step_00000004"
    limit = time.monotonic() + 120
    while not checkpoint.is_dir():
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert err.count("SIGTERM stopped the training after step") == 1
    for later in sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[1:]:
        later.rename(tmp_path / later.name)
    flowdistill.train(gin_file=gin_file, workdir=tmp_path / "run", device="cpu")
    agree(tmp_path / "run", expected)


@pytest.mark.parametrize("noise_time", [0, 1])
def test_a_file_decides_what_all_processes_build(noise_time, tmp_path):
    """The second process builds without the file at first, and so a network of another size, or with another time."""
    sizes = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    network = SiT(**sizes, learn_sigma=noise_time == 0)
    network.final_layer.linear.weight.data.normal_()
    torch.save({"ema": network.state_dict()}, tmp_path / "sit.pt")
    text = (
        "train.teacher = @sit_teacher()\ntrain.flow_map = @from_teacher\nfrom_teacher.conditioning = 'anchored'\n"
        f"sit_teacher.checkpoint = '{tmp_path / 'sit.pt'}'\nsit_teacher.num_heads = 2\nsit_teacher.num_classes = 3\n"
        f"sit_teacher.noise_time = {noise_time}\n"
        "train.objective = @freeflow_prediction()\ntrain.optimizer = @SGD\nSGD.lr = 1e-3\ntrain.steps = 2\n"
        "train.batch_size = 2\ntrain.accumulation = 2\ntrain.sample_every = 1\ntrain.callbacks = []\n"
    )
    (gin_file := tmp_path / "sit.gin").write_text(text)
    flowdistill.train(gin_file=gin_file, workdir=tmp_path / "one", device="cpu", report=False)
    finish(training(gin_file, tmp_path / "two"))
    one, two = (
        load_tensors_of(run / "checkpoints" / "step_00000002", "student")
        for run in (tmp_path / "one", tmp_path / "two")
    )
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, msg=name)


def test_backward_passes_that_cannot_be_shared_out_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="set it to a multiple of 3"):
        flowdistill.plan(write(tmp_path / "ring.gin", accumulation=4))


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "8"}, {"WORLD_SIZE": "x", "RANK": "0"}, {"RANK": "3"}])
def test_variables_that_torchrun_does_not_set_so_are_refused(tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="start several processes by torchrun"):
        flowdistill.train(write(tmp_path / "ring.gin"), workdir=tmp_path / "run")


def test_processes_that_cannot_meet_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"cannot meet.*MASTER_ADDR.*torchrun"):
        flowdistill.train(write(tmp_path / "ring.gin"), workdir=tmp_path / "run")


def test_all_processes_are_refused_where_the_first_one_is(alone, tmp_path):
    with locked(tmp_path / "run"):
        _, err = (process := training(alone[0], tmp_path / "run")).communicate(timeout=120)
    assert process.returncode == 1
    assert f"process {os.getpid()} on " in err
    assert not (tmp_path / "run" / "config.gin").exists()


STOPPED = """
import os, signal, sys, attrs, flowdistill
@flowdistill.register_objective("stopped")
@attrs.define(kw_only=True)
class Stopped(flowdistill.Objective):
    def loss(self, states, step):
        if step.number == 5 and os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGUSR1)
        return flowdistill.ObjectiveOutput((self.student.average_velocity(*states.to(0.0)) - states.x).square().mean())
try:
    flowdistill.train(sys.argv[1], workdir=sys.argv[2], device="cpu")
except flowdistill.TrainingInterrupted as stop:
    print(f"{stop}\\n", end="")
"""


def test_all_processes_stop_at_the_step_that_follows_a_signal_to_one(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED)
    gin_file = write(tmp_path / "ring.gin", accumulation=2)
    lines = [line for line in gin_file.read_text().splitlines() if "freeflow" not in line and "online" not in line]
    gin_file.write_text("\n".join([*lines, "train.objective = @stopped()"]))
    out, _ = finish(torchrun(tmp_path / "stopped.py", gin_file, tmp_path / "run"))
    assert out.count("stopped the training after step 7 of 12") == 2
    assert out.count("SIGUSR1") == out.count("a signal stopped") == 1
    assert [p.name for p in checkpoint_paths(tmp_path / "run")] == ["step_00000004", "step_00000007"]


LEFT = """
import os, sys, time, flowdistill
flowdistill.train(sys.argv[1], workdir=sys.argv[2], device="cpu", report=False)
if os.environ["RANK"] == sys.argv[3]:
    time.sleep(1)
"""


@pytest.mark.parametrize("later", ["0", "1"])
def test_a_process_may_end_before_the_others(later, tmp_path):
    """Threads of Gloo that are left must not abort those that are still there."""
    (tmp_path / "left.py").write_text(LEFT)
    gin_file = write(tmp_path / "ring.gin", accumulation=2, steps=2)
    finish(torchrun(tmp_path / "left.py", gin_file, tmp_path / "run", later))


# What one of two processes does alone.


@pytest.fixture
def odd(tmp_path):
    """Start two processes, of which the second does a deed."""
    gin_file = write(tmp_path / "odd.gin", accumulation=2, steps=8)
    lines = [line for line in gin_file.read_text().splitlines() if "freeflow" not in line and "online" not in line]
    gin_file.write_text("\n".join([*lines, "train.objective = @odd()"]))
    script = Path(__file__).with_name("one_of_two.py")

    def start(deed, *options):
        return torchrun(script, deed, gin_file, "--workdir", tmp_path / "run", "--device", "cpu", *options)

    return start


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        pytest.param(
            "stops", "process 1 of 2 gave no sign for 3 seconds: look at what it said", marks=pytest.mark.slow
        ),
        pytest.param("dies", "process 1 of 2 ended: look at what it said", marks=pytest.mark.slow),
        pytest.param("fails", "a file is damaged", marks=pytest.mark.slow),
        ("has_another_rate", "process 1 has another configuration than process 0 (one has 'AdamW.lr = 0.001')"),
        pytest.param("has_a_mistake", "batch_size", marks=pytest.mark.slow),
        pytest.param(
            "has_no_room",
            "step_00000004: No space left on device (process 0 of 2); there is none",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_learn_what_one_of_them_does(odd, deed, message):
    """One message says it, whoever noticed, and nobody waits for longer than the time-out."""
    process = odd(deed, "--timeout", "3")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert message in err
    assert err.count("flowdistill: error") == 1
    assert "flowdistill/plumbing" not in err  # as a traceback has


@pytest.mark.slow
def test_the_first_process_may_take_longer_than_the_time_out(odd, tmp_path):
    evaluated = ["--gin.train.evaluation=@evaluation()", "--gin.evaluation.metrics=('w2',)"]
    evaluated += ["--gin.evaluation.num_samples=50", "--gin.evaluation.teacher_steps=(1,)"]
    finish(odd("is_slow", "--timeout", "3", "--gin.train.sample_every=4", *evaluated))
    assert [p.name for p in checkpoint_paths(tmp_path / "run")] == ["step_00000004", "step_00000008"]
    assert (tmp_path / "run" / "report.md").is_file()


@pytest.mark.slow
def test_a_metric_may_exist_in_one_process_alone(odd, tmp_path):
    finish(odd("has_a_part"))
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["extra"] == 1.0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ConfigError("wrong")])
def test_one_process_alone_tells_an_error(error, monkeypatch):
    failure = distributed._Failure(error, rank=0)
    with pytest.raises(type(error)) as raised:
        failure.throw()
    assert raised.value is error
    assert not isinstance(error, FlowDistillError) or not error.told
    monkeypatch.setattr(distributed, "rank_and_world", lambda: (1, 2))
    with pytest.raises(FlowDistillError, match=f"{error.args[-1]}$") as raised:
        failure.throw()
    assert raised.value.told


@pytest.mark.slow
def test_all_processes_have_the_weights_of_the_first(odd, tmp_path):
    out, _ = finish(odd("has_other_weights"))
    first, second, report = out.split()
    assert first == second
    assert report == str(tmp_path / "run" / "report.md")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_told_once(odd):
    _, err = odd("nothing", "--gin.AdamW.lr=1e30").communicate(timeout=120)
    assert err.count("flowdistill: error") == err.count("NaN or infinite") == 1
