"""Data sets that serve random batches."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowdistill.interfaces import Condition, ExactTeacher, Teacher
from flowdistill.plumbing.errors import ConfigError
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


class ImageDataset(Dataset):
    """Images and their classes, held in memory.

    Args:
        images: (N, C, H, W), float32 in [-1, 1].
        labels: classes (N,), int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.sample_shape = tuple(images.shape[1:])

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw images and labels with replacement."""
        if self.images.device != generator.device:
            self.images, self.labels = self.images.to(generator.device), self.labels.to(generator.device)
        rows = torch.randint(len(self.images), (batch_size,), generator=generator, device=generator.device)
        return self.images[rows], self.labels[rows]


@register_dataset("digits")
class Digits(ImageDataset):
    """The 1797 handwritten digits of 8x8 pixels that scikit-learn carries, in [-1, 1], with their 10 classes.

    They are the test part of the UCI data set "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).
    """

    num_classes = 10

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        super().__init__(
            torch.from_numpy(digits.images).float()[:, None] / 8 - 1, torch.from_numpy(digits.target).long()
        )


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
