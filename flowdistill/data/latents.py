"""Latents of images, computed once and stored in shards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from flowdistill.data.datasets import Dataset
from flowdistill.plumbing.errors import DataError, in_one_line
from flowdistill.plumbing.randomness import on_host
from flowdistill.plumbing.registry import register_dataset
from flowdistill.plumbing.threads import in_thread

_HINT = (
    "write each as safetensors.torch.save_file({'latents': x, 'labels': y}, 'folder/00000.safetensors'), with x "
    "(N, C, H, W) scaled as the teacher's samples are and y (N,), or with mean and std of the autoencoder's posterior "
    "in place of latents; or as numpy.savez('folder/00000.npz', latents=x, labels=y), or in latents.npy and labels.npy"
)
_SUFFIXES = (".safetensors", ".npz", ".npy")
_NAMES = {"samples": "latents", "arr_0": "latents", "arr_1": "labels"}  # as samples are written, and nameless arrays


@register_dataset("latents")
class Latents(Dataset):
    """Latents of an autoencoder and their classes, in a folder of shards.

    A shard holds ``labels`` (N,) and either ``latents`` (N, C, H, W) or ``mean`` and ``std`` of that shape, from which
    a latent is drawn anew each time. It is a file ``*.safetensors`` or ``*.npz``, or a file for each array:
    ``latents_01.npy`` and ``labels_01.npy``, whatever follows these words. Nothing is read before the first sample, and
    then only the rows that are drawn; but an ``.npz`` file is held in memory.

    Args:
        folder: of the shards, or one of them.
        sample_shape: (C, H, W) of a latent.
        num_classes: number of classes.

    Examples:
        >>> Latents("imagenet_latents").sample_shape
        (4, 32, 32)
    """

    def __init__(
        self, folder: str | Path, sample_shape: tuple[int, ...] = (4, 32, 32), num_classes: int = 1000
    ) -> None:
        self.folder, self.sample_shape, self.num_classes = Path(folder), tuple(sample_shape), num_classes
        self._classes = num_classes
        self._shards: list[dict[str, Any]] = []
        self._ends = torch.zeros(0, dtype=torch.long)
        self._labels = torch.zeros(0, dtype=torch.long)
        self._ahead: dict[bytes, Future[tuple[Tensor, Tensor | None]]] = {}

    def _open(self) -> None:
        folder = self.folder
        paths = [folder] if folder.is_file() else sorted(p for p in folder.glob("*") if p.suffix in _SUFFIXES)
        paths = [p for p in paths if p.suffix != ".npy" or p.name.startswith(("latents", "mean"))]
        if not paths:
            raise DataError(f"{folder} holds no shards of latents: {_HINT}")
        shards, labels = [], []
        for path in paths:
            try:
                shard = _arrays(path)
                parts = ["latents"] if "latents" in shard else ["mean", "std"]
                shapes = [tuple(shard[name].shape) for name in parts]
                named = _rows(shard["labels"], slice(None))
            except Exception as error:  # of damaged files, many
                lacks = "it lacks " if isinstance(error, KeyError) else ""
                raise DataError(f"{path} is not a shard of latents ({lacks}{in_one_line(error)}): {_HINT}") from None
            if any(shape != (len(named), *self.sample_shape) for shape in shapes) or named.ndim != 1:
                raise DataError(
                    f"{path} holds {' and '.join(map(str, shapes))} for {len(named)} labels, not latents of shape "
                    f"{self.sample_shape}: set latents.sample_shape"
                )
            if not bool(((named >= 0) & (named < self._classes) & (named == named.long())).all()):
                raise DataError(f"{path} has labels that are not in 0 to {self._classes - 1}")
            shards.append(shard)
            labels.append(named.long())
        self._ends = torch.tensor([len(part) for part in labels]).cumsum(0)
        self._shards, self._labels = shards, torch.cat(labels)
        if not len(self._labels):
            raise DataError(f"{folder} holds shards without latents")

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw latents and labels with replacement."""
        state, rows = self._draw(batch_size, generator)
        read = self._ahead.pop(state, None)
        mean, std = self._read(rows) if read is None else read.result()
        device = generator.device
        drawn = _moved(mean, device)
        if std is not None:
            noise = torch.randn(drawn.shape, generator=generator, device=device)
            drawn = drawn + _moved(std, device) * noise
        return drawn, _moved(self._labels[rows], device)

    def prefetch(self, batch_size: int, generator: torch.Generator) -> None:
        """Read in another thread what `sample` will return for this generator."""
        state, rows = self._draw(batch_size, generator)
        for stale in list(self._ahead)[:-1]:  # of a training that went another way
            del self._ahead[stale]
        self._ahead[state] = in_thread(lambda: self._read(rows))

    def _draw(self, batch_size: int, generator: torch.Generator) -> tuple[bytes, Tensor]:
        """The state of a generator with the size of the batch, and the rows that are drawn from it."""
        if not len(self._labels):
            self._open()
        state = generator.get_state().numpy().tobytes() + batch_size.to_bytes(8, "big")
        return state, torch.randint(len(self._labels), (batch_size,), generator=on_host(generator))

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The latents of some rows, or the means and the standard deviations of their posteriors."""
        order = rows.argsort()
        shards = torch.searchsorted(self._ends, rows[order], right=True)
        mean, std = torch.zeros(len(rows), *self.sample_shape), None
        for number, places in zip(*_runs(shards, order), strict=True):
            shard, start = self._shards[number], int(self._ends[number - 1]) if number else 0
            ours = rows[places] - start
            mean[places] = _rows(shard["latents" if "latents" in shard else "mean"], ours).float()
            if "latents" not in shard:
                std = torch.zeros_like(mean) if std is None else std
                std[places] = _rows(shard["std"], ours).float()
        return mean, std


def _runs(shards: Tensor, order: Tensor) -> tuple[list[int], tuple[Tensor, ...]]:
    """The numbers of shards, and the places of the batch that each of them fills."""
    numbers, counts = torch.unique_consecutive(shards, return_counts=True)
    return numbers.tolist(), torch.split(order, counts.tolist())


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, to which it goes while the host goes on."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays of a shard, by name, of which rows can be read."""
    if path.suffix == ".safetensors":
        shard: Any = safetensors.safe_open(path, framework="pt")
        return {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118, no mapping; nothing is read yet
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {_NAMES.get(name, name): arrays[name] for name in arrays}
    return dict(_beside(path))


def _beside(path: Path) -> Iterator[tuple[str, Any]]:
    """The arrays of the files whose names begin otherwise than that of the latents or means, and end alike."""
    first = "latents" if path.name.startswith("latents") else "mean"
    for name in ("latents", "labels") if first == "latents" else ("mean", "std", "labels"):
        yield name, np.load(path.with_name(path.name.replace(first, name, 1)), mmap_mode="r", allow_pickle=False)


def _rows(array: Any, rows: Tensor | slice) -> Tensor:
    """Some rows of an array, as a tensor of its own."""
    if isinstance(array, Tensor):
        return array[rows]
    if array.dtype.kind not in "fiu":
        raise ValueError(f"it has an array of {array.dtype}, not of numbers")
    return torch.from_numpy(array[rows if isinstance(rows, slice) else rows.numpy()].astype(np.float64))
