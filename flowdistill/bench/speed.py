"""What a training step costs: ``flowdistill bench speed``."""

from __future__ import annotations

import runpy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch

from flowdistill import differentiation
from flowdistill.bench.tables import Cells, markdown_table
from flowdistill.interfaces import Step
from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import find_device
from flowdistill.plumbing.dry import without_files
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.files import write_json, write_text
from flowdistill.plumbing.flops import Allocations, Flops
from flowdistill.plumbing.machine import machine
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.randomness import ONE_AT_A_TIME, step_generator
from flowdistill.training.loop import Loop, configured_loop

_SETTINGS = ("mnist_sit", "mnist_edm2")
_HEAD = ["", "counted", "measured", "measured / counted", "kernels", "memory", "states a second", "GFLOP/s"]
_Call = Callable[[], object]


@attrs.frozen(kw_only=True)
class Cost:
    """The cost of something, beside the student's own forward pass on the same states."""

    group: str
    """The setting."""
    name: str
    """The method, or the part of a step."""
    counted: float
    """Its operations over those of the forward pass: products and sums of matrix products, convolutions, attention."""
    measured: float
    """Its time over that of the forward pass, taken in turns: the median of the rounds."""
    spread: float
    """Half of the interquartile range of this ratio."""
    kernels: float
    """The kernels that it launches, over those of the forward pass; views and empty tensors are none."""
    memory: float
    """The most bytes that it allocates beyond those before, over those of a forward and backward pass."""
    states_per_second: float
    """The states of a batch over its median time."""
    flops_per_second: float
    """Its operations over its median time."""

    def cells(self) -> list[str]:
        """The row of a table."""
        return [
            self.name,
            f"{self.counted:.2f}",
            f"{self.measured:.2f} ± {self.spread:.2f}",
            f"{self.measured / self.counted:.2f}",
            f"{self.kernels:.1f}",
            f"{self.memory:.2f}",
            f"{self.states_per_second:.3g}",
            f"{self.flops_per_second / 1e9:.3g}",
        ]


def speed(
    *,
    out: str | Path = "runs/bench/speed",
    bindings: Sequence[str] = (),
    only: Sequence[str] = (),
    peers: Sequence[tuple[str | Path, str | Path]] = (),
    rounds: int = 10,
    device: str | None = None,
) -> Path:
    """Measure a late training step of every method, and the parts of FreeFlow's, and write the tables.

    Nothing is read: networks have fresh weights, and data are zeros. On a CPU the methods are those on the small SiT
    and EDM2 of MNIST, on a GPU the recipes for ImageNet at full size. Everything is timed in turns with the student's
    forward pass, in one process: CPU time on a CPU, and on a GPU the time until it is done. With ``train.compile`` both
    are compiled, and operations, kernels and memory are those without a compiler.

    Args:
        out: where ``table.md`` and ``results.json`` go.
        bindings: for all trainings, such as ``"train.precision = 'bf16'"``.
        only: parts of the names of methods; others are left out.
        peers: other implementations of a method, each an adapter and the checkout that it imports. An adapter is a
            Python file with the name of our ``METHOD`` and a function ``step`` of our loop and the checkout, which
            gives a call that computes their loss and its gradients, as in ``benchmarks/peers``.
        rounds: of each measurement, after two to warm up.
        device: of the networks; None is a GPU if there is one.

    Returns:
        ``out``.

    Raises:
        ConfigError: no method has such a name, or a binding is wrong.

    Examples:
        >>> folder = speed(only=["stee"], bindings=["train.batch_size = 2"], rounds=2)
        >>> (folder / "table.md").is_file()
        True
    """
    if rounds < 2:
        raise ConfigError(f"rounds must be at least 2, not {rounds}")
    place, folder = find_device(device), Path(out)
    rows = [row for row in _rows(place) if not only or any(part in row[1] for part in only)]
    if not rows:
        raise ConfigError(f"no method has any of {', '.join(only)} in its name")
    adapters = {str(file): (runpy.run_path(str(file)), Path(checkout)) for file, checkout in peers}
    costs: list[Cost] = []
    with progress("bench speed", len(rows)) as phase, tempfile.TemporaryDirectory() as temporary:
        for group, name, files in rows:
            loop = _built(files, bindings, temporary, place)
            if name in ("freeflow", "freeflow/imagenet"):
                costs += _measured(f"{group}, parts of a step", loop, _parts(loop), rounds)
            if name in ("meanflow_distillation", "meanflow/meanflow_distillation_imagenet"):
                costs += _measured(group, loop, {f"{name}, by hand": _by_hand(loop)}, rounds)
            calls: dict[str, _Call] = {name: loop.train_step}
            beside = {file: (code, place) for file, (code, place) in adapters.items() if code["METHOD"] == name}
            if beside:
                calls[f"{name}, loss and gradients"] = _loss_and_gradients(loop)
            for file, (code, checkout) in beside.items():
                calls[Path(file).stem] = code["step"](loop, checkout)
            costs += _measured(group, loop, calls, rounds)
            del loop
            phase.advance(1)
    tables = [(title, _table(costs, title)) for title in dict.fromkeys(cost.group for cost in costs)]
    text = "\n\n".join(part for title, cells in tables for part in (f"### {title}", markdown_table(cells)))
    note = f"Medians of {rounds} rounds ± half of the interquartile range. {machine()}."
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "table.md", f"{text}\n\n{note}\n")
    write_json(folder / "results.json", [attrs.asdict(cost) for cost in costs])
    return folder


