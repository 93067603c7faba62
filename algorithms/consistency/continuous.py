"""Consistency in the limit of neighbouring times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, lt, optional
from torch import nn

from flowdistill.algorithms.combined import Combined
from flowdistill.algorithms.identities import eulerian_residual, normalize, pull
from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.algorithms.weighting import LearnedWeighting
from flowdistill.interfaces import (
    FlowMap,
    GeneratingVelocity,
    Objective,
    ObjectiveOutput,
    States,
    TargetVelocity,
    Teacher,
)
from flowdistill.paths import expand_time, state_std
from flowdistill.plumbing.registry import OBJECTIVES, register_objective
from flowdistill.times import LogitNormal
from flowdistill.velocities.estimators import Jvp, OnlineNetwork
from flowdistill.velocities.targets import ConditionalVelocity, TeacherVelocity

CITATION = """\
@inproceedings{lu2025scm,
  title     = {Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models},
  author    = {Lu, Cheng and Song, Yang},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2410.11081},
}"""


@register_objective("sct")
@attrs.define(kw_only=True)
class SCT(VelocityObjective):
    """Simplified continuous-time consistency training: samples X(x, t, 0) do not move along trajectories.

    It is Algorithm 1 of the paper on a student of the linear path. With S = sqrt((1 - t)^2 sd^2 + t^2) and the factor
    w of the tangent warm-up, TrigFlow's tangent is

        g = -((1 - t) A / S) R,   R = F - v + (w S^2 / A) t D_t F,   A = (1 - t) sd^2 + w (t^2 - t (1 - t) sd^2),

    and A = S^2 at w = 1. F is moved by (S / sd) g / (|g| + c), the first factor from TrigFlow's parametrisation of
    the network. States at t = 1 have g = 0 whatever the student: the prior alone cannot be the state source.

    From data the residual vanishes at the flow map only on average. Normalising it is biased where samples have few
    dimensions: there, ``normalization = None``.

    Attributes:
        velocity: v in target and tangent: the conditional one of the data, or the teacher's.
        sigma_data: sd, the standard deviation of the data.
        estimator: of D_t F.
        warmup: training steps in which w grows from 0 to 1; 0 is none.
        normalization: c, with |g| over all elements of a sample; None leaves g as it is.
        weighting: the learned weight e^w(t) of the squared move; None is 1.
    """

    citation = CITATION

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    sigma_data: float = attrs.field(default=0.5, validator=gt(0.0))
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    warmup: int = attrs.field(default=10_000, validator=ge(0))
    normalization: float | None = attrs.field(factory=lambda: 0.1, validator=optional(gt(0.0)))
    weighting: LearnedWeighting | None = attrs.field(
        factory=LearnedWeighting, validator=optional(instance_of(LearnedWeighting))
    )

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Start the weighting."""
        if self.weighting is not None:
            self.weighting.setup()

    def modules(self) -> Mapping[str, nn.Module]:
        """The network of the weighting."""
        return {} if self.weighting is None else self.weighting.modules()

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The regression of F onto sg(F + (S / sd) g / (|g| + c)); the metrics are those of R."""
        x, t = states.x, states.t
        velocity = self.velocity.velocity(student, teacher, states)
        factor = min(1.0, step / self.warmup) if self.warmup else 1.0
        clean, std = (1 - t) * self.sigma_data**2, state_std(t, self.sigma_data)
        share = clean + factor * (t.square() - t * clean)
        average, residual = eulerian_residual(
            student,
            velocity,
            self.estimator,
            x,
            t,
            torch.zeros_like(t),
            states.condition,
            warmup=factor * std.square() / share.clamp_min(torch.finfo(t.dtype).tiny),
            step=step,
        )
        tangent = expand_time((1 - t) * share / std, x) * residual
        if self.normalization is not None:
            tangent = normalize(tangent, self.normalization)
        weight = std / self.sigma_data
        if self.weighting is not None:
            weight = weight * self.weighting(t, tangent.square().flatten(1).mean(1), step)
        return attrs.evolve(pull(average, residual), loss=pull(average, tangent, scale=weight).loss)

    def auxiliary_loss(
        self,
        name: str,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        *,
        step: int,
        generator: torch.Generator,
    ) -> ObjectiveOutput | None:
        """That of the weighting, on the errors of the student's own loss."""
        assert self.weighting is not None
        return self.weighting.loss()


@register_objective("scd")
@attrs.define(kw_only=True)
class SCD(SCT):
    """Simplified continuous-time consistency distillation: `SCT` with the teacher's velocity.

    The residual vanishes at the teacher's flow map at every state, so that neither weights nor the law of the times
    bias it.

    Attributes:
        velocity: see `SCT`.
        sigma_data: see `SCT`.
        estimator: see `SCT`.
        warmup: see `SCT`.
        normalization: see `SCT`.
        weighting: see `SCT`.
    """

    velocity: TargetVelocity = attrs.field(factory=TeacherVelocity, validator=instance_of(TargetVelocity))


def _vsd() -> Objective:
    noising = OnlineNetwork(times=LogitNormal(mean=-0.8, std=1.6))
    result: Objective = OBJECTIVES.build("vsd", noising=noising, times=LogitNormal(mean=0.4, std=2.0), weighting="none")
    return result


@register_objective("scd_vsd")
@attrs.define(kw_only=True)
class SCDWithVSD(Combined):
    """Continuous-time consistency distillation with variational score distillation added, loss by loss.

    Consistency covers the modes of the teacher and blurs details, score distillation is sharp and loses modes (appendix
    of the paper).

    Attributes:
        prediction: the part that follows trajectories.
        correction: the part that matches distributions, on one-step samples from the states' noises.
        correction_fraction: see `Combined`.
        alpha: factor of the correction's loss.
        balance: see `Combined`.
        correction_start: see `Combined`.
        online_warmup: see `Combined`.
    """

    prediction: Objective = attrs.field(factory=SCD, validator=instance_of(Objective))
    correction: Objective = attrs.field(factory=_vsd, validator=instance_of(Objective))
    correction_fraction: float = attrs.field(default=0.5, validator=and_(gt(0.0), lt(1.0)))
    balance: Literal["adaptive", "fixed"] = attrs.field(default="fixed", validator=in_(("adaptive", "fixed")))
