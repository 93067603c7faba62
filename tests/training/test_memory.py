"""A long training holds no more memory, and no more handles, than a short one."""

import gc
import os
import sys

import gin
import pytest
from runs import write

import flowdistill


def held():
    """The memory of this process in MiB, and its open files."""
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20, len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says it")
def test_a_long_training_holds_no_more_than_a_short_one(tmp_path):
    gin_file = write(tmp_path / "ring.gin", log_every=1, checkpoint_every=100)
    after = {}
    for steps in (300, 5000):
        flowdistill.train(gin_file, gin_bindings=[f"train.steps = {steps}"], workdir=tmp_path / "run", report=False)
        after[steps] = held()
    assert after[5000][0] - after[300][0] < 20
    assert after[5000][1] == after[300][1]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says it")
def test_trainings_and_samplings_leave_nothing_in_the_process(tmp_path):
    gin_file = write(tmp_path / "ring.gin", steps=1)
    flowdistill.train(gin_file, workdir=tmp_path / "first", report=False)
    flowdistill.sample(tmp_path / "first", 2)
    places, (before, handles) = len(gin.config._LOCATION_PREFIXES), held()
    for number in range(4):
        flowdistill.train(gin_file, workdir=tmp_path / str(number), report=False)
        for _ in range(3):
            flowdistill.sample(tmp_path / "first", 2)
    after, handles_after = held()
    assert len(gin.config._LOCATION_PREFIXES) == places
    assert handles_after == handles
    assert after - before < 20
