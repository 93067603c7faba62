"""``flowdistill bench speed``: what steps cost, counted and measured."""

import json
import sys

import pytest
import torch

from flowdistill.bench import speed
from flowdistill.cli import main
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.flops import Allocations, Flops

ADAPTER = """
METHOD = "meanflow_distillation"

def step(loop, checkout):
    assert (checkout / "theirs.py").is_file()
    return lambda: loop.student.average_velocity(*loop.draw(__import__("torch").Generator()))
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The digits in place of MNIST."""
    monkeypatch.setattr(sys.modules[speed.__module__], "_SETTINGS", ("digits",))


def test_costs_of_methods_parts_and_peers(tmp_path, capsys):
    (tmp_path / "peer.py").write_text(ADAPTER)
    (tmp_path / "theirs.py").touch()
    arguments = ["--gin.train.batch_size=4", "--only", "freeflow_pseudo", "meanflow_distillation"]
    peer = ["--peer", str(tmp_path / "peer.py"), str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        main(["bench", "speed", "--quick", *arguments, *peer, "--out", str(tmp_path / "out")])
    assert end.value.code == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {cost["group"] for cost in found} == {"digits"}
    costs = {cost["name"]: cost for cost in found}
    ours = ("", ", by hand", ", loss and gradients")
    names = ["freeflow_pseudo", *(f"meanflow_distillation{part}" for part in ours), "peer"]
    assert sorted(costs) == sorted(names)
    whole, by_hand, loss = (costs[f"meanflow_distillation{part}"] for part in ours)
    assert costs["peer"]["counted"] == pytest.approx(1)
    assert costs["peer"]["kernels"] < loss["kernels"] < whole["kernels"]
    assert whole["counted"] == pytest.approx(loss["counted"]) == pytest.approx(by_hand["counted"])
    assert all(cost["measured"] > 0 and cost["spread"] >= 0 and cost["memory"] > 0 for cost in costs.values())
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.strip() in capsys.readouterr().out
    assert all(f"| {name} |" in table for name in names)


def test_the_parts_of_a_step(tmp_path):
    folder = speed(only=["freeflow"], bindings=["train.batch_size = 4"], rounds=2, out=tmp_path)
    costs = json.loads((folder / "results.json").read_text())
    counted = {cost["name"]: cost["counted"] for cost in costs}
    assert counted["forward and backward"] == pytest.approx(3, abs=0.05)  # the first layer needs no gradient
    assert counted["with an exact derivative"] == pytest.approx(4, abs=0.05)  # one pass for both
    assert counted["with a backward difference"] == pytest.approx(4, abs=0.05)
    assert counted["guided teacher"] == pytest.approx(2, abs=0.02)


def test_a_method_that_there_is_not():
    with pytest.raises(ConfigError, match="no method has any of nothing in its name"):
        speed(only=["nothing"])


def test_counting_kernels():
    x = torch.randn(3, 4)
    with Flops() as counts:
        y = x.T.contiguous().view(2, 6) + torch.empty(2, 6)
        y.add_(1)
    assert counts.kernels == 3  # a copy and two sums, not the views and the empty tensor


def test_the_most_bytes_at_one_time():
    x = torch.randn(1000)
    with Allocations() as allocations:
        y = x * 2
        del y
        z = x.view(10, 100) + 1
        z = z * 2  # while the sum is alive
        z.add_(1)
    assert allocations.most == 2 * 4000
