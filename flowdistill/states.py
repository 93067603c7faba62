"""State sources: the prior, noised data, teacher trajectories, and the student's own rollouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import attrs
import torch
from attrs.validators import ge, instance_of, le
from torch import Tensor

from flowdistill.data import Blank, Dataset
from flowdistill.interfaces import Condition, FlowMap, Jumps, Pairs, States, StateSource, Teacher
from flowdistill.interfaces.jump import ratio
from flowdistill.paths import interpolate
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.fields import short
from flowdistill.plumbing.registry import register_state_source
from flowdistill.solvers import Euler

GuidanceRange: TypeAlias = float | tuple[float, float] | None


def _guidance_range(value: GuidanceRange) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = (value, value) if isinstance(value, (int, float)) else value
    if not low <= high:
        raise ConfigError(f"guidance must be a scale or a range (low, high), not {value!r}")
    return float(low), float(high)


@attrs.define(kw_only=True, eq=False, slots=False)
class _Guided(StateSource):
    """A source that draws guidance scales with its states."""

    guidance: tuple[float, float] | None = attrs.field(default=None, converter=_guidance_range)
    """The scale of every sample, or a range from which each draws its own; None leaves the scale to the teacher."""

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take the models; ConfigError for a range of scales if the student is told none: it would learn a mixture."""
        super().setup(student, teacher)
        if self.guidance is not None and self.guidance[0] < self.guidance[1] and student.guidance is None:
            raise ConfigError(
                f"guidance scales in {self.guidance} are drawn, and the student has no input for them: set "
                "from_teacher.guidance, or a single scale"
            )

    def _scales(self, n: int, generator: torch.Generator) -> Tensor | None:
        if self.guidance is None:
            return None
        low, high = self.guidance
        return low + (high - low) * torch.rand(n, generator=generator, device=generator.device)


