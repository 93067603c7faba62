"""The truth that samples are compared with: images, published statistics, or an exact distribution."""

from __future__ import annotations

import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowdistill.data import ImageDataset
from flowdistill.evaluation.features import FeatureExtractor, load_features
from flowdistill.evaluation.metrics import Moments
from flowdistill.evaluation.samples import SampleSet, sample_set
from flowdistill.interfaces import Decoder, ExactTeacher, Teacher
from flowdistill.plumbing.errors import ConfigError, DataError
from flowdistill.plumbing.files import file_parts, fingerprint
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.registry import DATASETS, unknown_name

_BATCH = 100
_SUFFIXES = {".png", ".jpg", ".jpeg"}
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)
Reference = str | Path | ImageDataset


NOTHING_TO_COMPARE = "nothing to compare with: name the features of an evaluation, or use an exact teacher"


def reference_set(
    features: str | FeatureExtractor | None,
    teacher: Teacher | None,
    n: int,
    seed: int,
    source: Reference | None = None,
    decoder: Decoder | None = None,
    device: torch.device | str = "cpu",
) -> SampleSet:
    """The truth: a reference, the real data that come with the features, or draws of an exact teacher's distribution.

    Args:
        features: a feature extractor or its name; None is the samples themselves.
        teacher: whose distribution is drawn from where there are no features.
        n: how many draws.
        seed: of the draws.
        source: see `load_images`; None is the data of the features, or the teacher's.
        decoder: turns samples of a data set into images.
        device: where features are computed.

    Raises:
        ConfigError: there is nothing to compare with.
        DataError: the reference is not what it should be.
    """
    if source is not None and features is None:
        raise ConfigError("a reference of images needs features: name an extractor, such as inception")
    if features is not None:
        extractor = load_features(features)
        if source is not None:
            return load_images(source, extractor, decoder, device)
        if extractor.reference is None:
            raise ConfigError(
                f"{type(extractor).__name__} comes without features of real data: name a reference, which is a folder "
                "of images, an .npz file, or a data set"
            )
        return SampleSet(extractor.reference)
    if not isinstance(teacher, ExactTeacher):
        raise ConfigError(NOTHING_TO_COMPARE)
    generator = torch.Generator(teacher.device).manual_seed(seed + 10_000)
    samples = teacher.sample_data(n, generator).flatten(1).cpu()
    return SampleSet(samples, modes=teacher.modes)


def load_images(
    source: Reference,
    features: str | FeatureExtractor,
    decoder: Decoder | None = None,
    device: torch.device | str = "cpu",
) -> SampleSet:
    """The features of a reference, computed once and then read from a cache.

    They lie in ``$XDG_CACHE_HOME/flowdistill/references`` (by default ``~/.cache/...``) under a hash of the images and
    of the extractor with its weights, so that neither can change unnoticed.

    Args:
        source: a folder of PNG and JPEG files of one size, however deep; an ``.npz`` file with images ``arr_0``
            (N, H, W, C), uint8, as ADM publishes them, or with ``mu`` (D,) and ``sigma`` (D, D), as EDM does, or with
            both: then ``fid`` is measured against the latter; a data set of images, or its registered name.
        features: a feature extractor or its name.
        decoder: turns samples of a data set into images.
        device: where features are computed.

    Raises:
        ConfigError: neither a path nor the name of a data set.
        DataError: no images, images of several sizes, or a file that cannot be read.

    Examples:
        >>> from flowdistill.data import Digits
        >>> load_images(Digits(), "digits").features.shape  # doctest: +SKIP
        torch.Size([1797, 64])
    """
    extractor, published = load_features(features), None
    if isinstance(source, ImageDataset):
        digest, batches = _digest_of_dataset(source, decoder), _of_dataset(source, decoder)
    elif (path := Path(source)).is_dir():
        paths = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not paths:
            raise DataError(f"{path} holds no images: a reference is a folder of .png or .jpg files")
        digest, batches = _digest_of_files(paths), _of_files(paths, "L" if extractor.channels == 1 else "RGB")
    elif path.is_file():
        if path.suffix != ".npz":
            raise DataError(f"{path} is no reference: a file must be .npz, with arr_0, or with mu and sigma")
        names, published = _of_npz(path)
        if "arr_0" not in names:
            return SampleSet(None, moments=published)
        digest, batches = _digest_of_files([path]), _of_array(path)
    elif str(source) in DATASETS:
        return load_images(_built(str(source)), extractor, decoder, device)
    else:
        raise unknown_name("reference", str(source), DATASETS.names())
    key = fingerprint(f"{digest} {extractor.fingerprint()}")
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = root / "flowdistill" / "references" / f"{key}.safetensors"
    found = SampleSet.load(cached)
    if found is None:
        parts = []
        with progress("features of the reference's images", None) as phase:
            for images, labels in batches:
                parts.append(sample_set(images.to(device), labels, extractor))
                phase.advance(len(images))
        joined = SampleSet.join(parts)
        found = SampleSet(joined.features, joined.labels, joined.logits, published)
        found.save(cached)
    return found


