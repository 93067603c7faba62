"""The objective of flow-anchored consistency models."""

from __future__ import annotations

import math

import attrs
import torch
import torch.nn.functional as F
from attrs.validators import ge, gt, instance_of, optional
from torch import Tensor

from flowdistill.algorithms.identities import eulerian_residual, pull, velocity_residual
from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.interfaces import (
    FlowMap,
    GeneratingVelocity,
    ObjectiveOutput,
    States,
    TargetVelocity,
    Teacher,
)
from flowdistill.paths import expand_time
from flowdistill.plumbing.registry import register_objective
from flowdistill.velocities.estimators import Jvp
from flowdistill.velocities.targets import TeacherVelocity

CITATION = """\
@inproceedings{peng2026facm,
  title     = {{FACM}: Flow-Anchored Consistency Models},
  author    = {Peng, Yansong and Zhu, Kai and Liu, Yu and Wu, Pingyu and Li, Hebei and Sun, Xiaoyan and Wu, Feng},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
}"""


@register_objective("facm")
@attrs.define(kw_only=True)
class FACM(VelocityObjective):
    """Continuous-time consistency, F(x, t, 0), anchored by flow matching, F(x, t, t), at the same states.

    The consistency loss regresses F(x, t, 0) onto a relaxed and clamped target,

        sin(pi t/2) e / (e + eps)^p,   e = mean of [F - sg(F - alpha clamp(R, -k, k))]^2,
        R = F - u + t D_t F,   alpha = 1 - (1 - t)^q,

    with the weight 1/(e + eps)^p detached. The anchor is the mean squared error of F(x, t, t) from u, plus
    1 - cos of the angle between the two along the first dimension of a sample.

    Only jumps to s = 0 and the diagonal are learnt; samples of several steps are noised again between jumps. With the
    velocities of the data the clamp, the angle and a ``power`` above 0 are biased where samples have few dimensions.

    Attributes:
        velocity: u in targets and tangent: the teacher's, or the conditional one of the data.
        estimator: of D_t F.
        clamp: k, the largest absolute value of an element of R; None is no limit.
        relaxation: q; None is alpha = 1.
        power: p.
        eps: see ``power``.
        anchor: weight of the anchor.
        cosine: weight of the angle in the anchor.
    """

    citation = CITATION

    velocity: TargetVelocity = attrs.field(factory=TeacherVelocity, validator=instance_of(TargetVelocity))
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    clamp: float | None = attrs.field(factory=lambda: 1.0, validator=optional(gt(0.0)))
    relaxation: float | None = attrs.field(factory=lambda: 0.5, validator=optional(gt(0.0)))
    power: float = attrs.field(default=0.5, validator=ge(0.0))
    eps: float = attrs.field(default=1e-3, validator=gt(0.0))
    anchor: float = attrs.field(default=1.0, validator=ge(0.0))
    cosine: float = attrs.field(default=1.0, validator=ge(0.0))

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """Both losses; ``error`` is the squared R, ``anchor_error`` the squared error on the diagonal."""
        x, t, condition = states.x, states.t, states.condition
        velocity = self.velocity.velocity(student, teacher, states)
        average, residual = eulerian_residual(
            student, velocity, self.estimator, x, t, torch.zeros_like(t), condition, step=step
        )
        weight = torch.sin(math.pi / 2 * t)
        consistency = pull(average, self.relaxed(residual, t), power=self.power, eps=self.eps, scale=weight)
        diagonal, deviation = velocity_residual(student, velocity, x, t, condition)
        anchor = pull(diagonal, deviation)
        angle = (1 - F.cosine_similarity(diagonal, velocity, dim=1)).mean()
        raw = pull(average, residual)
        return attrs.evolve(
            raw,
            loss=consistency.loss + self.anchor * (anchor.loss + self.cosine * angle),
            metrics={**raw.metrics, "anchor_error": anchor.metrics["error"]},
        )

    def relaxed(self, residual: Tensor, t: Tensor) -> Tensor:
        """Alpha clamp(R, -k, k)."""
        if self.clamp is not None:
            residual = residual.clamp(-self.clamp, self.clamp)
        if self.relaxation is not None:
            residual = expand_time(1 - (1 - t) ** self.relaxation, residual) * residual
        return residual
