"""Consistency in the limit of neighbouring times."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, le, lt, optional

from flowdistill.algorithms.combined import Combined
from flowdistill.algorithms.identities import Residual, eulerian, normalize, pull
from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.algorithms.weighting import LearnedWeighting
from flowdistill.interfaces import (
    GeneratingVelocity,
    Jumps,
    Objective,
    ObjectiveOutput,
    Pairs,
    States,
    Step,
    TargetVelocity,
)
from flowdistill.pairs import ToData
from flowdistill.paths import expand_time, state_std
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import OBJECTIVES, register_objective
from flowdistill.times import LogitNormal
from flowdistill.velocities import ConditionalVelocity, Jvp, OnlineNetwork, TeacherVelocity


@register_objective("sct", presets={"scd": {"target": attrs.Factory(TeacherVelocity)}})
@attrs.define(kw_only=True, slots=False)
class SCT(VelocityObjective):
    """Simplified continuous-time consistency training: samples X(x, t, 0) do not move along trajectories.

    It is Algorithm 1 of the paper on a student of the linear path.
    With S = sqrt((1 - t)^2 sd^2 + t^2) and the factor w of the tangent warm-up, TrigFlow's tangent is

        g = -((1 - t) A / S) R,   R = F - v + (w S^2 / A) t D_t F,   A = (1 - t) sd^2 + w (t^2 - t (1 - t) sd^2),

    and A = S^2 at w = 1.
    F is moved by (S / sd) g / (|g| + c), the first factor from TrigFlow's parametrisation of the network.
    States at t = 1 have g = 0 whatever the student: the prior alone cannot be the state source.

    From data the residual vanishes at the flow map only on average.
    Normalising it is biased if samples have few dimensions: there, ``normalization = None``.
    ``scd``, consistency distillation, has the teacher's velocity for v.
    Its residual vanishes at the teacher's flow map at every state, so that neither weights nor the law of the times
    bias it.
    """

    citation = bibtex("lu2025scm")
    trains = Jumps.TO_DATA
    needs_all_times = True

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    pairs: Pairs = attrs.field(factory=ToData, validator=instance_of(Pairs))
    """The law of t, with s = 0."""
    sigma_data: float = attrs.field(default=0.5, validator=gt(0.0))
    """sd, the standard deviation of the data."""
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    """The estimator of D_t F."""
    warmup: float = attrs.field(default=0.1, validator=and_(ge(0.0), le(1.0)))
    """The part of the training in which w grows from 0 to 1; 0 is none."""
    normalization: float | None = attrs.field(factory=lambda: 0.1, validator=optional(gt(0.0)))
    """c, with |g| over all elements of a sample; None leaves g as it is."""
    weighting: LearnedWeighting | None = attrs.field(
        factory=LearnedWeighting, validator=optional(instance_of(LearnedWeighting))
    )
    """The learned weight e^w(t) of the squared move; None is 1."""

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The regression of F onto sg(F + (S / sd) g / (|g| + c)); the metrics are those of R."""
        t = states.t
        factor = min(1.0, step.progress / self.warmup) if self.warmup else 1.0
        clean, std = (1 - t) * self.sigma_data**2, state_std(t, self.sigma_data)
        share = clean + factor * (t.square() - t * clean)
        warmup = factor * std.square() / share.clamp_min(torch.finfo(t.dtype).tiny)
        residual = eulerian(self.estimator, self.target(states), states.to(0.0), step.progress, warmup=warmup)
        tangent = expand_time((1 - t) * share / std, states.x) * residual.value
        if self.normalization is not None:
            tangent = normalize(tangent, self.normalization)
        weight = std / self.sigma_data
        if self.weighting is not None:
            weight = weight * self.weighting(t, tangent.square().flatten(1).mean(1), step.number)
        return attrs.evolve(pull(residual), loss=pull(Residual(residual.average, tangent), scale=weight).loss)

    def auxiliary_loss(self, name: str, states: States, step: Step) -> ObjectiveOutput | None:
        """The loss of the weighting, on the errors of the student's own loss."""
        assert self.weighting is not None
        return self.weighting.loss()


def _scd() -> Objective:
    result: Objective = OBJECTIVES.build("scd")
    return result


def _vsd() -> Objective:
    noising = OnlineNetwork(times=LogitNormal(mean=-0.8, std=1.6))
    result: Objective = OBJECTIVES.build("vsd", noising=noising, times=LogitNormal(mean=0.4, std=2.0), weighting="none")
    return result


@register_objective("scd_vsd")
@attrs.define(kw_only=True, slots=False)
class SCDWithVSD(Combined):
    """Continuous-time consistency distillation with variational score distillation added, loss by loss.

    Consistency covers the modes of the teacher and blurs details, score distillation is sharp and loses modes (appendix
    of the paper).
    """

    prediction: Objective = attrs.field(factory=_scd, validator=instance_of(Objective))
    correction: Objective = attrs.field(factory=_vsd, validator=instance_of(Objective))
    correction_fraction: float = attrs.field(default=0.5, validator=and_(gt(0.0), lt(1.0)))
    balance: Literal["adaptive", "fixed"] = attrs.field(default="fixed", validator=in_(("adaptive", "fixed")))
