"""The velocity at a state that an objective is trained on: the conditional one of the data, or the teacher's."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import lt, optional
from torch import Tensor

from flowdistill.interfaces import NULL_LABEL, States, TargetVelocity
from flowdistill.interfaces.condition import check_interval
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_target_velocity


@register_target_velocity("teacher_velocity")
@attrs.define(kw_only=True, slots=False)
class TeacherVelocity(TargetVelocity):
    """The teacher's u(x, t), guided if the teacher is: a function of the state alone."""

    needs_teacher = True

    @torch.no_grad()
    def __call__(self, states: States) -> Tensor:
        """One evaluation of the teacher."""
        return self.teacher.velocity(states.x, states.t, states.condition)


@register_target_velocity("conditional_velocity")
@attrs.define(kw_only=True, slots=False)
class ConditionalVelocity(TargetVelocity):
    """The conditional velocity v = n - x_0 of the data, whose mean at a state is u(x, t).

    It can be mixed with the student's own velocities with and without the label,

        v* = omega v + kappa F(x, t, t | y) + (1 - omega - kappa) F(x, t, t | no label),

    which trains a student that is guided without further evaluations.
    The fixed point is classifier-free guidance by omega / (1 - kappa) (MeanFlow, arXiv 2505.13447, section 4.2).
    omega = 1 is the model guidance of Decoupled MeanFlow (arXiv 2510.24474).
    Samples without a label, and times outside the interval, keep v.
    """

    needs_data = True

    omega: float = 1.0
    """The weight of v."""
    kappa: float | None = attrs.field(default=0.0, validator=optional(lt(1.0)))  # type: ignore[arg-type]
    """The weight of the student's velocity with the label; None is 1 - 1/gamma with the guidance scale gamma of each
    sample, which makes gamma the scale (improved MeanFlow, arXiv 2512.02012)."""
    interval: tuple[float, float] = attrs.field(default=(0.0, 1.0), converter=check_interval)
    """The times [low, high] at which v is mixed."""

    @torch.no_grad()
    def __call__(self, states: States) -> Tensor:
        """V or v*; two evaluations of the student for v*, none for v."""
        assert states.clean is not None
        assert states.noise is not None
        plain = states.noise - states.clean
        if self.omega == 1.0 and self.kappa == 0.0:
            return plain
        condition = states.condition
        if condition.labels is None:
            raise ConfigError("conditional_velocity mixes guidance in by labels, which these data do not have")
        kappa: Tensor | float
        if self.kappa is not None:
            kappa = self.kappa
        elif condition.scale is not None:
            kappa = expand_time(1 - 1 / condition.scale, plain)
        else:
            raise ConfigError("conditional_velocity.kappa = None needs guidance scales: set the states' guidance")
        labelled = self.student.velocity(states.x, states.t, condition)
        unlabelled = self.student.velocity(states.x, states.t, condition.unlabelled())
        mixed = self.omega * plain + kappa * labelled + (1 - self.omega - kappa) * unlabelled
        low, high = self.interval
        inside = (states.t >= low) & (states.t <= high) & (condition.labels != NULL_LABEL)
        return torch.where(expand_time(inside, plain).bool(), mixed, plain)
