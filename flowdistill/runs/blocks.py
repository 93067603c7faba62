"""Samples in blocks on disk, so that a large job can be interrupted, continued, and shared out over processes.

A block is always of the same samples: those of its number. So metrics depend neither on where a job was interrupted nor
on how many ranks it had, and one with more samples or other metrics continues an earlier one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from typing_extensions import Self

from flowdistill.plumbing.caches import refusal
from flowdistill.plumbing.distributed import rank_and_world
from flowdistill.plumbing.errors import DataError
from flowdistill.plumbing.files import warn_if_damaged

BLOCK = 500
"""Samples in a block of an evaluation."""

_PATIENCE = 3600.0  # seconds without a new block after which the other ranks are taken for dead


class Rows(Protocol):
    """What blocks hold, such as `flowdistill.evaluation.SampleSet`."""

    def __len__(self) -> int:
        """The number of samples."""

    def __getitem__(self, rows: slice) -> Self:
        """Some of them."""

    def save(self, path: Path) -> None:
        """Write to a file, which is there whole or not at all."""

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """What a file holds; None where there is no such file, or it is damaged."""

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All samples of some parts."""


R = TypeVar("R", bound=Rows)
T = TypeVar("T")


def block_sizes(num_samples: int, block_size: int = BLOCK) -> list[int]:
    """How many samples each block holds; the last one may hold fewer than the others.

    Examples:
        >>> block_sizes(1200)
        [500, 500, 200]
    """
    return [min(block_size, num_samples - start) for start in range(0, num_samples, block_size)]


def wait_for(block: int, folder: Path, read: Callable[[], T | None]) -> T:
    """What ``read`` gives as soon as another process has written a block.

    Raises:
        DataError: the other process gave no sign for an hour.
    """
    asked = time.monotonic()
    while (found := read()) is None:
        if time.monotonic() - asked > _PATIENCE:
            raise DataError(
                f"block {block} of {folder} did not come for an hour: run the same command again to continue"
            )
        time.sleep(0.2)
    return found


def collect(
    kind: type[R], folder: Path, num_samples: int, draw: Callable[[int, int], R], block_size: int = BLOCK
) -> R | None:
    """The first ``num_samples`` samples of a folder of blocks, where those that are missing are drawn first.

    Each rank draws its share. Rank 0 waits for the others' and reads all; elsewhere the result is None. Where the
    folder cannot be written, rank 0 draws all that is missing and holds it in memory, and a warning says so.

    Args:
        kind: what the blocks hold.
        folder: of the blocks ``00000.safetensors``, ...; all ranks must see it.
        num_samples: how many; the last block may hold less than ``block_size``.
        draw: block number and n to the block's first n samples.
        block_size: samples in a block.

    Raises:
        DataError: a block holds another number of samples than it should, or another rank gave no sign for an hour.
    """
    rank, world = rank_and_world()
    sizes = block_sizes(num_samples, block_size)
    error = refusal(folder)
    if error is not None:
        if rank != 0:
            return None
        world = 1
        _warn_unkept(folder, error)
    unkept: dict[int, R] = {}
    for block in range(rank, len(sizes), world):
        path = _path(folder, block)
        found = kind.load(path)
        if found is None:
            warn_if_damaged(path)
        if found is None or len(found) < sizes[block]:
            drawn = draw(block, sizes[block])
            if len(drawn) != sizes[block]:
                raise DataError(f"block {block} has {len(drawn)} samples in place of {sizes[block]}")
            if error is None:
                try:
                    drawn.save(path)
                    continue
                except OSError as full:
                    if world > 1:  # nobody else could see it
                        raise
                    error = full
                    _warn_unkept(folder, error)
            unkept[block] = drawn
    if rank != 0:
        return None
    return kind.join(
        [
            unkept.get(block) or wait_for(block, folder, partial(_read, kind, folder, block, size))
            for block, size in enumerate(sizes)
        ]
    )


def _warn_unkept(folder: Path, error: OSError) -> None:
    warnings.warn(
        f"{folder} cannot be written ({error}): all is held in memory, and nothing is kept for another time",
        RuntimeWarning,
        stacklevel=4,
    )


def _path(folder: Path, block: int) -> Path:
    return folder / f"{block:05d}.safetensors"


def _read(kind: type[R], folder: Path, block: int, size: int) -> R | None:
    found = kind.load(_path(folder, block))
    return None if found is None or len(found) < size else found[:size]
