"""Laws of times, and of pairs of times."""

from __future__ import annotations

from abc import ABC, abstractmethod

import attrs
import torch
from torch import Tensor


class TimeSampler(ABC):
    """A law of one time in [0, 1]. Concrete laws are attrs classes."""

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` times, float32 of shape (n,), on the device of ``generator``."""


class Pairs(ABC):
    """A law of pairs of times (t, s) with s <= t: where jumps start and end.

    An objective owns the law of its pairs.
    A state source draws from it, and makes a state at each t.
    """

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` starts t and ends s, float32 of shape (n,), on the device of ``generator``."""

    def on_diagonal(self, n: int) -> int:
        """How many of ``n`` drawn rows have s = t by design; they are the first ones."""
        return 0


@attrs.frozen
class OneStep(Pairs):
    """The one jump of a one-step generator: from noise, t = 1, to data, s = 0."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """1 and 0, ``n`` times."""
        return torch.ones(n, device=generator.device), torch.zeros(n, device=generator.device)
