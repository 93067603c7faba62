"""Networks that several processes share: the results are those of one process, and each holds its part."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import write

from flowdistill import ConfigError
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import EDM2, MLP
from flowdistill.plumbing.config import methods
from flowdistill.runs.checkpoints import load_tensors_of
from flowdistill.training.parallel import Parallel, recompute, units

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 13), reason="processes share networks from PyTorch 2.13 on")

SCRIPT = Path(__file__).with_name("steps_of_methods.py")
SHORT = ["train.accumulation = 4", "train.batch_size = 8", "train.evaluation = None"]
EDM2_STUDENT = [
    "train.flow_map = @network()",
    "network.network = @edm2()",
    "network.conditioning = 'two_time'",
    "network.guidance = None",
    "edm2.img_resolution = 8",
    "edm2.img_channels = 1",
    "edm2.label_dim = 10",
    "edm2.model_channels = 8",
    "edm2.channel_mult = (1, 2)",
    "edm2.num_blocks = 1",
    "edm2.channels_per_head = 8",
    "edm2.attn_resolutions = (4,)",
]


def on(setting, method, *bindings, start=None):
    return {"method": method, "setting": setting, "bindings": [*SHORT, *bindings], "start": start and str(start)}


def parallel(**fields):
    return [f"parallel.{name} = {value!r}" for name, value in fields.items()]


def taken(folder, processes, trainings):
    """Take three steps of some trainings; the folder in which each leaves a run."""
    folder = folder / str(processes)
    folder.mkdir(parents=True, exist_ok=True)
    (file := folder / "trainings.json").write_text(json.dumps(trainings))
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(several if processes > 1 else []), str(SCRIPT), str(folder), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "rank1" not in line)
    return folder


def told(folder, name, rank=0):
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def checkpoint(folder, name, step=3):
    return folder / name / "checkpoints" / f"step_{step:08d}"


def tensors(path):
    names = {file.name.partition(".")[0] for file in path.glob("*.safetensors")} - {"optimizers"}
    return {f"{name}/{key}": value for name in names for key, value in load_tensors_of(path, name).items()}


def agree(ours, theirs, name, step=3, atol=2e-6):
    """The same losses, and the same weights up to rounding."""
    assert told(ours, name)["losses"] == pytest.approx(told(theirs, name)["losses"], rel=1e-5), name
    left, right = tensors(checkpoint(ours, name, step)), tensors(checkpoint(theirs, name, step))
    assert left.keys() == right.keys()
    for key, value in left.items():
        if "logvar" not in key:  # which nothing trains: one process leaves it as it is drawn
            torch.testing.assert_close(value, right[key], atol=atol, rtol=1e-5, msg=f"{name}: {key}")


def test_every_method_trains_the_same_in_two_processes(tmp_path):
    trainings = {method: on("plane", method) for method in methods()}
    one, two = taken(tmp_path, 1, trainings), taken(tmp_path, 2, trainings)
    for method in methods():
        agree(two, one, method)


DISCRIMINATOR = ["dmd2.discriminator = @mlp", "train.states = %data"]
CASES = {
    "full": on("digits", "freeflow"),
    "scalars": on("digits", "meanflow", *EDM2_STUDENT),
    "copies": on("plane", "freeflow", *parallel(shard=2)),
    "each_a_copy": on("plane", "freeflow", *parallel(shard=1)),
    "kept": on("digits", "freeflow", *parallel(reshard_after_forward=False)),
    "recomputed": on("digits", "meanflow_distillation", *parallel(checkpoint_activations=True)),
}
MORE = {
    "low_rank": on("plane", "freeflow", "online_network.lora_rank = 2"),
    "discriminator": on("plane", "dmd2", *DISCRIMINATOR),
    "graph": on("digits", "lsd", *EDM2_STUDENT),
    "compiled": on("plane", "meanflow", "train.compile = 'eager'"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """All cases in one process and in four."""
    folder = tmp_path_factory.mktemp("cases")
    return taken(folder, 1, CASES), taken(folder, 4, CASES)


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    return taken(folder, 1, MORE), taken(folder, 4, MORE)


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_four_processes_train_what_one_does(name, request):
    one, four = request.getfixturevalue("cases" if name in CASES else "more")
    # AdamW makes steps of full size of the rounding errors of what has no gradient, as the biases of keys.
    digits = "digits" in (CASES | MORE)[name].values()
    agree(four, one, name, atol=5e-5 if digits else 5e-6)


def test_each_process_holds_its_part(cases):
    """Of every tensor the next whole number of rows to a fourth."""
    one, four = cases
    rows = [(v.shape[0], v[0].numel()) for k, v in tensors(checkpoint(one, "recomputed")).items()
            if k.startswith("student/") and not k.endswith("pos_embed")]  # fmt: skip
    whole = told(one, "recomputed")["held"]
    assert whole["parameters"] == sum(4 * n * rest for n, rest in rows)
    most = sum(4 * math.ceil(n / 4) * rest for n, rest in rows)
    assert most < 1.01 * whole["parameters"] / 4
    for rank in range(4):
        held = told(four, "recomputed", rank)["held"]
        assert held["parameters"] <= most
        assert held["gradients"] == held["parameters"]
        assert held["optimizer"] == 2 * held["parameters"]
    total = sum(told(four, "recomputed", rank)["held"]["parameters"] for rank in range(4))
    assert total == whole["parameters"]


def bytes_of(path, name):
    return sum(v.nbytes for key, v in tensors(path).items() if key.startswith(name))


def test_traffic_is_what_the_evaluations_need(cases):
    """Weights are gathered for each evaluation, again for its backward pass, and gradients are added up once.

    This step evaluates the student twice, once with a graph, and the teacher once.
    """
    _, four = cases
    student, teacher = (bytes_of(checkpoint(four, "kept"), name) for name in ("student", "online"))
    for name, gathered in (("full", 3 * student + teacher), ("kept", student)):
        found = told(four, name)["bytes"]
        # What is not divisible is padded; the table of positions is gathered, and has no gradient.
        assert found["all_gather"] == pytest.approx(gathered, rel=0.02), name
        assert found["reduce_scatter"] == pytest.approx(student, rel=0.02), name
        assert found.keys() <= {"all_gather", "reduce_scatter", "all_reduce"}
        assert found.get("all_reduce", 0) < 1000, name  # the norm of the gradient
    copies = told(four, "each_a_copy")["bytes"]
    assert copies.keys() == {"all_reduce", "broadcast"}  # and buffers
    assert copies["broadcast"] < 1000


@pytest.mark.slow
def test_another_number_of_processes_goes_on(cases, tmp_path):
    """By the steps that one process would have taken; the network has parameters that are scalars."""
    one, four = ({"scalars": {**CASES["scalars"], "start": str(checkpoint(folder, "scalars"))}} for folder in cases)
    expected = taken(tmp_path / "expected", 1, one)
    for place, processes, trainings in (("one", 1, four), ("two", 2, four), ("from_one", 2, one)):
        agree(taken(tmp_path / place, processes, trainings), expected, "scalars", step=6, atol=5e-5)


@pytest.mark.slow
def test_in_low_precision_weights_travel_in_half_the_bytes(tmp_path):
    trained = [*parallel(precision="bf16"), "train.precision = 'bf16'"]
    trainings = {
        "high": on("digits", "meanflow_distillation"),
        "low": on("digits", "meanflow_distillation", "train.precision = 'bf16'"),
        "lowest": on("digits", "meanflow_distillation", *trained),
    }
    two = taken(tmp_path, 2, trainings)
    high, low, lowest = (told(two, name) for name in trainings)
    for found in (low, lowest):
        assert found["losses"] == pytest.approx(high["losses"], rel=0.05)
        assert found["bytes"]["reduce_scatter"] == high["bytes"]["reduce_scatter"]
        assert found["held"]["dtypes"] == ["torch.bfloat16"]
        assert found["held"]["parameters"] == high["held"]["parameters"]
    gathered = [found["bytes"]["all_gather"] for found in (high, low, lowest)]
    student = bytes_of(checkpoint(two, "high"), "student")
    assert gathered[2] == pytest.approx(gathered[0] / 2, rel=1e-3)
    # In two backward passes the student is evaluated for the derivative and on the diagonal, there and back.
    assert gathered[1] == pytest.approx(gathered[0] / 2 + 8 * student / 2, rel=0.02)


@pytest.mark.slow
def test_a_student_that_travels_in_low_precision_is_not_evaluated_in_high(tmp_path):
    trained = [*parallel(precision="bf16"), "train.precision = 'bf16'"]
    with pytest.raises(AssertionError, match=r"leave parallel.precision at 'float32'"):
        taken(tmp_path, 2, {"differences": on("digits", "freeflow", *trained)})


def test_weights_that_an_objective_takes_by_itself_are_refused_once(tmp_path):
    (tmp_path / "penalty.py").write_text(PENALTY)
    gin_file = write(tmp_path / "ring.gin", accumulation=2)
    lines = [line for line in gin_file.read_text().splitlines() if "freeflow" not in line and "online" not in line]
    gin_file.write_text("\n".join(["import penalty", *lines, "train.objective = @penalty()"]))
    command = [sys.executable, "-m", "flowdistill", "launch", "--nproc_per_node", "2", "train", gin_file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*command, "--device", "cpu"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert done.stderr.count("used outside the method that evaluates their network, as in a penalty on them") == 1


PENALTY = """
import attrs, flowdistill
@flowdistill.register_objective("penalty")
@attrs.define(kw_only=True)
class Penalty(flowdistill.Objective):
    def loss(self, states, step):
        loss = (self.student.average_velocity(*states.to(0.0)) - states.x).square().mean()
        return flowdistill.ObjectiveOutput(loss + sum(p.square().sum() for p in self.student.parameters()))
