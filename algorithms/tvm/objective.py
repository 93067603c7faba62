"""The objective of terminal velocity matching."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, instance_of, lt
from torch import Tensor

from flowdistill.algorithms.identities import lagrangian_residual
from flowdistill.algorithms.trajectory import SelfTaughtObjective
from flowdistill.interfaces import FlowMap, GeneratingVelocity, ObjectiveOutput, States, TargetVelocity, Teacher
from flowdistill.paths import interpolate
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import EndSampler, LogitNormal
from flowdistill.velocities.estimators import Jvp
from flowdistill.velocities.targets import ConditionalVelocity


@register_objective("tvm")
@attrs.define(kw_only=True)
class TerminalVelocityMatching(SelfTaughtObjective):
    """The end of a jump moves with the velocity there, which flow matching teaches at the ends' times.

        |dX(x, t, s)/ds - sg F'(X, s, s)|^2   and   |F(x_s, s, s) - v|^2,   dX/ds = F - (t - s) dF/ds

    F' is an average of the student's weights. Gradients flow through dX/ds, and so through a derivative of the network.
    x_s is the state's own data and noise at time s; where these are unknown it is where the student lands, X(x, t, s).

    With a teacher its velocity takes the place of both F' and v, and no average is kept. From noise alone (t = 1) the
    first term is then FreeFlow's prediction, differentiated through dF/ds as well.

    Attributes:
        velocity: v: the conditional velocity of the data, or the teacher's.
        ends: law of s given t, in both terms.
        equal: fraction of the batch for the second term.
        power: see `TrajectoryObjective`.
        eps: see `TrajectoryObjective`.
        reduction: see `TrajectoryObjective`.
        target_decay: weight of the old average at each update, in [0, 1); 0 takes the present weights.
        estimator: of dF/ds; without its graph only F is moved, as if dF/ds were given.
    """

    citation = """\
@article{zhou2025tvm,
  title   = {Terminal Velocity Matching},
  author  = {Zhou, Linqi and Parger, Mathias and Haque, Ayaan and Song, Jiaming},
  journal = {arXiv preprint arXiv:2511.19797},
  year    = {2025},
}"""

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    ends: EndSampler = attrs.field(factory=lambda: LogitNormal(mean=-0.4, std=1.0), validator=instance_of(EndSampler))
    target_decay: float = attrs.field(default=0.99, validator=[ge(0.0), lt(1.0)])
    estimator: GeneratingVelocity = attrs.field(
        factory=lambda: Jvp(graph=True), validator=instance_of(GeneratingVelocity)
    )

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Start the average, unless the teacher takes its place."""
        if not self.velocity.needs_teacher:
            super().setup(student, teacher)

    def residual(
        self,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        s: Tensor,
        *,
        step: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """That of the Lagrangian identity."""
        field = self.target(student).velocity
        if self.velocity.needs_teacher:
            assert teacher is not None
            field = teacher.velocity
        return lagrangian_residual(student, field, self.estimator, states.x, states.t, s, states.condition, step=step)

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """Both terms, the second on the first rows of the batch, which are carried to times drawn from ``ends``."""
        rows = round(self.equal * len(states))
        first = states[:rows]
        s = self.ends.sample_below(first.t, generator)
        with torch.no_grad():
            if first.clean is None or first.noise is None:
                terminal = student(first.x, first.t, s, first.condition)
            else:
                terminal = interpolate(first.clean, first.noise, s)
        states = attrs.evolve(states, x=torch.cat([terminal, states.x[rows:]]), t=torch.cat([s, states.t[rows:]]))
        return super().loss(student, teacher, states, step=step, generator=generator)
