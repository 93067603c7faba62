"""The identities that define a flow map, as residuals that vanish at the teacher's own map.

Each function evaluates a student F on a batch of jumps.
It returns F with a graph, and a detached residual R of the same shape: descent along -R moves F towards the solution.
`pull` turns the two into a loss with that gradient.

    identity    statement, X(x, t, s) = x - (t - s) F            residual
    Lagrangian  dX(x, t, s)/ds = u(X(x, t, s), s)                F - (t - s) dF/ds - u(X, s)
    Eulerian    F = u(x, t) - (t - s) D_t F                      F - u + (t - s) D_t F
    semigroup   X(x, t, s) = X(X(x, t, r), r, s)                 F - [(t - r) F_1 + (r - s) F_2] / (t - s)
    secant      F(x, t, s) = E_r u(X(x, t, r), r), r ~ U(s, t)   F - u(X(x, t, r), r)
    end point   the same from a state at r, x_t = X(x_r, r, t)   F(x_t, t, s) - u(x_r, r)
    diagonal    F(x, t, t) = u(x, t)                             F - u
    noising     velocity of the noised student is the teacher's  v_N(x_r, r) - u(x_r, r)

A `Field` is a velocity as a function of (x, t, condition): the method ``velocity`` of a teacher, or that of a flow map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import attrs
import torch
from torch import Tensor

from flowdistill.differentiation import evaluate
from flowdistill.interfaces import (
    Condition,
    FlowMap,
    GeneratingVelocity,
    Jump,
    NoisingVelocity,
    ObjectiveOutput,
    States,
)
from flowdistill.paths import expand_time, interpolate

Field: TypeAlias = Callable[[Tensor, Tensor, Condition], Tensor]


@attrs.frozen(eq=False)
class Residual:
    """What an identity says of a student on a batch."""

    average: Tensor
    """F (B, ...), with a graph."""
    value: Tensor
    """R (B, ...), the residual, detached or with a graph."""

    @property
    def attached(self) -> Tensor:
        """R with a graph, its own or else that of F, so that descent on |R|^2 moves F along -R."""
        return self.value if self.value.requires_grad else self.average - (self.average.detach() - self.value)

    @classmethod
    def join(cls, parts: Sequence[Residual]) -> Residual:
        """The residuals of the parts of a batch as one; with a graph if one of them has one."""
        graph = any(part.value.requires_grad for part in parts)
        values = [part.attached if graph else part.value for part in parts]
        return cls(torch.cat([part.average for part in parts]), torch.cat(values))


def lagrangian(estimator: GeneratingVelocity, field: Field, jump: Jump, progress: float = 0.0) -> Residual:
    """dX/ds - u(X, s): the end of the jump must move with the velocity ``field`` there.

    An estimator that keeps the graph of the derivative gives the residual a graph; the field's value has none.
    """
    average, generating = estimator.estimate(jump, progress)
    with torch.no_grad():
        target = field(jump.land(average), jump.s, jump.condition)
    return Residual(average, generating - target)


def eulerian(
    estimator: GeneratingVelocity,
    velocity: Tensor,
    jump: Jump,
    progress: float = 0.0,
    *,
    tangent: Tensor | None = None,
    warmup: Tensor | float = 1.0,
) -> Residual:
    """F - u + (t - s) D_t F: the end of a jump must not depend on where on a trajectory it starts.

    An estimator that keeps the graph of the derivative gives the residual a graph.

    Args:
        estimator: of the derivative D_t F = (d_x F) dx/dt + d_t F.
        velocity: u, dx/dt at (x, t): the teacher's, or the conditional one n - x_0, for which the residual is right on
            average alone.
        jump: the jumps.
        progress: the part of the training that is done.
        tangent: dx/dt in the derivative; None is ``velocity``.
        warmup: factor of the derivative, a number or (B,); below 1 the solution lies between the velocity and the
            flow map.
    """
    tangent = velocity if tangent is None else tangent
    average, slope = estimator.derivative(jump, dx=tangent, dt=1.0, progress=progress)
    value = average if slope.requires_grad else average.detach()
    return Residual(average, value - velocity + expand_time(warmup * (jump.t - jump.s), jump.x) * slope)


def semigroup(student: FlowMap, second: FlowMap | Field, first: Tensor, jump: Jump, r: Tensor) -> Residual:
    """F - [(t - r) F_1 + (r - s) F_2] / (t - s): one jump must land where two jumps land.

    Args:
        student: F.
        second: gives F_2 = F(x_r, r, s) at x_r = x - (t - r) F_1, without a graph: the student, an average of it, or
            any velocity there.
        first: F_1, the average velocity over [r, t]: of the target itself, or for r near t a velocity at (x, t).
        jump: the jumps; the residual is F - F_2 if t = s.
        r: the times at which the two jumps meet, s <= r <= t.
    """
    x, t, s, condition = jump
    average = evaluate(student, jump)
    with torch.no_grad():
        moved = x - expand_time(t - r, x) * first
        if isinstance(second, FlowMap):
            following = second.average_velocity(moved, r, s, condition)
        else:
            following = second(moved, r, condition)
        share = expand_time((t - r) / (t - s).clamp_min(torch.finfo(t.dtype).tiny), x)
        return Residual(average, average.detach() - share * first - (1 - share) * following)


def secant(student: FlowMap, field: Field, jump: Jump, r: Tensor) -> Residual:
    """F - u(X(x, t, r), r), whose mean over r ~ U(s, t) vanishes: the average velocity is the mean velocity."""
    average = evaluate(student, jump)
    with torch.no_grad():
        return Residual(average, average - field(student(*jump.to(r)), r, jump.condition))


def end_point(student: FlowMap, velocity: Tensor, states: Jump, t: Tensor, s: Tensor) -> Residual:
    """F(x_t, t, s) - u(x, r) at x_t = X(x, r, t), without a graph: the secant identity from states x at times r.

    The mean of the residual vanishes if r is uniform between s and t for each x_t.
    For that the states must be of the teacher's own distribution: their images x_t then have one distribution whatever
    r is.
    And the law of (t, s) given r must make r uniform given (t, s).

    Args:
        student: F, which is asked for jumps to later times as well.
        velocity: dx/dt at (x, r): the teacher's, or the conditional one n - x_0, whose mean given x_t is the same since
            x_t is a function of x.
        states: x and their times r, between s and t.
        t: the times at which the jumps start; later or earlier than s.
        s: the times at which they end.
    """
    with torch.no_grad():
        start = student(*states.to(t))
    average = evaluate(student, Jump(start, t, s, states.condition))
    return Residual(average, average.detach() - velocity)


def diagonal(student: FlowMap, velocity: Tensor, states: Jump) -> Residual:
    """F(x, t, t) - u: on the diagonal the average velocity is the velocity."""
    average = evaluate(student, states.staying())
    return Residual(average, average.detach() - velocity)


def noising(
    student: FlowMap,
    field: Field,
    estimator: NoisingVelocity,
    start: Jump,
    noise: Tensor,
    r: Tensor,
) -> tuple[Residual, Tensor]:
    """v_N(x_r, r) - u(x_r, r) at the student's sample X(x, t, 0) noised to time r.

    Since u = -(x + t score)/(1 - t), moving the sample along v_N - u moves it along the teacher's score minus the
    student's, and the sample is x - t F.
    The second tensor is the error of the field itself, u(x_r, r) - (n - X), detached.
    """
    start = start.to(0.0)
    average = evaluate(student, start)
    with torch.no_grad():
        samples = start.land(average)
        noised = interpolate(samples, noise, r)
        student_velocity = estimator.estimate(noised, r, start.condition, samples=samples)
        teacher_velocity = field(noised, r, start.condition)
        return Residual(average, student_velocity - teacher_velocity), teacher_velocity - (noise - samples)


def noised(samples: Tensor, r: Tensor, condition: Condition, generator: torch.Generator) -> States:
    """Samples as states at times r, with fresh noise."""
    noise = torch.randn(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)
    return States(interpolate(samples, noise, r), r, r, condition, clean=samples, noise=noise)


def normalize(residual: Tensor, constant: float) -> Tensor:
    """R / (|R| + c), with the norm over all elements of a sample: a gradient of nearly equal size at all samples."""
    norm = residual.flatten(1).norm(dim=1)
    return residual / expand_time(norm + constant, residual)


def pull(
    residual: Residual,
    *,
    power: float = 0.0,
    eps: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    scale: Tensor | None = None,
) -> ObjectiveOutput:
    """The weighted regression of F onto sg(F - R), averaged over the batch.

        loss = a w |F - sg(F - R)|^2,   w = (|R|^2 + eps)^-power,

    where the squared norm is the mean or the sum over the elements of a sample.
    The gradient with respect to F is 2 a w R (over the number of elements for the mean).
    A residual with a graph is itself the distance, a w |R|^2 with a detached weight.
    The metric ``error`` is the unweighted squared norm.

    Args:
        residual: F and R.
        power: exponent of the weight; 0 is plain least squares, 1/2 normalises the gradient of each sample, and 1
            has the gradient of the logarithm of the squared norm.
        eps: added to the squared norm in the weight, > 0 if ``power`` is not 0.
        reduction: how the squared norm adds up elements.
        scale: a (B,), a further weight of each sample; None is 1.
    """
    reduce = torch.mean if reduction == "mean" else torch.sum
    detached = residual.value.detach().flatten(1)
    error = reduce(detached.square(), dim=1)
    weight = (error + eps) ** -power if power else torch.ones_like(error)
    if scale is not None:
        weight = weight * scale
    distance = reduce(residual.attached.square().flatten(1), dim=1)
    norm = detached.norm(dim=1)
    return ObjectiveOutput((weight * distance).mean(), {"error": error.mean()}, norm.mean(), (weight * norm).mean())
