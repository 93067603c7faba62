"""The secant objectives."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import gt, instance_of, le, optional
from torch import Tensor

from flowdistill.algorithms.identities import Field, Residual, end_point, pull, secant
from flowdistill.algorithms.trajectory import TrajectoryObjective, VelocityObjective
from flowdistill.interfaces import ObjectiveOutput, Pairs, States, Step, TimeSampler
from flowdistill.pairs import Below, Diagonal, WithDiagonal
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import WithPointMass
from flowdistill.velocities import ConditionalVelocity


@register_objective(
    "sdei",
    presets={
        "stei": {
            "target": attrs.Factory(ConditionalVelocity),
            "pairs": attrs.Factory(lambda: WithDiagonal(pairs=Below(), share=0.5)),
        }
    },
)
@attrs.define(kw_only=True, slots=False)
class SDEI(TrajectoryObjective):
    """Secant distillation by estimated interior points: F(x_t, t, s) is regressed onto u(x_r, r) with r ~ U(s, t).

    The interior point x_r = X(x_t, t, r) is the student's own.
    The loss at the flow map is the spread of u along the path, not 0; the gradient vanishes on average over r.
    States come from any source, the prior included.

    A velocity that is not the teacher's is known at the states alone, where it trains the rows with s = t.
    At x_r the student's own F(x_r, r, r) takes its place.
    ``stei``, secant training by estimated interior points, is this.
    Its loss is the mean over all rows, so a share e on the diagonal weighs flow matching by e / (1 - e) relative to the
    secant loss.
    With ``frozen`` the teacher's velocity stands at x_r, as in the authors' code; flow matching is then told the
    guidance scale 1 where the student is told scales.
    """

    citation = bibtex("liu2025secant")

    pairs: Pairs = attrs.field(factory=Below, validator=instance_of(Pairs))
    frozen: bool = attrs.field(default=False, validator=instance_of(bool))
    """Whether the velocity at x_r is the teacher's also where the velocity at the states is the data's."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the velocity at the states or at x_r is the teacher's."""
        return self.frozen or super().needs_teacher

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The weighted squared residual; the data's velocity on the diagonal is that of the guidance scale 1."""
        scale = states.condition.scale
        if self.frozen and self.target.needs_data and scale is not None:
            diagonal = torch.arange(len(states), device=scale.device) < self.pairs.on_diagonal(len(states))
            states = attrs.evolve(states, condition=states.condition.guided(scale=scale.masked_fill(diagonal, 1.0)))
        return super().loss(states, step)

    def residual(self, states: States, step: Step) -> Residual:
        """The residual of the secant identity at one r for each state."""
        field: Field = self.teacher.velocity if self.needs_teacher else self.student.velocity
        unit = torch.rand(len(states), generator=step.generator, device=states.s.device)
        r = states.s + unit.to(states.s.dtype) * (states.t - states.s)
        return secant(self.student, field, states, r)


@register_objective("sdee", presets={"stee": {"target": attrs.Factory(ConditionalVelocity)}})
@attrs.define(kw_only=True, slots=False)
class SDEE(VelocityObjective):
    """Secant distillation by estimated end points: F(x_t, t, s) is regressed onto u(x_r, r) at the state x_r.

    The end point x_t = X(x_r, r, t) is the student's own, so what the jump to t lands on must be learnt as well: of the
    pairs (t, s) half are exchanged, and train F from the earlier to the later time.

    The loss at the flow map is the spread of u along the path, not 0.
    The gradient vanishes on average if the secant identity holds:

    - r is uniform given (t, s). The cuts of [0, 1] are drawn independently of r, and t and s are the ends of the part
      in which r falls; for that the times of the states must be uniform on [0, 1].
    - x_t tells nothing about r. For that the states must have the distribution that the velocity transports: noised
      data of the teacher's own distribution, or states on the teacher's trajectories.

    ``stee``, secant training by estimated end points, has the conditional velocity n - x_0 for u.
    It is unbiased, since x_t is a function of x_r, where the mean of n - x_0 is u(x_r, r).
    """

    citation = bibtex("liu2025secant")
    needs_all_times = True

    pairs: Pairs = attrs.field(factory=Diagonal, validator=instance_of(Diagonal))
    """The law of the times r of the states, which is to be uniform."""
    cuts: TimeSampler = attrs.field(factory=lambda: WithPointMass(fraction=0.5), validator=instance_of(TimeSampler))
    """The law of two cuts; one at 0 or 1 cuts nothing."""
    longest: float | None = attrs.field(default=None, validator=optional([gt(0.0), le(1.0)]))
    """The length of the longest jump: cuts lie at equal distances d ~ U(0, longest) from a uniform first one.
    None is two cuts of the law ``cuts``."""

    def around(self, r: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Starts t and ends s (B,) on both sides of the times r (B,)."""
        if self.longest is None:
            cuts = torch.stack([self.cuts.sample(len(r), generator).to(r.dtype) for _ in range(2)])
            earlier = torch.where(cuts < r, cuts, 0.0).amax(0)
            later = torch.where(cuts < r, 1.0, cuts).amin(0)
        else:
            length, place = torch.rand(2, len(r), generator=generator, device=r.device).to(r.dtype)
            length = length * self.longest
            earlier = (r - place * length).clamp_min(0.0)
            later = (r + (1 - place) * length).clamp(max=1.0)
        exchanged = torch.rand(len(r), generator=generator, device=r.device) < 0.5
        return torch.where(exchanged, earlier, later), torch.where(exchanged, later, earlier)

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The squared residual; one evaluation of the velocity and two of the student."""
        t, s = self.around(states.t, step.generator)
        return pull(end_point(self.student, self.target(states), states, t, s))
