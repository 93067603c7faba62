"""What a recipe would cost: its last training step on tensors without values."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from flowdistill.differentiation import backward
from flowdistill.duals import parts
from flowdistill.interfaces import ObjectiveOutput
from flowdistill.plumbing import config
from flowdistill.plumbing.dry import without_files
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.flops import Flops
from flowdistill.plumbing.randomness import ONE_AT_A_TIME
from flowdistill.training.gpus import GPUS, MACHINE, NETWORK, speed
from flowdistill.training.loop import Loop, configured_loop
from flowdistill.training.parallel import Parallel, evaluate_low, layers, recompute
from flowdistill.training.settings import OptimizerBuilder
from flowdistill.training.traffic import Record, Sizes, Traffic, Unit, replay, units_of


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
    """The operations of a step, of all processes: products and sums of matrix products, convolutions and attention, in
    all forward and backward passes. Other operations are not counted."""
    memory: Mapping[str, int]
    """The bytes of a process by part. "activations" is what autograd keeps of one backward pass. "gathered" is what
    several processes gather: the most weights at once, a layer more that travels ahead, and a layer's gradients."""
    flops_per_second: float
    """The speed of a process, at which ``hours`` are stated."""
    source: str = ""
    """Where that speed is from, in words; empty for a speed that was given."""
    processes: int = 1
    """The processes that share out the step."""
    shard: int = 1
    """Those of them that share one copy of the networks."""
    gpu: str = ""
    """The GPU of each process; empty for one that is not known."""
    traffic: Traffic | None = None
    """What one of several processes exchanges with the others in a step."""
    recomputed: int | None = None
    """The bytes of "activations" with ``parallel.checkpoint_activations``; None where it is set, or not counted."""

    def fitting(self, size: float) -> tuple[int, int]:
        """The largest ``train.batch_size``, and its ``train.accumulation``, whose steps fit into some bytes.

        The states of a step stay the same, and the activations are in proportion to those of a backward pass.

        Raises:
            ConfigError: not even one state at a time fits, or that is no size.
        """
        if not 0 < size < math.inf:
            raise ConfigError(f"a memory is a positive number of bytes, not {size:g}")
        fixed = sum(part for name, part in self.memory.items() if name != "activations")
        each = self.memory["activations"] * self.accumulation / self.batch_size
        most = math.floor((size - fixed) / max(each, 1))
        if most < 1:
            raise ConfigError(f"a state at a time needs {(fixed + each) / 2**30:.3g} GiB, more than {size / 2**30:.3g}")
        states = self.batch_size // self.processes
        batch = max(n for n in range(1, min(most, states) + 1) if states % n == 0)
        return batch, self.batch_size // batch

    @property
    def computing(self) -> float:
        """The seconds of a step that a process computes."""
        return self.flops / self.processes / self.flops_per_second

    @property
    def exchanging(self) -> float | None:
        """The seconds of a step that a process sends at the full bandwidth of its links; None where it is not known."""
        if self.traffic is None:
            return 0.0
        return self.traffic.seconds(GPUS[self.gpu], self.shard, self.processes) if self.gpu else None

    @property
    def hours(self) -> float:
        """Of the whole training, in which processes compute and exchange at the same time."""
        return self.steps * max(self.computing, self.exchanging or 0.0) / 3600

    def __str__(self) -> str:
        """A table."""
        lines = [f"{self.steps} steps of {self.batch_size} states"]
        if self.traffic is not None:
            states, copies = self.batch_size // self.accumulation, self.processes // self.shard
            lines.append(f"{self.processes} processes, {states} states at a time in each")
            lines += [f"{copies} copies of the networks"] if copies > 1 else []
        lines += ["", f"{'':12}{'parameters':>14}{'evaluations of a state':>26}"]
        for name, count in self.parameters.items():
            lines.append(f"{name:12}{count:14,}{self.evaluations.get(name, 0):26.3g}")
        lines += ["", f"{'memory' if self.traffic is None else 'of a process':12}{'GiB':>14}"]
        lines += [f"{name:12}{size / 2**30:14.3f}" for name, size in self.memory.items()]
        lines += [f"{'all':12}{sum(self.memory.values()) / 2**30:14.3f}", ""]
        if self.traffic is not None:
            lines += [*_traffic_lines(self.traffic), "", *self._time_lines()]
        source = f", {self.source}" if self.source else ""
        speed = f"{self.flops_per_second:.3g} FLOP/s{' a process' if self.traffic else ''}{source}"
        lines.append(f"{self.flops:.4g} FLOP a step; {self.hours:.3g} hours at {speed}")
        return "\n".join(lines + self._advice())

    def _time_lines(self) -> list[str]:
        """The seconds of a step of several processes."""
        if self.exchanging is None:
            return [f"{self.computing:.3g} s of computing a step; name a --gpu to see the time of the traffic"]
        link = GPUS[self.gpu].link
        where = f"{link / 1e9:g} GB/s inside a machine of {MACHINE}"
        if self.processes > MACHINE:
            where += f", and {NETWORK / 1e9:g} GB/s a GPU between machines, which is assumed"
        return [
            f"{self.computing:.3g} s of computing a step, and {self.exchanging:.3g} s of traffic at the same time, "
            f"at {where}",
            "computed, not measured: no step of several GPUs has been timed",
        ]

    def _advice(self) -> list[str]:
        """What to change where several processes need more memory than their GPUs have, in a sentence."""
        if self.traffic is None or not self.gpu or sum(self.memory.values()) <= GPUS[self.gpu].memory:
            return []
        size, needed, ways = GPUS[self.gpu].memory, sum(self.memory.values()), ["more processes"]
        with contextlib.suppress(ConfigError):
            batch, accumulation = self.fitting(size)
            ways.insert(0, f"train.batch_size = {batch} with train.accumulation = {accumulation}")
        if self.recomputed is not None and self.recomputed < self.memory["activations"]:
            rest = needed - self.memory["activations"] + self.recomputed
            ways.insert(0, f"parallel.checkpoint_activations = True, which needs {rest / 2**30:.3g} GiB")
        return [
            f"a process needs {needed / 2**30:.3g} GiB, more than the {size / 2**30:.3g} of its {self.gpu.upper()}: "
            f"set {', or '.join(ways)}".replace("set more", "take more")
        ]


