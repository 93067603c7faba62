"""The MeanFlow objectives."""

from __future__ import annotations

from typing import Literal

import attrs
from attrs.validators import ge, gt, in_, instance_of

from flowdistill.algorithms.identities import Residual, eulerian
from flowdistill.algorithms.trajectory import TrajectoryObjective
from flowdistill.interfaces import GeneratingVelocity, Pairs, States, Step, TargetVelocity
from flowdistill.pairs import SortedPair, WithDiagonal
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import LogitNormal
from flowdistill.velocities import ConditionalVelocity, Jvp, TeacherVelocity


@register_objective("meanflow", presets={"meanflow_distillation": {"target": attrs.Factory(TeacherVelocity)}})
@attrs.define(kw_only=True, slots=False)
class MeanFlow(TrajectoryObjective):
    """The Eulerian identity: F is regressed onto v - (t - s) D_t F, with D_t F = (d_x F) v + d_t F.

    From data v is the conditional velocity n - x_0, and the residual vanishes at the flow map only on average.
    A ``power`` above 0 is then biased if samples have few dimensions.
    ``meanflow_distillation`` has the teacher's velocity for v, and any state source will do: the residual vanishes at
    the teacher's flow map at every state.
    """

    citation = bibtex("geng2025meanflow")

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    pairs: Pairs = attrs.field(
        factory=lambda: WithDiagonal(pairs=SortedPair(first=LogitNormal(mean=-0.4)), share=0.75),
        validator=instance_of(Pairs),
    )
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    """The estimator of D_t F."""
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    eps: float = attrs.field(default=0.01, validator=gt(0.0))
    reduction: Literal["mean", "sum"] = attrs.field(default="sum", validator=in_(("mean", "sum")))

    def residual(self, states: States, step: Step) -> Residual:
        """F - v + (t - s) D_t F."""
        return eulerian(self.estimator, self.target(states), states, step.progress)
