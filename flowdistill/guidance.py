"""Guided teachers: teachers that wrap teachers."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor, nn

from flowdistill.interfaces import Condition, Teacher
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_teacher


@register_teacher("guided")
class GuidedTeacher(Teacher):
    """A teacher whose velocity is extrapolated away from a weaker one.

        u_gamma(x, t) = u(x, t) + (gamma - 1) (u(x, t) - u_weak(x, t))

    The weak velocity is the same teacher's with the null label (classifier-free guidance, Ho and Salimans 2022,
    arXiv 2207.12598) or another network's with the same label (autoguidance, Karras et al. 2024,
    arXiv 2406.02507). Outside the interval of times gamma is 1 (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    Args:
        teacher: the teacher to guide.
        scale: gamma of samples whose condition names none; 1 is no guidance.
        interval: times [low, high], ends included, at which guidance is on.
        guide: the weak teacher of autoguidance; None is classifier-free guidance.
        channels: guide the first channels alone; None is all. SiT's published samples guide 3 of 4, REPA's and EDM2's
            all.

    Raises:
        ConfigError: classifier-free guidance of an unconditional teacher, an interval outside [0, 1], or more channels
            than there are.

    Examples:
        >>> from flowdistill import Condition, load_teacher
        >>> teacher = GuidedTeacher(load_teacher("digits_teacher"), scale=1.5, interval=(0.1, 0.9))
        >>> noise = teacher.sample_prior(2)
        >>> teacher.velocity(noise, torch.ones(2), Condition(torch.tensor([3, 7]))).shape, teacher.evaluations
        (torch.Size([2, 1, 8, 8]), 4)
    """

    def __init__(
        self,
        teacher: Teacher,
        scale: float = 1.0,
        interval: tuple[float, float] = (0.0, 1.0),
        guide: Teacher | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        if channels is not None and not 0 < channels <= teacher.sample_shape[0]:
            raise ConfigError(f"channels must be in 1 to {teacher.sample_shape[0]}, not {channels}")
        if guide is not None and guide.sample_shape != teacher.sample_shape:
            raise ConfigError(
                f"the guide's samples have shape {guide.sample_shape}, the teacher's {teacher.sample_shape}"
            )
        if guide is None and teacher.num_classes is None:
            raise ConfigError("classifier-free guidance needs a class-conditional teacher, or give a guide")
        self.teacher, self.guide, self.scale = teacher, guide, scale
        self.interval, self.channels = check_interval(interval), channels
        self.decoder = teacher.decoder
        self.sample_shape, self.num_classes = teacher.sample_shape, teacher.num_classes

    @property
    def network(self) -> nn.Module | None:
        """The network of the guided teacher, if it has one."""
        return getattr(self.teacher, "network", None)

    @property
    def evaluations(self) -> int:
        """Evaluations of the wrapped teachers."""
        return self.teacher.evaluations + (0 if self.guide is None else self.guide.evaluations)

    def with_interval(self, interval: tuple[float, float]) -> GuidedTeacher:
        """The same teachers guided at other times."""
        return GuidedTeacher(self.teacher, self.scale, interval, self.guide, self.channels)

    def held(self, t: Tensor) -> GuidedTeacher:
        """The same teachers, guided at all times or at none as the interval says of t (B,)."""
        result = self.with_interval(self.interval)
        result._decided_by = t
        return result

    _decided_by: Tensor | None = None

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The guided velocity; two evaluations, or one where the scale is 1 for all samples alike."""
        condition = condition or Condition()
        plain = attrs.evolve(condition, guidance=None)
        if condition.guidance is None and self.scale == 1.0:
            return self.teacher.velocity(x, t, plain)
        low, high = self.interval
        time = t if self._decided_by is None else self._decided_by
        own = condition.guidance
        scale = torch.full_like(t, self.scale, dtype=x.dtype) if own is None else own.to(x.dtype)
        excess = expand_time(torch.where((time >= low) & (time <= high), scale - 1, torch.zeros_like(scale)), x)
        if self.guide is not None:
            strong = self.teacher.velocity(x, t, plain)
            return self._extrapolate(strong, self.guide.velocity(x, t, plain), excess)
        if condition.labels is None:
            raise ConfigError("classifier-free guidance needs labels in the condition")
        labels = torch.cat([condition.labels, plain.drop().labels])  # type: ignore[list-item]
        extra = {name: torch.cat([value, value]) for name, value in condition.extra.items()}
        both = self.teacher.velocity(torch.cat([x, x]), torch.cat([t, t]), Condition(labels, extra=extra))
        strong, weak = both.chunk(2)
        return self._extrapolate(strong, weak, excess)

    def _extrapolate(self, strong: Tensor, weak: Tensor, excess: Tensor) -> Tensor:
        guided = strong + excess * (strong - weak)
        if self.channels is None:
            return guided
        return torch.cat([guided[:, : self.channels], strong[:, self.channels :]], dim=1)


def check_interval(interval: tuple[float, float]) -> tuple[float, float]:
    """The interval as two floats; ConfigError unless 0 <= low <= high <= 1."""
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ConfigError(f"a guidance interval is (low, high) with 0 <= low <= high <= 1, not {interval!r}")
    return float(low), float(high)
