"""FreeFlow whose correction needs no online network."""

from __future__ import annotations

import attrs
from attrs.validators import gt, instance_of

from flowdistill.algorithms.corrections import one_step_samples
from flowdistill.algorithms.freeflow.objective import FreeFlow, FreeFlowCorrection
from flowdistill.algorithms.identities import diagonal, noised, pull
from flowdistill.interfaces import Objective, ObjectiveOutput, States, Step, TimeSampler
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import Uniform
from flowdistill.velocities import PseudoVelocity


@register_objective("freeflow_pseudo")
@attrs.define(kw_only=True, slots=False)
class FreeFlowPseudo(FreeFlow):
    """FreeFlow with the student's own diagonal as its noising velocity: v_N(x_r, r) = F(x_r, r, r).

    The loss has a further term, by which the diagonal learns the velocity of the student's own distribution,

        tracking |F(x_r, r, r) - (n - x)|^2,   x_r = (1 - r) x + r n,

    at detached one-step samples x from the noises of the correction.
    Nothing else may train the diagonal.
    So the prediction starts from the noises of its states whatever their times: from t < 1 it would pull F(x, t, t) to
    the teacher.
    The student must not be anchored.
    """

    citation = bibtex("tong2025freeflow", "kim2026fsfdmd")

    correction: Objective = attrs.field(
        factory=lambda: FreeFlowCorrection(noising=PseudoVelocity()), validator=instance_of(Objective)
    )
    tracking: float = attrs.field(default=1.0, validator=gt(0.0))
    """The weight of the further term, from the warm-up of the correction on."""
    tracking_times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    """The law of its times r."""

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The loss of FreeFlow, and from the warm-up on the flow matching of the diagonal."""
        states = states.at_prior()
        output = super().loss(states, step)
        if not self.warmed_up(step.progress):
            return output
        start = self.split(states)[1]
        samples = one_step_samples(self.student, start) if output.samples is None else output.samples
        r = self.tracking_times.sample(len(start), step.generator).to(start.t.dtype)
        again = noised(samples, r, start.condition, step.generator)
        assert again.noise is not None
        tracked = pull(diagonal(self.student, again.noise - samples, again))
        metrics = {**output.metrics, "tracking_error": tracked.metrics["error"]}
        return attrs.evolve(output, loss=output.loss + self.tracking * tracked.loss, metrics=metrics)
