"""The objective of shortcut models."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import and_, ge, instance_of, le, lt
from torch import Tensor

from flowdistill.algorithms.identities import semigroup_residual
from flowdistill.algorithms.trajectory import SelfTaughtObjective
from flowdistill.interfaces import Condition, FlowMap, States, TargetVelocity, Teacher
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import Dyadic
from flowdistill.velocities.targets import ConditionalVelocity


@register_objective("shortcut")
@attrs.define(kw_only=True)
class Shortcut(SelfTaughtObjective):
    """Flow matching, and jumps that must land where two jumps of half their length land.

        R = F(x, t, s) - [F'(x, t, r) + F'(x_r, r, s)] / 2,   r = (t + s) / 2,   x_r = x - (t - r) F'(x, t, r)

    F' is an average of the student's weights. The jumps are those of samplers of 1, 2, 4, ... steps, so that the
    halves of each level are what the next finer level learns. The halves of the shortest jumps are Euler steps of the
    velocity F'(x, t, t), or of the teacher's where ``velocity`` is that.

    Attributes:
        velocity: the velocity that the diagonal learns: the conditional one of the data, or the teacher's.
        ends: law of the jumps. The states' times are to be its starts: the same law, or with one level more, by which
            the halves of the shortest jumps start at such times, too.
        equal: fraction of the batch with s = t, where the loss is flow matching.
        power: see `TrajectoryObjective`.
        eps: see `TrajectoryObjective`.
        reduction: see `TrajectoryObjective`.
        target_decay: weight of the old average at each update, in [0, 1); 0 takes the present weights.
        guidance: scale of classifier-free guidance of the halves of the shortest jumps, from which all longer jumps
            inherit it; 1 is none. The diagonal stays unguided. For training from data whose labels are dropped.
    """

    citation = """\
@article{frans2024shortcut,
  title   = {One Step Diffusion via Shortcut Models},
  author  = {Frans, Kevin and Hafner, Danijar and Levine, Sergey and Abbeel, Pieter},
  journal = {arXiv preprint arXiv:2410.12557},
  year    = {2024},
}"""

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    ends: Dyadic = attrs.field(factory=Dyadic, validator=instance_of(Dyadic))
    equal: float = attrs.field(default=0.875, validator=and_(ge(0.0), le(1.0)))
    target_decay: float = attrs.field(default=0.999, validator=[ge(0.0), lt(1.0)])
    guidance: float = attrs.field(default=1.0, validator=ge(0.0))

    def __attrs_post_init__(self) -> None:
        if self.guidance != 1.0 and self.velocity.needs_teacher:
            raise ConfigError("shortcut.guidance is for training from data: guide the teacher instead")

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
        """That of the semigroup identity at the midpoint."""
        target = self.target(student)
        length = (states.t - s) / 2
        finest = length < 0.75 * self.ends.shortest
        plain = not self.velocity.needs_teacher and self.guidance == 1.0
        rows = None if plain else finest.nonzero()[:, 0]

        def half(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            average = target.average_velocity(x, t, torch.where(finest, t, t - length), condition)
            if rows is None or not len(rows):
                return average
            if self.velocity.needs_teacher:
                assert teacher is not None
                velocity = teacher.velocity(x[rows], t[rows], condition[rows])
                average = average.index_copy(0, rows, velocity.to(average.dtype))
            else:
                guided = self._guided(target, average[rows], x[rows], t[rows], condition[rows])
                average = average.index_copy(0, rows, guided)
            return average

        x, t, condition = states.x, states.t, states.condition
        with torch.no_grad():
            first = half(x, t, condition)
        return semigroup_residual(student, half, first, x, t, t - length, s, condition)

    def _guided(self, target: FlowMap, labelled: Tensor, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if condition.labels is None:
            raise ConfigError("shortcut.guidance needs labels, which these data do not have")
        unlabelled = target.velocity(x, t, condition.drop(torch.ones_like(condition.labels).bool()))
        return unlabelled + self.guidance * (labelled - unlabelled)
