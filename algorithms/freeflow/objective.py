"""The prediction, correction and joint objectives of FreeFlow, in the sign u = dx/dt (t = 1 is noise)."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, gt, instance_of

from flowdistill.algorithms.combined import Combined
from flowdistill.algorithms.corrections import CorrectionObjective
from flowdistill.algorithms.identities import lagrangian_residual, pull
from flowdistill.interfaces import FlowMap, GeneratingVelocity, Objective, ObjectiveOutput, States, Teacher
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import LogitNormal, TimeSampler, WithPointMass
from flowdistill.velocities.estimators import FiniteDifference

CITATION = """\
@article{tong2025freeflow,
  title   = {Flow Map Distillation Without Data},
  author  = {Tong, Shangyuan and Ma, Nanye and Xie, Saining and Jaakkola, Tommi},
  journal = {arXiv preprint arXiv:2511.19428},
  year    = {2025},
}"""


@register_objective("freeflow_prediction")
@attrs.define(kw_only=True)
class FreeFlowPrediction(Objective):
    """The student's generating velocity is the teacher's velocity along the student's own path.

    For noise z and a duration delta the student reaches X = z - delta F(z, 1, 1 - delta). The residual

        v_G - u(X, 1 - delta),   v_G = -dX/d delta = F + delta dF/d delta

    vanishes for all z and delta only at the teacher's flow map.

    Attributes:
        durations: law of delta. For states that start at t < 1 it is the fraction of the way to t = 0.
        estimator: how v_G is computed.
        power: exponent k of the weight 1 / (mean square of the residual + eps)^k.
        eps: see ``power``.
    """

    citation = CITATION

    durations: TimeSampler = attrs.field(factory=WithPointMass, validator=instance_of(TimeSampler))
    estimator: GeneratingVelocity = attrs.field(factory=FiniteDifference, validator=instance_of(GeneratingVelocity))
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    eps: float = attrs.field(default=1e-4, validator=gt(0.0))

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The weighted squared residual; one evaluation of the teacher."""
        assert teacher is not None
        delta = self.durations.sample(len(states), generator).to(states.t.dtype)
        s = states.t * (1 - delta)
        average, residual = lagrangian_residual(
            student, teacher.velocity, self.estimator, states.x, states.t, s, states.condition, step=step
        )
        return pull(average, residual, power=self.power, eps=self.eps)


@register_objective("freeflow_correction")
@attrs.define(kw_only=True)
class FreeFlowCorrection(CorrectionObjective):
    """The noising velocity of the student's distribution is the teacher's velocity.

    One-step samples x = z - F(z, 1, 0) are noised to x_r = (1 - r) x + r n. The residual

        v_N(x_r, r) - u(x_r, r)

    is the gradient that reaches F, so that descent moves samples along the teacher's score minus the student's.

    Attributes:
        noising: the estimator of v_N.
        times: law of r.
        guidance_interval: times at which a guided teacher is guided here, in place of its own interval; None keeps
            that.
        weighting: see `CorrectionObjective`.
    """

    citation = CITATION

    times: TimeSampler = attrs.field(factory=lambda: LogitNormal(mean=0.8, std=1.6), validator=instance_of(TimeSampler))


@register_objective("freeflow")
@attrs.define(kw_only=True)
class FreeFlow(Combined):
    """Prediction and correction together, balanced by lambda = alpha E|v_G - u| / E|v_N - u|.

    The prediction is weighted by its own power law, the correction is not: with a power of 1 the correction's share of
    the gradient falls with the square of the prediction's residual as training converges.

    Attributes:
        prediction: the prediction objective.
        correction: the correction objective.
        correction_fraction: see `Combined`.
        alpha: see `Combined`.
        balance: see `Combined`.
        correction_start: see `Combined`.
        online_warmup: see `Combined`.

    Examples:
        >>> from flowdistill import load_teacher
        >>> from flowdistill.flow_maps import from_teacher
        >>> from flowdistill.states import Prior
        >>> teacher, source, objective = load_teacher("digits_teacher"), Prior(), FreeFlow(alpha=0.5)
        >>> student = from_teacher(teacher, "anchored")
        >>> source.setup(student, teacher), objective.setup(student, teacher)
        (None, None)
        >>> generator = torch.Generator()
        >>> output = objective.loss(student, teacher, source.sample(8, generator), step=0, generator=generator)
        >>> output.loss.backward()
        >>> sorted(output.metrics)
        ['correction_error', 'error', 'lambda']
    """

    citation = CITATION

    prediction: Objective = attrs.field(factory=FreeFlowPrediction, validator=instance_of(Objective))
    correction: Objective = attrs.field(factory=FreeFlowCorrection, validator=instance_of(Objective))
