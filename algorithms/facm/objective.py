"""The objective of flow-anchored consistency models."""

from __future__ import annotations

import math

import attrs
import torch
import torch.nn.functional as F
from attrs.validators import ge, gt, instance_of, optional
from torch import Tensor

from flowdistill.algorithms.identities import Residual, diagonal, eulerian, pull
from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.interfaces import GeneratingVelocity, Jumps, ObjectiveOutput, Pairs, States, Step
from flowdistill.pairs import ToData
from flowdistill.paths import expand_time
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.velocities import Jvp


@register_objective("facm")
@attrs.define(kw_only=True, slots=False)
class FACM(VelocityObjective):
    """Continuous-time consistency, F(x, t, 0), anchored by flow matching, F(x, t, t), at the same states.

    The consistency loss regresses F(x, t, 0) onto a relaxed and clamped target,

        sin(pi t/2) e / (e + eps)^p,   e = mean of [F - sg(F - alpha clamp(R, -k, k))]^2,
        R = F - u + t D_t F,   alpha = 1 - (1 - t)^q,

    with the weight 1/(e + eps)^p detached.
    The anchor is the mean squared error of F(x, t, t) from u, plus 1 - cos of the angle between the two along the first
    dimension of a sample.

    Only jumps to s = 0 and the diagonal are learnt; samples of several steps are noised again between jumps.
    With the velocities of the data the clamp, the angle and a ``power`` above 0 are biased if samples have few
    dimensions.
    """

    citation = bibtex("peng2026facm")
    trains = Jumps.TO_DATA

    pairs: Pairs = attrs.field(factory=ToData, validator=instance_of(Pairs))
    """The law of t, with s = 0."""
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    """The estimator of D_t F."""
    clamp: float | None = attrs.field(factory=lambda: 1.0, validator=optional(gt(0.0)))
    """k, the largest absolute value of an element of R; None is no limit."""
    relaxation: float | None = attrs.field(factory=lambda: 0.5, validator=optional(gt(0.0)))
    """q; None is alpha = 1."""
    power: float = attrs.field(default=0.5, validator=ge(0.0))
    """p, the exponent of the weight."""
    eps: float = attrs.field(default=1e-3, validator=gt(0.0))
    """See ``power``."""
    anchor: float = attrs.field(default=1.0, validator=ge(0.0))
    """The weight of the anchor."""
    cosine: float = attrs.field(default=1.0, validator=ge(0.0))
    """The weight of the angle in the anchor."""

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """Both losses; ``error`` is the squared R, ``anchor_error`` the squared error on the diagonal."""
        velocity = self.target(states)
        residual = eulerian(self.estimator, velocity, states.to(0.0), step.progress)
        relaxed = Residual(residual.average, self.relaxed(residual.value, states.t))
        consistency = pull(relaxed, power=self.power, eps=self.eps, scale=torch.sin(math.pi / 2 * states.t))
        on_diagonal = diagonal(self.student, velocity, states)
        anchor = pull(on_diagonal)
        angle = (1 - F.cosine_similarity(on_diagonal.average, velocity, dim=1)).mean()
        raw = pull(residual)
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
