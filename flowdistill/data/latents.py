"""Latents of images, computed once and stored in shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from flowdistill.data.datasets import Dataset
from flowdistill.plumbing.errors import DataError, in_one_line
from flowdistill.plumbing.registry import register_dataset

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
                shapes = [_shape(shard[name]) for name in parts]
                named = _rows(shard["labels"], 0, None)
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
        if not len(self._labels):
            self._open()
        device = generator.device
        rows = torch.randint(len(self._labels), (batch_size,), generator=generator, device=device).cpu()
        noise = torch.randn((batch_size, *self.sample_shape), generator=generator, device=device)
        means, stds = zip(*(self._row(int(row)) for row in rows), strict=True)
        drawn = torch.stack(means).to(device)
        if any(std is not None for std in stds):
            zero = torch.zeros(self.sample_shape)
            drawn = drawn + torch.stack([zero if std is None else std for std in stds]).to(device) * noise
        return drawn, self._labels[rows].to(device)

    def _row(self, row: int) -> tuple[Tensor, Tensor | None]:
        """The latent of a row, or the mean and the standard deviation of its posterior."""
        number = int(torch.searchsorted(self._ends, row, right=True))
        shard, place = self._shards[number], row - (int(self._ends[number - 1]) if number else 0)

        def read(name: str) -> Tensor:
            return _rows(shard[name], place, place + 1)[0].float()

        if "latents" in shard:
            return read("latents"), None
        return read("mean"), read("std")


def _arrays(path: Path) -> dict[str, Any]:
    """The arrays of a shard, by name, of which rows can be read."""
    if path.suffix == ".safetensors":
        shard: Any = safetensors.safe_open(path, framework="pt")
        return {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118, no mapping
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {_NAMES.get(name, name): arrays[name] for name in arrays}
    return dict(_beside(path))


def _beside(path: Path) -> Iterator[tuple[str, Any]]:
    """The arrays of the files whose names begin otherwise than that of the latents or means, and end alike."""
    first = "latents" if path.name.startswith("latents") else "mean"
    for name in ("latents", "labels") if first == "latents" else ("mean", "std", "labels"):
        yield name, np.load(path.with_name(path.name.replace(first, name, 1)), mmap_mode="r", allow_pickle=False)


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape if isinstance(array, np.ndarray) else array.get_shape())


def _rows(array: Any, start: int, stop: int | None) -> Tensor:
    """Some rows of an array, as a tensor of its own."""
    if not isinstance(array, np.ndarray):
        rows: Tensor = array[start:stop]
        return rows
    if array.dtype.kind not in "fiu":
        raise ValueError(f"it has an array of {array.dtype}, not of numbers")
    return torch.from_numpy(array[start:stop].astype(np.float64))
