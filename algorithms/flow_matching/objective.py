"""The flow-matching objective."""

from __future__ import annotations

import attrs
import torch

from flowdistill.algorithms.identities import pull, velocity_residual
from flowdistill.interfaces import FlowMap, Objective, ObjectiveOutput, States, Teacher
from flowdistill.plumbing.registry import register_objective


@register_objective("flow_matching")
@attrs.define(kw_only=True)
class FlowMatching(Objective):
    """Regression of the velocity onto the conditional one, |F(x_t, t, t) - (n - x_0)|^2.

    Its minimiser is the marginal velocity u(x, t) = E[n - x_0 | x_t = x]. The run it leaves loads as a teacher.
    """

    needs_data = True
    needs_teacher = False
    citation = """\
@inproceedings{lipman2023flow,
  title     = {Flow Matching for Generative Modeling},
  author    = {Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
}"""

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The mean squared error over elements and batch."""
        assert states.noise is not None
        assert states.clean is not None
        velocity = states.noise - states.clean
        return pull(*velocity_residual(student, velocity, states.x, states.t, states.condition))
