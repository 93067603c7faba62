"""The prediction, correction and joint objectives of FreeFlow, in the sign u = dx/dt (t = 1 is noise)."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import torch
from attrs.validators import and_, ge, gt, instance_of, lt
from torch import Tensor, nn

from flowdistill.algorithms.identities import lagrangian_residual, noising_residual, pull
from flowdistill.errors import ConfigError
from flowdistill.guidance import GuidedTeacher, check_interval
from flowdistill.interfaces import (
    FlowMap,
    GeneratingVelocity,
    NoisingVelocity,
    Objective,
    ObjectiveOutput,
    States,
    Teacher,
)
from flowdistill.registry import register_objective
from flowdistill.times import LogitNormal, TimeSampler, WithPointMass
from flowdistill.velocity_estimators import FiniteDifference, OnlineNetwork

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
        self,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        *,
        step: int,
        generator: torch.Generator,
    ) -> ObjectiveOutput:
        """The weighted squared residual; one evaluation of the teacher."""
        assert teacher is not None
        delta = self.durations.sample(len(states), generator).to(states.t.dtype)
        s = states.t * (1 - delta)
        average, residual = lagrangian_residual(
            student, teacher, self.estimator, states.x, states.t, s, states.condition, step=step
        )
        return pull(average, residual, power=self.power, eps=self.eps)


@register_objective("freeflow_correction")
@attrs.define(kw_only=True)
class FreeFlowCorrection(Objective):
    """The noising velocity of the student's distribution is the teacher's velocity.

    One-step samples x = z - F(z, 1, 0) are noised to x_r = (1 - r) x + r n. The residual

        v_N(x_r, r) - u(x_r, r)

    is the gradient that reaches F, so that descent moves samples along the teacher's score minus the student's.

    Attributes:
        noising: the estimator of v_N.
        times: law of r.
        guidance_interval: times at which a guided teacher is guided here, in place of its own interval; None keeps
            that.
    """

    citation = CITATION

    noising: NoisingVelocity = attrs.field(factory=OnlineNetwork, validator=instance_of(NoisingVelocity))
    times: TimeSampler = attrs.field(factory=lambda: LogitNormal(mean=0.8, std=1.6), validator=instance_of(TimeSampler))
    guidance_interval: tuple[float, float] | None = attrs.field(
        default=None, converter=attrs.converters.optional(check_interval)
    )

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Set the noising velocity up; ConfigError for a guidance interval without guidance."""
        if self.guidance_interval is not None and not isinstance(teacher, GuidedTeacher):
            raise ConfigError("guidance_interval needs a guided teacher: train.teacher = @guided()")
        self.noising.setup(student, teacher)

    def modules(self) -> Mapping[str, nn.Module]:
        """What the noising velocity trains."""
        return self.noising.modules()

    def loss(
        self,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        *,
        step: int,
        generator: torch.Generator,
    ) -> ObjectiveOutput:
        """The squared difference of the velocities; one evaluation of the teacher."""
        assert teacher is not None
        if self.guidance_interval is not None and isinstance(teacher, GuidedTeacher):
            teacher = teacher.with_interval(self.guidance_interval)
        z = states.x
        r = self.times.sample(len(states), generator).to(states.t.dtype)
        noise = torch.randn(z.shape, generator=generator, device=z.device, dtype=z.dtype)
        average, residual = noising_residual(student, teacher, self.noising, z, noise, r, states.condition)
        return pull(average, residual)

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
        """The loss by which the noising velocity follows the student's samples."""
        samples = _samples(student, states)
        loss = self.noising.module_loss(name, samples, states.condition, generator=generator)
        return ObjectiveOutput(loss.mean())


@torch.no_grad()
def _samples(student: FlowMap, states: States) -> Tensor:
    samples: Tensor = student(states.x, states.t, torch.zeros_like(states.t), states.condition)
    return samples


@register_objective("freeflow")
@attrs.define(kw_only=True)
class FreeFlow(Objective):
    """Prediction and correction together.

    Of each batch a fraction goes to the correction, whose loss is scaled by

        lambda = alpha E|v_G - u| / E|v_N - u|,

    and is at most 10^4 alpha: where the velocities are equal, as at the start of an online network that copies the
    teacher, their difference is rounding errors that must not be scaled up to the size of the prediction's.
    The prediction is weighted by its own power law, the correction is not: with a power of 1 the correction's share of
    the gradient falls with the square of the prediction's residual as training converges.

    Attributes:
        prediction: the prediction objective.
        correction: the correction objective.
        correction_fraction: fraction of the batch for the correction, in (0, 1).
        alpha: ratio of the scaled correction residual to the prediction's.
        correction_start: training step of the first correction; until then the whole batch is prediction.
        online_warmup: steps before ``correction_start`` from which v_N is already trained.

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

    prediction: FreeFlowPrediction = attrs.field(factory=FreeFlowPrediction, validator=instance_of(FreeFlowPrediction))
    correction: FreeFlowCorrection = attrs.field(factory=FreeFlowCorrection, validator=instance_of(FreeFlowCorrection))
    correction_fraction: float = attrs.field(default=0.25, validator=and_(gt(0.0), lt(1.0)))
    alpha: float = attrs.field(default=1.0, validator=ge(0.0))
    correction_start: int = attrs.field(default=0, validator=ge(0))
    online_warmup: int = attrs.field(default=0, validator=ge(0))

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Set both parts up."""
        self.prediction.setup(student, teacher)
        self.correction.setup(student, teacher)

    def modules(self) -> Mapping[str, nn.Module]:
        """What the correction trains."""
        return self.correction.modules()

    def _split(self, states: States) -> tuple[States, States]:
        rows = max(1, round(self.correction_fraction * len(states)))
        return states[rows:], states[:rows]

    def loss(
        self,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        *,
        step: int,
        generator: torch.Generator,
    ) -> ObjectiveOutput:
        """Prediction loss + lambda times correction loss."""
        if step < self.correction_start:
            return self.prediction.loss(student, teacher, states, step=step, generator=generator)
        for_prediction, for_correction = self._split(states)
        prediction = self.prediction.loss(student, teacher, for_prediction, step=step, generator=generator)
        correction = self.correction.loss(student, teacher, for_correction, step=step, generator=generator)
        assert prediction.residual_norm is not None
        assert correction.residual_norm is not None
        floor = (1e-4 * prediction.residual_norm).clamp_min(torch.finfo(prediction.residual_norm.dtype).tiny)
        scale = self.alpha * prediction.residual_norm / torch.maximum(correction.residual_norm, floor)
        metrics = {
            "error": prediction.metrics["error"],
            "correction_error": correction.metrics["error"],
            "lambda": scale,
        }
        return ObjectiveOutput(prediction.loss + scale * correction.loss, metrics, prediction.residual_norm)

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
        """The correction's, on its part of the batch; None before the warm-up of v_N."""
        if step < self.correction_start - self.online_warmup:
            return None
        return self.correction.auxiliary_loss(
            name, student, teacher, self._split(states)[1], step=step, generator=generator
        )
