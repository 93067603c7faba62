"""Data sets of `torch.utils.data`, whose items worker processes read."""

from __future__ import annotations

import math
import random
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowdistill.data.datasets import Dataset, in_range
from flowdistill.plumbing.errors import DataError, in_one_line
from flowdistill.plumbing.randomness import on_host
from flowdistill.plumbing.registry import register_dataset

_LOOKED_AT = 8  # items whose range is checked

_Read = tuple["np.ndarray[Any, Any]", int]


@register_dataset("torch_dataset")
class TorchDataset(Dataset):
    """Items of a map-style data set of `torch.utils.data`, such as torchvision's, drawn with replacement.

    An item is a sample, or begins with a sample and its class. A sample is a tensor or an array of one shape, of uint8
    or of numbers in [-1, 1], or an image of Pillow. Random transforms are repeatable: whatever of `random`, NumPy and
    torch an item draws is seeded for it by the training's generator. One batch is read ahead.

    Args:
        dataset: has ``__len__`` and ``__getitem__``; with workers it is sent to them.
        num_classes: number of classes; None leaves classes out.
        workers: processes that share out the items of a batch; 0 reads them in the training's own.

    Raises:
        DataError: no items, or what is no such sample; an item that cannot be read.

    Examples:
        >>> items = torch.utils.data.TensorDataset(torch.zeros(9, 1, 4, 4), torch.arange(9))
        >>> data = TorchDataset(items, num_classes=9)
        >>> samples, labels = data.sample(5, torch.Generator().manual_seed(0))
        >>> samples.shape, labels.shape
        (torch.Size([5, 1, 4, 4]), torch.Size([5]))
    """

    def __init__(
        self, dataset: torch.utils.data.Dataset[Any], num_classes: int | None = None, workers: int = 0
    ) -> None:
        if workers < 0:
            raise DataError(f"the number of workers is at least 0, not {workers}")
        self.num_classes, self._workers = num_classes, workers
        self._dataset = cast("Any", dataset)  # whose __len__ torch does not declare
        try:
            first = [_read(dataset, number, 0) for number in range(min(len(self._dataset), _LOOKED_AT))]
        except TypeError as error:
            raise DataError(f"{type(dataset).__name__} is no map-style data set: {in_one_line(error)}") from None
        if not first:
            raise DataError(f"{type(dataset).__name__} has no items")
        samples, _ = self._joined(first)
        if samples.ndim == 4 and samples.is_floating_point():
            in_range(samples)
        self.sample_shape = tuple(samples.shape[1:])
        self._pool: ProcessPoolExecutor | None = None
        self._ahead: tuple[bytes, list[Future[list[_Read]]]] | None = None

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw samples and labels with replacement."""
        state, jobs = self._draw(batch_size, generator)
        if not self._workers:
            items = [_read(self._dataset, *job) for job in jobs]
        else:
            ahead, self._ahead = self._ahead, None
            parts = ahead[1] if ahead is not None and ahead[0] == state else self._start(jobs)
            try:
                items = [item for part in parts for item in part.result()]
            except BrokenProcessPool:
                raise DataError("a worker that reads items was killed, perhaps for lack of memory") from None
        samples, labels = self._joined(items)
        return samples.to(generator.device), None if labels is None else labels.to(generator.device)

    def prefetch(self, batch_size: int, generator: torch.Generator) -> None:
        """Let the workers read what `sample` will return for this generator."""
        if self._workers:
            state, jobs = self._draw(batch_size, generator)
            self._ahead = state, self._start(jobs)

    def _draw(self, batch_size: int, generator: torch.Generator) -> tuple[bytes, list[tuple[int, int]]]:
        """The state of a generator with the size of the batch, and the numbers and seeds of items drawn from it."""
        state = generator.get_state().numpy().tobytes() + batch_size.to_bytes(8, "big")
        host = on_host(generator)
        rows, seeds = (torch.randint(high, (batch_size,), generator=host) for high in (len(self._dataset), 2**31))
        return state, list(zip(rows.tolist(), seeds.tolist(), strict=True))

    def _start(self, jobs: list[tuple[int, int]]) -> list[Future[list[_Read]]]:
        if self._pool is None:
            context = torch.multiprocessing.get_context()
            self._pool = ProcessPoolExecutor(self._workers, context, _begin, (self._dataset,))
        size = math.ceil(len(jobs) / self._workers)
        return [self._pool.submit(_read_all, jobs[i : i + size]) for i in range(0, len(jobs), size)]

    def _joined(self, items: list[_Read]) -> tuple[Tensor, Tensor | None]:
        shapes = {array.shape for array, _ in items}
        if len(shapes) > 1:
            raise DataError(f"samples have several shapes, such as {' and '.join(map(str, sorted(shapes)[:2]))}")
        samples = torch.from_numpy(np.stack([array for array, _ in items]))
        samples = samples.float() / 127.5 - 1 if samples.dtype == torch.uint8 else samples.float()
        if self.num_classes is None:
            return samples, None
        labels = torch.tensor([label for _, label in items])
        if not bool(((labels >= 0) & (labels < self.num_classes)).all()):
            raise DataError(f"items have classes that are not in 0 to {self.num_classes - 1}")
        return samples, labels


def _read(dataset: Any, number: int, seed: int) -> _Read:
    """The sample of an item as an array (C, H, W) or of any other shape, and its class; -1 if it has none."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        item = dataset[number]
        sample, label = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) > 1 else (item, -1)
        sample = sample[0] if isinstance(sample, (tuple, list)) else sample
        if isinstance(sample, Image.Image):
            sample = np.asarray(sample)
            sample = sample[None] if sample.ndim == 2 else np.moveaxis(sample, -1, 0)
        return np.asarray(sample), int(label)
    except Exception as error:  # of a damaged file, or of a user's own transforms
        raise DataError(f"item {number} of {type(dataset).__name__} cannot be read: {in_one_line(error)}") from error
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


_OURS: list[Any] = []  # the data set of a worker


def _begin(dataset: Any) -> None:
    """Set a worker up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the training's own process ends it
    torch.set_num_threads(1)
    _OURS[:] = [dataset]


def _read_all(jobs: list[tuple[int, int]]) -> list[_Read]:
    """The items of some numbers and seeds, in a worker."""
    return [_read(_OURS[0], *job) for job in jobs]
