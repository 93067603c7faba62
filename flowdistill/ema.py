"""Exponential moving averages of the student's weights."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import attrs
import gin
import torch
from attrs.validators import ge, gt, lt
from torch import Tensor, nn

from flowdistill.plumbing.distributed import local

_M = TypeVar("_M", bound=nn.Module)


def _widths(value: Sequence[float]) -> tuple[float, ...]:
    widths = tuple(value) if isinstance(value, (list, tuple)) else ()
    if not widths or not all(isinstance(width, (int, float)) and 0 < width < 0.28 for width in widths):
        raise ValueError(f"relative_widths must be a list of widths between 0 and 0.28, not {value!r}")
    return widths


class Averaging(ABC):
    """How far the average keeps its old value at each update."""

    @abstractmethod
    def decay_at(self, update: int) -> float:
        """The weight of the old average at update number 0, 1, 2, ..."""

    @property
    def tracks(self) -> Sequence[Averaging]:
        """The averages that a run keeps at once, of which the first is its result."""
        return (self,)

    @property
    def keeps_past(self) -> bool:
        """Whether the averages of past checkpoints stay when these are deleted."""
        return False


@gin.register("ema", module="training")
@attrs.frozen(kw_only=True)
class Ema(Averaging):
    """The plain average, with a warm-up so that it forgets the first weights: min(decay, (1 + n) / (10 + n))."""

    decay: float = attrs.field(default=0.999, validator=[ge(0.0), lt(1.0)])
    """The weight of the old average, in [0, 1)."""

    def decay_at(self, update: int) -> float:
        """min(decay, (1 + n) / (10 + n)) at update n."""
        return min(self.decay, (1 + update) / (10 + update))


@gin.register("power_ema", module="training")
@attrs.frozen(kw_only=True)
class PowerEma(Averaging):
    """The power-function average of Karras et al. 2024 (EDM2, arXiv 2312.02696), whose memory grows with training.

    The decay at update n is (1 - 1/(n + 1))^(gamma + 1), with gamma such that the profile's standard deviation is
    ``relative_width`` of the run:

        relative_width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
    """

    relative_width: float = attrs.field(default=0.05, validator=[gt(0.0), lt(0.28)])
    """The width sigma_rel, in (0, 0.28); EDM2 uses 0.05 to 0.2."""

    @functools.cached_property
    def gamma(self) -> float:
        """The exponent that has this relative width, by bisection: the width falls as gamma grows."""
        low, high = 0.0, 1e6
        for _ in range(100):
            middle = (low + high) / 2
            width = ((middle + 1) / ((middle + 2) ** 2 * (middle + 3))) ** 0.5
            low, high = (middle, high) if width > self.relative_width else (low, middle)
        return low

    def decay_at(self, update: int) -> float:
        """(1 - 1/(n + 1))^(gamma + 1) at update n."""
        return float((1 - 1 / (update + 1)) ** (self.gamma + 1))


@gin.register("post_hoc_ema", module="training")
@attrs.frozen(kw_only=True)
class PostHocEma(Averaging):
    """Power-function averages of several widths, from which one of any width follows when the training is over.

    Each checkpoint leaves them in ``averages/`` of the run directory, where they stay. ``flowdistill evaluate RUN --ema
    0.1`` and ``flowdistill.Run(run, ema=0.1)`` take the average of relative width 0.1 (Karras et al. 2024, EDM2,
    section 3.2). The first width is that of the run's own result.

    Examples:
        >>> [track.relative_width for track in PostHocEma().tracks]
        [0.05, 0.1]
    """

    relative_widths: tuple[float, ...] = attrs.field(default=(0.05, 0.1), converter=_widths)
    """The widths sigma_rel that are kept, in (0, 0.28); EDM2 keeps 0.05 and 0.1."""

    @functools.cached_property
    def _tracks(self) -> tuple[PowerEma, ...]:
        return tuple(PowerEma(relative_width=width) for width in self.relative_widths)

    @property
    def tracks(self) -> Sequence[PowerEma]:
        """An average of each width."""
        return self._tracks

    @property
    def keeps_past(self) -> bool:
        """True: an average of another width is made of them."""
        return True

    def decay_at(self, update: int) -> float:
        """That of the first width."""
        return self._tracks[0].decay_at(update)


class AveragedModel(Generic[_M]):
    """A copy of a module whose weights are the average of the module's, and whose buffers are the module's."""

    def __init__(self, model: _M, averaging: Averaging) -> None:
        self.averaging, self._model = averaging, model
        self.module = copy.deepcopy(model).requires_grad_(False)

    @functools.cached_property
    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """The averages and what they follow, of which each process may hold a part, since the first update."""
        pairs = zip(self.module.parameters(), self._model.parameters(), strict=True)
        moving = [(local(average.detach()), local(p.detach())) for average, p in pairs if p.requires_grad]
        return [average for average, _ in moving], [p for _, p in moving]

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Move the average towards the module's present weights, and take its present buffers."""
        averages, parameters = self._pairs
        torch._foreach_lerp_(averages, parameters, 1 - self.averaging.decay_at(number))
        for ours, theirs in zip(self.module.modules(), self._model.modules(), strict=True):
            for name, buffer in theirs._buffers.items():
                ours._buffers[name] = None if buffer is None else buffer.detach().clone()
