"""The objective of decoupled MeanFlow."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, le
from torch import Tensor

from flowdistill.algorithms.dmf.times import SortedPair
from flowdistill.algorithms.identities import eulerian_residual
from flowdistill.algorithms.trajectory import TrajectoryObjective
from flowdistill.interfaces import FlowMap, GeneratingVelocity, ObjectiveOutput, States, TargetVelocity, Teacher
from flowdistill.paths import interpolate
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import EndSampler, LogitNormal, TimeSampler
from flowdistill.velocities.estimators import Jvp
from flowdistill.velocities.targets import ConditionalVelocity

CITATION = """\
@article{lee2025dmf,
  title   = {Decoupled {MeanFlow}: Turning Flow Models into Flow Maps for Accelerated Sampling},
  author  = {Lee, Kyungmin and Yu, Sihyun and Shin, Jinwoo},
  journal = {arXiv preprint arXiv:2510.24474},
  year    = {2025},
}"""


@register_objective("dmf")
@attrs.define(kw_only=True)
class DecoupledMeanFlow(TrajectoryObjective):
    """Flow matching on one half of the batch and the Eulerian identity on the other, each at times of its own.

    With the residuals F(x, t, t) - v and F - v + (t - s) D_t F and e their mean square, the loss is
    log(e + eps) averaged over the batch, as far as gradients go: ``power = 1``. It is biased from data where samples
    have few dimensions; use 0 there.

    The student is meant to have decoupled conditioning: early blocks see t and late ones s, see `NetworkFlowMap`.

    Attributes:
        velocity: v: the conditional velocity of the data, with which `ConditionalVelocity` can mix guidance in
            (``omega = 1`` is the paper's model guidance), or the teacher's.
        times: law of t in the flow-matching part, for which states that have clean data are noised anew. Other states
            keep their times.
        ends: law of the end time s, conditioned on s <= t.
        equal: fraction of the batch for flow matching.
        estimator: how the derivative D_t F is computed.
        power: exponent p of the weight 1 / (squared residual + eps)^p.
        eps: see ``power``.
        reduction: how the squared residual adds up elements; belongs to ``power`` and ``eps``.
    """

    citation = CITATION

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    times: TimeSampler = attrs.field(factory=LogitNormal, validator=instance_of(TimeSampler))
    ends: EndSampler = attrs.field(factory=SortedPair, validator=instance_of(EndSampler))
    equal: float = attrs.field(default=0.5, validator=and_(ge(0.0), le(1.0)))
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    eps: float = attrs.field(default=0.01, validator=gt(0.0))
    reduction: Literal["mean", "sum"] = attrs.field(default="mean", validator=in_(("mean", "sum")))

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

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The weighted squared residuals of both parts."""
        rows = round(self.equal * len(states))
        if states.clean is not None and states.noise is not None:
            times = self.times.sample(rows, generator).to(states.t.dtype)
            noised = interpolate(states.clean[:rows], states.noise[:rows], times)
            states = attrs.evolve(states, x=torch.cat([noised, states.x[rows:]]), t=torch.cat([times, states.t[rows:]]))
        return super().loss(student, teacher, states, step=step, generator=generator)
