"""The MeanFlow objectives."""

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
from flowdistill.velocities.targets import ConditionalVelocity, TeacherVelocity

CITATION = """\
@article{geng2025meanflow,
  title   = {Mean Flows for One-step Generative Modeling},
  author  = {Geng, Zhengyang and Deng, Mingyang and Bai, Xingjian and Kolter, J. Zico and He, Kaiming},
  journal = {arXiv preprint arXiv:2505.13447},
  year    = {2025},
}"""


@register_objective("meanflow")
@attrs.define(kw_only=True)
class MeanFlow(TrajectoryObjective):
    """The Eulerian identity with the conditional velocity n - x_0 in target and tangent: training from data.

    The residual vanishes at the flow map only on average over (x_0, n), so a ``power`` above 0 is biased where samples
    have few dimensions: use 0 there.

    Attributes:
        velocity: the velocity in target and tangent; `ConditionalVelocity` can mix guidance in.
        ends: law of the end time s, conditioned on s <= t. With states at the larger of two draws of the same law
            (`Maximum`), (t, s) are the paper's sorted pairs.
        equal: fraction of the batch with s = t, where the loss is flow matching.
        estimator: how the derivative along the trajectory is computed.
        power: exponent p of the weight 1 / (squared residual + eps)^p.
        eps: see ``power``.
        reduction: how the squared residual adds up elements; belongs to ``power`` and ``eps``.
    """

    citation = CITATION

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    ends: EndSampler = attrs.field(factory=lambda: LogitNormal(mean=-0.4, std=1.0), validator=instance_of(EndSampler))
    equal: float = attrs.field(default=0.75, validator=and_(ge(0.0), le(1.0)))
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
        """That of the Eulerian identity."""
        velocity = self.velocity.velocity(student, teacher, states)
        return eulerian_residual(student, velocity, self.estimator, states.x, states.t, s, states.condition, step=step)


@register_objective("meanflow_distillation")
@attrs.define(kw_only=True)
class MeanFlowDistillation(MeanFlow):
    """The Eulerian identity with the teacher's velocity in target and tangent; any state source will do.

    The residual vanishes at the teacher's flow map at every state, whatever the weight and the laws of the times.

    Attributes:
        velocity: see `MeanFlow`.
        ends: see `MeanFlow`.
        equal: see `MeanFlow`.
        estimator: see `MeanFlow`.
        power: see `MeanFlow`.
        eps: see `MeanFlow`.
        reduction: see `MeanFlow`.
    """

    velocity: TargetVelocity = attrs.field(factory=TeacherVelocity, validator=instance_of(TargetVelocity))
