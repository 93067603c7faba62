"""What the objectives that follow trajectories share: flow matching on a part of the batch, an identity on the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import attrs
from attrs.validators import ge, in_, instance_of, lt
from torch import nn

from flowdistill.algorithms.identities import Residual, diagonal, pull
from flowdistill.ema import AveragedModel, Ema
from flowdistill.interfaces import (
    FlowMap,
    Objective,
    ObjectiveOutput,
    Pairs,
    States,
    Step,
    TargetVelocity,
    Teacher,
)
from flowdistill.pairs import Below, WithDiagonal
from flowdistill.velocities import TeacherVelocity


@attrs.define(kw_only=True, slots=False)
class VelocityObjective(Objective):
    """An objective that takes a velocity at its states: a teacher's, which it distils, or that of data."""

    target: TargetVelocity = attrs.field(factory=TeacherVelocity, validator=instance_of(TargetVelocity))
    """The velocity u at the states: the teacher's, or the conditional one of the data."""

    @property
    def needs_data(self) -> bool:
        """Whether the velocity is that of the data."""
        return self.target.needs_data

    @property
    def needs_teacher(self) -> bool:
        """Whether the velocity is the teacher's."""
        return self.target.needs_teacher


@attrs.define(kw_only=True, slots=False)
class TrajectoryObjective(VelocityObjective):
    """An identity on the rows that jump from t to s < t, and F(x, t, t) = u(x, t) on those that the law puts there."""

    pairs: Pairs = attrs.field(factory=lambda: WithDiagonal(pairs=Below()), validator=instance_of(Pairs))
    """The law of the times (t, s), with its share on the diagonal."""
    power: float = attrs.field(default=0.0, validator=ge(0.0))
    """The exponent p of the weight 1 / (squared residual + eps)^p.
    Above 0 it biases a residual that vanishes only on average, if samples have few dimensions."""
    eps: float = attrs.field(default=1e-3, validator=ge(0.0))
    """See ``power``."""
    reduction: Literal["mean", "sum"] = attrs.field(default="mean", validator=in_(("mean", "sum")))
    """How the squared residual adds up elements; it decides what ``power`` and ``eps`` mean."""

    @abstractmethod
    def residual(self, states: States, step: Step) -> Residual:
        """The residual of the identity for jumps from the states."""

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The weighted squared residual; rows on the diagonal take no derivative and no second jump."""
        rows = self.pairs.on_diagonal(len(states))
        on, off = states[:rows], states[rows:]
        parts = [diagonal(self.student, self.target(on), on)] if len(on) else []
        parts += [self.residual(off, step)] if len(off) else []
        return pull(Residual.join(parts), power=self.power, eps=self.eps, reduction=self.reduction)


@attrs.define(kw_only=True, slots=False)
class SelfTaughtObjective(TrajectoryObjective):
    """A trajectory objective whose targets are jumps of the student itself, or of an average of its weights."""

    target_decay: float = attrs.field(default=0.0, validator=[ge(0.0), lt(1.0)])
    """The weight of the old average at each update; 0 takes the present weights."""
    _average: AveragedModel[FlowMap] | None = attrs.field(default=None, init=False, repr=False, eq=False)

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take the models, and start the average."""
        super().setup(student, teacher)
        if self.decay:
            self._average = AveragedModel(student, Ema(decay=self.decay))
            self._average.module.eval()

    @property
    def decay(self) -> float:
        """The decay of the average that is kept; 0 keeps none."""
        return self.target_decay

    def modules(self) -> Mapping[str, nn.Module]:
        """The average, under the name ``target``."""
        return {} if self._average is None else {"target": self._average.module}

    def after_step(self, number: int) -> None:
        """Move the average."""
        if self._average is not None:
            self._average.update(number)

    @property
    def tutor(self) -> FlowMap:
        """The map that gives the targets."""
        return self.student if self._average is None else self._average.module
