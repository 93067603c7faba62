"""Several processes, as torchrun starts them: which this one is, and what they tell each other."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from flowdistill.plumbing.errors import ConfigError, DistributedError, FlowDistillError, TrainingInterrupted

P = TypeVar("P")
T = TypeVar("T")
_GRACE = 5.0  # seconds in which processes that have lost another one say that they are there themselves


@attrs.define
class _Meeting:
    """What the processes of a group of ours share beside it."""

    store: Any  # of torch.distributed
    timeout: float
    works: int = 0  # how often the processes have worked for themselves

    @contextlib.contextmanager
    def showing_life(self, rank: int) -> Iterator[None]:
        """Inside, another thread gives signs of life, which those see that wait for this process.

        It also stops the training, as SIGTERM does, when torchrun has died, which nobody else would do.
        """
        over, parent = threading.Event(), os.getppid()

        def show() -> None:
            with contextlib.suppress(RuntimeError):  # of a store that has ended, which the others notice
                while not over.wait(min(1.0, self.timeout / 10)):
                    if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent:
                        os.kill(os.getpid(), signal.SIGTERM)
                        return
                    self.store.add(f"life/{rank}", 1)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def wait(self, work: str, world: int) -> None:
        """Wait until all have done a piece of work.

        Raises:
            DistributedError: one of them has failed.
            RuntimeError: one of them shows no life.
        """
        seen: dict[int, tuple[int, float]] = {}
        pause, look = 0.001, time.monotonic() + self.timeout / 10
        while self.store.add(f"{work}/done", 0) < world:
            if self.store.check(["failed"]):
                failed = self.store.get("failed").decode()
                raise DistributedError(f"process {failed} of {world} failed: its own message says why", told=True)
            if (now := time.monotonic()) >= look:
                look = now + self.timeout / 10
                for rank in (rank for rank in range(world) if not self.store.check([f"{work}/{rank}"])):
                    signs = self.store.add(f"life/{rank}", 0)
                    if signs != seen.get(rank, (-1, now))[0]:
                        seen[rank] = signs, now
                    elif now - seen[rank][1] > self.timeout:
                        raise RuntimeError("timeout")
            time.sleep(pause)
            pause = min(2 * pause, 0.2)


_meeting: _Meeting | None = None


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


def rank_and_world_together() -> tuple[int, int]:
    """This process and how many there are among those that are in one group; (0, 1) without a group."""
    return rank_and_world() if _joined() else (0, 1)


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
def process_group(device: torch.device, timeout: float) -> Iterator[None]:
    """PyTorch's process group, by NCCL for GPUs and by Gloo for CPUs, where there are several and no group yet.

    Args:
        device: of this process.
        timeout: the seconds that processes wait for one another.

    Raises:
        ConfigError: the processes cannot meet.
        DistributedError: inside, a process has ended, or has not answered in time.
    """
    global _meeting
    if _joined() or rank_and_world()[1] == 1:
        yield
        return
    # The group that exists when this module is first imported, as by torch._dynamo, stays among the defaults of its
    # functions: so none may exist, or its threads would outlive it and abort a process that ends before the others.
    importlib.import_module("torch.distributed.nn")
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun on one machine, where the store outlives a restart
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)  # type: ignore[attr-defined]
        meeting = {"store": store, "rank": rank, "world_size": world}
        if device.type == "cuda":
            torch.cuda.set_device(device)
            # NCCL ends the process when its time is over, so that the votes on the CPU must notice first
            dist.init_process_group(
                "cpu:gloo,cuda:nccl", timeout=timedelta(seconds=2 * timeout), device_id=device, **meeting
            )
        else:
            dist.init_process_group("gloo", timeout=timedelta(seconds=timeout), **meeting)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the processes cannot meet: {reason}; start them by torchrun") from None
    _meeting = _Meeting(store.clone(), timeout)  # of a connection of its own, since others wait by this one
    try:
        with _meeting.showing_life(rank):
            yield
        _leave()  # not after an error: it would wait for processes that do not know of it
    except TrainingInterrupted:  # of which all know
        _leave()
        raise
    except BaseException as error:
        with contextlib.suppress(RuntimeError):  # of a store that has ended as well
            _meeting.store.set("failed", str(rank))
            if isinstance(error, FlowDistillError) and not error.told:  # by the first that fails
                error.told = _meeting.store.add("told", 1) > 1
        raise
    finally:
        _meeting = None


def _leave() -> None:
    with answered():
        dist.destroy_process_group()


@contextlib.contextmanager
def answered() -> Iterator[None]:
    """Inside, an exchange between processes; DistributedError names those that take no part in it."""
    try:
        yield
    except RuntimeError as error:  # as torch.distributed.DistError is
        raise lost(error) from None


def is_of_exchange(error: RuntimeError) -> bool:
    """Whether an error of a step comes from an exchange between processes."""
    words = ("gloo", "NCCL", "ncclComm")
    return _joined() and (isinstance(error, dist.DistError) or any(word in str(error) for word in words))


def lost(error: RuntimeError) -> DistributedError:
    """The error of an exchange that failed; the first of the processes that are left is to tell it."""
    reason = str(error).strip().partition("\n")[0]
    if _meeting is None:
        return DistributedError(f"the processes have lost each other: {reason}")
    rank, world = rank_and_world()
    store, until = _meeting.store, time.monotonic() + _GRACE
    try:
        store.set(f"left/{rank}", "")
        while (missing := [r for r in range(world) if not store.check([f"left/{r}"])]) and time.monotonic() < until:
            time.sleep(0.1)
    except RuntimeError:
        return DistributedError("the process that the others meet at has ended: its own message says why")
    if not missing:
        return DistributedError(f"the processes do not do the same: {reason}", told=rank > 0)
    names = f"process{'es' if len(missing) > 1 else ''} {', '.join(map(str, missing))} of {world}"
    how = f"gave no sign for {_meeting.timeout:g} seconds" if "time" in reason.lower() else "ended"
    message = f"{names} {how}: look at what it said; the same command continues from the last checkpoint"
    return DistributedError(message, told=rank > min(set(range(world)) - set(missing)))


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Put the first process's values in place of each tensor; all must give the same ones in the same order.

    Those of a dtype travel together.
    """
    if not _joined():
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in kinds.values():
        values = torch.cat([tensor.reshape(-1) for tensor in group])
        with answered():
            dist.broadcast(values, 0)
        begin = 0
        for tensor in group:
            tensor.copy_(values[begin : begin + tensor.numel()].view_as(tensor))
            begin += tensor.numel()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; the tensor itself where no processes share it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that processes share, and that all ask for at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(value: T) -> list[T]:
    """What each process gave, by rank."""
    values = [value]
    if _joined():
        values = values * dist.get_world_size()
        with answered():
            dist.all_gather_object(values, value)
    return values


