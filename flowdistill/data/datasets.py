"""Data sets that serve random batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from flowdistill.interfaces import Condition, ExactTeacher, Teacher
from flowdistill.plumbing.errors import ConfigError, DataError
from flowdistill.plumbing.registry import register_dataset


class Dataset(ABC):
    """Samples and their labels."""

    sample_shape: tuple[int, ...]
    """The shape of one sample, without the batch."""
    num_classes: int | None = None
    """The number of classes; None where there are no labels."""

    @abstractmethod
    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw independent samples ``(B, *sample_shape)`` and labels (B,) or None, on the generator's device."""

    def prefetch(self, batch_size: int, generator: torch.Generator) -> None:
        """Begin to read what `sample` will return for a generator in this state; the default does nothing."""


class ImageDataset(Dataset):
    """Images, and their classes where there are any, held in memory.

    Args:
        images: (N, C, H, W), a tensor or an array: uint8, or numbers in [-1, 1].
        labels: classes (N,), whole numbers from 0 on; None for images without classes. The number of classes is the
            largest label and one, where the class of the data set does not say it.

    Raises:
        DataError: images of another shape or range, or labels that are not theirs.

    Examples:
        >>> dataset = ImageDataset(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), [0, 4])
        >>> dataset.images.max(), dataset.num_classes
        (tensor(1.), 5)
    """

    def __init__(self, images: Tensor | ArrayLike, labels: Tensor | ArrayLike | None = None) -> None:
        self.images = in_range(torch.as_tensor(images))
        self.labels: Tensor | None = None
        self.sample_shape = tuple(self.images.shape[1:])
        if labels is not None:
            self.labels = _whole(torch.as_tensor(labels), len(self.images))
            if self.num_classes is None:
                self.num_classes = int(self.labels.max()) + 1

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw images and labels with replacement."""
        device = generator.device
        if self.images.device != device:
            self.images, self.labels = self.images.to(device), None if self.labels is None else self.labels.to(device)
        rows = torch.randint(len(self.images), (batch_size,), generator=generator, device=device)
        return self.images[rows], None if self.labels is None else self.labels[rows]


def in_range(images: Tensor) -> Tensor:
    """Images as float32 in [-1, 1]."""
    if images.ndim != 4 or not images.numel():
        raise DataError(f"images have the shape (N, C, H, W), not {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point():
        raise DataError(f"images are uint8, or numbers in [-1, 1], not {images.dtype}")
    low, high = (float(end) for end in images.aminmax())
    if not (low >= -1.001 and high <= 1.001):
        raise DataError(f"images lie in [-1, 1], and these in [{low:g}, {high:g}]: give uint8, or images / 127.5 - 1")
    if low >= 0 and high > 0:
        raise DataError(f"images lie in [-1, 1], and these in [{low:g}, {high:g}], so 0 is not black: 2 * images - 1")
    return images.float()


def _whole(labels: Tensor, n: int) -> Tensor:
    """Labels as int64."""
    if labels.shape != (n,):
        raise DataError(f"{n} images have labels of shape ({n},), not {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or int(labels.min()) < 0:
        raise DataError("labels are whole numbers from 0 on")
    return labels.long()


@register_dataset("digits")
class Digits(ImageDataset):
    """The 1797 handwritten digits of 8x8 pixels that scikit-learn carries too, in [-1, 1], with their 10 classes.

    They are the test part of the UCI data set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).
    """

    num_classes = 10

    def __init__(self) -> None:
        with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as digits:
            images, labels = (torch.from_numpy(digits[name]) for name in ("images", "labels"))
        super().__init__(images.float()[:, None] / 8 - 1, labels.long())


@register_dataset("exact_samples")
class ExactSamples(Dataset):
    """Fresh samples of an exact teacher's distribution, for methods that train from data.

    Args:
        teacher: a teacher with ``sample_data``.

    Raises:
        ConfigError: the teacher cannot draw data.
    """

    def __init__(self, teacher: Teacher) -> None:
        if not isinstance(teacher, ExactTeacher):
            raise ConfigError(f"{type(teacher).__name__} is not an exact teacher: it cannot draw data")
        self._teacher = teacher
        self.sample_shape, self.num_classes = teacher.sample_shape, teacher.num_classes

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Draw data, of uniform classes where there are any."""
        labels = None
        if self.num_classes is not None:
            size = (batch_size,)
            labels = torch.randint(self.num_classes, size, generator=generator, device=generator.device)
        self._teacher.to(generator.device)
        data: Tensor = self._teacher.sample_data(batch_size, generator, Condition(labels))
        return data, labels


class Blank(Dataset):
    """Zeros in place of a data set, with its shape and its classes, for what needs no values.

    Args:
        dataset: the data set.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.sample_shape, self.num_classes = dataset.sample_shape, dataset.num_classes

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """Zeros, of class 0 where there are classes."""
        device = generator.device
        labels = None if self.num_classes is None else torch.zeros(batch_size, dtype=torch.long, device=device)
        return torch.zeros(batch_size, *self.sample_shape, device=device), labels
