"""The flow-matching objective."""

from __future__ import annotations

import attrs
from attrs.validators import instance_of

from flowdistill.algorithms.identities import diagonal, pull
from flowdistill.interfaces import Jumps, Objective, ObjectiveOutput, Pairs, States, Step
from flowdistill.pairs import Diagonal
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective


@register_objective("flow_matching")
@attrs.define(kw_only=True, slots=False)
class FlowMatching(Objective):
    """Regression of the velocity onto the conditional one, |F(x_t, t, t) - (n - x_0)|^2.

    Its minimiser is the marginal velocity u(x, t) = E[n - x_0 | x_t = x]. The run it leaves loads as a teacher.
    """

    citation = bibtex("lipman2023flow")
    trains = Jumps.NONE
    needs_data = True
    needs_teacher = False

    pairs: Pairs = attrs.field(factory=Diagonal, validator=instance_of(Pairs))
    """The law of t, with s = t."""

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The mean squared error over elements and batch."""
        assert states.noise is not None
        assert states.clean is not None
        return pull(diagonal(self.student, states.noise - states.clean, states))
