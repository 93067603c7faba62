"""What the objectives that match distributions share."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import in_, instance_of
from torch import Tensor

from flowdistill.algorithms.identities import Residual, noising, pull
from flowdistill.interfaces import (
    Condition,
    FlowMap,
    Jump,
    Jumps,
    NoisingVelocity,
    Objective,
    ObjectiveOutput,
    States,
    Step,
    Teacher,
    TimeSampler,
)
from flowdistill.interfaces.condition import check_interval
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.times import Uniform
from flowdistill.velocities import OnlineNetwork


@torch.no_grad()
def one_step_samples(student: FlowMap, start: Jump) -> Tensor:
    """The student's samples X(z, 1, 0) from noises, without a graph."""
    samples: Tensor = student(*start.to(0.0))
    return samples


@attrs.define(kw_only=True, slots=False)
class CorrectionObjective(Objective):
    """The noising velocity of the student's distribution is the teacher's velocity.

    One-step samples x = z - F(z, 1, 0) are noised to x_r = (1 - r) x + r n. The residual

        v_N(x_r, r) - u(x_r, r)

    is the gradient that reaches F, so that descent moves samples along the teacher's score minus the student's.
    """

    trains = Jumps.ONE_STEP

    noising: NoisingVelocity = attrs.field(factory=OnlineNetwork, validator=instance_of(NoisingVelocity))
    """The estimator of v_N."""
    times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    """The law of r."""
    guidance_interval: tuple[float, float] | None = attrs.field(
        default=None, converter=attrs.converters.optional(check_interval)
    )
    """The times at which a guided teacher is guided here; None is the teacher's own interval."""
    weighting: Literal["none", "dmd"] = attrs.field(default="none", validator=in_(("none", "dmd")))
    """"dmd" divides the residual of each sample by the mean absolute error of the teacher's velocity there,
    mean |u - (n - x)|."""

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take the models; ConfigError for a guidance interval without guidance."""
        if self.guidance_interval is not None and (teacher is None or not teacher.takes_guidance):
            raise ConfigError("guidance_interval needs a guided teacher: train.teacher = @guided()")
        super().setup(student, teacher)

    def field(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The teacher's velocity, guided in ``guidance_interval``."""
        if self.guidance_interval is not None:
            condition = condition.guided(interval=self.guidance_interval)
        return self.teacher.velocity(x, t, condition)

    def residual(self, start: Jump, step: Step) -> Residual:
        """F(z, 1, 0) and the weighted residual, for noises ``start``; one evaluation of the teacher."""
        r = self.times.sample(len(start), step.generator).to(start.t.dtype)
        noise = torch.randn(start.x.shape, generator=step.generator, device=start.x.device, dtype=start.x.dtype)
        residual, error = noising(self.student, self.field, self.noising, start, noise, r)
        if self.weighting == "none":
            return residual
        scale = error.abs().flatten(1).mean(1).clamp_min(1e-5)
        return Residual(residual.average, residual.value / expand_time(scale, error))

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The squared difference of the velocities, from the noises of the states."""
        start = states.at_prior().to(0.0)
        residual = self.residual(start, step)
        return attrs.evolve(pull(residual), samples=start.land(residual.average.detach()))

    def auxiliary_loss(self, name: str, states: States, step: Step) -> ObjectiveOutput | None:
        """The loss by which the noising velocity follows the student's samples."""
        start = states.at_prior()
        samples = one_step_samples(self.student, start)
        return ObjectiveOutput(self.noising.module_loss(name, samples, start.condition, step.generator).mean())