"""


def test_units_are_layers_and_what_is_left():
    student = NetworkFlowMap(MLP(dim=2, hidden_size=8, depth=2), "two_time", guidance=1.0)
    found = units(student)
    assert found[:3] == [*student.network.blocks, student.network]
    covered = [id(p) for unit in found for p in unit.parameters()]
    assert set(covered) == {id(p) for p in student.parameters()}
    assert units(torch.nn.Identity()) == []
    first, second = student.network.blocks
    second.last.weight = first.last.weight  # which one module must then gather
    assert units(student)[:1] == [student.network]


def test_layers_compute_their_activations_again():
    torch.manual_seed(0)
    net = EDM2(8, img_channels=1, label_dim=3, model_channels=8, channel_mult=(1, 2), num_blocks=1)
    net.unet.out_gain.data.fill_(1.0)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.7])

    def measured():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: (kept.append(v.nbytes), v)[1], lambda v: v):
            loss = net.velocity(x, t).square().mean()
        (gradient,) = torch.autograd.grad(loss, net.unet.out_conv.weight)
        return sum(kept), loss, gradient

    before, loss, gradient = measured()
    recompute(net)
    after, again, same = measured()
    assert after < before / 2
    assert torch.equal(loss, again)
    assert torch.equal(gradient, same)


def test_processes_that_do_not_divide_are_refused():
    assert [Parallel(shard=shard).copies(8) for shard in (None, 8, 2, 1)] == [1, 1, 4, 8]
    assert Parallel(shard=3).copies(1) == 1
    with pytest.raises(ConfigError, match=r"parallel.shard = 3 .*set it to a divisor of 8"):
        Parallel(shard=3).copies(8)