@attrs.define(kw_only=True, eq=False, slots=False)
class _FromPrior(_Guided):
    """States that start from noise: what all data-free sources share."""

    def _prior(self, n: int, generator: torch.Generator) -> tuple[Tensor, Condition]:
        """Noises and conditions, in the dtype of the teacher's samples."""
        dtype = torch.float32 if self._teacher is None else self._teacher.dtype
        shape = (n, *self.student.sample_shape)
        noise = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
        labels = None
        if self.student.num_classes is not None:
            labels = torch.randint(self.student.num_classes, (n,), generator=generator, device=generator.device)
        return noise, Condition(labels, self._scales(n, generator))

    def _times(self, n: int, pairs: Pairs, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Times of the law, in the dtype of the teacher's samples."""
        dtype = torch.float32 if self._teacher is None else self._teacher.dtype
        t, s = pairs.sample(n, generator)
        return t.to(dtype), s.to(dtype)


@register_state_source("prior")
@attrs.define(kw_only=True, eq=False, slots=False)
class Prior(_FromPrior):
    """Noise at t = 1 with uniform labels: the only states that FreeFlow needs.

    Of a law of pairs it keeps the ratio s/t.

    Examples:
        >>> from flowdistill import load_teacher
        >>> from flowdistill.flow_maps import from_teacher
        >>> from flowdistill.pairs import Durations
        >>> teacher, source = load_teacher("digits_teacher"), Prior(guidance=(1.0, 2.0))
        >>> source.setup(from_teacher(teacher, guidance=1.5), teacher)
        >>> states = source.sample(5, Durations(), torch.Generator())
        >>> states.x.shape, states.s.shape, states.condition.scale.shape
        (torch.Size([5, 1, 8, 8]), torch.Size([5]), torch.Size([5]))
    """

    knows_all_times = False

    def sample(self, batch_size: int, pairs: Pairs, generator: torch.Generator) -> States:
        """Draw noises, labels and guidance scales."""
        noise, condition = self._prior(batch_size, generator)
        t, s = self._times(batch_size, pairs, generator)
        return States(x=noise, t=torch.ones_like(t), s=ratio(t, s), condition=condition, noise=noise)


@register_state_source("teacher_trajectories")
@attrs.define(kw_only=True, eq=False, slots=False)
class TeacherTrajectories(_FromPrior):
    """States on the teacher's own trajectories: Euler steps carry noise to the times of the law."""

    steps: int = attrs.field(default=16, validator=ge(1))
    """The Euler steps from t = 1 to such a time."""

    @torch.no_grad()
    def sample(self, batch_size: int, pairs: Pairs, generator: torch.Generator) -> States:
        """Draw noises, and integrate the teacher from each to its own time."""
        noise, condition = self._prior(batch_size, generator)
        t, s = self._times(batch_size, pairs, generator)
        x = Euler(steps=self.steps).solve(self.teacher, noise, condition, end=t)
        return States(x=x, t=t, s=s, condition=condition, noise=noise)


@register_state_source("student_rollouts")
@attrs.define(kw_only=True, eq=False, slots=False)
class StudentRollouts(_FromPrior):
    """States that the student reaches itself, X(z, 1, t) at the times t of the law.

    A student that maps to data alone is not trained for that jump: its samples X(z, 1, 0) are noised to t.
    """

    @torch.no_grad()
    def sample(self, batch_size: int, pairs: Pairs, generator: torch.Generator) -> States:
        """Draw noises, and let the student jump from each to its own time."""
        noise, condition = self._prior(batch_size, generator)
        t, s = self._times(batch_size, pairs, generator)
        one = torch.ones_like(t)
        if self.student.jumps is not Jumps.TO_DATA:
            return States(x=self.student(noise, one, t, condition), t=t, s=s, condition=condition, noise=noise)
        samples = self.student(noise, one, torch.zeros_like(t), condition)
        fresh = torch.randn(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)
        return States(x=interpolate(samples, fresh, t), t=t, s=s, condition=condition, noise=fresh)


def _augmentation(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and (not callable(value) or isinstance(value, type)):
        raise ValueError(f"{field.name} must map images to images, as @random_affine() does, not {short(value)}")


@register_state_source("noised_data")
@attrs.define(kw_only=True, eq=False, slots=False)
class NoisedData(_Guided):
    """Data noised along the linear path to the times of the law, x_t = (1 - t) x_0 + t n."""

    needs_data = True

    dataset: Dataset = attrs.field(validator=instance_of(Dataset))
    """Draws x_0 and its label."""
    label_dropout: float = attrs.field(default=0.0, validator=[ge(0.0), le(1.0)])
    """The fraction of labels replaced by the null label.
    It teaches a network the unconditional velocity that classifier-free guidance needs."""
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = attrs.field(default=None, validator=_augmentation)
    """Maps (images, generator) to augmented images before they are noised, such as ``@random_affine()``."""

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take the models; ConfigError if the data have another shape than the student's, or more classes."""
        super().setup(student, teacher)
        if self.dataset.sample_shape != student.sample_shape:
            raise ConfigError(
                f"the data have shape {self.dataset.sample_shape}, the student's samples {student.sample_shape}"
            )
        ours, theirs = student.num_classes, self.dataset.num_classes
        if ours is not None and theirs is not None and theirs > ours:
            raise ConfigError(f"the data have {theirs} classes, and the student knows {ours}")

    def prefetch(self, batch_size: int, generator: torch.Generator) -> None:
        """Begin to read the data."""
        self.dataset.prefetch(batch_size, generator)

    def leave_out_data(self) -> None:
        """Take zeros in place of the data set."""
        self.dataset = Blank(self.dataset)

    def sample(self, batch_size: int, pairs: Pairs, generator: torch.Generator) -> States:
        """Draw data, times and noise."""
        clean, labels = self.dataset.sample(batch_size, generator)
        if self.augment is not None:
            clean = self.augment(clean, generator)
        t, s = pairs.sample(batch_size, generator)
        noise = torch.randn(clean.shape, generator=generator, device=generator.device, dtype=clean.dtype)
        condition = Condition(labels, self._scales(batch_size, generator))
        if self.label_dropout:
            dropped = torch.rand(batch_size, generator=generator, device=generator.device) < self.label_dropout
            condition = condition.drop(dropped)
        return States(x=interpolate(clean, noise, t), t=t, s=s, condition=condition, clean=clean, noise=noise)
