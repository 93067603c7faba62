"""The three objectives of self-distillation."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, in_, instance_of, le
from torch import Tensor

from flowdistill.algorithms.identities import eulerian_residual, lagrangian_residual, semigroup_residual
from flowdistill.algorithms.trajectory import SelfTaughtObjective
from flowdistill.interfaces import FlowMap, GeneratingVelocity, States, TargetVelocity, Teacher
from flowdistill.plumbing.registry import register_objective
from flowdistill.velocities.estimators import Jvp
from flowdistill.velocities.targets import ConditionalVelocity


@attrs.define(kw_only=True)
class SelfDistillation(SelfTaughtObjective):
    """Flow matching on the diagonal, and off it an identity with the student's own diagonal for the velocity.

    Attributes:
        velocity: the velocity that the diagonal learns: the conditional one of the data, or the teacher's.
        ends: law of s given t.
        equal: fraction of the batch with s = t, where the loss is flow matching.
        power: see `TrajectoryObjective`.
        eps: see `TrajectoryObjective`.
        reduction: see `TrajectoryObjective`.
        target_decay: see `SelfTaughtObjective`.
    """

    citation = """\
@article{boffi2025selfdistillation,
  title   = {How to Build a Consistency Model: Learning Flow Maps via Self-Distillation},
  author  = {Boffi, Nicholas M. and Albergo, Michael S. and Vanden-Eijnden, Eric},
  journal = {arXiv preprint arXiv:2505.18825},
  year    = {2025},
}"""

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    equal: float = attrs.field(default=0.75, validator=and_(ge(0.0), le(1.0)))


@register_objective("semigroup")
@attrs.define(kw_only=True)
class Semigroup(SelfDistillation):
    """Progressive self-distillation (PSD): one jump lands where two detached jumps land.

        R = F(x, t, s) - [(t - r) F(x, t, r) + (r - s) F(x_r, r, s)] / (t - s),   x_r = x - (t - r) F(x, t, r)

    It is the difference of the ends over t - s, with which it does not fade as s approaches t.

    Attributes:
        velocity: see `SelfDistillation`.
        ends: see `SelfDistillation`.
        equal: see `SelfDistillation`.
        power: see `TrajectoryObjective`.
        eps: see `TrajectoryObjective`.
        reduction: see `TrajectoryObjective`.
        target_decay: see `SelfTaughtObjective`.
        middle: "midpoint" for r = (t + s) / 2, or "uniform" for r ~ U(s, t).
    """

    middle: Literal["midpoint", "uniform"] = attrs.field(default="midpoint", validator=in_(("midpoint", "uniform")))

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
        """That of the semigroup identity."""
        x, t, condition = states.x, states.t, states.condition
        target = self.target(student)
        part: float | Tensor = 0.5
        if self.middle == "uniform":
            part = torch.rand(len(t), generator=generator, device=t.device, dtype=t.dtype)
        r = s + part * (t - s)
        with torch.no_grad():
            first = target.average_velocity(x, t, r, condition)
        return semigroup_residual(student, target, first, x, t, r, s, condition)


@register_objective("lsd")
@attrs.define(kw_only=True)
class LSD(SelfDistillation):
    """Lagrangian self-distillation: the end of a jump moves with the velocity there.

        R = dX(x, t, s)/ds - sg F(X, s, s),   dX/ds = F - (t - s) dF/ds

    Gradients flow through dX/ds alone.

    Attributes:
        velocity: see `SelfDistillation`.
        ends: see `SelfDistillation`.
        equal: see `SelfDistillation`.
        power: see `TrajectoryObjective`.
        eps: see `TrajectoryObjective`.
        reduction: see `TrajectoryObjective`.
        target_decay: see `SelfTaughtObjective`.
        estimator: of dF/ds. Without its graph only F is moved, as if dF/ds were given.
    """

    estimator: GeneratingVelocity = attrs.field(
        factory=lambda: Jvp(graph=True), validator=instance_of(GeneratingVelocity)
    )

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
        return lagrangian_residual(student, field, self.estimator, states.x, states.t, s, states.condition, step=step)


@register_objective("esd")
@attrs.define(kw_only=True)
class ESD(SelfDistillation):
    """Eulerian self-distillation: the end of a jump does not depend on where on a trajectory it starts.

        R = -(dX/dt + J_x X b) = F - b + (t - s) (dF/dt + (d_x F) b),   b = sg F(x, t, t)

    Gradients flow through F and its derivatives.

    Attributes:
        velocity: see `SelfDistillation`.
        ends: see `SelfDistillation`.
        equal: see `SelfDistillation`.
        power: see `TrajectoryObjective`.
        eps: see `TrajectoryObjective`.
        reduction: see `TrajectoryObjective`.
        target_decay: see `SelfTaughtObjective`.
        estimator: of the derivative along the trajectory. Without its graph only F is moved, as MeanFlow moves it.
    """

    estimator: GeneratingVelocity = attrs.field(
        factory=lambda: Jvp(graph=True), validator=instance_of(GeneratingVelocity)
    )

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
        """That of the Eulerian identity."""
        with torch.no_grad():
            velocity = self.target(student).velocity(states.x, states.t, states.condition)
        return eulerian_residual(student, velocity, self.estimator, states.x, states.t, s, states.condition, step=step)
