"""The two objectives of Align Your Flow."""

from __future__ import annotations

from abc import abstractmethod

import attrs
import torch
from attrs.validators import and_, ge, gt, instance_of, le, optional
from torch import Tensor

from flowdistill.algorithms.identities import eulerian_residual, lagrangian_residual, normalize, pull
from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.interfaces import (
    FlowMap,
    GeneratingVelocity,
    Objective,
    ObjectiveOutput,
    States,
    TargetVelocity,
    Teacher,
)
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import EndSampler, LogitNormal
from flowdistill.velocities.estimators import Jvp
from flowdistill.velocities.targets import TeacherVelocity

CITATION = """\
@inproceedings{sabour2025ayf,
  title     = {Align Your Flow: Scaling Continuous-Time Flow Map Distillation},
  author    = {Sabour, Amirmojtaba and Fidler, Sanja and Kreis, Karsten},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
}"""


@attrs.define(kw_only=True, slots=False)
class AlignYourFlow(Objective):
    """What both objectives share: the residual R of an identity, normalised to R / (|R| + c), moves F.

    The paper moves the end X = x - (t - s) F of a jump, weighted by w(t, s). With w = 1/(t - s) that is a move of F
    itself, which stays in place as s approaches t.

    Attributes:
        ends: law of the end time s, conditioned on s <= t.
        estimator: how the derivative of F is computed.
        normalization: c, with |R| over all elements of a sample; None leaves R as it is.
    """

    citation = CITATION

    ends: EndSampler = attrs.field(factory=lambda: LogitNormal(mean=-0.8, std=1.0), validator=instance_of(EndSampler))
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    normalization: float | None = attrs.field(factory=lambda: 0.1, validator=optional(gt(0.0)))

    @abstractmethod
    def residual(
        self, student: FlowMap, teacher: Teacher | None, states: States, s: Tensor, *, step: int
    ) -> tuple[Tensor, Tensor]:
        """F and R for jumps from the states to s (B,)."""

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The regression of F onto sg(F - R / (|R| + c)); the metrics are those of R itself."""
        s = self.ends.sample_below(states.t, generator)
        average, residual = self.residual(student, teacher, states, s, step=step)
        output = pull(average, residual)
        if self.normalization is None:
            return output
        return attrs.evolve(output, loss=pull(average, normalize(residual, self.normalization)).loss)


@register_objective("ayf_emd")
@attrs.define(kw_only=True)
class AyfEmd(AlignYourFlow, VelocityObjective):
    """Eulerian map distillation: where a jump lands must not depend on where on a trajectory it starts.

        R = F - u + w (t - s) D_t F,   D_t F = (d_x F) u + d_t F

    At s = 0 it is continuous-time consistency, as s approaches t flow matching. The factor w grows from 0, where R is
    F - u, to ``final`` in the course of training. Below 1 the solution is not the flow map but the mean velocity on
    the way with the density (a/(t - s))^(1/w - 1) / (w (t - s)) at a distance a from s: the start counts for more.

    Attributes:
        velocity: u in target and tangent: the teacher's, or the conditional one of the data, for which normalised
            residuals are biased where samples have few dimensions.
        ends: see `AlignYourFlow`.
        estimator: of D_t F.
        normalization: see `AlignYourFlow`.
        warmup: training steps in which w would reach 1; 0 is none.
        final: the largest w, in (0, 1]; 1 is exact.
    """

    velocity: TargetVelocity = attrs.field(factory=TeacherVelocity, validator=instance_of(TargetVelocity))
    warmup: int = attrs.field(default=10_000, validator=ge(0))
    final: float = attrs.field(default=0.99, validator=and_(gt(0.0), le(1.0)))

    def residual(
        self, student: FlowMap, teacher: Teacher | None, states: States, s: Tensor, *, step: int
    ) -> tuple[Tensor, Tensor]:
        """That of the Eulerian identity; one evaluation of the teacher."""
        velocity = self.velocity.velocity(student, teacher, states)
        warmup = min(step / self.warmup, self.final) if self.warmup else self.final
        return eulerian_residual(
            student, velocity, self.estimator, states.x, states.t, s, states.condition, warmup=warmup, step=step
        )


@register_objective("ayf_lmd")
@attrs.define(kw_only=True)
class AyfLmd(AlignYourFlow):
    """Lagrangian map distillation: the end of a jump must move with the teacher's velocity there.

        R = dX/ds - u(X, s) = F - (t - s) dF/ds - u(X, s)

    From noise alone (t = 1) it is the residual of FreeFlow's prediction.

    Attributes:
        ends: see `AlignYourFlow`.
        estimator: of dF/ds.
        normalization: see `AlignYourFlow`.
    """

    def residual(
        self, student: FlowMap, teacher: Teacher | None, states: States, s: Tensor, *, step: int
    ) -> tuple[Tensor, Tensor]:
        """That of the Lagrangian identity; one evaluation of the teacher."""
        assert teacher is not None
        return lagrangian_residual(
            student, teacher.velocity, self.estimator, states.x, states.t, s, states.condition, step=step
        )
