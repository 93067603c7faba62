"""The objective of terminal velocity matching."""

from __future__ import annotations

import attrs
from attrs.validators import ge, instance_of, lt

from flowdistill.algorithms.identities import Residual, lagrangian
from flowdistill.algorithms.trajectory import SelfTaughtObjective
from flowdistill.interfaces import GeneratingVelocity, Pairs, States, Step, TargetVelocity
from flowdistill.pairs import Below, WithDiagonal
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import LogitNormal
from flowdistill.velocities import ConditionalVelocity, Jvp


@register_objective("tvm")
@attrs.define(kw_only=True, slots=False)
class TerminalVelocityMatching(SelfTaughtObjective):
    """The end of a jump moves with the velocity there, which flow matching teaches at the ends' times.

        |dX(x, t, s)/ds - sg F'(X, s, s)|^2   and   |F(x_s, s, s) - v|^2,   dX/ds = F - (t - s) dF/ds

    F' is an average of the student's weights.
    Gradients flow through dX/ds, and so through a derivative of the network.
    The second term is on the diagonal rows of the law, which lie at the ends s of its pairs.

    With a teacher its velocity takes the place of both F' and v, and no average is kept.
    From noise alone (t = 1) the first term is then FreeFlow's prediction, differentiated through dF/ds as well.
    """

    citation = bibtex("zhou2025tvm")

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    pairs: Pairs = attrs.field(
        factory=lambda: WithDiagonal(pairs=Below(ends=LogitNormal(mean=-0.4)), at_ends=True),
        validator=instance_of(Pairs),
    )
    target_decay: float = attrs.field(default=0.99, validator=[ge(0.0), lt(1.0)])
    estimator: GeneratingVelocity = attrs.field(
        factory=lambda: Jvp(graph=True), validator=instance_of(GeneratingVelocity)
    )
    """The estimator of dF/ds; without its graph only F is moved, as if dF/ds were given."""

    @property
    def decay(self) -> float:
        """``target_decay``, or 0 if the teacher takes the place of the average."""
        return 0.0 if self.target.needs_teacher else self.target_decay

    def residual(self, states: States, step: Step) -> Residual:
        """DX/ds - F'(X, s, s)."""
        field = self.teacher.velocity if self.target.needs_teacher else self.tutor.velocity
        return lagrangian(self.estimator, field, states, step.progress)
