"""Jumps from states on the way from noise to data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor
from typing_extensions import Self

from flowdistill.interfaces.condition import Condition
from flowdistill.paths import expand_time


@attrs.frozen(eq=False)
class Jump:
    """The arguments (x, t, s, condition) of a flow map for a batch.

    Examples:
        >>> jump = Jump(torch.zeros(3, 2), torch.ones(3), torch.zeros(3))
        >>> x, t, s, condition = jump
        >>> jump.land(torch.full((3, 2), 0.5))[0]
        tensor([-0.5000, -0.5000])
    """

    x: Tensor
    """The states from which the jumps start, ``(B, *sample_shape)``."""
    t: Tensor
    """Their times (B,), in [0, 1]."""
    s: Tensor
    """The times (B,) at which the jumps end, at most t."""
    condition: Condition = attrs.field(factory=Condition)
    """Labels and guidance."""

    def __iter__(self) -> Iterator[Any]:
        """X, t, s and the condition, as a flow map takes them."""
        yield from (self.x, self.t, self.s, self.condition)

    def __len__(self) -> int:
        """Batch size."""
        return len(self.x)

    def land(self, average: Tensor) -> Tensor:
        """The end X = x - (t - s) F of jumps with the average velocities F."""
        return self.x - expand_time(self.t - self.s, self.x) * average

    def to(self, s: Tensor | float) -> Jump:
        """The jumps from the same states to other times s."""
        return Jump(self.x, self.t, s if isinstance(s, Tensor) else torch.full_like(self.t, s), self.condition)

    def staying(self) -> Jump:
        """The jumps of length 0 at the same states, s = t."""
        return Jump(self.x, self.t, self.t, self.condition)

    def __getitem__(self, index: slice | Tensor) -> Self:
        """Some rows of the batch: ``index`` is a slice, a mask, or row numbers."""
        fields = ((field.name, getattr(self, field.name)) for field in attrs.fields(type(self)))
        taken: dict[str, Any] = {name: None if value is None else value[index] for name, value in fields}
        return type(self)(**taken)


@attrs.frozen(eq=False)
class States(Jump):
    """A batch of states with the ends of their jumps, and with what is known of their origin."""

    clean: Tensor | None = None
    """The data x_0 of each state, if there are any."""
    noise: Tensor | None = None
    """The noise n of each state, if it is known."""

    def at_prior(self) -> States:
        """The states at t = 1 from which these come, with the same ratio s/t; these themselves if it is unknown."""
        if self.noise is None or self.noise is self.x:
            return self
        return States(self.noise, torch.ones_like(self.t), ratio(self.t, self.s), self.condition, noise=self.noise)


def ratio(t: Tensor, s: Tensor) -> Tensor:
    """The part s/t of the way to noise at which jumps end, in [0, 1]; 1 at t = 0."""
    return torch.where(t > 0, s / t.clamp_min(torch.finfo(t.dtype).tiny), torch.ones_like(t)).clamp(0, 1)