def _traffic_lines(traffic: Traffic) -> list[str]:
    rows = [
        ("gathers of weights", traffic.gathers, traffic.gathered),
        ("reductions of gradients", traffic.reductions, traffic.reduced),
        ("means over the copies", traffic.averagings, traffic.averaged),
    ]
    lines = [f"{'traffic of a process in a step':32}{'number':>10}{'GiB':>10}"]
    lines += [f"{name:32}{number:10,}{size / 2**30:10.3f}" for name, number, size in rows if number]
    return [*lines, f"{'the least there could be':32}{'':10}{traffic.least / 2**30:10.3f}"]


def plan(
    recipe: str | Path | None = None,
    *,
    on: str | Path | None = None,
    gin_file: str | Path | None = None,
    gin_files: Sequence[str | Path] = (),
    gin_bindings: Sequence[str] = (),
    gpu: str = "h200",
    flops_per_second: float | None = None,
    processes: int = 1,
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
        gpu: at whose speed hours are stated, that of FreeFlow's step on SiT-XL/2 in bfloat16: "h200", where it was
            measured, or a GPU for which it is computed, such as "h100-80".
        flops_per_second: the speed of a process in place of it.
        processes: that share out the backward passes of a step, and the networks as ``train.parallel`` says.

    Raises:
        ConfigError: the configuration cannot work, or nothing is known of the GPU.

    Examples:
        >>> result = plan("freeflow/ring.gin")
        >>> result.evaluations["teacher"], result.memory["teacher"] < 1e4
        (1.0, True)
    """
    if flops_per_second is not None and not flops_per_second > 0:
        raise ConfigError(f"FLOP/s must be positive, not {flops_per_second}")
    if processes < 1:
        raise ConfigError(f"processes must be at least 1, not {processes}")
    rate, source = speed(gpu) if flops_per_second is None else (flops_per_second, "")
    files = config.chosen(recipe, on, gin_file, gin_files)
    with ONE_AT_A_TIME, torch.random.fork_rng(), config.parsed(files, gin_bindings), without_files():
        loop = configured_loop("plan", "cpu")
        training = loop.training
        training.check_shares(processes)
        loop.source.leave_out_data()
        models: dict[str, nn.Module] = {"student": loop.student}
        models |= {} if loop.teacher is None else {"teacher": loop.teacher}
        models |= loop.objective.modules()
        shares = Shares(training.parallel, processes, models, training.precision == "bf16")
        memory = _memory(loop, models, shares)
        found = units_of(models) if processes > 1 else []
        sizes = {unit: shares.sizes(unit) for unit in found}
        if processes > 1:
            shares.lower()
        try:
            first, counters = _counted(loop, models, record := Record(found)), loop.counters
            again = first
            if processes > 1 or training.parallel.checkpoint_activations:
                for module in loop.trained_modules():
                    recompute(module)
                again = _counted(loop, models, Record(()))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ConfigError(
                f"a plan has no values, and a step of this training asks for some, by {error}: train a few steps to "
                "see what it costs"
            ) from error
    recomputes, recomputed = training.parallel.checkpoint_activations, again.activations + first.layer
    traffic, memory["gathered"] = None, 0
    if processes > 1:
        micros = training.accumulation // processes
        traffic, most = replay(record, sizes, micros, shares.shard, shares.copies)
        ahead = max(size.weights for size in sizes.values()) + max(size.gradients for size in sizes.values())
        memory["gathered"] = round(most + ahead)
    else:
        del memory["gathered"]
    memory["activations"] = recomputed if recomputes else first.activations
    return Plan(
        steps=training.steps,
        batch_size=training.batch_size * training.accumulation,
        accumulation=training.accumulation,
        parameters={name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        evaluations={
            name.removesuffix("_evaluations"): count / training.batch_size for name, count in counters.items()
        },
        flops=(again if recomputes else first).flops * training.accumulation,
        memory=memory,
        flops_per_second=rate,
        source=source,
        processes=processes,
        shard=shares.shard,
        gpu=gpu.lower() if gpu.lower() in GPUS else "",
        traffic=traffic,
        recomputed=recomputed if processes > 1 and not recomputes else None,
    )


class _Activations:
    """The most bytes that autograd keeps for a backward pass, parameters and their views left out."""

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self.most = self.layer = 0
        self._weights = {v.untyped_storage()._cdata for m in models for v in (*m.parameters(), *m.buffers())}
        self._kept: dict[int, Any] = {}
        self._before = 0

    def keep(self, tensor: Tensor) -> Tensor:
        storage = parts(tensor)[0].untyped_storage()
        if storage._cdata not in self._weights:
            self._kept[storage._cdata] = storage
        return tensor

    def enter(self, *_: Any) -> None:
        """A layer is entered."""
        self._before = len(self._kept)

    def leave(self, *_: Any) -> None:
        """It is left, and ``layer`` is what the largest has kept."""
        kept = itertools.islice(self._kept.values(), self._before, None)
        self.layer = max(self.layer, sum(storage.nbytes() for storage in kept))

    def count(self) -> None:
        self.most = max(self.most, sum(storage.nbytes() for storage in self._kept.values()))
        self._kept.clear()


@attrs.frozen
class _Counted:
    """What a step was seen to take."""

    flops: int
    """The operations of one backward pass of each loss."""
    activations: int
    """The most bytes that one of them keeps."""
    layer: int
    """Those of the layer that keeps most."""


def _counted(loop: Loop, models: Mapping[str, nn.Module], record: Record) -> _Counted:
    flops, activations = Flops(), _Activations(models.values())  # type: ignore[no-untyped-call]
    with contextlib.ExitStack() as hooks:
        for layer in (layer for module in loop.trained_modules() for layer in layers(module)):
            hooks.callback(layer.register_forward_pre_hook(activations.enter).remove)
            hooks.callback(layer.register_forward_hook(activations.leave).remove)
        with record, flops:
            _step(loop, activations, record)
    return _Counted(flops.total, activations.most, activations.layer)


def _step(loop: Loop, activations: _Activations, record: Record) -> None:
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
        record.begin("student")
        add(loop.loss(batch, generator))
        for number in range(loop.objective.auxiliary_updates if loop.auxiliary else 0):
            batch = loop.draw(generator) if number else batch
            for name in loop.auxiliary:
                record.begin(name)
                add(loop.auxiliary_loss(name, batch, generator))


class Shares:
    """What one of several processes has of the networks of a training.

    Args:
        settings: how they share.
        processes: their number.
        models: the networks by name, of which "teacher" is frozen.
        low: whether the training is in bfloat16.
    """

    def __init__(self, settings: Parallel, processes: int, models: Mapping[str, nn.Module], low: bool) -> None:
        self.copies = settings.copies(processes)
        self.shard = processes // self.copies
        self._settings, self._models = settings, models
        lowered = {name for name, model in models.items() if settings.lowers(model, name == "teacher")}
        self._low = lowered if low and processes > 1 else set[str]()

    def elements(self, parameter: Tensor) -> int:
        """Of a parameter, whose first dimension is cut: of a process that has no less than the others."""
        rows, *_ = parameter.shape or (1,)
        return math.ceil(rows / self.shard) * parameter.numel() // max(rows, 1)

    def held(self, parameter: Tensor, name: str = "") -> int:
        """The bytes of a process's part of a parameter, of the module of that name."""
        low = name == "teacher" and name in self._low and parameter.dtype == torch.float32
        return (2 if low else parameter.itemsize) * self.elements(parameter)

    def sizes(self, unit: Unit) -> Sizes:
        """The bytes of a unit, filled up to equal parts."""
        low = unit.network in self._low
        return Sizes(
            weights=self.shard * sum(self.elements(p) * (2 if low else p.itemsize) for p in unit.parameters),
            gradients=self.shard
            * sum(self.elements(p) * (4 if low else p.itemsize) for p in unit.parameters if p.requires_grad),
            stays=self._settings.leaves(self._models[unit.network], unit.network == "teacher"),
        )

    def lower(self) -> None:
        """Give the networks weights in the precision in which processes gather them."""
        for name in self._low:
            evaluate_low(self._models[name], "cpu")
            for parameter in self._models[name].parameters():
                if parameter.dtype == torch.float32:
                    parameter.data = parameter.data.bfloat16()


def _memory(loop: Loop, models: Mapping[str, nn.Module], shares: Shares) -> dict[str, int]:
    """The bytes of what stays from step to step, by part."""

    def size(module: nn.Module, name: str = "") -> int:
        return sum(shares.held(p, name) for p in module.parameters()) + sum(v.nbytes for v in module.buffers())

    sizes = {name: size(model, name) for name, model in models.items()}
    trained = [loop.trained, *loop.auxiliary.values()]
    parts = [sum(shares.held(p) for p in module.parameters) for module in trained]
    sizes["gradients"] = sum(parts)
    sizes["optimisers"] = sum(round(_state(m.builder) * part) for m, part in zip(trained, parts, strict=True))
    sizes["average"] = sum(size(average.module) for average in loop.averages.values())
    return sizes


def _state(builder: OptimizerBuilder) -> float:
    """Bytes of an optimiser's state for each byte of a parameter, seen on a parameter of its own."""
    parameter = nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros(1000)
    optimizer = builder([parameter])
    optimizer.step()
    stored = (v.nbytes for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.numel() > 1)
    return sum(stored) / parameter.nbytes
