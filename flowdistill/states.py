"""State sources: the prior, noised data, teacher trajectories, and the student's own rollouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import attrs
import gin
import torch
import torch.nn.functional as F
from attrs.validators import ge, instance_of, is_callable, le, optional
from torch import Tensor

from flowdistill.data import Dataset
from flowdistill.interfaces import Condition, FlowMap, States, StateSource, Teacher
from flowdistill.paths import interpolate
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_state_source
from flowdistill.solvers import Euler
from flowdistill.times import TimeSampler, Uniform

GuidanceRange: TypeAlias = float | tuple[float, float] | None


def _guidance_range(value: GuidanceRange) -> tuple[float, float] | None:
    if value is None:
        return None
    low, high = (value, value) if isinstance(value, (int, float)) else value
    if not low <= high:
        raise ConfigError(f"guidance must be a scale or a range (low, high), not {value!r}")
    return float(low), float(high)


def _check_guidance_input(guidance: tuple[float, float] | None, student: FlowMap) -> None:
    """ConfigError for a range of scales of which the student is told none: it would learn their mixture."""
    if guidance is not None and guidance[0] < guidance[1] and getattr(student, "guidance", 0.0) is None:
        raise ConfigError(
            f"guidance scales in {guidance} are drawn, and the student has no input for them: set "
            "from_teacher.guidance, or a single scale"
        )


@attrs.define(kw_only=True, eq=False, slots=False)
class _FromPrior(StateSource):
    """States that start from noise: what all data-free sources share.

    Attributes:
        guidance: scale of every sample, or a range from which each draws its own; None leaves the scale to the
            teacher.
    """

    guidance: tuple[float, float] | None = attrs.field(default=None, converter=_guidance_range)

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Keep the models: the student's shape and classes, the teacher's dtype."""
        _check_guidance_input(self.guidance, student)
        self._student, self._teacher = student, teacher

    def _prior(self, n: int, generator: torch.Generator) -> States:
        device = generator.device
        dtype = torch.float32 if self._teacher is None else self._teacher.dtype
        shape = (n, *self._student.sample_shape)
        noise = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        labels = guidance = None
        if self._student.num_classes is not None:
            labels = torch.randint(self._student.num_classes, (n,), generator=generator, device=device)
        if self.guidance is not None:
            low, high = self.guidance
            guidance = low + (high - low) * torch.rand(n, generator=generator, device=device)
        return States(
            x=noise, t=torch.ones(n, device=device, dtype=dtype), condition=Condition(labels, guidance), noise=noise
        )


@register_state_source("prior")
@attrs.define(kw_only=True, eq=False, slots=False)
class Prior(_FromPrior):
    """Noise at t = 1 with uniform labels: the only states that FreeFlow needs.

    Examples:
        >>> from flowdistill import load_teacher
        >>> from flowdistill.flow_maps import from_teacher
        >>> teacher, source = load_teacher("digits_teacher"), Prior(guidance=(1.0, 2.0))
        >>> source.setup(from_teacher(teacher, guidance=1.5), teacher)
        >>> states = source.sample(5, torch.Generator())
        >>> states.x.shape, states.condition.guidance.shape
        (torch.Size([5, 1, 8, 8]), torch.Size([5]))
    """

    def sample(self, batch_size: int, generator: torch.Generator) -> States:
        """Draw noises, labels and guidance scales."""
        return self._prior(batch_size, generator)


@register_state_source("teacher_trajectories")
@attrs.define(kw_only=True, eq=False, slots=False)
class TeacherTrajectories(_FromPrior):
    """States on the teacher's own trajectories: noise carried to a random time by Euler steps.

    Attributes:
        times: law of the time at which the trajectory is stopped.
        steps: Euler steps from t = 1 to that time.
    """

    times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    steps: int = attrs.field(default=16, validator=ge(1))

    @torch.no_grad()
    def sample(self, batch_size: int, generator: torch.Generator) -> States:
        """Draw noises and integrate the teacher from each to its own time."""
        if self._teacher is None:
            raise ConfigError("teacher_trajectories needs a teacher: set train.teacher")
        prior = self._prior(batch_size, generator)
        t = self.times.sample(batch_size, generator)
        x = Euler(steps=self.steps).solve(self._teacher, prior.x, prior.condition, end=t)
        return attrs.evolve(prior, x=x, t=t)


