"""The prediction, correction and joint objectives of FreeFlow, in the sign u = dx/dt (t = 1 is noise)."""

from __future__ import annotations

import attrs
from attrs.validators import ge, gt, instance_of

from flowdistill.algorithms.combined import Combined
from flowdistill.algorithms.corrections import CorrectionObjective
from flowdistill.algorithms.identities import lagrangian, pull
from flowdistill.interfaces import (
    GeneratingVelocity,
    Jumps,
    Objective,
    ObjectiveOutput,
    Pairs,
    States,
    Step,
    TimeSampler,
)
from flowdistill.pairs import Durations
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import LogitNormal
from flowdistill.velocities import FiniteDifference


@register_objective("freeflow_prediction")
@attrs.define(kw_only=True, slots=False)
class FreeFlowPrediction(Objective):
    """The student's generating velocity is the teacher's velocity along the student's own path.

    For noise z and a duration delta the student reaches X = z - delta F(z, 1, 1 - delta). The residual

        v_G - u(X, 1 - delta),   v_G = -dX/d delta = F + delta dF/d delta

    vanishes for all z and delta only at the teacher's flow map.
    """

    citation = bibtex("tong2025freeflow")
    trains = Jumps.FROM_NOISE

    pairs: Pairs = attrs.field(factory=Durations, validator=instance_of(Pairs))
    """The law of the jumps, t = 1 and s = 1 - delta."""
    estimator: GeneratingVelocity = attrs.field(factory=FiniteDifference, validator=instance_of(GeneratingVelocity))
    """The estimator of v_G."""
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    """The exponent k of the weight 1 / (mean square of the residual + eps)^k."""
    eps: float = attrs.field(default=1e-4, validator=gt(0.0))
    """See ``power``."""

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The weighted squared residual; one evaluation of the teacher."""
        residual = lagrangian(self.estimator, self.teacher.velocity, states, step.progress)
        return pull(residual, power=self.power, eps=self.eps)


@register_objective("freeflow_correction")
@attrs.define(kw_only=True, slots=False)
class FreeFlowCorrection(CorrectionObjective):
    """The noising velocity of the student's distribution is the teacher's velocity: `CorrectionObjective`.

    The law of r favours high noise, as published.
    """

    citation = bibtex("tong2025freeflow")

    times: TimeSampler = attrs.field(factory=lambda: LogitNormal(mean=0.8, std=1.6), validator=instance_of(TimeSampler))


@register_objective("freeflow")
@attrs.define(kw_only=True, slots=False)
class FreeFlow(Combined):
    """Prediction and correction together, balanced by lambda = alpha E|v_G - u| / E|v_N - u|.

    The prediction is weighted by its own power law, the correction is not: with a power of 1 the correction's share of
    the gradient falls with the square of the prediction's residual as training converges.

    Examples:
        >>> import torch
        >>> from flowdistill import Step, load_teacher
        >>> from flowdistill.flow_maps import from_teacher
        >>> from flowdistill.states import Prior
        >>> teacher, source, objective = load_teacher("digits_teacher"), Prior(), FreeFlow(alpha=0.5)
        >>> student, generator = from_teacher(teacher, "anchored"), torch.Generator()
        >>> source.setup(student, teacher), objective.setup(student, teacher)
        (None, None)
        >>> states = source.sample(8, objective.law(progress=0.5), generator)
        >>> output = objective.loss(states, Step(generator, progress=0.5))
        >>> output.loss.backward()
        >>> sorted(output.metrics)
        ['correction_error', 'error', 'lambda']
    """

    citation = bibtex("tong2025freeflow")

    prediction: Objective = attrs.field(factory=FreeFlowPrediction, validator=instance_of(Objective))
    correction: Objective = attrs.field(factory=FreeFlowCorrection, validator=instance_of(Objective))
