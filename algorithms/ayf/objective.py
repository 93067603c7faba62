"""The two objectives of Align Your Flow."""

from __future__ import annotations

from abc import abstractmethod

import attrs
from attrs.validators import and_, ge, gt, instance_of, le, optional

from flowdistill.algorithms.identities import Residual, eulerian, lagrangian, normalize, pull
from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.interfaces import GeneratingVelocity, Objective, ObjectiveOutput, Pairs, States, Step
from flowdistill.pairs import SortedPair
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import LogitNormal
from flowdistill.velocities import Jvp


@attrs.define(kw_only=True, slots=False)
class AlignYourFlow(Objective):
    """What both objectives share: the residual R of an identity, normalised to R / (|R| + c), moves F.

    The paper moves the end X = x - (t - s) F of a jump, weighted by w(t, s).
    With w = 1/(t - s) that is a move of F itself, which stays in place as s approaches t.
    """

    citation = bibtex("sabour2025ayf")

    pairs: Pairs = attrs.field(factory=lambda: SortedPair(first=LogitNormal(mean=-0.8)), validator=instance_of(Pairs))
    """The law of the times (t, s)."""
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    """The estimator of the derivative of F."""
    normalization: float | None = attrs.field(factory=lambda: 0.1, validator=optional(gt(0.0)))
    """c, with |R| over all elements of a sample; None leaves R as it is."""

    @abstractmethod
    def residual(self, states: States, step: Step) -> Residual:
        """F and R for jumps from the states."""

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The regression of F onto sg(F - R / (|R| + c)); the metrics are those of R itself."""
        residual = self.residual(states, step)
        output = pull(residual)
        if self.normalization is None:
            return output
        normalized = Residual(residual.average, normalize(residual.value, self.normalization))
        return attrs.evolve(output, loss=pull(normalized).loss)


@register_objective("ayf_emd")
@attrs.define(kw_only=True, slots=False)
class AyfEmd(AlignYourFlow, VelocityObjective):
    """Eulerian map distillation: where a jump lands must not depend on where on a trajectory it starts.

        R = F - u + w (t - s) D_t F,   D_t F = (d_x F) u + d_t F

    At s = 0 it is continuous-time consistency, as s approaches t flow matching.
    The factor w grows from 0, where R is F - u, to ``final`` in the course of training.
    Below 1 the solution is not the flow map but the mean velocity on the way with the density
    (a/(t - s))^(1/w - 1) / (w (t - s)) at a distance a from s: the start counts for more.
    With the velocity of the data normalised residuals are biased if samples have few dimensions.
    """

    warmup: float = attrs.field(default=0.2, validator=and_(ge(0.0), le(1.0)))
    """The part of the training in which w would reach 1; 0 is none."""
    final: float = attrs.field(default=0.99, validator=and_(gt(0.0), le(1.0)))
    """The largest w; 1 is exact."""

    def residual(self, states: States, step: Step) -> Residual:
        """The residual of the Eulerian identity; one evaluation of the teacher."""
        w = min(step.progress / self.warmup, self.final) if self.warmup else self.final
        return eulerian(self.estimator, self.target(states), states, step.progress, warmup=w)


@register_objective("ayf_lmd")
@attrs.define(kw_only=True, slots=False)
class AyfLmd(AlignYourFlow):
    """Lagrangian map distillation: the end of a jump must move with the teacher's velocity there.

        R = dX/ds - u(X, s) = F - (t - s) dF/ds - u(X, s)

    From noise alone (t = 1) it is the residual of FreeFlow's prediction.
    """

    def residual(self, states: States, step: Step) -> Residual:
        """The residual of the Lagrangian identity; one evaluation of the teacher."""
        return lagrangian(self.estimator, self.teacher.velocity, states, step.progress)
