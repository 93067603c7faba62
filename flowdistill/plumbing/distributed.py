"""Several processes, as torchrun starts them: which this one is, and what they tell each other."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from flowdistill.plumbing.errors import ConfigError, FlowDistillError

T = TypeVar("T")


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This process and how many there are: by PyTorch's process group, or RANK and WORLD_SIZE where there is none.

    Raises:
        ConfigError: these variables are not what torchrun sets.
    """
    if _joined():
        return dist.get_rank(), dist.get_world_size()
    world = os.environ.get("WORLD_SIZE", "1")
    rank = os.environ.get("RANK", "0" if world == "1" else "")
    if rank.isdecimal() and world.isdecimal() and int(rank) < int(world):
        return int(rank), int(world)
    raise ConfigError(
        f"the environment has WORLD_SIZE={world!r} and RANK={rank!r}: start several processes by torchrun, which sets "
        "both, or unset both"
    )


def find_device(device: str | torch.device | None) -> torch.device:
    """A device by its name; None is the first GPU (of each rank its own), as "cuda" is, else the CPU."""
    gpu = int(os.environ.get("LOCAL_RANK", "0"))
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except RuntimeError as error:
        raise ConfigError(f"{device!r} is no device: {str(error).splitlines()[0]}") from None
    if found.type != "cuda":
        return found
    index, count = gpu if found.index is None else found.index, torch.cuda.device_count()
    if index >= count:
        raise ConfigError(f"there is no device cuda:{index}: PyTorch sees {count} GPUs here")
    return torch.device("cuda", index)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """PyTorch's process group, by NCCL for GPUs and by Gloo for CPUs, where there are several and no group yet."""
    if _joined() or rank_and_world()[1] == 1:
        yield
        return
    # The group that exists when this module is first imported, as by torch._dynamo, stays among the defaults of its
    # functions: so none may exist, or its threads would outlive it and abort a process that ends before the others.
    importlib.import_module("torch.distributed.nn")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the processes cannot meet: {reason}; start them by torchrun") from None
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that do not know of it


def add_up(tensors: Iterable[Tensor]) -> None:
    """Put the sum over all processes in place of each tensor; all must give the same ones in the same order."""
    if _joined():
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Put the first process's values in place of each tensor; all must give the same ones in the same order."""
    if _joined():
        for tensor in tensors:
            value = tensor.contiguous()
            dist.broadcast(value, 0)
            tensor.copy_(value)


def gathered(value: T) -> list[T]:
    """What each process gave, by rank."""
    values = [value]
    if _joined():
        values = values * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def by_first(do: Callable[[], T]) -> T:
    """What the first process has done, for all: its result, or its error in all of them."""
    outcome: T | FlowDistillError | OSError | None = None
    if rank_and_world()[0] == 0:
        try:
            outcome = do()
        except (FlowDistillError, OSError) as error:
            outcome = error
    outcome = gathered(outcome)[0]
    if isinstance(outcome, (FlowDistillError, OSError)):
        raise outcome
    return cast("T", outcome)


class Vote:
    """Whether any process has said yes, known to all of them at the same step.

    Each asks once a step and learns the answer of the step before, which has arrived meanwhile: nobody waits for a GPU,
    nor for the network unless a process is a whole step ahead.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if _joined() else None
        self._yes: Tensor | None = None
        self._asked: dist.Work | None = None

    def any_yes(self, yes: bool) -> bool:
        """Say yes or no, and learn whether any process said yes the time before."""
        if self._group is None:
            return yes
        before = self._answer()
        self._yes = torch.tensor(int(yes))
        self._asked = dist.all_reduce(self._yes, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return before

    def close(self) -> bool:
        """Wait for the last answer, and give it; nothing can be asked afterwards."""
        answer = self._answer()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None
        return answer

    def _answer(self) -> bool:
        if self._asked is None or self._yes is None:
            return False
        self._asked.wait()
        self._asked = None
        return bool(self._yes)


def barrier() -> None:
    """Wait until all processes are here."""
    if _joined():
        dist.barrier()
