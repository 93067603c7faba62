"""Estimators of the velocity with which a student's jump moves as its end time changes."""

from __future__ import annotations

from typing import Literal

import attrs
from attrs.validators import and_, gt, in_, le, optional
from torch import Tensor

from flowdistill import differentiation
from flowdistill.interfaces import GeneratingVelocity, Jump
from flowdistill.plumbing.fields import interval, part_done
from flowdistill.plumbing.registry import register_velocity_estimator


@register_velocity_estimator("jvp")
@attrs.define(kw_only=True, slots=False)
class Jvp(GeneratingVelocity):
    """The exact derivative, by a Jacobian-vector product."""

    graph: bool = False
    """Whether gradients flow through the derivative, as terminal velocity matching lets them."""

    def derivative(
        self, jump: Jump, *, dx: Tensor | None = None, dt: float = 0.0, ds: float = 0.0, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See `differentiation.jvp`."""
        return differentiation.jvp(self.student, jump, dx=dx, dt=dt, ds=ds, graph=self.graph)


@register_velocity_estimator("finite_difference")
@attrs.define(kw_only=True, slots=False)
class FiniteDifference(GeneratingVelocity):
    """The derivative by a finite difference, whose step may shrink during training.

    The identity amplifies the student's own errors by the factor delta dF/d delta, which a step h caps at delta/h.
    Early in training a backward difference with a large h is the better teacher.
    Late in training its bias of O(h) asks for a small h.
    """

    scheme: Literal["backward", "central"] = attrs.field(default="backward", validator=in_(("backward", "central")))
    """"backward" steps towards shorter durations, "central" both ways."""
    h: float = attrs.field(default=0.1, validator=and_(gt(0.0), le(1.0)))
    """The step in the duration t - s."""
    final_h: float | None = attrs.field(default=None, validator=optional(and_(gt(0.0), le(1.0))))
    """The step at the end of the annealing; None keeps ``h``."""
    anneal: tuple[float, float] = attrs.field(default=(0.0, 1.0), validator=interval)
    """The parts (first, last) of the training between which the step goes to ``final_h`` geometrically."""

    def step_size(self, progress: float) -> float:
        """The step h when a part of the training is done."""
        if self.final_h is None:
            return self.h
        share = part_done(self.anneal, progress)
        return float(self.h ** (1 - share) * self.final_h**share)

    def derivative(
        self, jump: Jump, *, dx: Tensor | None = None, dt: float = 0.0, ds: float = 0.0, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See `differentiation.finite_difference`."""
        h = self.step_size(progress)
        return differentiation.finite_difference(self.student, jump, dx=dx, dt=dt, ds=ds, h=h, scheme=self.scheme)
