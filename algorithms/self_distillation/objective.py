"""The three objectives of self-distillation."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import in_, instance_of
from torch import Tensor

from flowdistill.algorithms.identities import Residual, eulerian, lagrangian, semigroup
from flowdistill.algorithms.trajectory import SelfTaughtObjective
from flowdistill.interfaces import GeneratingVelocity, Pairs, States, Step, TargetVelocity
from flowdistill.pairs import Below, WithDiagonal
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.velocities import ConditionalVelocity, Jvp


@attrs.define(kw_only=True, slots=False)
class SelfDistillation(SelfTaughtObjective):
    """Flow matching on the diagonal, and off it an identity with the student's own diagonal for the velocity."""

    citation = bibtex("boffi2025selfdistillation")

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    """The velocity that the diagonal learns: the conditional one of the data, or the teacher's."""
    pairs: Pairs = attrs.field(factory=lambda: WithDiagonal(pairs=Below(), share=0.75), validator=instance_of(Pairs))


@register_objective("semigroup")
@attrs.define(kw_only=True, slots=False)
class Semigroup(SelfDistillation):
    """Progressive self-distillation (PSD): one jump lands where two detached jumps land.

        R = F(x, t, s) - [(t - r) F(x, t, r) + (r - s) F(x_r, r, s)] / (t - s),   x_r = x - (t - r) F(x, t, r)

    It is the difference of the ends over t - s, with which it does not fade as s approaches t.
    """

    middle: Literal["midpoint", "uniform"] = attrs.field(default="midpoint", validator=in_(("midpoint", "uniform")))
    """"midpoint" is r = (t + s) / 2, "uniform" is r ~ U(s, t)."""

    def residual(self, states: States, step: Step) -> Residual:
        """The residual of the semigroup identity."""
        t, s = states.t, states.s
        part: float | Tensor = 0.5
        if self.middle == "uniform":
            part = torch.rand(len(t), generator=step.generator, device=t.device, dtype=t.dtype)
        r = s + part * (t - s)
        with torch.no_grad():
            first = self.tutor.average_velocity(*states.to(r))
        return semigroup(self.student, self.tutor, first, states, r)


@register_objective("lsd")
@attrs.define(kw_only=True, slots=False)
class LSD(SelfDistillation):
    """Lagrangian self-distillation: the end of a jump moves with the velocity there.

        R = dX(x, t, s)/ds - sg F(X, s, s),   dX/ds = F - (t - s) dF/ds

    Gradients flow through dX/ds alone.
    """

    estimator: GeneratingVelocity = attrs.field(
        factory=lambda: Jvp(graph=True), validator=instance_of(GeneratingVelocity)
    )
    """The estimator of dF/ds. Without its graph only F is moved, as if dF/ds were given."""

    def residual(self, states: States, step: Step) -> Residual:
        """The residual of the Lagrangian identity."""
        return lagrangian(self.estimator, self.tutor.velocity, states, step.progress)


@register_objective("esd")
@attrs.define(kw_only=True, slots=False)
class ESD(SelfDistillation):
    """Eulerian self-distillation: the end of a jump does not depend on where on a trajectory it starts.

        R = -(dX/dt + J_x X b) = F - b + (t - s) (dF/dt + (d_x F) b),   b = sg F(x, t, t)

    Gradients flow through F and its derivatives.
    """

    estimator: GeneratingVelocity = attrs.field(
        factory=lambda: Jvp(graph=True), validator=instance_of(GeneratingVelocity)
    )
    """The estimator of the derivative along the trajectory. Without its graph only F is moved, as MeanFlow moves it."""

    def residual(self, states: States, step: Step) -> Residual:
        """The residual of the Eulerian identity."""
        with torch.no_grad():
            velocity = self.tutor.velocity(states.x, states.t, states.condition)
        return eulerian(self.estimator, velocity, states, step.progress)
