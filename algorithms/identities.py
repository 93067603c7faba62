"""The identities that define a flow map, as residuals that vanish at the teacher's own map.

Each function evaluates a student F on a batch and returns F with a graph together with a detached residual R of the
same shape, for which descent along -R moves F towards the solution. `pull` turns the pair into a loss with that
gradient.

    identity    statement, X(x, t, s) = x - (t - s) F            residual
    Lagrangian  dX(x, t, s)/ds = u(X(x, t, s), s)                F - (t - s) dF/ds - u(X, s)
    Eulerian    F = u(x, t) - (t - s) D_t F                      F - u + (t - s) D_t F
    velocity    F(x, t, t) = u(x, t)                             F - u
    noising     velocity of the noised student is the teacher's  v_N(x_r, r) - u(x_r, r)
"""

from __future__ import annotations

from typing import Literal

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


def lagrangian_residual(
    student: FlowMap,
    teacher: Teacher,
    estimator: GeneratingVelocity,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Condition,
    *,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """F and dX/ds - u(X, s): the end of the jump must move with the teacher's velocity there."""
    average, generating = estimator.velocity(student, x, t, s, condition, step=step)
    with torch.no_grad():
        end = x - expand_time(t - s, x) * average
        return average, generating - teacher.velocity(end, s, condition)


def eulerian_residual(
    student: FlowMap,
    velocity: Tensor,
    estimator: GeneratingVelocity,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    condition: Condition,
    *,
    step: int = 0,
) -> tuple[Tensor, Tensor]:
    """F and F - u + (t - s) D_t F: where the jump lands must not depend on where on a trajectory it starts.

    ``velocity`` is dx/dt at (x, t): the teacher's, or the conditional one n - x_0, which makes the residual right only
    on average.
    """
    average, slope = estimator.derivative(student, x, t, s, condition, dx=velocity, dt=1.0, step=step)
    return average, average.detach() - velocity + expand_time(t - s, x) * slope


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
    z: Tensor,
    noise: Tensor,
    r: Tensor,
    condition: Condition,
) -> tuple[Tensor, Tensor]:
    """F(z, 1, 0) and v_N(x_r, r) - u(x_r, r) at the student's sample noised to time r.

    Since u = -(x + t score)/(1 - t), moving the sample along v_N - u moves it along the teacher's score minus
    the student's, and the sample is z - F.
    """
    one = torch.ones_like(r)
    average = evaluate(student, z, one, torch.zeros_like(r), condition)
    with torch.no_grad():
        samples = z - average
        x = interpolate(samples, noise, r)
        student_velocity = estimator.velocity(x, r, condition, samples=samples)
        return average, student_velocity - teacher.velocity(x, r, condition)


def pull(
    average: Tensor,
    residual: Tensor,
    *,
    power: float = 0.0,
    eps: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
) -> ObjectiveOutput:
    """The weighted regression of F onto sg(F - R), averaged over the batch.

        loss = w |F - sg(F - R)|^2,   w = (|R|^2 + eps)^-power,

    where the squared norm is the mean or the sum over the elements of a sample. The gradient with respect to F is
    2 w R (over the number of elements for the mean); the metric ``error`` is the unweighted squared norm.

    Args:
        average: F (B, ...), with a graph.
        residual: R (B, ...), detached.
        power: exponent of the weight; 0 is plain least squares, 1/2 normalises the gradient of each sample, and 1
            has the gradient of the logarithm of the squared norm.
        eps: added to the squared norm in the weight, > 0 where ``power`` is not 0.
        reduction: how the squared norm adds up elements.
    """
    reduce = torch.mean if reduction == "mean" else torch.sum
    error = reduce(residual.square().flatten(1), dim=1)
    weight = (error + eps) ** -power if power else torch.ones_like(error)
    distance = reduce((average - (average.detach() - residual)).square().flatten(1), dim=1)
    residual_norm = residual.flatten(1).norm(dim=1).mean()
    return ObjectiveOutput((weight * distance).mean(), {"error": error.mean()}, residual_norm)
