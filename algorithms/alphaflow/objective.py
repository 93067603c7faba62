"""The objective of alpha-Flow."""

from __future__ import annotations

import math
from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, le, lt
from torch import Tensor

from flowdistill.algorithms.identities import eulerian_residual, semigroup_residual
from flowdistill.algorithms.trajectory import TrajectoryObjective
from flowdistill.differentiation import evaluate
from flowdistill.interfaces import FlowMap, GeneratingVelocity, States, TargetVelocity, Teacher
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import EndSampler, LogitNormal
from flowdistill.velocities.estimators import Jvp
from flowdistill.velocities.targets import ConditionalVelocity

CITATION = """\
@inproceedings{zhang2026alphaflow,
  title     = {{AlphaFlow}: Understanding and Improving {MeanFlow} Models},
  author    = {Zhang, Huijie and Siarohin, Aliaksandr and Menapace, Willi and Vasilkovsky, Michael and Tulyakov, Sergey
               and Qu, Qing and Skorokhodov, Ivan},
  booktitle = {International Conference on Learning Representations},
  year      = {2026},
}"""


@register_objective("alphaflow")
@attrs.define(kw_only=True)
class AlphaFlow(TrajectoryObjective):
    """The semigroup identity whose first jump, a fraction alpha of the way, is one step along the velocity v.

        R = (F(x, t, s) - alpha v - (1 - alpha) F(x - (t - r) v, r, s)) / alpha,   r = alpha s + (1 - alpha) t

    At alpha = 1 it regresses F(x, t, s) onto v, at 1/2 it is the two-step consistency of shortcut models with v as the
    first step, and as alpha goes to 0 it becomes MeanFlow's residual. During training alpha falls from 1 to 0,

        alpha = sigmoid(sharpness (1/2 - progress)),

    and below ``switch`` the residual is MeanFlow's own. The gradient of the squared R is that of the paper's
    alpha^-1 |F - ...|^2: dividing the difference by alpha leaves one factor alpha^-1 in the gradient of F. For
    0 < alpha < 1 the exact flow map leaves an R of order alpha (t - s).

    Attributes:
        velocity: v: the conditional velocity of the data, with which `ConditionalVelocity` can mix guidance in, or the
            teacher's.
        ends: law of the end time s, conditioned on s <= t.
        equal: fraction of the batch with s = t, where the loss is flow matching.
        anneal: training steps (first, last) between which ``progress`` goes from 0 to 1; alpha is 1 before and 0 after.
        sharpness: of the sigmoid.
        switch: alpha below it counts as 0, and above 1 minus it as 1.
        estimator: how MeanFlow's derivative along the trajectory is computed.
        power: exponent p of the weight 1 / (squared residual + eps)^p.
        eps: see ``power``.
        reduction: how the squared residual adds up elements; belongs to ``power`` and ``eps``.
    """

    citation = CITATION

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    ends: EndSampler = attrs.field(factory=lambda: LogitNormal(mean=-0.4, std=1.0), validator=instance_of(EndSampler))
    equal: float = attrs.field(default=0.5, validator=and_(ge(0.0), le(1.0)))
    anneal: tuple[int, int] = (600_000, 1_000_000)
    sharpness: float = attrs.field(default=25.0, validator=gt(0.0))
    switch: float = attrs.field(default=5e-3, validator=and_(gt(0.0), lt(0.5)))
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    eps: float = attrs.field(default=1e-3, validator=gt(0.0))
    reduction: Literal["mean", "sum"] = attrs.field(default="mean", validator=in_(("mean", "sum")))

    def alpha(self, step: int) -> float:
        """The value of alpha at a training step."""
        first, last = self.anneal
        if step < first or step >= last:
            return float(step < first)
        alpha = 1 / (1 + math.exp(self.sharpness * ((step - first) / (last - first) - 0.5)))
        if alpha < self.switch:
            return 0.0
        return 1.0 if alpha > 1 - self.switch else alpha

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
        """F and R, which is MeanFlow's residual where alpha is 0."""
        x, t, condition = states.x, states.t, states.condition
        velocity = self.velocity.velocity(student, teacher, states)
        alpha = self.alpha(step)
        if alpha == 0:
            return eulerian_residual(student, velocity, self.estimator, x, t, s, condition, step=step)
        if alpha == 1:
            average = evaluate(student, x, t, s, condition)
            return average, average.detach() - velocity
        with torch.autocast(x.device.type, enabled=False):  # a small alpha magnifies rounding errors
            r = alpha * s + (1 - alpha) * t
            average, residual = semigroup_residual(student, student, velocity, x, t, r, s, condition)
            return average, residual / alpha
