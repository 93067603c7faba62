"""The MNIST handwritten digits, from a folder of the original files or downloaded."""

from __future__ import annotations

import gzip
import hashlib
import os
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from flowdistill.data.datasets import ImageDataset
from flowdistill.errors import DataError
from flowdistill.registry import register_dataset

_SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist"
_SHA256 = {  # of the files before compression
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


@register_dataset("mnist")
class Mnist(ImageDataset):
    """MNIST (LeCun et al. 1998): images (1, 28, 28) in [-1, 1] of 10 classes, 60 000 for training and 10 000 for tests.

    Args:
        folder: where the four idx files lie, compressed by gzip or not; None downloads them once (11 MB), checks them
            by their SHA-256, and keeps them in ``$XDG_CACHE_HOME/flowdistill/mnist`` (by default ``~/.cache/...``).
        train: the training part, or the test part.
        size: height and width to which the images are padded with background; at least 28.

    Raises:
        DataError: the files are not there, damaged, or could not be downloaded; the message says where to put them.

    Examples:
        >>> images = Mnist(folder="data/mnist").images  # doctest: +SKIP
    """

    num_classes = 10

    def __init__(self, folder: str | Path | None = None, train: bool = True, size: int = 28) -> None:
        if size < 28:
            raise DataError(f"mnist.size must be at least 28, not {size}")
        part = "train" if train else "t10k"
        images = _read(folder, f"{part}-images-idx3-ubyte")
        labels = _read(folder, f"{part}-labels-idx1-ubyte")
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(f"MNIST files hold images of shape {images.shape} and labels of shape {labels.shape}")
        before = (size - images.shape[-1]) // 2
        after = size - images.shape[-1] - before
        padded = F.pad(torch.from_numpy(images)[:, None], (before, after, before, after))
        super().__init__(padded.float() / 127.5 - 1, torch.from_numpy(labels).long())


def _read(folder: str | Path | None, name: str) -> np.ndarray:  # type: ignore[type-arg]
    """The array of an idx file: two zero bytes, the type (8 is uint8), the rank, big-endian sizes, then the values."""
    path = _download(name) if folder is None else _find(Path(folder), name)
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    rank = data[3] if len(data) > 3 else 0
    sizes = np.frombuffer(data[4 : 4 + 4 * rank], ">u4").astype(int).tolist()
    values = np.frombuffer(data, np.uint8, offset=min(4 + 4 * rank, len(data)))
    if data[:3] != b"\0\0\x08" or len(sizes) != rank or values.size != int(np.prod(sizes)):
        raise DataError(f"{path} is not a whole idx file of bytes")
    return values.reshape(sizes).copy()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"{folder} holds no {name} or {name}.gz: put the four files of MNIST there ({_SOURCE}/{name}.gz, ...), "
        "or leave the folder out to have them downloaded"
    )


def _download(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowdistill" / "mnist"
    path = cache / f"{name}.gz"
    if path.is_file():
        return path
    address = f"{_SOURCE}/{name}.gz"
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            data = response.read()
        content = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise DataError(
            f"MNIST could not be downloaded from {address} ({error}): put its four files into a folder and set "
            f"mnist.folder, or put them into {cache}"
        ) from None
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise DataError(f"{address} is not the file that is expected: its SHA-256 differs; nothing was kept")
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)
    return path
