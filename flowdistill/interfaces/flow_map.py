"""The student: a map that jumps along the teacher's trajectories."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flowdistill.interfaces._counting import Counted, counted
from flowdistill.interfaces.condition import Condition
from flowdistill.interfaces.decoder import Decoder
from flowdistill.paths import expand_time, interpolate, shifted
from flowdistill.plumbing.errors import ConfigError


class Jumps(enum.Flag):
    """The jumps (t, s) that a flow map can make, or that an objective trains."""

    NONE = 0
    """No jumps: a velocity field, for s = t alone."""
    ONE_STEP = enum.auto()
    """The one jump from noise, t = 1, to data, s = 0."""
    _OTHER_ENDS = enum.auto()
    _OTHER_STARTS = enum.auto()
    _OTHERS = enum.auto()
    FROM_NOISE = ONE_STEP | _OTHER_ENDS
    """Jumps from t = 1 to all s, as in FreeFlow."""
    TO_DATA = ONE_STEP | _OTHER_STARTS
    """Jumps from all t to s = 0, and the velocity, as in consistency models."""
    ANY = FROM_NOISE | TO_DATA | _OTHERS
    """All jumps with s <= t, and the velocity."""


class FlowMap(nn.Module, Counted, ABC):
    """A flow map X(x, t, s) = x - (t - s) F(x, t, s) for s <= t, with F the average velocity over [s, t].

    On the diagonal F(x, t, t) is the instantaneous velocity u(x, t).
    """

    sample_shape: tuple[int, ...]
    """The shape of one sample, without the batch."""
    num_classes: int | None = None
    """The number of classes; None for an unconditional map."""
    decoder: Decoder | None = None
    """Turns samples into images; None if the samples themselves are shown."""
    jumps: Jumps = Jumps.ANY
    """The jumps that are meaningful."""
    guidance: float | None = None
    """The guidance scale of samples that name none; None for a map that takes no scales."""
    first_time: float = 1.0
    """The first time of samples, at which a state is noise alone, or is taken to be."""
    time_shift: float = 1.0
    """The shift of the times of several steps, see `flowdistill.paths.shifted`."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """The suffixes of other people's files that a flow map reads from its argument ``checkpoint``."""

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether a file with such a suffix is one that it reads, where other flow maps read such suffixes too."""
        return True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "average_velocity" in cls.__dict__:
            cls.average_velocity = counted(cls.average_velocity)  # type: ignore[method-assign]

    @abstractmethod
    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """F(x, t, s), of the shape of x, for x ``(B, *sample_shape)`` and times t, s (B,), 0 <= s <= t <= 1."""

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """The jump X(x, t, s) = x - (t - s) F(x, t, s)."""
        return x - expand_time(t - s, x) * self.average_velocity(x, t, s, condition)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The instantaneous velocity F(x, t, t); a map that starts at noise alone has none."""
        if not self.has_velocity:
            raise ConfigError(f"{type(self).__name__} is anchored at t = 1 and has no velocity at other times")
        return self.average_velocity(x, t, t, condition)

    @property
    def has_velocity(self) -> bool:
        """Whether F(x, t, t) is meaningful at all t."""
        return self.jumps not in (Jumps.ONE_STEP, Jumps.FROM_NOISE)

    @property
    def backbone(self) -> nn.Module | None:
        """The network that is the velocity F(x, t, t) as it stands, and may be copied; None if there is none."""
        return None

    def built_by(self) -> tuple[str, dict[str, Any]]:
        """The registered flow map and its arguments that build one of this architecture, with other weights.

        Arguments are numbers, words, networks, decoders, and lists of these; by them a student becomes a folder.

        Raises:
            ConfigError: there are none, which is the default.
        """
        raise ConfigError(f"a {type(self).__name__} does not tell what builds it: its class lacks built_by")

    def grid(self, steps: int) -> Tensor:
        """The times (steps + 1,) between which samples jump, from ``first_time`` to 0: evenly spaced, then shifted."""
        return shifted(self.first_time * torch.linspace(1.0, 0.0, steps + 1), self.time_shift)

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        steps: int = 1,
        condition: Condition | None = None,
        times: Tensor | None = None,
        renoise: Tensor | None = None,
    ) -> Tensor:
        """Carry noise ``(B, *sample_shape)`` to data in ``steps`` jumps.

        Args:
            noise: draws of the prior.
            steps: number of jumps, see `grid`; ignored when ``times`` is given.
            condition: labels and guidance of the batch.
            times: a decreasing grid from 1 to 0 of any length, in place of `grid`.
            renoise: fresh noise ``(steps - 1, B, *sample_shape)`` that makes every jump go to t = 0, whose result is
                then noised to the next time: the sampler of consistency models. None is jumps from time to time.

        Raises:
            ConfigError: more than one jump of an anchored map, or of a map to data without fresh noise; times that do
                not decrease; fresh noise for another number of steps.
        """
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, not {steps}")
        grid = self.grid(steps) if times is None else times.detach().cpu()
        if grid.ndim != 1 or len(grid) < 2 or bool((grid.diff() >= 0).any()):
            raise ConfigError("times must be a decreasing one-dimensional grid of at least two entries")
        if not self.has_velocity and len(grid) > 2:
            raise ConfigError(f"an anchored flow map samples in 1 step, not {len(grid) - 1}: only t = 1 is meaningful")
        if self.jumps is Jumps.TO_DATA and renoise is None and len(grid) > 2:
            raise ConfigError("a map to data knows no other end: give sample fresh noise to add between the jumps")
        if renoise is not None and len(renoise) != len(grid) - 2:
            raise ConfigError(f"{len(grid) - 1} steps noise {len(grid) - 2} times, not {len(renoise)}")
        x = noise
        for i, (t, s) in enumerate(zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True)):
            end = s if renoise is None else 0.0
            x = self(x, x.new_full((len(x),), t), x.new_full((len(x),), end), condition)
            if renoise is not None and s > 0:
                x = interpolate(x, renoise[i], x.new_full((len(x),), s))
        return x
