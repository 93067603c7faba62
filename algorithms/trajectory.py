"""What the objectives that follow trajectories share: flow matching on a part of the batch, an identity on the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, in_, instance_of, le, lt
from torch import Tensor, nn

from flowdistill.algorithms.identities import attach, pull, velocity_residual
from flowdistill.ema import AveragedModel, Ema
from flowdistill.interfaces import FlowMap, Objective, ObjectiveOutput, States, TargetVelocity, Teacher
from flowdistill.times import EndSampler, Uniform
from flowdistill.velocities.targets import TeacherVelocity


@attrs.define(kw_only=True)
class VelocityObjective(Objective):
    """An objective that takes a velocity at its states: a teacher's, which it distils, or that of data.

    Attributes:
        velocity: the velocity at the states.
    """

    velocity: TargetVelocity = attrs.field(factory=TeacherVelocity, validator=instance_of(TargetVelocity))

    @property
    def needs_data(self) -> bool:
        """Whether the velocity is that of the data."""
        return self.velocity.needs_data

    @property
    def needs_teacher(self) -> bool:
        """Whether the velocity is the teacher's."""
        return self.velocity.needs_teacher


@attrs.define(kw_only=True)
class TrajectoryObjective(VelocityObjective):
    """An identity on the part of the batch that jumps from t to s < t, and F(x, t, t) = u(x, t) on the rest.

    Attributes:
        velocity: the velocity u at the states: the teacher's, or the conditional one of the data.
        ends: law of s given t.
        equal: fraction of the batch with s = t, where the loss is flow matching.
        power: exponent p of the weight 1 / (squared residual + eps)^p.
        eps: see ``power``.
        reduction: how the squared residual adds up elements; belongs to ``power`` and ``eps``.
    """

    ends: EndSampler = attrs.field(factory=Uniform, validator=instance_of(EndSampler))
    equal: float = attrs.field(default=0.5, validator=and_(ge(0.0), le(1.0)))
    power: float = attrs.field(default=0.0, validator=ge(0.0))
    eps: float = attrs.field(default=1e-3, validator=ge(0.0))
    reduction: Literal["mean", "sum"] = attrs.field(default="mean", validator=in_(("mean", "sum")))

    @abstractmethod
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
        """F and the residual of the identity for jumps from the states to s (B,), detached or with a graph."""

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The weighted squared residual; rows with s = t take no derivative and no second jump."""
        s = self.ends.sample_below(states.t, generator)
        rows = round(self.equal * len(states))
        on, off = states[:rows], states[rows:]
        parts = []
        if len(on):
            velocity = self.velocity.velocity(student, teacher, on)
            parts.append(velocity_residual(student, velocity, on.x, on.t, on.condition))
        if len(off):
            parts.append(self.residual(student, teacher, off, s[rows:], step=step, generator=generator))
        if any(residual.requires_grad for _, residual in parts):
            parts = [(average, attach(average, residual)) for average, residual in parts]
        average, residual = (torch.cat(part) for part in zip(*parts, strict=True))
        return pull(average, residual, power=self.power, eps=self.eps, reduction=self.reduction)


@attrs.define(kw_only=True)
class SelfTaughtObjective(TrajectoryObjective):
    """A trajectory objective whose targets are jumps of the student itself, or of an average of its weights.

    Attributes:
        target_decay: weight of the old average at each update, in [0, 1); 0 takes the present weights.
    """

    target_decay: float = attrs.field(default=0.0, validator=[ge(0.0), lt(1.0)])
    _average: AveragedModel[FlowMap] | None = attrs.field(default=None, init=False, repr=False, eq=False)

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Start the average."""
        if self.target_decay:
            self._average = AveragedModel(student, Ema(decay=self.target_decay))
            self._average.module.eval()

    def modules(self) -> Mapping[str, nn.Module]:
        """The average, under the name ``target``."""
        return {} if self._average is None else {"target": self._average.module}

    def after_step(self, student: FlowMap, step: int) -> None:
        """Move the average."""
        if self._average is not None:
            self._average.update(step)

    def target(self, student: FlowMap) -> FlowMap:
        """The map that gives the targets."""
        return student if self._average is None else self._average.module
