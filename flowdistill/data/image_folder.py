"""Images in a folder, read as they are drawn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowdistill.data.datasets import Dataset
from flowdistill.data.image_files import ImageFiles
from flowdistill.plumbing.dry import data_unread
from flowdistill.plumbing.errors import DataError
from flowdistill.plumbing.registry import register_dataset


@register_dataset("image_folder")
class ImageFolder(Dataset):
    """Images in a folder or a zip archive, in [-1, 1], cut and scaled to one size.

    Each subfolder is a class, in the order of their names, and images in it may lie deeper. Without subfolders there
    are no classes. A ``dataset.json``, as EDM's tool writes it, says the classes in place of the folders. An image is
    read each time that it is drawn, as `flowdistill.data.image_files.ImageFiles` describes. The square in its middle is
    scaled as ADM does (Dhariwal and Nichol 2021, arXiv 2105.05233): it is halved while it can be, then resized
    bicubically.

    Args:
        folder: the folder or the archive.
        size: height and width of the images.
        channels: 3, or 1 for grey images.

    Raises:
        DataError: no images, classes that cannot be told, or, when it is drawn, an image that is damaged.

    Examples:
        >>> dataset = ImageFolder("imagenet/train", size=64)  # doctest: +SKIP
        >>> dataset.sample_shape, dataset.num_classes  # doctest: +SKIP
        ((3, 64, 64), 1000)
    """

    def __init__(self, folder: str | Path, size: int, channels: int = 3) -> None:
        if size < 1 or channels not in (1, 3):
            raise DataError(f"images have 1 or 3 channels and at least 1 pixel, not {channels} and {size}")
        self.sample_shape = (channels, size, size)
        self._labels: Tensor | None = None
        path = Path(folder)
        if data_unread() and not path.exists():
            return
        self._files = ImageFiles(path)
        if self._files.labels is not None:
            self._labels = torch.tensor(self._files.labels)
            self.num_classes = int(self._labels.max()) + 1

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw images and labels with replacement; several threads read the images."""
        device = generator.device
        rows = torch.randint(len(self._files), (batch_size,), generator=generator, device=device).cpu()
        with ThreadPoolExecutor() as threads:
            pixels = torch.from_numpy(np.stack(list(threads.map(self._pixels, rows.tolist()))))
        images = pixels.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images, None if self._labels is None else self._labels[rows].to(device)

    def _pixels(self, row: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        channels, size, _ = self.sample_shape
        return np.asarray(centre_crop(self._files.read(row, channels), size)).reshape(size, size, channels)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle of an image, scaled to ``size`` by ``size`` pixels as ADM does.

    Examples:
        >>> centre_crop(Image.new("RGB", (500, 375)), 64).size
        (64, 64)
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
