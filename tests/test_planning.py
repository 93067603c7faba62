"""Plans: recipes at scale, built and counted without their files, a GPU, or memory."""

import copy
import resource
from pathlib import Path

import pytest
import torch
from runs import FLOW_MATCHING, command, write
from torch import nn

import flowdistill
from flowdistill import ConfigError, plan
from flowdistill.cli import main
from flowdistill.networks import MLP
from flowdistill.plumbing import config
from flowdistill.plumbing.dry import weights, without_files
from flowdistill.training.gpus import SPEEDS


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [("freeflow/imagenet.gin", None), ("freeflow", "mnist_edm2")],
)
def test_recipes_at_scale_are_planned(recipe, setting):
    """In little memory, though the weights alone would take gigabytes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = plan(recipe, on=setting)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1.5e6  # KiB
    assert result.flops > 1e10
    assert all(size >= 0 for size in result.memory.values())
    assert str(result).count("\n") > 10


@pytest.mark.parametrize("method", config.methods())
def test_every_method_is_planned_on_digits(method):
    """With every one of its bindings used; ``make test-all`` takes two steps of each."""
    assert plan(method, on="digits").flops > 0


@pytest.mark.slow
@pytest.mark.parametrize("recipe", config.recipes())
def test_every_recipe_is_planned(recipe):
    assert plan(recipe).flops > 0


def test_the_batch_that_fits_into_a_memory(capsys):
    """The activations of the plan of that batch are those that were foreseen, and the states of a step the same."""
    bindings = ["train.batch_size = 24", "train.accumulation = 2"]
    whole = plan("meanflow", on="digits", gin_bindings=bindings)
    assert whole.fitting(sum(whole.memory.values())) == (24, 2)
    assert whole.fitting(10 * sum(whole.memory.values())) == (48, 1)
    size = sum(whole.memory.values()) - whole.memory["activations"] * 11 / 24  # 13 states at a time, and 12 divide 48
    batch, accumulation = whole.fitting(size)
    assert (batch, accumulation) == (12, 4)
    changed = [f"train.batch_size = {batch}", f"train.accumulation = {accumulation}"]
    part = plan("meanflow", on="digits", gin_bindings=changed)
    assert part.batch_size == whole.batch_size
    assert part.memory["activations"] == pytest.approx(whole.memory["activations"] / 2, rel=0.02)
    assert sum(part.memory.values()) <= size
    with pytest.raises(ConfigError, match=r"a state at a time needs .* GiB, more than"):
        whole.fitting(sum(whole.memory.values()) - whole.memory["activations"])
    arguments = ["--on", "digits", *(f"--gin.{binding.replace(' ', '')}" for binding in bindings)]
    with pytest.raises(SystemExit):
        main(["plan", "meanflow", *arguments, "--memory", str(size / 2**30)])
    assert "hold 12 states at a time: --gin.train.batch_size=12 --gin.train.accumulation=4" in capsys.readouterr().out


def test_a_plan_says_what_training_does(tmp_path):
    """Parameters, evaluations and memory of weights, against a run of the same recipe."""
    bindings = ["train.steps = 3", "train.batch_size = 16", "evaluation.num_samples = 50"]
    bindings += ["freeflow.correction_start = 0.0", "freeflow.online_warmup = 0.0"]  # all steps are as the last
    result = plan("freeflow", on="plane", gin_bindings=bindings)
    run = flowdistill.train("freeflow", on="plane", gin_bindings=bindings, workdir=tmp_path / "run")
    assert result.steps == 3
    assert result.batch_size == 16
    assert result.parameters["student"] == sum(p.numel() for p in run.flow_map.parameters())
    for name in ("student", "teacher", "online"):
        assert run.metrics[f"{name}_evaluations"] == 3 * 16 * result.evaluations[name]
    weights = 4 * result.parameters["student"]
    trained = weights + 4 * sum(p.numel() for p in MLP(hidden_size=128).parameters())
    assert result.memory["student"] == result.memory["average"] == weights
    assert result.memory["gradients"] == trained
    assert result.memory["optimisers"] == 2 * trained  # AdamW keeps two numbers for each parameter


def test_flops_of_a_perceptron_are_those_of_its_matrices(tmp_path):
    """Flow matching: one forward pass, and a backward pass of twice its products but for the first layer's input."""
    bindings = ["train.batch_size = 10", "train.steps = 2", "mlp.hidden_size = 32", "mlp.depth = 1"]
    result = plan(gin_file=write(tmp_path / "ring.gin", FLOW_MATCHING), gin_bindings=bindings)
    size, sinusoids = 32, 256
    inputs = [2 * size, sinusoids * size]  # whose inputs need no gradient
    inner = [size * size, 2 * size * size, size * size, size * size, size * 2]
    assert result.flops == 10 * 2 * (2 * sum(inputs) + 3 * sum(inner))


def test_more_auxiliary_updates_cost_more():
    once = plan("dmd2", on="plane", gin_bindings=["dmd2.auxiliary_updates = 1"])
    five = plan("dmd2", on="plane", gin_bindings=["dmd2.auxiliary_updates = 5"])
    assert five.evaluations["online"] == once.evaluations["online"] + 4
    assert five.flops > 2 * once.flops


