"""The objective of decoupled MeanFlow."""

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
from flowdistill.velocities import ConditionalVelocity, Jvp


def _pairs() -> Pairs:
    two_laws = SortedPair(first=LogitNormal(mean=0.4), second=LogitNormal(mean=-1.2))
    return WithDiagonal(pairs=two_laws, share=0.5, times=LogitNormal())


@register_objective("dmf")
@attrs.define(kw_only=True, slots=False)
class DecoupledMeanFlow(TrajectoryObjective):
    """Flow matching on one half of the batch and the Eulerian identity on the other, each at times of its own.

    With the residuals F(x, t, t) - v and F - v + (t - s) D_t F and e their mean square, the loss is
    log(e + eps) averaged over the batch, as far as gradients go: ``power = 1``.

    The student is meant to have decoupled conditioning: early blocks see t and late ones s, see `NetworkFlowMap`.
    ``conditional_velocity.omega = 1`` is the paper's model guidance.
    """

    citation = bibtex("lee2025dmf")

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    pairs: Pairs = attrs.field(factory=_pairs, validator=instance_of(Pairs))
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    """The estimator of D_t F."""
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    eps: float = attrs.field(default=0.01, validator=gt(0.0))
    reduction: Literal["mean", "sum"] = attrs.field(default="mean", validator=in_(("mean", "sum")))

    def residual(self, states: States, step: Step) -> Residual:
        """F - v + (t - s) D_t F."""
        return eulerian(self.estimator, self.target(states), states, step.progress)
