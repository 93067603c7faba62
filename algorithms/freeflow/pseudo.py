"""FreeFlow whose correction needs no online network."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import gt, instance_of

from flowdistill.algorithms.corrections import one_step_samples
from flowdistill.algorithms.freeflow.objective import CITATION, FreeFlow, FreeFlowCorrection
from flowdistill.algorithms.identities import pull, velocity_residual
from flowdistill.interfaces import FlowMap, Objective, ObjectiveOutput, States, Teacher
from flowdistill.paths import interpolate
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import TimeSampler, Uniform
from flowdistill.velocities.estimators import PseudoVelocity

PSEUDO_CITATION = """\
@article{kim2026fsfdmd,
  title   = {Distribution Matching Distillation without Fake Score Network},
  author  = {Kim, Youngjoong and Lee, Deokyeong and Park, Jaesik},
  journal = {arXiv preprint arXiv:2605.19256},
  year    = {2026},
}"""


@register_objective("freeflow_pseudo")
@attrs.define(kw_only=True)
class FreeFlowPseudo(FreeFlow):
    """FreeFlow with the student's own diagonal as its noising velocity: v_N(x_r, r) = F(x_r, r, r).

    The loss has a further term, by which the diagonal learns the velocity of the student's own distribution,

        tracking |F(x_r, r, r) - (n - x)|^2,   x_r = (1 - r) x + r n,

    at detached one-step samples x from the noises of the correction. Nothing else may train the diagonal, so the
    prediction starts from the noises of its states whatever their times: from t < 1 it would pull F(x, t, t) to the
    teacher. The student must not be anchored.

    Attributes:
        prediction: see `FreeFlow`.
        correction: see `FreeFlow`; its estimator of v_N is ``pseudo_velocity``.
        correction_fraction: see `FreeFlow`.
        alpha: see `FreeFlow`.
        balance: see `FreeFlow`.
        correction_start: see `FreeFlow`.
        online_warmup: steps before ``correction_start`` from which the diagonal is trained.
        tracking: weight of the further term.
        tracking_times: law of its times r.
    """

    citation = f"{CITATION}\n\n{PSEUDO_CITATION}"

    correction: Objective = attrs.field(
        factory=lambda: FreeFlowCorrection(noising=PseudoVelocity()), validator=instance_of(Objective)
    )
    tracking: float = attrs.field(default=1.0, validator=gt(0.0))
    tracking_times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """That of FreeFlow, and from the warm-up on the flow matching of the diagonal."""
        states = states.at_prior()
        output = super().loss(student, teacher, states, step=step, generator=generator)
        if step < self.correction_start - self.online_warmup:
            return output
        start = self._split(states)[1]
        samples = one_step_samples(student, start)
        r = self.tracking_times.sample(len(start), generator).to(start.t.dtype)
        noise = torch.randn(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)
        noised = interpolate(samples, noise, r)
        tracked = pull(*velocity_residual(student, noise - samples, noised, r, start.condition))
        return ObjectiveOutput(
            output.loss + self.tracking * tracked.loss,
            {**output.metrics, "tracking_error": tracked.metrics["error"]},
            output.residual_norm,
        )
