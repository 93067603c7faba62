"""The truth that samples are compared with: images, published statistics, or an exact distribution."""

from __future__ import annotations

import contextlib
import math
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import attrs
import numpy as np
import torch
from torch import Tensor

from flowdistill.data import ImageDataset
from flowdistill.data.image_files import ImageFiles
from flowdistill.evaluation.features import FeatureExtractor, load_features
from flowdistill.evaluation.metrics import Moments
from flowdistill.evaluation.published import checked_moments, pickled_moments
from flowdistill.evaluation.samples import SampleSet, sample_set
from flowdistill.interfaces import Decoder, ExactTeacher, Teacher
from flowdistill.plumbing.caches import cached
from flowdistill.plumbing.errors import ConfigError, DataError, in_one_line
from flowdistill.plumbing.files import file_parts, fingerprint, warn_if_damaged
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.registry import DATASETS, unknown_name

_BATCH = 100
_MOST_BYTES = 1 << 28  # of a batch of images
_FORMAT = 2  # of what is kept of images
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
        device: where features are computed, and neighbours are looked for if it is a GPU.

    Raises:
        ConfigError: there is nothing to compare with.
        DataError: the reference is not what it should be.
    """
    if source is not None and features is None:
        raise ConfigError("a reference of images needs features: name an extractor, such as inception")
    place = torch.device(device)
    near = place if place.type == "cuda" else "cpu"  # others have no float64
    if features is not None:
        extractor = load_features(features)
        if source is not None:
            return attrs.evolve(load_images(source, extractor, decoder, device), device=near)
        if extractor.reference is None:
            raise ConfigError(
                f"{type(extractor).__name__} comes without features of real data: name a reference, which is a folder "
                "or a file of images, or a data set"
            )
        return SampleSet(extractor.reference, device=near)
    if not isinstance(teacher, ExactTeacher):
        raise ConfigError(NOTHING_TO_COMPARE)
    generator = torch.Generator(teacher.device).manual_seed(seed + 10_000)
    samples = teacher.sample_data(n, generator).flatten(1).cpu()
    return SampleSet(samples, modes=teacher.modes, device=near)


def load_images(
    source: Reference,
    features: str | FeatureExtractor,
    decoder: Decoder | None = None,
    device: torch.device | str = "cpu",
) -> SampleSet:
    """The features of a reference, computed once and then read from a cache.

    They lie in ``$XDG_CACHE_HOME/flowdistill/references`` (by default ``~/.cache/...``) under a hash of the images and
    of the extractor with its weights, so that neither can change unnoticed. Where they cannot be kept, or were damaged,
    they are computed again, with a warning.

    Args:
        source: a folder or a ``.zip`` or ``.tar`` archive of image files of one size, as
            `flowdistill.data.image_files.ImageFiles` reads them; a ``.npy`` file of images (N, H, W, C), uint8; an
            ``.npz`` file with such images ``arr_0``, as ADM publishes them, or with ``mu`` (D,) and ``sigma`` (D, D),
            as EDM does, or with both: then ``fid`` is measured against the latter; a ``.pkl`` file of such statistics,
            as EDM2 publishes them; a data set of images, or its registered name.
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
    elif (path := Path(source)).is_dir() or (path.is_file() and path.suffix.lower() in (".zip", ".tar")):
        files = ImageFiles(path)
        digest, batches = fingerprint(files.parts()), _of_files(files, extractor.channels)
    elif path.is_file():
        kind = path.suffix.lower()
        if kind not in (".npz", ".npy", ".pkl"):
            raise DataError(f"{path} is no reference: a file ends in .npz, .npy, .zip, .tar or .pkl")
        if kind == ".pkl":
            return SampleSet(None, moments=pickled_moments(path, extractor))
        if kind == ".npz":
            names, published = _of_npz(path)
            if "arr_0" not in names:
                return SampleSet(None, moments=published)
        digest, batches = fingerprint(file_parts(path)), _of_array(path)
    elif str(source) in DATASETS:
        return load_images(_built(str(source)), extractor, decoder, device)
    elif path.suffix or len(path.parts) > 1:
        raise ConfigError(f"unknown reference {str(source)!r}: there is no such file or folder")
    else:
        raise unknown_name("reference", str(source), DATASETS.names())
    key = fingerprint(f"{_FORMAT} {digest} {extractor.fingerprint()}")
    place = cached(f"references/{key}.safetensors")
    found = SampleSet.load(place)
    if found is None:
        warn_if_damaged(place)
        parts = []
        with progress("features of the reference's images", None) as phase:
            for images, labels in batches:
                parts.append(sample_set(images.to(device), labels, extractor))
                phase.advance(len(images))
        joined = SampleSet.join(parts)
        found = SampleSet(joined.features, joined.labels, joined.logits, published)
        try:
            found.save(place)
        except OSError as error:
            warnings.warn(f"the features of {source} are not kept: {in_one_line(error)}", RuntimeWarning, stacklevel=2)
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


def _of_files(files: ImageFiles, channels: int) -> _Batches:
    size: tuple[int, int] | None = None
    labels = None if files.listed_labels is None else torch.tensor(files.listed_labels)
    for start in range(0, len(files), _BATCH):
        arrays = []
        for number in range(start, min(start + _BATCH, len(files))):
            image = files.read(number, channels)
            size = size or image.size
            if image.size != size:
                name, first = files.names[number], files.names[0]
                raise DataError(
                    f"{files.path / name} has {image.size} pixels and {first} {size}: a reference has one size"
                )
            arrays.append(np.asarray(image).reshape(size[1], size[0], channels))
        yield _images(torch.from_numpy(np.stack(arrays))), None if labels is None else labels[start:][:_BATCH]


def _of_npz(path: Path) -> tuple[list[str], Moments | None]:
    """The names of the arrays in a file, and the mean and covariance among them."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            names = list(arrays)
            found = {name: arrays[name] for name in ("mu", "sigma") if name in names}
    except Exception as error:  # of damaged archives and headers, many
        raise DataError(f"{path} cannot be read: {in_one_line(error)}") from None
    if len(found) == 2:
        return names, checked_moments(path, found)
    if "arr_0" not in names:
        raise DataError(f"{path} holds {names}, not images arr_0, nor mu and sigma")
    return names, None


def _of_array(path: Path) -> _Batches:
    """The images of an ``.npy`` file, or those named ``arr_0`` of an ``.npz`` file, which are never all in memory."""
    try:
        with _array_file(path) as file:
            old = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            if dtype != np.uint8 or fortran or len(shape) != 4 or shape[-1] not in (1, 3) or min(shape) < 1:
                raise DataError(
                    f"{path} holds an array {shape} of {dtype}, not images of uint8, (N, H, W, 3) or (N, H, W, 1)"
                )
            bytes_of_one = math.prod(shape[1:])
            if bytes_of_one > _MOST_BYTES:
                raise DataError(f"{path} says that its images are {shape[1:]}, which is too large for one")
            size = min(_BATCH, _MOST_BYTES // bytes_of_one)
            for start in range(0, shape[0], size):
                n = min(size, shape[0] - start)
                pixels = np.frombuffer(file.read(n * bytes_of_one), np.uint8).reshape(n, *shape[1:])
                yield _images(torch.from_numpy(pixels.copy())), None
    except DataError:
        raise
    except Exception as error:  # of damaged archives and headers, many
        raise DataError(f"{path} cannot be read: {in_one_line(error)}") from None


@contextlib.contextmanager
def _array_file(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            yield file
    else:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            yield file
