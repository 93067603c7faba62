"""What a sample is conditioned on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

NULL_LABEL = -1
"""The label that stands for "no class": networks map it to their null embedding."""


@attrs.frozen(eq=False)
class Condition:
    """The condition of a batch: class labels, guidance scales, and anything a model adds.

    Attributes:
        labels: class of each sample, int64 of shape (B,), in [0, num_classes) or ``NULL_LABEL``;
            None where the model has no classes.
        guidance: guidance scale gamma of each sample, float of shape (B,); None where the scale is
            the teacher's own.
        extra: further tensors whose first dimension is the batch, by name.

    Examples:
        >>> c = Condition(labels=torch.tensor([3, 7]))
        >>> c[:1].labels, c.drop().labels
        (tensor([3]), tensor([-1, -1]))
    """

    labels: Tensor | None = None
    guidance: Tensor | None = None
    extra: Mapping[str, Tensor] = attrs.field(factory=dict)

    @classmethod
    def in_turn(cls, num_classes: int | None, n: int, guidance: float | None = None) -> Condition:
        """The condition of ``n`` samples: all classes in turn, where there are any, and one guidance scale."""
        labels = None if num_classes is None else torch.arange(n) % num_classes
        return cls(labels, None if guidance is None else torch.full((n,), float(guidance)))

    def _tensors(self) -> list[Tensor]:
        return [v for v in (self.labels, self.guidance, *self.extra.values()) if v is not None]

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

        The whole null condition keeps no guidance and no extra tensors, since both say how to
        follow a condition that is no longer there.
        """
        if rows is not None:
            labels = None if self.labels is None else self.labels.masked_fill(rows, NULL_LABEL)
            return attrs.evolve(self, labels=labels)
        return Condition(labels=None if self.labels is None else torch.full_like(self.labels, NULL_LABEL))