@attrs.frozen
class _Failure:
    """An error on its way to other processes."""

    error: FlowDistillError | OSError
    rank: int

    def throw(self) -> NoReturn:
        if self.rank == rank_and_world()[0]:
            raise self.error
        if not isinstance(self.error, FlowDistillError):
            raise DistributedError(f"process {self.rank} failed: {self.error}", told=True)
        self.error.told = True
        raise self.error


def _tried(do: Callable[[], T]) -> T | _Failure:
    try:
        return do()
    except (FlowDistillError, OSError) as error:
        return _Failure(error, rank_and_world()[0])


def by_first(do: Callable[[], T]) -> T:
    """What the first process has done, for all: its result, or its error in all of them.

    In the others an error of the operating system is a `DistributedError`.

    The others wait however long it takes, as long as the first one shows life.
    """
    with _working(), alone():
        outcome = _tried(do) if rank_and_world()[0] == 0 else None
    outcome = gathered(outcome)[0]
    if isinstance(outcome, _Failure):
        outcome.throw()
    return cast("T", outcome)


_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Inside, one of several processes works alone, and is to evaluate nothing that they share."""
    token = _ALONE.set(_meeting is not None)
    try:
        yield
    finally:
        _ALONE.reset(token)


def check_together() -> None:
    """ConfigError where the first process works alone, and the others would be waited for."""
    if _ALONE.get():
        raise ConfigError(
            "processes share the networks, which the first one cannot evaluate alone, as in a callback: take "
            "flowdistill.Run(loop.workdir).student, which is whole"
        )


def by_each(do: Callable[[], T]) -> T:
    """What this process has done, or in all of them the error of the first one that failed.

    Those that are done wait for the others, as `by_first` lets them wait for the first.
    """
    with _working():
        outcome = _tried(do)
    failures = [each for each in gathered(outcome if isinstance(outcome, _Failure) else None) if each is not None]
    if failures:
        failures[0].throw()
    return cast("T", outcome)


def in_turn(do: Callable[[], T]) -> T:
    """What this process has done, the processes of a machine one after another; see `by_each`."""
    rank, world = rank_and_world()
    ours = int(os.environ.get("LOCAL_RANK", rank)) if world > 1 else 0
    result: T | None = None
    for turn in range(max(gathered(ours)) + 1):
        done = by_each(do if turn == ours else lambda: None)
        result = done if turn == ours else result
    return cast("T", result)


def shared_out(parts: Sequence[P], do: Callable[[P], T]) -> list[T]:
    """What comes of each part, in order, for all processes: each does those of its turn.

    Examples:
        >>> shared_out([1, 2, 3], lambda number: number**2)
        [1, 4, 9]
    """
    rank, world = rank_and_world_together()
    shares = gathered(by_each(lambda: [do(part) for part in parts[rank::world]]))
    return [shares[number % world][number // world] for number in range(len(parts))]


@contextlib.contextmanager
def _working() -> Iterator[None]:
    """Inside, each process works however long it takes; at the end it waits for those that show life."""
    meeting = _meeting
    if meeting is None:
        yield
        return
    meeting.works += 1
    work, (rank, world) = f"work/{meeting.works}", rank_and_world()
    yield
    with answered():
        meeting.store.set(f"{work}/{rank}", "")
        meeting.store.add(f"{work}/done", 1)
        meeting.wait(work, world)
        past = f"work/{meeting.works - 1}"  # for which nobody waits any more
        for key in (f"{past}/{rank}", *([f"{past}/done"] if rank == 0 else [])):
            meeting.store.delete_key(key)


class Vote:
    """Whether any process has said yes, known to all of them at the same step.

    Each asks once a step and learns the answer of the step before, which has arrived meanwhile: nobody waits for a GPU,
    nor for the network unless a process is a whole step ahead.
    """

    def __init__(self) -> None:
        limit = None if _meeting is None else timedelta(seconds=_meeting.timeout)
        self._group = dist.new_group(backend="gloo", timeout=limit) if _joined() else None
        self._yes: Tensor | None = None
        self._asked: dist.Work | None = None

    def any_yes(self, yes: bool) -> bool:
        """Say yes or no, and learn whether any process said yes the time before."""
        if self._group is None:
            return yes
        before = self._answer()
        self._yes = torch.tensor(int(yes))
        with answered():
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
        with answered():
            self._asked.wait()
        self._asked = None
        return bool(self._yes)