@register_state_source("student_rollouts")
@attrs.define(kw_only=True, eq=False, slots=False)
class StudentRollouts(_FromPrior):
    """States that the student reaches itself, X(z, 1, t) at a random time t.

    A student that maps to data alone is not trained for that jump: its samples X(z, 1, 0) are noised to t.

    Attributes:
        times: law of t.
    """

    times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))

    @torch.no_grad()
    def sample(self, batch_size: int, generator: torch.Generator) -> States:
        """Draw noises and let the student jump from each to its own time."""
        prior = self._prior(batch_size, generator)
        t = self.times.sample(batch_size, generator)
        if not self._student.to_data:
            return attrs.evolve(prior, x=self._student(prior.x, prior.t, t, prior.condition), t=t)
        samples = self._student(prior.x, prior.t, torch.zeros_like(t), prior.condition)
        noise = torch.randn(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)
        return attrs.evolve(prior, x=interpolate(samples, noise, t), t=t, noise=noise)


@register_state_source("noised_data")
@attrs.define(kw_only=True, eq=False, slots=False)
class NoisedData(StateSource):
    """Data noised along the linear path, x_t = (1 - t) x_0 + t n.

    Attributes:
        dataset: where x_0 and its label come from.
        times: law of t.
        label_dropout: fraction of labels replaced by the null label, which teaches a network the unconditional
            velocity that classifier-free guidance needs.
        guidance: as for the data-free sources.
        augment: maps (images, generator) to augmented images before they are noised, such as `RandomAffine`
            (``@random_affine()``).
    """

    needs_data = True

    dataset: Dataset = attrs.field(validator=instance_of(Dataset))
    times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    label_dropout: float = attrs.field(default=0.0, validator=[ge(0.0), le(1.0)])
    guidance: tuple[float, float] | None = attrs.field(default=None, converter=_guidance_range)
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = attrs.field(
        default=None, validator=optional(is_callable())
    )

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Check that the data are of the student's shape; ConfigError if they are not."""
        if self.dataset.sample_shape != student.sample_shape:
            raise ConfigError(
                f"the data have shape {self.dataset.sample_shape}, the student's samples {student.sample_shape}"
            )
        _check_guidance_input(self.guidance, student)

    def sample(self, batch_size: int, generator: torch.Generator) -> States:
        """Draw data, times and noise."""
        device = generator.device
        clean, labels = self.dataset.sample(batch_size, generator)
        if self.augment is not None:
            clean = self.augment(clean, generator)
        t = self.times.sample(batch_size, generator)
        noise = torch.randn(clean.shape, generator=generator, device=device, dtype=clean.dtype)
        guidance = None
        if self.guidance is not None:
            low, high = self.guidance
            guidance = low + (high - low) * torch.rand(batch_size, generator=generator, device=device)
        condition = Condition(labels, guidance)
        if self.label_dropout:
            condition = condition.drop(torch.rand(batch_size, generator=generator, device=device) < self.label_dropout)
        return States(x=interpolate(clean, noise, t), t=t, condition=condition, clean=clean, noise=noise)


@gin.register("random_affine", module="augmentations")
@attrs.frozen(kw_only=True)
class RandomAffine:
    """Random rotation, scaling and translation of images (B, C, H, W).

    Attributes:
        strength: 1 rotates by up to 45 degrees, scales by up to a half and shifts by up to half the image.
    """

    strength: float = attrs.field(default=0.25, validator=[ge(0.0), le(1.0)])

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Transform each image by its own draw."""
        unit = 2 * torch.rand(4, len(images), generator=generator, device=images.device) - 1
        angle, zoom, dx, dy = unit * self.strength * unit.new_tensor([[0.785], [0.5], [0.5], [0.5]])
        cos, sin = torch.cos(angle) * (1 + zoom), torch.sin(angle) * (1 + zoom)
        theta = torch.stack([torch.stack([cos, -sin, dx], -1), torch.stack([sin, cos, dy], -1)], 1)
        grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
