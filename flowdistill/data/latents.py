"""Latents of images, computed once and stored in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from flowdistill.data.datasets import Dataset
from flowdistill.plumbing.errors import DataError
from flowdistill.plumbing.registry import register_dataset

_HINT = (
    "write each as safetensors.torch.save_file({'latents': x, 'labels': y}, 'folder/00000.safetensors'), with x "
    "(N, C, H, W) scaled as the teacher's samples are and y (N,), or with mean and std of the autoencoder's posterior "
    "in place of latents"
)


@register_dataset("latents")
class Latents(Dataset):
    """Latents of an autoencoder and their classes, in a folder of safetensors shards.

    A shard ``*.safetensors`` holds ``labels`` (N,) and either ``latents`` (N, C, H, W) or ``mean`` and ``std`` of that
    shape, from which a latent is drawn anew each time. Nothing is read before the first sample, and then only the rows
    that are drawn.

    Args:
        folder: of the shards.
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
        self._shards: list[Any] = []
        self._ends = torch.zeros(0, dtype=torch.long)
        self._labels = torch.zeros(0, dtype=torch.long)

    def _open(self) -> None:
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise DataError(f"{self.folder} holds no shards of latents: {_HINT}")
        labels = []
        for path in paths:
            try:
                shard: Any = safetensors.safe_open(path, framework="pt")
                names = ("latents",) if "latents" in shard.keys() else ("mean", "std")  # noqa: SIM118, no mapping
                shapes = [tuple(shard.get_slice(name).get_shape()) for name in names]
                labels.append(shard.get_tensor("labels").long())
            except (safetensors.SafetensorError, OSError) as error:
                raise DataError(f"{path} is not a shard of latents ({error}): {_HINT}") from None
            if any(shape != (len(labels[-1]), *self.sample_shape) for shape in shapes):
                raise DataError(
                    f"{path} holds {' and '.join(map(str, shapes))} for {len(labels[-1])} labels, not latents of shape "
                    f"{self.sample_shape}: set latents.sample_shape"
                )
            self._shards.append(shard)
        self._ends = torch.tensor([len(part) for part in labels]).cumsum(0)
        self._labels = torch.cat(labels)
        if len(self._labels) and not 0 <= int(self._labels.min()) <= int(self._labels.max()) < self._classes:
            raise DataError(f"{self.folder} has labels that are not in 0 to {self._classes - 1}")

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw latents and labels with replacement."""
        if not self._shards:
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
            tensor: Tensor = shard.get_slice(name)[place : place + 1][0]
            return tensor.float()

        if "latents" in shard.keys():  # noqa: SIM118, no mapping
            return read("latents"), None
        return read("mean"), read("std")
