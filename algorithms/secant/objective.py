"""The secant objectives."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import and_, ge, instance_of, le
from torch import Tensor

from flowdistill.algorithms.identities import Field, end_point_residual, pull, secant_residual
from flowdistill.algorithms.trajectory import TrajectoryObjective, VelocityObjective
from flowdistill.interfaces import FlowMap, ObjectiveOutput, States, TargetVelocity, Teacher
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import TimeSampler, WithPointMass
from flowdistill.velocities.targets import ConditionalVelocity, TeacherVelocity

CITATION = """\
@inproceedings{liu2025secant,
  title     = {Learning to Integrate Diffusion {ODE}s by Averaging the Derivatives},
  author    = {Liu, Wenze and Yue, Xiangyu},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
}"""


@register_objective("sdei")
@attrs.define(kw_only=True)
class SDEI(TrajectoryObjective):
    """Secant distillation by estimated interior points: F(x_t, t, s) is regressed onto u(x_r, r) with r ~ U(s, t).

    The interior point x_r = X(x_t, t, r) is the student's own. The loss at the flow map is the spread of u along the
    path, not 0; the gradient vanishes on average over r. States come from any source, the prior included.

    Attributes:
        velocity: what u is. A velocity that is not the teacher's is known at the states alone, where it trains the
            rows with s = t; at x_r the student's own F(x_r, r, r) takes its place, as in `STEI`.
        ends: law of s given t.
        equal: fraction of the batch with s = t, where the loss is flow matching.
        power: exponent p of the weight 1 / (squared residual + eps)^p; above 0 it biases what vanishes only on average.
        eps: see ``power``.
        reduction: how the squared residual adds up elements; belongs to ``power`` and ``eps``.
    """

    citation = CITATION

    equal: float = attrs.field(default=0.0, validator=and_(ge(0.0), le(1.0)))

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
        """That of the secant identity at one r for each state."""
        field: Field = student.velocity
        if self.velocity.needs_teacher:
            assert teacher is not None
            field = teacher.velocity
        unit = torch.rand(len(s), generator=generator, device=s.device)
        r = s + unit.to(s.dtype) * (states.t - s)
        return secant_residual(student, field, states.x, states.t, r, s, states.condition)


@register_objective("stei")
@attrs.define(kw_only=True)
class STEI(SDEI):
    """Secant training by estimated interior points: F(x_r, r, r) for u(x_r, r), and flow matching on the diagonal.

    The loss is the mean over all rows, so a fraction e of rows with s = t weighs flow matching by
    lambda = e / (1 - e) relative to the secant loss; lambda = 1 is half of the rows.

    Attributes:
        velocity: of flow matching; `ConditionalVelocity` can mix guidance in.
        ends: see `SDEI`.
        equal: see `SDEI`.
        power: see `SDEI`.
        eps: see `SDEI`.
        reduction: see `SDEI`.
    """

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    equal: float = attrs.field(default=0.5, validator=and_(ge(0.0), le(1.0)))


@register_objective("sdee")
@attrs.define(kw_only=True)
class SDEE(VelocityObjective):
    """Secant distillation by estimated end points: F(x_t, t, s) is regressed onto u(x_r, r) at the state x_r.

    The end point x_t = X(x_r, r, t) is the student's own, so what the jump to t lands on must be learnt as well: of the
    pairs (t, s) half are exchanged, and train F from the earlier to the later time.

    The loss at the flow map is the spread of u along the path, not 0; the gradient vanishes on average where the secant
    identity holds:

    - r is uniform given (t, s). Two cuts of [0, 1] are drawn independently of r, and t and s are the ends of the part
      in which r falls; for that the times of the states must be uniform on [0, 1].
    - x_t tells nothing about r. For that the states must have the distribution that the velocity transports: noised
      data of the teacher's own distribution, or states on the teacher's trajectories.

    Attributes:
        velocity: u at the states: the teacher's, or the conditional one of the data, as in `STEE`.
        cuts: law of the cuts; one at 0 or 1 cuts nothing.
    """

    citation = CITATION

    velocity: TargetVelocity = attrs.field(factory=TeacherVelocity, validator=instance_of(TargetVelocity))
    cuts: TimeSampler = attrs.field(factory=lambda: WithPointMass(fraction=0.5), validator=instance_of(TimeSampler))

    def pairs(self, r: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Starts t and ends s (B,) on both sides of the times r (B,)."""
        cuts = torch.stack([self.cuts.sample(len(r), generator).to(r.dtype) for _ in range(2)])
        earlier = torch.where(cuts < r, cuts, 0.0).amax(0)
        later = torch.where(cuts < r, 1.0, cuts).amin(0)
        exchanged = torch.rand(len(r), generator=generator, device=r.device) < 0.5
        return torch.where(exchanged, earlier, later), torch.where(exchanged, later, earlier)

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The squared residual; one evaluation of the velocity and two of the student."""
        if step == 0 and len(states) > 1 and bool((states.t == states.t[0]).all()):
            raise ConfigError(
                f"sdee and stee need states at uniform times, as of @noised_data() or @teacher_trajectories(): "
                f"all of these have the time {float(states.t[0]):g}"
            )
        velocity = self.velocity.velocity(student, teacher, states)
        t, s = self.pairs(states.t, generator)
        return pull(*end_point_residual(student, velocity, states.x, states.t, t, s, states.condition))


@register_objective("stee")
@attrs.define(kw_only=True)
class STEE(SDEE):
    """Secant training by estimated end points: F(x_t, t, s) is regressed onto n - x_0 of the state x_r.

    It is unbiased, since x_t is a function of x_r, where the mean of n - x_0 is u(x_r, r).

    Attributes:
        velocity: see `SDEE`; `ConditionalVelocity` can mix guidance in.
        cuts: see `SDEE`.
    """

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
