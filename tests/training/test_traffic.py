"""Plans for several processes: what they hold and exchange, by closed forms and by processes that do it."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from runs import FLOW_MATCHING, write
from torch import nn

from flowdistill import ConfigError, plan
from flowdistill.cli import main
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import MLP
from flowdistill.training.gpus import GPUS, NETWORK, SPEEDS
from flowdistill.training.traffic import Event, Sizes, Traffic, Unit, replay, units_of

SIZES = ["mlp.hidden_size = 32", "mlp.depth = 1", "train.batch_size = 10", "train.steps = 2"]
LOW = ["train.precision = 'bf16'", "parallel.precision = 'bf16'"]
STAYS = ["parallel.reshard_after_forward = False"]


@pytest.fixture
def planned(tmp_path):
    """Plans flow matching, whose student is evaluated once for each state, for some processes."""
    gin_file = write(tmp_path / "ring.gin", FLOW_MATCHING)

    def of(processes, accumulation, *bindings, **options):
        given = [*SIZES, f"train.accumulation = {accumulation}", *bindings]
        return plan(gin_file=gin_file, gin_bindings=given, processes=processes, **options)

    return of


def student():
    return NetworkFlowMap(MLP(dim=2, hidden_size=32, depth=1, num_classes=None), "instantaneous")


def part(shard):
    """The elements of the student that the first of some processes has: rows are not cut."""
    return sum(math.ceil(p.shape[0] / shard) * p[0].numel() for p in student().parameters())


@pytest.mark.parametrize("shard", [2, 4, 8])
def test_weights_travel_twice_and_gradients_once_for_each_backward_pass(shard, planned):
    traffic = planned(shard, 2 * shard).traffic
    whole, past = 4 * shard * part(shard), (shard - 1) / shard
    assert (traffic.gathers, traffic.reductions, traffic.averagings) == (2 * 2 * 2, 2 * 2, 0)  # of network and block
    assert traffic.gathered == pytest.approx(2 * 2 * whole * past)
    assert traffic.reduced == pytest.approx(2 * whole * past)
    assert traffic.averaged == 0
    assert traffic.least == pytest.approx(2 * whole * past)  # weights once and gradients once


def test_weights_that_stay_travel_once_for_each_backward_pass(planned):
    freed, stay = planned(4, 8).traffic, planned(4, 8, *STAYS).traffic
    assert 2 * stay.gathered == freed.gathered
    assert stay.reduced == freed.reduced


def test_low_precision_halves_the_weights_that_travel_and_no_gradients(planned):
    exact, low = (
        planned(4, 4, "train.precision = 'bf16'", f"parallel.precision = '{precision}'")
        for precision in ("float32", "bf16")
    )
    assert 2 * low.traffic.gathered == exact.traffic.gathered
    assert low.traffic.reduced == exact.traffic.reduced
    for name in ("student", "gradients", "optimisers", "average"):
        assert low.memory[name] == exact.memory[name]


def test_weights_that_are_gathered_in_low_precision_need_no_copies_for_autocast():
    bindings = [
        "train.batch_size = 4",
        "train.accumulation = 2",
        "train.precision = 'bf16'",
        "parallel.precision = 'bf16'",
    ]
    alone, both = (plan("meanflow", on="digits", gin_bindings=bindings, processes=n) for n in (1, 2))
    copies = alone.memory["activations"] - both.memory["activations"]
    assert copies == pytest.approx(2 * alone.parameters["student"], rel=0.15)  # and some activations are shorter


def test_objectives_that_evaluate_in_float32_are_refused_as_in_training():
    with pytest.raises(ConfigError, match=r"evaluates the student in float32.*leave parallel.precision"):
        plan("freeflow", on="digits", gin_bindings=["train.accumulation = 2", *LOW], processes=2)


class Page:
    """Losses that happen as they are written, with the networks that they train."""

    def __init__(self, *pages):
        self.pages = pages


def test_what_frees_weights_that_stay():
    """A backward pass all units around which it went, and an update those of its network; nothing else does."""
    root = nn.Identity()
    block, rest = (Unit("student", module, (), root) for module in (nn.Identity(), root))
    other = Unit("student", nn.Identity(), (), nn.Identity())
    teacher = Unit("teacher", nn.Identity(), (), nn.Identity())
    sizes = {unit: Sizes(weights=2.0**i, gradients=0.0, stays=True) for i, unit in enumerate((block, rest, other))}
    sizes[teacher] = Sizes(weights=8.0, gradients=0.0, stays=True)
    seen = [(event, unit) for unit in sizes for event in (Event.ENTERED, Event.LEFT)]
    traffic, most = replay(Page(("student", [*seen, (Event.PASSED, rest)])), sizes, micros=2, shard=2, copies=1)
    assert traffic.gathered == (2 * (1 + 2) + 4) / 2
    assert traffic.least == (1 + 2 + 4) / 2
    assert most == 15
    traffic, _ = replay(Page(("online", seen)), sizes, micros=2, shard=2, copies=1)
    assert traffic.gathered == 0
    assert traffic.least == 0


def test_copies_add_up_what_each_has_reduced(planned):
    traffic = planned(8, 8, "parallel.shard = 2").traffic
    assert traffic.averagings == traffic.reductions == 2
    assert traffic.gathered == pytest.approx(2 * 4 * 2 * part(2) / 2)
    assert traffic.averaged == pytest.approx(2 * 3 / 4 * 4 * part(2))
    alone = planned(8, 8, "parallel.shard = 1").traffic
    assert (alone.gathers, alone.reductions, alone.averagings) == (0, 0, 2)
    assert alone.averaged == alone.least == pytest.approx(2 * 7 / 8 * 4 * part(1))


@pytest.mark.parametrize("shard", [2, 4, 8])
def test_a_process_holds_its_part_of_everything_that_stays(shard, planned):
    result = planned(shard, shard)
    held = 4 * part(shard)
    assert [result.memory[name] for name in ("student", "gradients", "average")] == [held] * 3
    assert result.memory["optimisers"] == 2 * held
    alone = planned(1, 1)
    assert result.memory["activations"] == alone.memory["activations"]
    assert result.flops == shard * alone.flops
    assert result.computing == pytest.approx(alone.computing)


def test_what_is_gathered_at_once(planned):
    """The network and its block, the larger of both again, and its gradients; nothing more where weights stay."""
    network = student().network
    block = 8 * sum(math.ceil(p.shape[0] / 8) * p[0].numel() for p in network.layer_modules[0].parameters())
    rest = 8 * part(8) - block
    for bindings in ([], STAYS):
        assert planned(8, 8, *bindings).memory["gathered"] == 4 * (block + rest + 2 * max(block, rest))


def test_gradients_wait_for_those_of_the_second_evaluation():
    """FreeFlow evaluates its student twice: weights travel four times, and gradients once."""
    bindings = ["train.batch_size = 4", "train.accumulation = 2"]
    both = plan("freeflow", on="plane", gin_bindings=bindings, processes=2)
    one = plan("freeflow/ring.gin", gin_bindings=bindings, processes=2)  # the prediction alone
    own = both.traffic.reduced - one.traffic.reduced
    assert own == pytest.approx(both.memory["online"], rel=0.01)  # half of its gradients, as of its weights
    assert both.memory["gathered"] > one.memory["gathered"] + one.parameters["student"]


def test_memory_falls_with_the_number_of_processes(planned):
    held = [planned(n, 8).memory for n in (1, 2, 4, 8)]
    for name in ("student", "gradients", "optimisers", "average"):
        assert all(more[name] > less[name] for more, less in itertools.pairwise(held))


def test_a_plan_for_one_process_is_as_before(planned):
    result = planned(1, 2)
    assert result.traffic is None
    assert "gathered" not in result.memory
    assert str(result) == str(planned(1, 2, "parallel.shard = 8"))
    assert "process" not in str(result)


def test_recomputation_keeps_less_and_computes_more(planned):
    deep = ["mlp.depth = 5"]
    recomputing = [*deep, "parallel.checkpoint_activations = True"]
    kept, again = planned(2, 2, *deep), planned(2, 2, *recomputing)
    assert again.memory["activations"] == kept.recomputed
    assert again.recomputed is None
    assert kept.memory["activations"] > kept.recomputed
    assert kept.flops < again.flops < 4 / 3 * kept.flops  # no more than another forward pass
    deeper = planned(2, 2, "mlp.depth = 6")
    block, given = deeper.memory["activations"] - kept.memory["activations"], deeper.recomputed - kept.recomputed
    assert given < block / 3  # the inputs of a block
    rest = kept.memory["activations"] - 5 * block
    assert kept.recomputed - rest - 5 * given == pytest.approx(block, abs=given)  # of the one that is recomputed
    alone = planned(1, 2, *recomputing)
    assert alone.memory["activations"] == kept.recomputed


def test_the_time_of_traffic_is_that_of_the_slowest_links():
    traffic = Traffic(gathers=1, gathered=8e9, reductions=1, reduced=1e9, averagings=1, averaged=2e9, least=0.0)
    gpu = GPUS["h100-80"]
    assert traffic.seconds(gpu, 8, 8) == pytest.approx(11e9 / gpu.link)
    assert traffic.seconds(gpu, 8, 64) == pytest.approx(9e9 / gpu.link + 2e9 / NETWORK)
    assert traffic.seconds(gpu, 64, 64) == pytest.approx(11e9 / NETWORK)


def test_hours_are_those_of_what_takes_longer(planned):
    slow, fast = (planned(8, 8, flops_per_second=speed) for speed in (1e6, 1e20))
    assert slow.hours == pytest.approx(2 * slow.flops / 8 / 1e6 / 3600)
    assert fast.hours == pytest.approx(2 * fast.exchanging / 3600)
    equal = planned(8, 8, flops_per_second=slow.flops / 8 / slow.exchanging)
    assert equal.hours == pytest.approx(fast.hours)
    assert fast.exchanging == pytest.approx((fast.traffic.gathered + fast.traffic.reduced) / GPUS["h200"].link)


def test_other_gpus_reach_the_part_of_their_peak_that_was_measured(planned):
    h100, a100 = planned(2, 2, gpu="H100-80"), planned(2, 2, gpu="a100-80")
    assert h100.flops_per_second == pytest.approx(SPEEDS["h200"])
    assert a100.flops_per_second == pytest.approx(SPEEDS["h200"] * 312 / 989)
    assert str(a100).endswith("a process, computed from that of the H200: no A100-80 has run it")
    assert "computed, not measured: no step of several GPUs has been timed" in str(h100)
    assert "450 GB/s inside a machine of 8\n" in str(h100)
    assert "50 GB/s a GPU between machines, which is assumed" in str(planned(16, 16))
    with pytest.raises(ConfigError, match="from which a plan computes that of a100-80, h100-80"):
        planned(2, 2, gpu="b300")
    given = planned(2, 2, gpu="b300", flops_per_second=1e12)
    assert "name a --gpu to see the time of the traffic" in str(given)


def test_too_much_memory_is_told_with_what_to_change(planned, monkeypatch):
    result = planned(2, 4, "mlp.depth = 5")
    assert "more than" not in str(result)
    rest = sum(result.memory.values()) - result.memory["activations"]
    room = rest + 0.55 * result.memory["activations"]
    monkeypatch.setitem(GPUS, "h200", type(GPUS["h200"])(memory=room, peak=1.0, link=1.0))
    (sentence,) = [line for line in str(result).splitlines() if "a process needs" in line]
    assert "set parallel.checkpoint_activations = True, which needs" in sentence
    assert "or train.batch_size = 5 with train.accumulation = 8, or more processes" in sentence
    monkeypatch.setitem(GPUS, "h200", type(GPUS["h200"])(memory=1.0, peak=1.0, link=1.0))
    assert "train.batch_size" not in str(result)


def test_a_batch_that_fits_can_be_shared_out(planned):
    result = planned(4, 4)  # 40 states, 10 in each
    size = sum(result.memory.values()) - 0.05 * result.memory["activations"]
    assert result.fitting(size) == (5, 8)
    assert result.fitting(100 * size) == (10, 4)


def test_passes_that_cannot_be_shared_out_are_refused(planned):
    with pytest.raises(ConfigError, match="over 3 processes: set it to a multiple of 3"):
        planned(3, 4)
    with pytest.raises(ConfigError, match="do not divide 4 processes"):
        planned(4, 4, "parallel.shard = 3")
    with pytest.raises(ConfigError, match="at least 1"):
        planned(0, 4)


def test_command_line(capsys):
    arguments = ["freeflow", "--on", "plane", "--processes", "4", "--gpu", "h100-80", "--gin.train.accumulation=4"]
    with pytest.raises(SystemExit) as done:
        main(["plan", *arguments])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "4 processes, 256 states at a time in each" in out
    assert "gathers of weights" in out
    assert "no H100-80 has run it" in out


# Processes that do it.

SHARED = ["train.batch_size = 4", "train.accumulation = 4"]
FREED, STAYING = ["parallel.shard = None"], ["parallel.reshard_after_forward = False"]
TRAININGS = {
    "two evaluations in a loss": ("freeflow", "plane", SHARED + FREED),
    "weights that stay": ("freeflow", "plane", SHARED + STAYING),
    "low precision": ("meanflow", "digits", [*SHARED, *LOW]),
}
LOW = ["train.precision = 'bf16'", "parallel.precision = 'bf16'"]
MORE = {
    "lowest precision": ("meanflow_distillation", "digits", [*SHARED, *FREED, *LOW]),
    "several updates": ("dmd2", "plane", SHARED + FREED),
    "several updates of weights that stay": ("dmd2", "plane", SHARED + STAYING),
    "low precision of the teacher alone": ("freeflow", "digits", [*SHARED, "train.precision = 'bf16'"]),
    "recomputation": ("meanflow", "digits", [*SHARED, "parallel.checkpoint_activations = True"]),
    "a student of policies": ("piflow", "digits", SHARED + STAYING),
}


def compare(trainings, processes):
    """Plans against what the first of some processes counted, to the byte."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    script = Path(__file__).with_name("exchanges.py")
    done = subprocess.run(
        [sys.executable, *torchrun, script, json.dumps(trainings)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    for name, (method, setting, bindings) in trainings.items():
        result = plan(method, on=setting, gin_bindings=bindings, processes=processes)
        traffic, shard, copies = result.traffic, result.shard, processes // result.shard
        expected = {"gathers": [traffic.gathers, traffic.gathered * shard / (shard - 1)]}
        expected["reductions"] = [traffic.reductions, traffic.reduced * shard / (shard - 1)]
        if copies > 1:
            expected["averagings"] = [traffic.averagings, traffic.averaged * copies / (copies - 1) / 2]
        assert counted[name]["exchanged"].keys() == expected.keys()
        for kind, values in expected.items():
            assert counted[name]["exchanged"][kind] == pytest.approx(values), (name, kind)
        for part_name, size in counted[name]["held"].items():
            assert result.memory[part_name] == size, (name, part_name)


@pytest.mark.parametrize("trainings", [TRAININGS, pytest.param(MORE, marks=pytest.mark.slow)])
def test_a_plan_says_what_two_processes_hold_and_exchange(trainings):
    compare(trainings, 2)


@pytest.mark.slow
def test_a_plan_says_what_copies_of_the_networks_exchange():
    compare({method: (method, "plane", [*SHARED, "parallel.shard = 2"]) for method in ("freeflow", "vsd")}, 4)


def test_no_parameter_of_a_unit_is_counted_twice():
    network = student()
    found = [p for unit in units_of({"student": network}) for p in unit.parameters]
    assert len(found) == len(set(found)) == len(list(network.parameters()))
