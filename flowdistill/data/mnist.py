"""MNIST and Fashion-MNIST, from a folder of the original files or downloaded."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import math
import urllib.request
import uuid
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from flowdistill.data.datasets import ImageDataset
from flowdistill.plumbing.caches import cached
from flowdistill.plumbing.dry import data_unread
from flowdistill.plumbing.errors import DataError
from flowdistill.plumbing.registry import register_dataset

_UNREADABLE = (OSError, EOFError, zlib.error, http.client.HTTPException)


class IdxImages(ImageDataset):
    """Images (1, 28, 28) in [-1, 1] of 10 classes, in the four idx files that MNIST made usual.

    Args:
        folder: where the four files lie, compressed by gzip or not; None downloads them once, checks them by their
            SHA-256, and keeps them in ``$XDG_CACHE_HOME/flowdistill/NAME`` (by default ``~/.cache/...``).
        train: the training part of 60 000 images, or the test part of 10 000.
        size: height and width to which the images are padded with background; at least 28.

    Raises:
        DataError: the files are missing or damaged, or the download failed; the message says where to put them.
    """

    num_classes = 10
    name: ClassVar[str]
    """The registered name."""
    title: ClassVar[str]
    """The name in messages."""
    source: ClassVar[str]
    """The address below which the compressed files lie."""
    sha256: ClassVar[dict[str, str]]
    """The checksums of the files before compression, by the names of the files."""

    def __init__(self, folder: str | Path | None = None, train: bool = True, size: int = 28) -> None:
        if size < 28:
            raise DataError(f"{self.name}.size must be at least 28, not {size}")
        if data_unread():
            super().__init__(torch.zeros(1, 1, size, size), torch.zeros(1, dtype=torch.long))
            return
        part = "train" if train else "t10k"
        images = self._read(folder, f"{part}-images-idx3-ubyte")
        labels = self._read(folder, f"{part}-labels-idx1-ubyte")
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.size == 0 or labels.max() > 9:
            found = f"images of shape {images.shape} and labels of shape {labels.shape}"
            raise DataError(
                f"the {part} files of {self.title} hold {found}, not 28 by 28 pixels of 10 classes; {self._hint()}"
            )
        before = (size - 28) // 2
        after = size - 28 - before
        padded = F.pad(torch.from_numpy(images)[:, None], (before, after, before, after))
        super().__init__(padded.float() / 127.5 - 1, torch.from_numpy(labels).long())

    @classmethod
    def _hint(cls) -> str:
        return (
            f"the four files are at {cls.source}/train-images-idx3-ubyte.gz, ...: "
            f"{cls.name}.folder is where they lie, and without it they are downloaded"
        )

    @classmethod
    def _read(cls, folder: str | Path | None, name: str) -> npt.NDArray[np.uint8]:
        """The array of an idx file: two zero bytes, the type (8 is uint8), the rank, big-endian sizes, the values."""
        path = cls._download(name) if folder is None else cls._find(Path(folder), name)
        advice = "delete it, and it is downloaded again" if folder is None else cls._hint()
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except _UNREADABLE as error:
            raise DataError(f"{path} cannot be read: {error}; {advice}") from None
        start = 4 + 4 * (data[3] if len(data) > 3 else 0)
        sizes = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
        if data[:3] != b"\0\0\x08" or len(data) != start + math.prod(sizes):
            raise DataError(f"{path} is not a whole idx file of bytes; {advice}")
        return np.frombuffer(data, np.uint8, offset=start).reshape(sizes).copy()

    @classmethod
    def _find(cls, folder: Path, name: str) -> Path:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
        raise DataError(f"{folder} holds no {name} or {name}.gz; {cls._hint()}")

    @classmethod
    def _download(cls, name: str) -> Path:
        path = cached(f"{cls.name}/{name}.gz")
        if path.is_file():
            return path
        address = f"{cls.source}/{name}.gz"
        try:
            with urllib.request.urlopen(address, timeout=30) as response:
                data = response.read()
            content = gzip.decompress(data)
        except _UNREADABLE as error:
            raise DataError(
                f"{cls.title} could not be downloaded from {address} ({error}): put its four files into a folder and "
                f"set {cls.name}.folder, or put them into {path.parent}"
            ) from None
        if hashlib.sha256(content).hexdigest() != cls.sha256[name]:
            raise DataError(f"{address} is not the file that is expected: its SHA-256 differs; nothing was kept")
        try:
            partial = path.with_suffix(f".{uuid.uuid4().hex}")  # of this process alone
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            raise DataError(
                f"{cls.title} cannot be kept in {path.parent} ({error}): set XDG_CACHE_HOME, or {cls.name}.folder"
            ) from None
        return path


@register_dataset("mnist")
class Mnist(IdxImages):
    """MNIST (LeCun et al. 1998): handwritten digits of 28x28 pixels; the download is 11 MB. See `IdxImages`.

    Examples:
        >>> images = Mnist(folder="data/mnist").images  # doctest: +SKIP
    """

    name, title = "mnist", "MNIST"
    source = "https://ossci-datasets.s3.amazonaws.com/mnist"
    sha256 = {  # noqa: RUF012, never changed
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    }


@register_dataset("fashion_mnist")
class FashionMnist(IdxImages):
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): clothes of 28x28 pixels; the download is 31 MB.

    Debian's package ``dataset-fashion-mnist`` carries the same files. See `IdxImages`.

    Examples:
        >>> images = FashionMnist(folder="data/fashion-mnist").images  # doctest: +SKIP
    """

    name, title = "fashion_mnist", "Fashion-MNIST"
    source = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
    sha256 = {  # noqa: RUF012, never changed
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    }
