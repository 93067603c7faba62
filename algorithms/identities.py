"""The identities that define a flow map, as residuals that vanish at the teacher's own map.

Each function evaluates a student F on a batch and returns F with a graph together with a detached residual R of the
same shape, for which descent along -R moves F towards the solution. `pull` turns the pair into a loss with that
gradient.

    identity    statement, X(x, t, s) = x - (t - s) F            residual
    Lagrangian  dX(x, t, s)/ds = u(X(x, t, s), s)                F - (t - s) dF/ds - u(X, s)
    Eulerian    F = u(x, t) - (t - s) D_t F                      F - u + (t - s) D_t F
    semigroup   X(x, t, s) = X(X(x, t, r), r, s)                 F - [(t - r) F_1 + (r - s) F_2] / (t - s)
    secant      F(x, t, s) = E_r u(X(x, t, r), r), r ~ U(s, t)   F - u(X(x, t, r), r)
    end point   the same from a state at r, x_t = X(x_r, r, t)   F(x_t, t, s) - u(x_r, r)
    velocity    F(x, t, t) = u(x, t)                             F - u
    noising     velocity of the noised student is the teacher's  v_N(x_r, r) - u(x_r, r)

A `Field` is a velocity as a function of (x, t, condition): the method ``velocity`` of a teacher, or that of a flow map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flowdistill.differentiation import evaluate
from flowdistill.interfaces import (
    Condition,
    FlowMap,
    GeneratingVelocity,
    NoisingVelocity,
    ObjectiveOutput,
    Teacher,
)
from flowdistill.paths import expand_time, interpolate

Field: TypeAlias = Callable[[Tensor, Tensor, Condition], Tensor]


def lagrangian_residual(
    student: FlowMap,
    field: Field,
    estimator: GeneratingVelocity,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Condition,
    *,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """F and dX/ds - u(X, s): the end of the jump must move with the velocity ``field`` there.

    An estimator that keeps the graph of the derivative gives the residual a graph; the field's value has none.
    """
    average, generating = estimator.velocity(student, x, t, s, condition, step=step)
    with torch.no_grad():
        target = field(x - expand_time(t - s, x) * average, s, condition)
    return average, generating - target


def eulerian_residual(
    student: FlowMap,
    velocity: Tensor,
    estimator: GeneratingVelocity,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Condition,
    *,
    tangent: Tensor | None = None,
    warmup: Tensor | float = 1.0,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """F and F - u + (t - s) D_t F: where the jump lands must not depend on where on a trajectory it starts.

    An estimator that keeps the graph of the derivative gives the residual a graph.

    Args:
        student: F.
        velocity: dx/dt at (x, t): the teacher's, or the conditional one n - x_0, which makes the residual right only on
            average.
        estimator: of the derivative D_t F = (d_x F) dx/dt + d_t F.
        x: states.
        t: times.
        s: ends.
        condition: labels and guidance.
        tangent: dx/dt in the derivative; None is ``velocity``.
        warmup: factor of the derivative, a number or (B,); below 1 the solution lies between the velocity and the
            flow map.
        step: of training.
    """
    tangent = velocity if tangent is None else tangent
    average, slope = estimator.derivative(student, x, t, s, condition, dx=tangent, dt=1.0, step=step)
    value = average if slope.requires_grad else average.detach()
    return average, value - velocity + expand_time(warmup * (t - s), x) * slope


def semigroup_residual(
    student: FlowMap,
    target: FlowMap | Field,
    first: Tensor,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    s: Tensor,
    condition: Condition,
) -> tuple[Tensor, Tensor]:
    """F and F - [(t - r) F_1 + (r - s) F_2] / (t - s): one jump must land where two jumps land.

    Args:
        student: F.
        target: gives F_2 = F(x_r, r, s) at x_r = x - (t - r) F_1, without a graph: the student, an average of it, or
            any velocity there.
        first: F_1, the average velocity over [r, t]: of the target itself, or for r near t a velocity at (x, t).
        x: states.
        t: times, t >= s; where they are equal the residual is F - F_2.
        r: where the two jumps meet, s <= r <= t.
        s: ends.
        condition: labels and guidance.
    """
    average = evaluate(student, x, t, s, condition)
    with torch.no_grad():
        moved = x - expand_time(t - r, x) * first
        if isinstance(target, FlowMap):
            second = target.average_velocity(moved, r, s, condition)
        else:
            second = target(moved, r, condition)
        share = expand_time((t - r) / (t - s).clamp_min(torch.finfo(t.dtype).tiny), x)
        return average, average.detach() - share * first - (1 - share) * second


def secant_residual(
    student: FlowMap, field: Field, x: Tensor, t: Tensor, r: Tensor, s: Tensor, condition: Condition
) -> tuple[Tensor, Tensor]:
    """F and F - u(X(x, t, r), r), whose mean over r ~ U(s, t) vanishes: the average velocity is the mean velocity."""
    average = evaluate(student, x, t, s, condition)
    with torch.no_grad():
        return average, average - field(student(x, t, r, condition), r, condition)


def end_point_residual(
    student: FlowMap, velocity: Tensor, x: Tensor, r: Tensor, t: Tensor, s: Tensor, condition: Condition
) -> tuple[Tensor, Tensor]:
    """F(x_t, t, s) and F - u(x, r) at x_t = X(x, r, t), without a graph: the secant identity from a state at r.

    The mean of the residual vanishes where r is uniform between s and t for each x_t. That holds for states x at r of
    the teacher's own distribution, whose images x_t have one distribution whatever r is, and a law of (t, s) given r
    for which r is uniform given (t, s).

    Args:
        student: F, which is asked for jumps to later times as well.
        velocity: dx/dt at (x, r): the teacher's, or the conditional one n - x_0, whose mean given x_t is the same since
            x_t is a function of x.
        x: states.
        r: their times, between s and t.
        t: where the jump starts; later or earlier than s.
        s: ends.
        condition: labels and guidance.
    """
    with torch.no_grad():
        start = student(x, r, t, condition)
    average = evaluate(student, start, t, s, condition)
    return average, average.detach() - velocity


def velocity_residual(
    student: FlowMap, velocity: Tensor, x: Tensor, t: Tensor, condition: Condition
) -> tuple[Tensor, Tensor]:
    """F(x, t, t) and F - u: on the diagonal the average velocity is the velocity."""
    average = evaluate(student, x, t, t, condition)
    return average, average.detach() - velocity


def noising_residual(
    student: FlowMap,
    teacher: Teacher,
    estimator: NoisingVelocity,
    x: Tensor,
    t: Tensor,
    noise: Tensor,
    r: Tensor,
    condition: Condition,
) -> tuple[Tensor, Tensor, Tensor]:
    """F(x, t, 0) and v_N(x_r, r) - u(x_r, r) at the student's sample X(x, t, 0) noised to time r.

    Since u = -(x + t score)/(1 - t), moving the sample along v_N - u moves it along the teacher's score minus
    the student's, and the sample is x - t F. The third tensor is the teacher's own error u(x_r, r) - (n - X),
    detached.
    """
    average = evaluate(student, x, t, torch.zeros_like(t), condition)
    with torch.no_grad():
        samples = x - expand_time(t, x) * average
        noised = interpolate(samples, noise, r)
        student_velocity = estimator.velocity(noised, r, condition, samples=samples)
        teacher_velocity = teacher.velocity(noised, r, condition)
        return average, student_velocity - teacher_velocity, teacher_velocity - (noise - samples)


def normalize(residual: Tensor, constant: float) -> Tensor:
    """R / (|R| + c), with the norm over all elements of a sample: a gradient of nearly equal size at all samples."""
    norm = residual.flatten(1).norm(dim=1)
    return residual / expand_time(norm + constant, residual)


def attach(average: Tensor, residual: Tensor) -> Tensor:
    """The residual with a graph: its own, or else that of F, so that descent on |R|^2 moves F along -R."""
    return residual if residual.requires_grad else average - (average.detach() - residual)


def pull(
    average: Tensor,
    residual: Tensor,
    *,
    power: float = 0.0,
    eps: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    scale: Tensor | None = None,
) -> ObjectiveOutput:
    """The weighted regression of F onto sg(F - R), averaged over the batch.

        loss = a w |F - sg(F - R)|^2,   w = (|R|^2 + eps)^-power,

    where the squared norm is the mean or the sum over the elements of a sample. The gradient with respect to F is
    2 a w R (over the number of elements for the mean). A residual with a graph is itself the distance, a w |R|^2 with
    a detached weight. The metric ``error`` is the unweighted squared norm.

    Args:
        average: F (B, ...), with a graph.
        residual: R (B, ...).
        power: exponent of the weight; 0 is plain least squares, 1/2 normalises the gradient of each sample, and 1
            has the gradient of the logarithm of the squared norm.
        eps: added to the squared norm in the weight, > 0 where ``power`` is not 0.
        reduction: how the squared norm adds up elements.
        scale: a (B,), a further weight of each sample; None is 1.
    """
    reduce = torch.mean if reduction == "mean" else torch.sum
    error = reduce(residual.detach().square().flatten(1), dim=1)
    weight = (error + eps) ** -power if power else torch.ones_like(error)
    if scale is not None:
        weight = weight * scale
    distance = reduce(attach(average, residual).square().flatten(1), dim=1)
    residual_norm = residual.detach().flatten(1).norm(dim=1).mean()
    return ObjectiveOutput((weight * distance).mean(), {"error": error.mean()}, residual_norm)
