"""The objective of shortcut models."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import and_, ge, instance_of, le, lt
from torch import Tensor

from flowdistill.algorithms.identities import Residual, semigroup
from flowdistill.algorithms.trajectory import SelfTaughtObjective
from flowdistill.interfaces import Condition, Pairs, States, Step, TargetVelocity
from flowdistill.pairs import Dyadic, WithDiagonal
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import Grid
from flowdistill.velocities import ConditionalVelocity


@register_objective("shortcut")
@attrs.define(kw_only=True, slots=False)
class Shortcut(SelfTaughtObjective):
    """Flow matching, and jumps that must land where two jumps of half their length land.

        R = F(x, t, s) - [F'(x, t, r) + F'(x_r, r, s)] / 2,   r = (t + s) / 2,   x_r = x - (t - r) F'(x, t, r)

    F' is an average of the student's weights.
    The jumps are those of samplers of 1, 2, 4, ... steps, so that the halves of each level are what the next finer
    level learns.
    The halves of the shortest jumps are Euler steps of the velocity F'(x, t, t), or of the teacher's
    if ``target`` is that.
    """

    citation = bibtex("frans2024shortcut")

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    """The velocity that the diagonal learns: the conditional one of the data, or the teacher's."""
    levels: int = attrs.field(default=7, validator=ge(1))
    """The samplers whose jumps are learned, of 1, 2, ..., 2^(levels - 1) steps."""
    share: float = attrs.field(default=0.875, validator=and_(ge(0.0), le(1.0)))
    """The share of the batch for flow matching, at times k / 2^levels."""
    pairs: Pairs = attrs.field(init=False)
    target_decay: float = attrs.field(default=0.999, validator=[ge(0.0), lt(1.0)])
    guidance: float = attrs.field(default=1.0, validator=ge(0.0))
    """The scale of classifier-free guidance of the halves of the shortest jumps, from which all longer jumps inherit
    it; 1 is none. The diagonal stays unguided. It is for training from data whose labels are dropped."""

    def __attrs_post_init__(self) -> None:
        jumps, times = Dyadic(levels=self.levels), Grid(steps=2**self.levels)
        self.pairs = WithDiagonal(pairs=jumps, share=self.share, times=times)
        if self.guidance != 1.0 and self.target.needs_teacher:
            raise ConfigError("shortcut.guidance is for training from data: guide the teacher instead")

    def residual(self, states: States, step: Step) -> Residual:
        """The residual of the semigroup identity at the midpoint."""
        length = (states.t - states.s) / 2
        finest = length < 1.5 * 2.0**-self.levels
        plain = not self.target.needs_teacher and self.guidance == 1.0
        rows = None if plain else finest.nonzero()[:, 0]

        def half(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            average = self.tutor.average_velocity(x, t, torch.where(finest, t, t - length), condition)
            if rows is None or not len(rows):
                return average
            if self.target.needs_teacher:
                velocity = self.teacher.velocity(x[rows], t[rows], condition[rows]).to(average.dtype)
            else:
                velocity = self._guided(average[rows], x[rows], t[rows], condition[rows])
            return average.index_copy(0, rows, velocity)

        with torch.no_grad():
            first = half(states.x, states.t, states.condition)
        return semigroup(self.student, half, first, states, states.t - length)

    def _guided(self, labelled: Tensor, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if condition.labels is None:
            raise ConfigError("shortcut.guidance needs labels, which these data do not have")
        unlabelled = self.tutor.velocity(x, t, condition.unlabelled())
        return unlabelled + self.guidance * (labelled - unlabelled)