def test_hours_are_stated_at_a_speed():
    slow, fast = (plan("meanflow", on="plane", flops_per_second=speed) for speed in (1e12, 2e12))
    assert slow.hours == pytest.approx(2 * fast.hours)
    with pytest.raises(ConfigError, match="positive"):
        plan("meanflow", on="plane", flops_per_second=0)
    measured = plan("meanflow", on="plane", gpu="H200")
    assert measured.flops_per_second == SPEEDS["h200"]
    assert str(measured).endswith("at 1.5e+14 FLOP/s, as measured on one H200")
    assert str(slow).endswith("at 1e+12 FLOP/s")
    with pytest.raises(ConfigError, match=r"speed of b300 has not been measured, only that of h200.*--flops"):
        plan("meanflow", on="plane", gpu="b300")


def test_the_measured_speed_is_that_of_the_table():
    """FreeFlow with exact derivatives, TFLOP/s to two digits."""
    table = Path(__file__).parents[1] / "benchmarks" / "results" / "imagenet_step.md"
    header, _, row, *_ = (line.split("|") for line in table.read_text().splitlines() if line.startswith("|"))
    measured = float(row[[name.strip() for name in header].index("TFLOP/s")])
    assert row[1].strip() == "FreeFlow, exact derivatives"
    assert SPEEDS["h200"] == pytest.approx(1e12 * measured, rel=0.02)


def test_no_file_is_read(monkeypatch):
    """Neither weights nor data, though the recipe names both; afterwards files are read again."""
    import safetensors.torch

    def refuse(*args, **kwargs):
        raise AssertionError("a plan has read a file")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "load_file", refuse)
        patch.setattr("flowdistill.data.mnist.IdxImages._read", refuse)
        plan("meanflow", on="mnist_sit", gin_bindings=["train.batch_size = 2"])
    teacher = flowdistill.load_teacher("digits_teacher")
    assert bool(teacher.velocity(teacher.sample_prior(1), torch.ones(1)).isfinite().all())


def test_a_teacher_of_a_file_needs_its_variant():
    with pytest.raises(ConfigError, match="variant"):
        plan("meanflow/meanflow_distillation_imagenet.gin", gin_bindings=["sit_teacher.variant = None"])


def test_command_line(tmp_path):
    planned = command("plan", "meanflow", "--on", "plane", "--gin.train.steps=7", "--flops", "1e12", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("7 steps of 256 states")
    assert "at 1e+12 FLOP/s" in planned.stdout
    dry = command("train", "--dry_run", "meanflow", "--on", "plane", "--gin.train.steps=7", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr
    assert dry.stdout.startswith("7 steps of 256 states")
    assert list(tmp_path.iterdir()) == []
    wrong = command("plan", "meanflow", "--on", "plane", "--gin.train.stepps=7", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean steps" in wrong.stderr
    unused = command("plan", "meanflow", "--on", "plane", "--gin.shortcut.guidance=2.0", cwd=tmp_path)
    assert unused.returncode == 2
    assert "nothing uses shortcut.guidance" in unused.stderr


class Buffers(MLP):
    """A network with tensors of many kinds that are not parameters."""

    def __init__(self):
        super().__init__(dim=2, hidden_size=8, depth=1)
        self.norm = copy.deepcopy(nn.BatchNorm1d(2))
        for dtype in (torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.complex64, torch.float8_e4m3fn):
            self.register_buffer(str(dtype).replace(".", "_"), torch.zeros(3, dtype=dtype), persistent=False)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.second.register_buffer("shared", self.norm.running_mean)
        self.weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.spectral_norm = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
        self.register_buffer("part", self.norm.running_mean[:1])
        self.unregistered = [torch.zeros(3)]


@pytest.mark.parametrize("within", [False, True])
def test_copies_of_networks_without_values(within):
    """Their tensors belong to the one mode, whose own copy has ended processes; what is shared stays shared."""
    with without_files():
        mode, network = weights(), Buffers()
        with weights() if within else torch.no_grad():
            copied = copy.deepcopy(network)
        tensors = [*copied.parameters(), *copied.buffers(), *copied.unregistered]
        assert all(tensor.fake_mode is mode for tensor in tensors)
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in copied.parameters())
        assert copied.first.weight is copied.second.weight
        assert copied.norm.running_mean is copied.second.shared
        assert copied.first.weight is not network.first.weight
        shapes = {name: (v.shape, v.dtype) for name, v in network.state_dict().items()}
        assert {name: (v.shape, v.dtype) for name, v in copied.state_dict().items()} == shapes


def test_networks_that_ask_for_values_are_not_planned(monkeypatch):
    """The learned scale of a network as a Python number."""
    velocity = MLP.velocity
    monkeypatch.setattr(
        MLP, "velocity", lambda self, *rest: velocity(self, *rest) * float(next(self.parameters()).detach().max())
    )
    with pytest.raises(ConfigError, match=r"a plan has no values.*train a few steps"):
        plan("meanflow", on="plane")
