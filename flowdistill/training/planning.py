"""What a recipe would cost: its last training step on tensors without values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from flowdistill.differentiation import backward
from flowdistill.interfaces import ObjectiveOutput
from flowdistill.plumbing import config
from flowdistill.plumbing.dry import without_files
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.flops import Flops
from flowdistill.plumbing.randomness import ONE_AT_A_TIME
from flowdistill.training.loop import Loop, configured_loop
from flowdistill.training.settings import OptimizerBuilder

SPEEDS = {"h200": 1.5e14}
"""FLOP/s of FreeFlow's step on SiT-XL/2 in bfloat16, with exact derivatives: benchmarks/results/imagenet_step.md."""


@attrs.frozen(kw_only=True)
class Plan:
    """The cost of a recipe."""

    steps: int
    """The training steps."""
    batch_size: int
    """The states of a step, accumulated ones included."""
    accumulation: int
    """The backward passes of a step."""
    parameters: Mapping[str, int]
    """The parameters of student, teacher and the objective's own modules, by name."""
    evaluations: Mapping[str, float]
    """The evaluations of each of them in a step, for each state of the batch."""
    flops: int
    """The operations of a step: products and sums of matrix products, convolutions and attention, in all forward and
    backward passes. Other operations are not counted."""
    memory: Mapping[str, int]
    """The bytes by part. "activations" is what autograd keeps of one backward pass, without recomputation."""
    flops_per_second: float
    """The speed at which ``hours`` are stated."""
    measured: str = ""
    """The GPU on which a step had that speed; empty for a speed that was given."""

    def fitting(self, size: float) -> tuple[int, int]:
        """The largest ``train.batch_size``, and its ``train.accumulation``, whose steps fit into some bytes.

        The states of a step stay the same, and the activations are in proportion to those of a backward pass.

        Raises:
            ConfigError: not even one state at a time fits.
        """
        fixed = sum(part for name, part in self.memory.items() if name != "activations")
        each = self.memory["activations"] * self.accumulation / self.batch_size
        most = math.floor((size - fixed) / max(each, 1))
        if most < 1:
            raise ConfigError(f"a state at a time needs {(fixed + each) / 2**30:.3g} GiB, more than {size / 2**30:.3g}")
        batch = max(n for n in range(1, min(most, self.batch_size) + 1) if self.batch_size % n == 0)
        return batch, self.batch_size // batch

    @property
    def hours(self) -> float:
        """Of the whole training."""
        return self.steps * self.flops / self.flops_per_second / 3600

    def __str__(self) -> str:
        """A table."""
        lines = [f"{self.steps} steps of {self.batch_size} states", ""]
        lines += [f"{'':12}{'parameters':>14}{'evaluations of a state':>26}"]
        for name, count in self.parameters.items():
            lines.append(f"{name:12}{count:14,}{self.evaluations.get(name, 0):26.3g}")
        lines += ["", f"{'memory':12}{'GiB':>14}"]
        lines += [f"{name:12}{size / 2**30:14.3f}" for name, size in self.memory.items()]
        lines += [f"{'all':12}{sum(self.memory.values()) / 2**30:14.3f}", ""]
        speed = f"{self.flops_per_second:.3g} FLOP/s" + (
            f", as measured on one {self.measured}" if self.measured else ""
        )
        lines.append(f"{self.flops:.4g} FLOP a step; {self.hours:.3g} hours at {speed}")
        return "\n".join(lines)