def split(reference: SampleSet, n: int) -> tuple[SampleSet, SampleSet] | None:
    """``n`` samples of a reference, chosen at random, and its others; None unless there are as many of those."""
    if len(reference) < 2 * n:
        return None
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))
    return reference[order[:n]], reference[order[n:]]


def _built(name: str) -> ImageDataset:
    dataset = DATASETS.build(name)
    if not isinstance(dataset, ImageDataset):
        raise ConfigError(f"the data set {name} does not hold images: write them into a folder")
    return dataset


_Batches = Iterator[tuple[Tensor, Tensor | None]]


def _images(pixels: Tensor) -> Tensor:
    """Bytes (B, H, W, C) as images (B, C, H, W) in [-1, 1]."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def _of_dataset(dataset: ImageDataset, decoder: Decoder | None) -> _Batches:
    for i in range(0, len(dataset.images), _BATCH):
        images = dataset.images[i : i + _BATCH]
        labels = None if dataset.labels is None else dataset.labels[i : i + _BATCH]
        yield images if decoder is None else decoder.decode(images), labels


def _digest_of_dataset(dataset: ImageDataset, decoder: Decoder | None) -> str:
    return fingerprint(
        part.cpu().contiguous().numpy().tobytes()
        for images, labels in _of_dataset(dataset, decoder)
        for part in (images, labels)
        if part is not None
    )


def _digest_of_files(paths: list[Path]) -> str:
    return fingerprint(part for path in paths for part in (path.stat().st_size.to_bytes(8, "big"), *file_parts(path)))


def _of_files(paths: list[Path], mode: str) -> _Batches:
    size: tuple[int, int] | None = None
    for start in range(0, len(paths), _BATCH):
        arrays = []
        for path in paths[start : start + _BATCH]:
            try:
                image = Image.open(path).convert(mode)
            except _UNREADABLE as error:
                raise DataError(f"{path} is not a whole image: {error}") from None
            size = size or image.size
            if image.size != size:
                raise DataError(f"{path} has {image.size} pixels and {paths[0]} {size}: a reference has one size")
            arrays.append(np.asarray(image).reshape(size[1], size[0], -1))
        yield _images(torch.from_numpy(np.stack(arrays))), None


def _of_npz(path: Path) -> tuple[list[str], Moments | None]:
    """The names of the arrays in a file, and the mean and covariance among them."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            if not {"mu", "sigma"} <= set(names):
                if "arr_0" not in names:
                    raise DataError(f"{path} holds {names}, not images arr_0, nor mu and sigma")
                return names, None
            mean, covariance = (torch.from_numpy(arrays[name]).double() for name in ("mu", "sigma"))
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path} holds mu {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, not (D,) and (D, D)")
    return names, (mean, covariance)


def _of_array(path: Path) -> _Batches:
    """The images ``arr_0`` of an .npz file, which is never whole in memory."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if dtype != np.uint8 or fortran or len(shape) != 4 or shape[-1] not in (1, 3) or not shape[0]:
                raise DataError(f"{path} holds arr_0 {shape}, {dtype}, not images (N, H, W, 3) of uint8")
            for start, end in itertools.pairwise([*range(0, shape[0], _BATCH), shape[0]]):
                data = file.read((end - start) * math.prod(shape[1:]))
                pixels = np.frombuffer(data, np.uint8).reshape(end - start, *shape[1:])
                yield _images(torch.from_numpy(pixels.copy())), None
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {error}") from None
