"""``flowdistill launch``: signals, deaths and restarts of processes on one machine."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from runs import write

from flowdistill.runs.checkpoints import checkpoint_paths

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 13), reason="processes share networks from PyTorch 2.13 on")

# An objective whose second process ends itself once, before the tenth step.
DIES = """
import os, pathlib, signal, attrs, flowdistill
@flowdistill.register_objective("dies")
@attrs.define(kw_only=True)
class Dies(flowdistill.Objective):
    def loss(self, states, step):
        marker = pathlib.Path("died")
        if os.environ["RANK"] == "1" and step.number == 9 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return flowdistill.ObjectiveOutput((self.student.average_velocity(*states.to(0.0)) - states.x).square().mean())
"""


def launch(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "flowdistill", "launch", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def train(folder, gin_file, *options):
    return launch(folder, "--nproc_per_node", 2, *options, "train", gin_file, "--workdir", "run", "--device", "cpu")


def steps(folder):
    return [int(path.name.removeprefix("step_")) for path in checkpoint_paths(folder / "run")]


@pytest.fixture
def deadly(tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    gin_file = write(tmp_path / "ring.gin", accumulation=2, evaluation="None")
    lines = [line for line in gin_file.read_text().splitlines() if "freeflow" not in line and "online" not in line]
    gin_file.write_text("\n".join(["import dies", *lines, "train.objective = @dies()"]))
    return gin_file


def test_a_signal_to_the_launcher_saves_once_and_the_same_command_continues(tmp_path):
    gin_file = write(tmp_path / "ring.gin", accumulation=2, evaluation="None", keep_checkpoints=1000)
    gin_file.write_text(gin_file.read_text().replace("train.steps = 12", "train.steps = 2000"))
    process, limit = train(tmp_path, gin_file), time.monotonic() + 100
    while not steps(tmp_path):
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (stopped,) = re.findall(r"SIGTERM stopped the training after step (\d+) of 2000.*run the same command again", err)
    assert "Traceback" not in err
    assert steps(tmp_path)[-1] == int(stopped)
    gin_file.write_text(gin_file.read_text().replace("train.steps = 2000", f"train.steps = {int(stopped) + 4}"))
    _, err = (process := train(tmp_path, gin_file)).communicate(timeout=100)
    assert process.returncode == 0, err
    assert f"resumed run/checkpoints/step_{int(stopped):08d}" in err
    assert steps(tmp_path)[-1] == int(stopped) + 4


def test_a_training_goes_on_after_the_death_of_a_process(deadly, tmp_path):
    _, err = (process := train(tmp_path, deadly, "--max-restarts", 1)).communicate(timeout=100)
    assert process.returncode == 0, err
    assert (tmp_path / "died").exists()
    assert len(re.findall("resumed run/checkpoints/step_0000000[48]", err)) == 1  # that of step 8 may be on its way
    assert steps(tmp_path)[-1] == 12
    assert "Traceback" not in err


LOOKS = """
import flowdistill, torch
@flowdistill.register_callback("looks")
class Looks(flowdistill.Callback):
    def on_record(self, loop, record):
        loop.result.sample(torch.randn(3, 2))
"""


@pytest.mark.slow
def test_a_hook_that_evaluates_what_processes_share_is_refused_once(tmp_path):
    (tmp_path / "looks.py").write_text(LOOKS)
    gin_file = write(tmp_path / "ring.gin", accumulation=2, evaluation="None", callbacks="[@looks()]")
    gin_file.write_text("import looks\n" + gin_file.read_text())
    _, err = (process := train(tmp_path, gin_file)).communicate(timeout=100)
    assert process.returncode == 2, err
    assert err.count("processes share the networks, which the first one cannot evaluate alone") == 1
    assert "Traceback" not in err


@pytest.mark.slow
def test_processes_stop_when_their_launcher_is_killed(tmp_path):
    gin_file = write(tmp_path / "ring.gin", accumulation=2, evaluation="None")
    gin_file.write_text(gin_file.read_text().replace("train.steps = 12", "train.steps = 200000"))
    process, limit = train(tmp_path, gin_file), time.monotonic() + 100
    while not steps(tmp_path):
        assert time.monotonic() < limit
        time.sleep(0.05)
    process.kill()
    _, err = process.communicate(timeout=60)  # they have closed it when they have ended
    assert err.count("SIGTERM stopped the training after step") == 1


@pytest.mark.slow
def test_a_death_is_told_once_and_soon(deadly, tmp_path):
    began = time.monotonic()
    _, err = (process := train(tmp_path, deadly)).communicate(timeout=100)
    assert process.returncode == 1
    assert time.monotonic() - began < 60
    assert err.count("flowdistill: error") == 1 + err.count("process 1 of 2 ended")
    assert "process 1 was ended by SIGKILL: the same command continues from the last checkpoint" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "after them comes one of train,"),
        (["--nproc_per_node", "2", "plan"], 2, "not 'plan'"),
        (["--nodes", "2", "train"], 2, "unrecognized arguments: --nodes"),
        pytest.param(["--nproc_per_node", "2", "train", "nothing.gin"], 2, "nothing.gin", marks=pytest.mark.slow),
    ],
)
def test_mistakes(arguments, code, words, tmp_path):
    _, err = (process := launch(tmp_path, *arguments)).communicate(timeout=60)
    assert process.returncode == code
    assert words in err
    assert "Traceback" not in err
