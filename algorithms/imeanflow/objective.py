"""The objective of improved MeanFlow."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, le
from torch import Tensor

from flowdistill.algorithms.identities import eulerian_residual
from flowdistill.algorithms.trajectory import TrajectoryObjective
from flowdistill.interfaces import FlowMap, GeneratingVelocity, States, TargetVelocity, Teacher
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import EndSampler, LogitNormal
from flowdistill.velocities.estimators import Jvp
from flowdistill.velocities.targets import ConditionalVelocity

CITATION = """\
@article{geng2025imeanflow,
  title   = {Improved Mean Flows: On the Challenges of Fastforward Generative Models},
  author  = {Geng, Zhengyang and Lu, Yiyang and Wu, Zongze and Shechtman, Eli and Kolter, J. Zico and He, Kaiming},
  journal = {arXiv preprint arXiv:2512.02012},
  year    = {2025},
}"""


@register_objective("imeanflow")
@attrs.define(kw_only=True)
class ImprovedMeanFlow(TrajectoryObjective):
    """The Eulerian identity as a regression of velocities: the derivative is taken along the student's own velocity.

    The compound prediction

        V(x, t, s) = F(x, t, s) + (t - s) D_t F,   D_t F = (d_x F) F(x, t, t) + d_t F,

    with a detached D_t F, is regressed onto the velocity, and so is F(x, t, t). MeanFlow's derivative is along the
    conditional velocity n - x_0 instead. Here V is a function of the state alone, and the velocity of the data enters
    only as the target of a regression. A ``power`` above 0 is biased from data where samples have few dimensions.

    Attributes:
        velocity: the target: the conditional velocity of the data, with which `ConditionalVelocity` can mix guidance in
            (``kappa=None`` for scales that the student is told), or the teacher's.
        ends: law of the end time s, conditioned on s <= t.
        equal: fraction of the batch with s = t, where F(x, t, t) is regressed.
        estimator: how the derivative D_t F is computed.
        power: exponent p of the weight 1 / (squared residual + eps)^p.
        eps: see ``power``.
        reduction: how the squared residual adds up elements; belongs to ``power`` and ``eps``.
    """

    citation = CITATION

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    ends: EndSampler = attrs.field(factory=lambda: LogitNormal(mean=-0.4, std=1.0), validator=instance_of(EndSampler))
    equal: float = attrs.field(default=0.5, validator=and_(ge(0.0), le(1.0)))
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    eps: float = attrs.field(default=0.01, validator=gt(0.0))
    reduction: Literal["mean", "sum"] = attrs.field(default="sum", validator=in_(("mean", "sum")))

    def residual(
        self,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        s: Tensor,
        *,
        step: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """F and V - velocity."""
        velocity = self.velocity.velocity(student, teacher, states)
        with torch.no_grad():
            predicted = student.velocity(states.x, states.t, states.condition)
        return eulerian_residual(
            student,
            velocity,
            self.estimator,
            states.x,
            states.t,
            s,
            states.condition,
            tangent=predicted,
            step=step,
        )
