"""What the objectives that match distributions share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs
import torch
from attrs.validators import in_, instance_of
from torch import Tensor, nn

from flowdistill.algorithms.identities import noising_residual, pull
from flowdistill.guidance import GuidedTeacher, check_interval
from flowdistill.interfaces import FlowMap, NoisingVelocity, Objective, ObjectiveOutput, States, Teacher
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.times import TimeSampler, Uniform
from flowdistill.velocities.estimators import OnlineNetwork


@torch.no_grad()
def one_step_samples(student: FlowMap, start: States) -> Tensor:
    """The student's samples X(z, 1, 0) from noises, without a graph."""
    samples: Tensor = student(start.x, start.t, torch.zeros_like(start.t), start.condition)
    return samples


@attrs.define(kw_only=True)
class CorrectionObjective(Objective):
    """The noising velocity of the student's distribution is the teacher's velocity.

    One-step samples x = z - F(z, 1, 0) are noised to x_r = (1 - r) x + r n. The residual

        v_N(x_r, r) - u(x_r, r)

    is the gradient that reaches F, so that descent moves samples along the teacher's score minus the student's.

    Attributes:
        noising: the estimator of v_N.
        times: law of r.
        guidance_interval: times at which a guided teacher is guided here, in place of its own interval; None keeps
            that.
        weighting: "none", or "dmd", which divides the residual of each sample by the mean absolute error of the
            teacher's velocity there, mean |u - (n - x)|.
    """

    noising: NoisingVelocity = attrs.field(factory=OnlineNetwork, validator=instance_of(NoisingVelocity))
    times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    guidance_interval: tuple[float, float] | None = attrs.field(
        default=None, converter=attrs.converters.optional(check_interval)
    )
    weighting: Literal["none", "dmd"] = attrs.field(default="none", validator=in_(("none", "dmd")))

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Set the noising velocity up; ConfigError for a guidance interval without guidance."""
        if self.guidance_interval is not None and not isinstance(teacher, GuidedTeacher):
            raise ConfigError("guidance_interval needs a guided teacher: train.teacher = @guided()")
        self.noising.setup(student, teacher)

    def modules(self) -> Mapping[str, nn.Module]:
        """What the noising velocity trains."""
        return self.noising.modules()

    def residual(
        self, student: FlowMap, teacher: Teacher | None, start: States, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """F(z, 1, 0) and the weighted residual, for noises ``start``; one evaluation of the teacher."""
        assert teacher is not None
        if self.guidance_interval is not None and isinstance(teacher, GuidedTeacher):
            teacher = teacher.with_interval(self.guidance_interval)
        r = self.times.sample(len(start), generator).to(start.t.dtype)
        noise = torch.randn(start.x.shape, generator=generator, device=start.x.device, dtype=start.x.dtype)
        average, residual, error = noising_residual(
            student, teacher, self.noising, start.x, start.t, noise, r, start.condition
        )
        if self.weighting == "dmd":
            residual = residual / expand_time(error.abs().flatten(1).mean(1).clamp_min(1e-5), residual)
        return average, residual

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The squared difference of the velocities, from the noises of the states."""
        return pull(*self.residual(student, teacher, states.at_prior(), generator=generator))

    def auxiliary_loss(
        self,
        name: str,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        *,
        step: int,
        generator: torch.Generator,
    ) -> ObjectiveOutput | None:
        """The loss by which the noising velocity follows the student's samples."""
        start = states.at_prior()
        samples = one_step_samples(student, start)
        return ObjectiveOutput(self.noising.module_loss(name, samples, start.condition, generator=generator).mean())
