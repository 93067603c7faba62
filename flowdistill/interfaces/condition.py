"""What a sample is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from flowdistill.plumbing.errors import ConfigError

NULL_LABEL = -1
"""The label that stands for "no class": networks map it to their null embedding."""


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """The interval as two floats; ConfigError unless 0 <= low <= high <= 1."""
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ConfigError(f"a guidance interval is (low, high) with 0 <= low <= high <= 1, not {interval!r}")
    return float(low), float(high)


@attrs.frozen(eq=False)
class Guidance:
    """How samples are guided; whatever is None is left to the guided teacher.

    Examples:
        >>> Guidance(torch.tensor([1.0, 2.0]), interval=(0.0, 0.7))[:1].scale
        tensor([1.])
    """

    scale: Tensor | None = None
    """The scale gamma of each sample, float of shape (B,); 1 is no guidance."""
    interval: tuple[float, float] | None = attrs.field(
        default=None, converter=attrs.converters.optional(check_interval)
    )
    """The times [low, high], ends included, at which guidance is on."""
    channels: int | None = None
    """Guide the first channels alone."""
    asked_at: Tensor | None = None
    """The times (B,) that decide whether guidance is on, in place of those at which the velocity is asked."""

    def __getitem__(self, index: slice | Tensor) -> Guidance:
        """The guidance of some rows."""
        return attrs.evolve(
            self,
            scale=None if self.scale is None else self.scale[index],
            asked_at=None if self.asked_at is None else self.asked_at[index],
        )

    def to(self, device: torch.device | str) -> Guidance:
        """The same guidance on another device."""
        return attrs.evolve(
            self,
            scale=None if self.scale is None else self.scale.to(device),
            asked_at=None if self.asked_at is None else self.asked_at.to(device),
        )


def _as_guidance(value: Guidance | Tensor | None) -> Guidance | None:
    return Guidance(value) if isinstance(value, Tensor) else value


@attrs.frozen(eq=False)
class Condition:
    """The condition of a batch: class labels, guidance, and anything a model adds.

    Examples:
        >>> c = Condition(labels=torch.tensor([3, 7]), guidance=torch.tensor([1.0, 1.5]))
        >>> c[:1].labels, c.scale, c.drop().labels
        (tensor([3]), tensor([1.0000, 1.5000]), tensor([-1, -1]))
    """

    labels: Tensor | None = None
    """The class of each sample, int64 of shape (B,), in [0, num_classes) or ``NULL_LABEL``; None without classes."""
    guidance: Guidance | None = attrs.field(default=None, converter=_as_guidance)
    """How the samples are guided; a tensor (B,) of scales stands for a guidance of these; None is the teacher's own."""
    extra: Mapping[str, Tensor] = attrs.field(factory=dict)
    """Further tensors by name, whose first dimension is the batch."""

    @classmethod
    def in_turn(cls, num_classes: int | None, n: int, scale: float | None = None) -> Condition:
        """The condition of ``n`` samples: all classes in turn, if there are any, and one guidance scale."""
        labels = None if num_classes is None else torch.arange(n) % num_classes
        return cls(labels, None if scale is None else torch.full((n,), float(scale)))

    @property
    def scale(self) -> Tensor | None:
        """The guidance scales (B,), or None."""
        return None if self.guidance is None else self.guidance.scale

    def guided(self, **changes: Any) -> Condition:
        """The same condition with some fields of its guidance changed, such as ``interval=(0.0, 0.7)``."""
        return attrs.evolve(self, guidance=attrs.evolve(self.guidance or Guidance(), **changes))

    def _tensors(self) -> list[Tensor]:
        return [v for v in (self.labels, self.scale, *self.extra.values()) if v is not None]

    def __len__(self) -> int:
        """Batch size; 0 for a condition that holds nothing."""
        tensors = self._tensors()
        return len(tensors[0]) if tensors else 0

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """The condition of some rows: ``index`` is a slice, a mask, or row numbers."""
        return Condition(
            labels=None if self.labels is None else self.labels[index],
            guidance=None if self.guidance is None else self.guidance[index],
            extra={name: value[index] for name, value in self.extra.items()},
        )

    def split(self, sizes: Sequence[int]) -> list[Condition]:
        """Consecutive parts of the given numbers of rows."""
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [self[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def to(self, device: torch.device | str) -> Condition:
        """The same condition on another device."""
        return Condition(
            labels=None if self.labels is None else self.labels.to(device),
            guidance=None if self.guidance is None else self.guidance.to(device),
            extra={name: value.to(device) for name, value in self.extra.items()},
        )

    def drop(self, rows: Tensor | None = None) -> Condition:
        """The null condition, or this one with the labels of some rows (a bool mask (B,)) nulled.

        The whole null condition keeps no guidance and no extra tensors.
        Both say how to follow a condition, and there is none.
        """
        if rows is not None:
            labels = None if self.labels is None else self.labels.masked_fill(rows, NULL_LABEL)
            return attrs.evolve(self, labels=labels)
        return Condition(labels=None if self.labels is None else torch.full_like(self.labels, NULL_LABEL))

    def unlabelled(self) -> Condition:
        """The same condition with all labels nulled; its guidance stays."""
        return attrs.evolve(self, labels=None if self.labels is None else torch.full_like(self.labels, NULL_LABEL))