def _rows(device: torch.device) -> list[tuple[str, str, Sequence[str | Path]]]:
    """The setting, the name and the gin files of each training."""
    if device.type == "cpu":
        return [(on, method, config.composed(method, on)) for on in _SETTINGS for method in config.methods()]
    whole = [name for name in config.recipes() if name.endswith("imagenet.gin")]
    return [("imagenet", name.removesuffix(".gin"), [name]) for name in whole]


def _built(files: Sequence[str | Path], bindings: Sequence[str], folder: str, device: torch.device) -> Loop:
    """The loop of a training, before its last step, with fresh weights and data of zeros."""
    short = ["train.batch_size = 16", "train.accumulation = 1", "train.evaluation = None", "train.sample_every = 0"]
    with ONE_AT_A_TIME, torch.random.fork_rng(), config.parsed(files, [*short, *bindings]), without_files(values=True):
        loop = configured_loop(folder, device)
    loop.source.leave_out_data()
    return loop


def _parts(loop: Loop) -> dict[str, _Call]:
    """What FreeFlow's step is made of, by name; passes with a graph go backward too."""
    student, teacher = loop.student, loop.teacher
    assert teacher is not None
    states = loop.draw(torch.Generator(loop.device).manual_seed(0))
    inside = attrs.evolve(states, t=torch.full_like(states.t, 0.8), s=torch.full_like(states.s, 0.2))

    def backward(value: torch.Tensor) -> None:
        value.square().mean().backward()  # type: ignore[no-untyped-call]
        student.zero_grad()

    def forward_and_backward() -> None:
        with loop.autocast():
            average = differentiation.evaluate(student, inside)
        backward(average)

    def exact() -> None:
        with loop.autocast():
            average, _ = differentiation.jvp(student, inside, ds=1.0)
        backward(average)

    def difference() -> None:
        with loop.autocast():
            average, _ = differentiation.finite_difference(student, inside, ds=1.0)
        backward(average)

    def guided() -> None:
        with torch.no_grad(), loop.autocast():
            teacher.velocity(inside.x, inside.t, inside.condition)

    return {
        "forward and backward": forward_and_backward,
        "with an exact derivative": exact,
        "with a backward difference": difference,
        "guided teacher": guided,
    }


def _by_hand(loop: Loop) -> _Call:
    """The step without the loop: for objectives without modules of their own."""
    training, objective, trained = loop.training, loop.objective, loop.trained

    def call() -> None:
        generators = [step_generator(training.seed, loop.step, stream, loop.device) for stream in ("states", "loss")]
        law = objective.law(loop.progress)
        states = loop.source.sample(training.batch_size, law, generators[0])
        with loop.autocast():
            output = objective.loss(states, Step(generators[1], loop.step, loop.progress))
        output.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained.parameters, training.gradient_clip or float("inf"))
        trained.optimizer.step()
        trained.optimizer.zero_grad(set_to_none=True)
        for average in loop.averages.values():
            average.update(loop.step)

    return call


def _loss_and_gradients(loop: Loop) -> _Call:
    generator = torch.Generator(loop.device)

    def call() -> None:
        loop.loss(loop.draw(generator), generator).loss.backward()  # type: ignore[no-untyped-call]
        loop.student.zero_grad()

    return call


def _measured(group: str, loop: Loop, calls: Mapping[str, _Call], rounds: int) -> Iterator[Cost]:
    """The costs of some calls, each timed in turns with the student's forward pass."""
    states = loop.draw(torch.Generator(loop.device).manual_seed(0))
    last = loop.training.steps - 1

    def forward() -> None:
        with torch.no_grad(), loop.autocast():
            differentiation.evaluate(loop.student, states)

    def plain() -> None:
        with loop.autocast():
            average = differentiation.evaluate(loop.student, states)
        average.square().mean().backward()  # type: ignore[no-untyped-call]
        loop.student.zero_grad()

    for name, call in calls.items():

        def late(call: _Call = call) -> None:
            loop.step = last
            call()

        late()  # makes the state of the optimisers, which stays
        whole, unit = _counted(late), _counted(forward)
        loop.compile(loop.training.compile)  # counts see single operations alone
        seconds, units = _in_turns((late, forward), rounds, loop.device)
        loop.compile(None)
        ratios = [one / other for one, other in zip(seconds, units, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        yield Cost(
            group=group,
            name=name,
            counted=whole.total / unit.total,
            measured=middle,
            spread=(high - low) / 2,
            kernels=whole.kernels / unit.kernels,
            memory=_most_bytes(late, loop.device) / _most_bytes(plain, loop.device),
            states_per_second=len(states.t) / statistics.median(seconds),
            flops_per_second=whole.total / statistics.median(seconds),
        )


def _counted(call: _Call) -> Flops:
    counts = Flops()  # type: ignore[no-untyped-call]
    with counts:
        call()
    return counts


def _in_turns(calls: Sequence[_Call], rounds: int, device: torch.device) -> list[list[float]]:
    """The seconds of each call in each round, after two to warm up."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 2):
        for call, times in zip(calls, seconds, strict=True):
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= 2:
                times.append(clock() - start)
    return seconds


def _most_bytes(call: _Call, device: torch.device) -> int:
    """The most bytes that a call allocates beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    allocations = Allocations()
    with allocations:
        call()
    return allocations.most


def _table(costs: Sequence[Cost], group: str) -> Cells:
    return [_HEAD, *(cost.cells() for cost in costs if cost.group == group)]
