"""The objective of alpha-Flow."""

from __future__ import annotations

import math
from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, lt

from flowdistill.algorithms.identities import Residual, eulerian, semigroup
from flowdistill.algorithms.trajectory import TrajectoryObjective
from flowdistill.differentiation import evaluate
from flowdistill.interfaces import GeneratingVelocity, Pairs, States, Step, TargetVelocity
from flowdistill.pairs import SortedPair, WithDiagonal
from flowdistill.plumbing.fields import interval, part_done
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import LogitNormal
from flowdistill.velocities import ConditionalVelocity, Jvp


@register_objective("alphaflow")
@attrs.define(kw_only=True, slots=False)
class AlphaFlow(TrajectoryObjective):
    """The semigroup identity whose first jump, a fraction alpha of the way, is one step along the velocity v.

        R = (F(x, t, s) - alpha v - (1 - alpha) F(x - (t - r) v, r, s)) / alpha,   r = alpha s + (1 - alpha) t

    At alpha = 1 it regresses F(x, t, s) onto v.
    At 1/2 it is the two-step consistency of shortcut models with v as the first step.
    As alpha goes to 0 it becomes MeanFlow's residual.
    During training alpha falls from 1 to 0,

        alpha = sigmoid(sharpness (1/2 - progress)),

    and below ``switch`` the residual is MeanFlow's own.
    The gradient of the squared R is that of the paper's alpha^-1 |F - ...|^2.
    Dividing the difference by alpha leaves one factor alpha^-1 in the gradient of F.
    For 0 < alpha < 1 the exact flow map leaves an R of order alpha (t - s).
    """

    citation = bibtex("zhang2026alphaflow")

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    pairs: Pairs = attrs.field(
        factory=lambda: WithDiagonal(pairs=SortedPair(first=LogitNormal(mean=-0.4)), share=0.5),
        validator=instance_of(Pairs),
    )
    anneal: tuple[float, float] = attrs.field(default=(0.5, 5 / 6), validator=interval)
    """The parts (first, last) of the training between which ``progress`` goes from 0 to 1.
    Before them alpha is 1, after them 0."""
    sharpness: float = attrs.field(default=25.0, validator=gt(0.0))
    """The sharpness of the sigmoid."""
    switch: float = attrs.field(default=5e-3, validator=and_(gt(0.0), lt(0.5)))
    """An alpha below it counts as 0, and above 1 minus it as 1."""
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    """The estimator of MeanFlow's derivative along the trajectory."""
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    eps: float = attrs.field(default=1e-3, validator=gt(0.0))
    reduction: Literal["mean", "sum"] = attrs.field(default="mean", validator=in_(("mean", "sum")))

    def alpha(self, progress: float) -> float:
        """The value of alpha when a part of the training is done."""
        first, last = self.anneal
        if progress < first or progress >= last:
            return float(progress < first)
        alpha = 1 / (1 + math.exp(self.sharpness * (part_done(self.anneal, progress) - 0.5)))
        if alpha < self.switch:
            return 0.0
        return 1.0 if alpha > 1 - self.switch else alpha

    def residual(self, states: States, step: Step) -> Residual:
        """R, which is MeanFlow's residual if alpha is 0."""
        velocity, alpha = self.target(states), self.alpha(step.progress)
        if alpha == 0:
            return eulerian(self.estimator, velocity, states, step.progress)
        if alpha == 1:
            average = evaluate(self.student, states)
            return Residual(average, average.detach() - velocity)
        with torch.autocast(states.x.device.type, enabled=False):  # a small alpha magnifies rounding errors
            r = alpha * states.s + (1 - alpha) * states.t
            residual = semigroup(self.student, self.student, velocity, states, r)
            return Residual(residual.average, residual.value / alpha)
