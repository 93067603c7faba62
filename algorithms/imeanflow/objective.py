"""The objective of improved MeanFlow."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import ge, gt, in_, instance_of

from flowdistill.algorithms.identities import Residual, eulerian
from flowdistill.algorithms.trajectory import TrajectoryObjective
from flowdistill.interfaces import GeneratingVelocity, Pairs, States, Step, TargetVelocity
from flowdistill.pairs import SortedPair, WithDiagonal
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import LogitNormal
from flowdistill.velocities import ConditionalVelocity, Jvp


@register_objective("imeanflow")
@attrs.define(kw_only=True, slots=False)
class ImprovedMeanFlow(TrajectoryObjective):
    """The Eulerian identity as a regression of velocities: the derivative is taken along the student's own velocity.

    The compound prediction

        V(x, t, s) = F(x, t, s) + (t - s) D_t F,   D_t F = (d_x F) F(x, t, t) + d_t F,

    with a detached D_t F, is regressed onto the velocity, and so is F(x, t, t).
    MeanFlow's derivative is along the conditional velocity n - x_0 instead.
    Here V is a function of the state alone, and the velocity of the data is only the target of a regression.
    ``conditional_velocity.kappa = None`` mixes guidance in at scales that the student is told.
    """

    citation = bibtex("geng2025imeanflow")

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    pairs: Pairs = attrs.field(
        factory=lambda: WithDiagonal(pairs=SortedPair(first=LogitNormal(mean=-0.4)), share=0.5),
        validator=instance_of(Pairs),
    )
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    """The estimator of D_t F."""
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    eps: float = attrs.field(default=0.01, validator=gt(0.0))
    reduction: Literal["mean", "sum"] = attrs.field(default="sum", validator=in_(("mean", "sum")))

    def residual(self, states: States, step: Step) -> Residual:
        """V - velocity."""
        with torch.no_grad():
            own = self.student.velocity(states.x, states.t, states.condition)
        return eulerian(self.estimator, self.target(states), states, step.progress, tangent=own)