def plan(
    recipe: str | Path | None = None,
    *,
    on: str | Path | None = None,
    gin_file: str | Path | None = None,
    gin_files: Sequence[str | Path] = (),
    gin_bindings: Sequence[str] = (),
    gpu: str = "h200",
    flops_per_second: float | None = None,
) -> Plan:
    """Build a recipe and take its last step, without its files, its data, a GPU, or memory for its weights.

    Everything is checked as in training: every name, every value, and that every binding is used. Of checkpoints
    only the named variant is taken.

    Args:
        recipe: see `train`.
        on: see `train`.
        gin_file: see `train`.
        gin_files: see `train`.
        gin_bindings: see `train`.
        gpu: at whose measured speed hours are stated, that of FreeFlow's step on SiT-XL/2 in bfloat16: "h200".
        flops_per_second: the speed in place of it.

    Raises:
        ConfigError: the configuration cannot work, or nobody has measured the GPU.

    Examples:
        >>> result = plan("freeflow/ring.gin")
        >>> result.evaluations["teacher"], result.memory["teacher"] < 1e4
        (1.0, True)
    """
    if flops_per_second is None and gpu.lower() not in SPEEDS:
        raise ConfigError(
            f"the speed of {gpu} has not been measured, only that of {', '.join(SPEEDS)}: measure it by "
            "flowdistill bench speed, and give it as --flops"
        )
    if flops_per_second is not None and not flops_per_second > 0:
        raise ConfigError(f"FLOP/s must be positive, not {flops_per_second}")
    files = config.chosen(recipe, on, gin_file, gin_files)
    with ONE_AT_A_TIME, torch.random.fork_rng(), config.parsed(files, gin_bindings), without_files():
        loop = configured_loop("plan", "cpu")
        loop.source.leave_out_data()
        models: dict[str, nn.Module] = {"student": loop.student}
        models |= {} if loop.teacher is None else {"teacher": loop.teacher}
        models |= loop.objective.modules()
        flops, activations = Flops(), _Activations(models.values())  # type: ignore[no-untyped-call]
        try:
            with flops:
                _step(loop, activations)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"a plan has no values, and a step of this training asks for some, by {error}: train a few steps to "
                "see what it costs"
            ) from error
    training = loop.training
    return Plan(
        steps=training.steps,
        batch_size=training.batch_size * training.accumulation,
        accumulation=training.accumulation,
        parameters={name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        evaluations={
            name.removesuffix("_evaluations"): count / training.batch_size for name, count in loop.counters.items()
        },
        flops=flops.total * training.accumulation,
        memory=_memory(loop, models, activations.most),
        flops_per_second=SPEEDS[gpu.lower()] if flops_per_second is None else flops_per_second,
        measured=gpu.upper() if flops_per_second is None else "",
    )


class _Activations:
    """The most bytes that autograd keeps for a backward pass, parameters and their views left out."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.most = 0
        self._weights = {v.untyped_storage()._cdata for m in models for v in (*m.parameters(), *m.buffers())}
        self._kept: dict[int, Any] = {}

    def keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._weights:
            self._kept[storage._cdata] = storage
        return tensor

    def count(self) -> None:
        self.most = max(self.most, sum(storage.nbytes() for storage in self._kept.values()))
        self._kept.clear()


def _step(loop: Loop, activations: _Activations) -> None:
    """The losses of one backward pass each of the student and of the objective's own modules, and these passes."""
    generator = torch.Generator()
    loop.step = loop.training.steps - 1
    loop.student.train()

    def add(output: ObjectiveOutput | None) -> None:
        activations.count()
        if output is not None:
            backward(output.loss)

    batch = loop.draw(generator)
    with torch.autograd.graph.saved_tensors_hooks(activations.keep, lambda tensor: tensor):
        add(loop.loss(batch, generator))
        for number in range(loop.objective.auxiliary_updates if loop.auxiliary else 0):
            batch = loop.draw(generator) if number else batch
            for name in loop.auxiliary:
                add(loop.auxiliary_loss(name, batch, generator))


def _memory(loop: Loop, models: Mapping[str, nn.Module], activations: int) -> dict[str, int]:
    sizes = {name: _bytes(model) for name, model in models.items()}
    trained = [loop.trained, *loop.auxiliary.values()]
    sizes["gradients"] = sum(p.nbytes for module in trained for p in module.parameters)
    sizes["optimisers"] = sum(round(_state(part.builder) * sum(p.nbytes for p in part.parameters)) for part in trained)
    sizes["average"] = sum(_bytes(average.module) for average in loop.averages.values())
    sizes["activations"] = activations
    return sizes


def _bytes(model: nn.Module) -> int:
    return sum(v.nbytes for v in (*model.parameters(), *model.buffers()))


def _state(builder: OptimizerBuilder) -> float:
    """Bytes of an optimiser's state for each byte of a parameter, seen on a parameter of its own."""
    parameter = nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros(1000)
    optimizer = builder([parameter])
    optimizer.step()
    stored = (v.nbytes for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.numel() > 1)
    return sum(stored) / parameter.nbytes
