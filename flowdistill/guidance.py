"""Guided teachers: teachers that wrap teachers."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor, nn

from flowdistill.interfaces import Condition, Guidance, Teacher
from flowdistill.interfaces.condition import check_interval
from flowdistill.networks.embeddings import NO_NULL_LABEL
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

    A condition may name a scale, an interval and channels of its own, see `Guidance`.

    Args:
        teacher: the teacher to guide.
        scale: gamma of samples whose condition names none; 1 is no guidance.
        interval: times [low, high], ends included, at which guidance is on.
        guide: the weak teacher of autoguidance; None is classifier-free guidance.
        channels: guide the first channels alone; None is all. SiT's published samples guide 3 of 4, REPA's and EDM2's
            all.

    Raises:
        ConfigError: classifier-free guidance of an unconditional teacher or of one without a null label, an interval
            outside [0, 1], or more channels than there are.

    Examples:
        >>> from flowdistill import Condition, load_teacher
        >>> teacher = GuidedTeacher(load_teacher("digits_teacher"), scale=1.5, interval=(0.1, 0.9))
        >>> noise = teacher.sample_prior(2)
        >>> teacher.velocity(noise, torch.ones(2), Condition(torch.tensor([3, 7]))).shape, teacher.evaluations
        (torch.Size([2, 1, 8, 8]), 4)
    """

    takes_guidance = True

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
        if guide is None and not teacher.has_null_label:
            raise ConfigError(f"classifier-free guidance of this teacher is impossible: {NO_NULL_LABEL}; give a guide")
        self.teacher, self.guide, self.scale = teacher, guide, scale
        self.interval, self.channels = check_interval(interval), channels
        self.decoder = teacher.decoder
        self.sample_shape, self.num_classes = teacher.sample_shape, teacher.num_classes

    @property
    def backbone(self) -> nn.Module | None:
        """The network of the guided teacher, if it has one."""
        return self.teacher.backbone

    @property
    def evaluations(self) -> int:
        """Evaluations of the wrapped teachers."""
        return self.teacher.evaluations + (0 if self.guide is None else self.guide.evaluations)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The guided velocity; two evaluations, or one if the scale is 1 for all samples alike."""
        condition = condition or Condition()
        asked = condition.guidance or Guidance()
        plain = attrs.evolve(condition, guidance=None)
        if asked.scale is None and self.scale == 1.0:
            return self.teacher.velocity(x, t, plain)
        low, high = self.interval if asked.interval is None else asked.interval
        time = t if asked.asked_at is None else asked.asked_at
        scale = torch.full_like(t, self.scale, dtype=x.dtype) if asked.scale is None else asked.scale.to(x.dtype)
        excess = expand_time(torch.where((time >= low) & (time <= high), scale - 1, torch.zeros_like(scale)), x)
        strong, weak = self._strong_and_weak(x, t, plain)
        guided = strong + excess * (strong - weak)
        channels = self.channels if asked.channels is None else asked.channels
        return guided if channels is None else torch.cat([guided[:, :channels], strong[:, channels:]], dim=1)

    def _strong_and_weak(self, x: Tensor, t: Tensor, plain: Condition) -> tuple[Tensor, Tensor]:
        if self.guide is not None:
            return self.teacher.velocity(x, t, plain), self.guide.velocity(x, t, plain)
        if plain.labels is None:
            raise ConfigError("classifier-free guidance needs labels in the condition")
        labels = torch.cat([plain.labels, plain.drop().labels])  # type: ignore[list-item]
        extra = {name: torch.cat([value, value]) for name, value in plain.extra.items()}
        both = self.teacher.velocity(torch.cat([x, x]), torch.cat([t, t]), Condition(labels, extra=extra))
        strong, weak = both.chunk(2)
        return strong, weak
