"""What stands for the velocity at a state: the conditional one of the data, or the teacher's."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from flowdistill.guidance import check_interval
from flowdistill.interfaces import NULL_LABEL, FlowMap, States, TargetVelocity, Teacher
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_target_velocity


@register_target_velocity("teacher_velocity")
@attrs.frozen(kw_only=True)
class TeacherVelocity(TargetVelocity):
    """The teacher's u(x, t), guided if the teacher is: a function of the state alone."""

    needs_teacher = True

    @torch.no_grad()
    def velocity(self, student: FlowMap, teacher: Teacher | None, states: States) -> Tensor:
        """One evaluation of the teacher."""
        assert teacher is not None
        return teacher.velocity(states.x, states.t, states.condition)


@register_target_velocity("conditional_velocity")
@attrs.frozen(kw_only=True)
class ConditionalVelocity(TargetVelocity):
    """The conditional velocity v = n - x_0 of the data, whose mean at a state is u(x, t).

    It can be mixed with the student's own velocities with and without the label,

        v* = omega v + kappa F(x, t, t | y) + (1 - omega - kappa) F(x, t, t | no label),

    which trains a student that is guided without further evaluations. The fixed point is classifier-free guidance by
    omega / (1 - kappa) (MeanFlow, arXiv 2505.13447, section 4.2). omega = 1 is the model guidance of Decoupled MeanFlow
    (arXiv 2510.24474). Samples without a label, and times outside the interval, keep v.

    Attributes:
        omega: weight of v.
        kappa: weight of the student's velocity with the label, below 1; None is 1 - 1/gamma with the guidance scale
            gamma of each sample, which makes gamma the scale (improved MeanFlow, arXiv 2512.02012).
        interval: times [low, high] at which v is mixed.
    """

    needs_data = True

    omega: float = 1.0
    kappa: float | None = 0.0
    interval: tuple[float, float] = attrs.field(default=(0.0, 1.0), converter=check_interval)

    @torch.no_grad()
    def velocity(self, student: FlowMap, teacher: Teacher | None, states: States) -> Tensor:
        """No evaluation of the student where nothing is mixed, else two."""
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
        elif condition.guidance is not None:
            kappa = expand_time(1 - 1 / condition.guidance, plain)
        else:
            raise ConfigError("conditional_velocity.kappa = None needs guidance scales: set the states' guidance")
        null = condition.drop(torch.ones_like(condition.labels).bool())
        labelled = student.velocity(states.x, states.t, condition)
        unlabelled = student.velocity(states.x, states.t, null)
        mixed = self.omega * plain + kappa * labelled + (1 - self.omega - kappa) * unlabelled
        low, high = self.interval
        inside = (states.t >= low) & (states.t <= high) & (condition.labels != NULL_LABEL)
        return torch.where(expand_time(inside, plain).bool(), mixed, plain)
