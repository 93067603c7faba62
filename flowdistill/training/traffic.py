"""What processes that share networks exchange in a step, by a record of a step on tensors without values.

The record says when each unit of `flowdistill.training.parallel.units` is evaluated, and when a backward pass reaches
it. From it follows when FSDP2 gathers its weights and adds up its gradients, without any process.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from flowdistill.duals import parts
from flowdistill.training.gpus import MACHINE, NETWORK, Gpu
from flowdistill.training.parallel import entries, units


@attrs.frozen(kw_only=True)
class Traffic:
    """What one process exchanges with the others in a step.

    A ring of N processes carries (N - 1)/N of the bytes of a tensor past each when it is gathered, or added up and
    cut, and twice that when it is added up for all.
    Norms, buffers and the numbers of the log are left out.
    """

    gathers: int
    """The all-gathers, each of the weights of a layer."""
    gathered: float
    """The bytes of weights that the process receives by them."""
    reductions: int
    """The reduce-scatters, each of the gradients of a layer."""
    reduced: float
    """The bytes of gradients that the process sends by them."""
    averagings: int
    """The all-reduces of gradients between the copies of hybrid sharding."""
    averaged: float
    """The bytes that the process sends by them."""
    least: float
    """The bytes of all kinds if the weights of each network were gathered once between two updates, and its gradients
    added up once for each."""

    def seconds(self, gpu: Gpu, shard: int, processes: int) -> float:
        """The time of it at the full bandwidth of a GPU's links.

        Args:
            gpu: the GPU.
            shard: the processes to a copy of the networks, which are neighbours.
            processes: all of them.
        """
        inner, outer = (gpu.link if size <= MACHINE else NETWORK for size in (shard, processes))
        return (self.gathered + self.reduced) / inner + self.averaged / outer


@attrs.frozen(eq=False)
class Unit:
    """Weights that are gathered together."""

    network: str
    """The name of the module that they belong to."""
    module: nn.Module
    parameters: Sequence[nn.Parameter]
    root: nn.Module
    """The unit around it, whose backward pass ends with all units in it freed."""


def units_of(networks: Mapping[str, nn.Module]) -> list[Unit]:
    """The units of the modules of a training, by name, each with the parameters that no unit within it has."""
    found, taken = [], set[nn.Parameter]()
    for name, network in networks.items():
        modules = units(network)
        for module in modules:
            own = [p for p in module.parameters() if p not in taken]
            taken.update(own)
            root = next(other for other in reversed(modules) if any(part is module for part in other.modules()))
            found.append(Unit(name, module, own, root))
    return found


class Event(enum.Enum):
    """What happens to a unit in a step."""

    ENTERED = enum.auto()
    LEFT = enum.auto()
    REACHED = enum.auto()
    """By a backward pass, whose end alone tells that the gradients are there: no input has a graph."""
    PASSED = enum.auto()
    """By a backward pass, which goes on to its inputs, so that its gradients are there."""


class Record:
    """Writes down what happens to units inside; `begin` opens the page of another loss.

    Args:
        found: the units.
    """

    def __init__(self, found: Iterable[Unit]) -> None:
        self.pages: list[tuple[str, list[tuple[Event, Unit]]]] = []
        """The module that each loss trains, and the events of its evaluation and of its backward pass."""
        self._units = list(found)
        self._inside: set[nn.Module] = set()

    def begin(self, trained: str) -> None:
        """What follows belongs to a loss that trains this module."""
        self.pages.append((trained, []))

    def __enter__(self) -> Record:
        with contextlib.ExitStack() as changes:
            for unit in self._units:
                for name in ("forward", *entries(unit.module)):
                    method, own = getattr(unit.module, name), vars(unit.module).get(name)
                    setattr(unit.module, name, functools.partial(self._call, unit, method))
                    changes.callback(_restore, unit.module, name, own)
            self._changes = changes.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._changes.close()

    def _call(self, unit: Unit, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if unit.module in self._inside:  # one method calls another
            return method(*args, **kwargs)
        self._inside.add(unit.module)
        self._note(Event.ENTERED, unit)
        fed = any(_has_graph(value) for value in tree_leaves((args, kwargs)))
        result = method(*args, **kwargs)
        self._note(Event.LEFT, unit)
        self._inside.remove(unit.module)
        if torch.is_grad_enabled():
            self._watch(unit, fed, [parts(value)[0] for value in tree_leaves(result) if _has_graph(value)])
        return result

    def _watch(self, unit: Unit, fed: bool, outputs: Sequence[Tensor]) -> None:
        reached = False

        def note(gradient: Tensor) -> None:
            nonlocal reached
            if not reached:
                self._note(Event.PASSED if fed else Event.REACHED, unit)
            reached = True

        for output in outputs:
            output.register_hook(note)  # type: ignore[no-untyped-call]

    def _note(self, event: Event, unit: Unit) -> None:
        self.pages[-1][1].append((event, unit))


def _restore(module: nn.Module, name: str, own: Callable[..., Any] | None) -> None:
    """Give a module back the method that it had for itself, or that of its class."""
    if own is None:
        delattr(module, name)
    else:
        setattr(module, name, own)


def _has_graph(value: Any) -> bool:
    value = parts(value)[0]
    return isinstance(value, Tensor) and value.requires_grad


@attrs.frozen(kw_only=True)
class Sizes:
    """The bytes of a unit, and whether they stay where they are gathered."""

    weights: float
    """Of the weights as they travel."""
    gradients: float
    """Of the gradients as they travel."""
    stays: bool
    """Whether the weights stay after an evaluation."""


class _Process:
    """A process as FSDP2 lets it act: the weights that it has gathered, and the sums of what it exchanged.

    Args:
        sizes: of the units.
    """

    def __init__(self, sizes: Mapping[Unit, Sizes]) -> None:
        self._sizes = sizes
        self._here: dict[Unit, None] = {}
        self._late: dict[Unit, None] = {}
        self.most = 0.0
        self.restart()

    def restart(self) -> None:
        """Count from here."""
        self.gathers = self.reductions = 0
        self.gathered = self.reduced = 0.0

    def gather(self, unit: Unit) -> None:
        """Gather the weights of a unit, if they are not there."""
        if unit not in self._here:
            self._here[unit] = None
            self.gathers += 1
            self.gathered += self._sizes[unit].weights
            self._look()

    def leave(self, unit: Unit) -> None:
        """End an evaluation."""
        if not self._sizes[unit].stays:
            self._here.pop(unit, None)

    def reduce(self, unit: Unit) -> None:
        """Add up the gradients of a unit, and free its weights."""
        self._here.pop(unit, None)
        self._late.pop(unit, None)
        if self._sizes[unit].gradients:
            self.reductions += 1
            self.reduced += self._sizes[unit].gradients

    def wait(self, unit: Unit) -> None:
        """Free the weights of a unit, and keep its gradients for those of another evaluation that are to come."""
        self._here.pop(unit, None)
        if self._sizes[unit].gradients:
            self._late[unit] = None
            self._look()

    def free(self, units: Iterable[Unit]) -> None:
        """Free the weights of units."""
        for unit in units:
            self._here.pop(unit, None)

    def _look(self) -> None:
        self.most = max(self.most, sum(self._sizes[unit].weights for unit in (*self._here, *self._late)))

    def pass_through(self, events: Sequence[tuple[Event, Unit]]) -> None:
        """Take a loss and its backward pass.

        The gradients of a unit are there when the backward pass has passed all its evaluations, since autograd adds
        them up before. Where no input has a graph, only the end of the backward pass tells. The end also frees all
        units of the networks that were reached.
        """
        left = Counter(unit for event, unit in events if event in _BACK)
        ends: dict[Unit, None] = {}
        for event, unit in events:
            if event is Event.LEFT:
                self.leave(unit)
                continue
            self.gather(unit)
            if event is Event.ENTERED:
                continue
            left[unit] -= 1
            if event is Event.REACHED:
                ends[unit] = None
            elif left[unit]:
                self.wait(unit)
            else:
                self.reduce(unit)
        for unit in ends:
            self.reduce(unit)
        roots = {unit.root for unit in left}
        self.free([unit for unit in self._sizes if unit.root in roots])


_BACK = (Event.REACHED, Event.PASSED)


def replay(record: Record, sizes: Mapping[Unit, Sizes], micros: int, shard: int, copies: int) -> tuple[Traffic, float]:
    """What FSDP2 does in a step whose losses happen as in a record, after another such step.

    Args:
        record: of each loss once.
        sizes: of its units.
        micros: how often the process takes each loss before the update.
        shard: the processes to a copy.
        copies: the copies.

    Returns:
        The traffic, and the most bytes that are there at once of weights, and of gradients that wait.
    """
    process = _Process(sizes)
    for _ in range(2):  # the weights that stay from the first are not gathered in the second
        process.restart()
        for trained, events in record.pages:
            for _ in range(micros):
                process.pass_through(events)
            process.free([unit for unit in sizes if unit.network == trained])

    moving = {name for name, _ in record.pages}
    ring, between = (shard - 1) / shard, 2 * (copies - 1) / copies / shard
    least = 0.0
    for _, events in record.pages:
        used = {unit for _, unit in events if unit.network in moving or not sizes[unit].stays}
        least += ring * sum(sizes[unit].weights for unit in used)
        reached = {unit for event, unit in events if event in _BACK}
        least += (ring + between) * sum(sizes[unit].gradients for unit in reached)
    traffic = Traffic(
        gathers=process.gathers if shard > 1 else 0,
        gathered=process.gathered * ring,
        reductions=process.reductions if shard > 1 else 0,
        reduced=process.reduced * ring,
        averagings=process.reductions if copies > 1 else 0,
        averaged=process.reduced * between,
        least=least,
    )
    return traffic, process.most
