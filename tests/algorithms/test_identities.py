"""Residuals and gradients vanish at the exact flow map, nowhere else; and every planted mistake is caught."""

import hypothesis.strategies as st
import pytest
import torch
from exact import below, bound, gaussian_teachers, gradient, judge, loss_of, path_states, perturbed, prior_states
from hypothesis import given, settings

from flowdistill import OBJECTIVES, Condition, States
from flowdistill.algorithms import identities
from flowdistill.algorithms.freeflow import FreeFlowPrediction
from flowdistill.algorithms.freeflow import objective as freeflow
from flowdistill.algorithms.meanflow import objective as meanflow
from flowdistill.interfaces import GeneratingVelocity
from flowdistill.pairs import WithDiagonal
from flowdistill.teachers.gaussian import (
    GaussianFlowMap,
    GaussianTeacher,
    ProductMixtureFlowMap,
    ProductMixtureTeacher,
)
from flowdistill.velocities import FiniteDifference, Jvp

MeanFlowDistillation = OBJECTIVES.get("meanflow_distillation")

POWERS = (0.0, 0.5, 1.0)


def prediction(power=0.0) -> FreeFlowPrediction:
    return FreeFlowPrediction(estimator=Jvp(), power=power, eps=1e-3)


def distillation(power=0.0) -> object:
    return MeanFlowDistillation(power=power, eps=1e-3, pairs=WithDiagonal(share=0.25))


CASES = {"freeflow": (prediction, prior_states), "meanflow": (distillation, path_states)}


@pytest.mark.parametrize("case", CASES)
@given(teacher=gaussian_teachers(), power=st.sampled_from(POWERS), seed=st.integers(0, 1000))
def test_exact_map_has_no_residual_and_no_gradient(case, teacher, power, seed):
    build, draw = CASES[case]
    states = draw(teacher, seed=seed)
    scale = float(teacher.velocity(states.x, states.t).square().flatten(1).sum(1).mean().sqrt())
    residual, slope = judge(build(power), GaussianFlowMap(teacher), teacher, states)
    assert residual <= 1e-6 * scale
    assert slope <= 1e-6 * scale / 1e-3**power
    residual, slope = judge(build(power), perturbed(teacher), teacher, states)
    assert residual > 1e-2
    assert slope > 1e-3


@pytest.mark.parametrize("case", CASES)
@given(seed=st.integers(0, 1000))
@settings(max_examples=5)
def test_exact_map_of_a_mixture(case, seed):
    """The same on a multi-modal map, whose Jacobian is far from constant."""
    g = torch.Generator().manual_seed(seed)
    means = torch.tensor([[-2.0, 1.5], [-1.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    variances = 0.1 + torch.rand(3, 2, generator=g, dtype=torch.float64)
    teacher = ProductMixtureTeacher(means, variances, torch.full((3, 2), 0.5, dtype=torch.float64))
    build, draw = CASES[case]
    states = draw(teacher, n=32, seed=seed)
    student = ProductMixtureFlowMap(teacher)
    residual, slope = judge(build(), student, teacher, states)
    assert residual < 1e-6
    assert slope < 1e-6
    with torch.no_grad():
        student.shift += 0.1
    residual, slope = judge(build(), student, teacher, states)
    assert residual > 1e-2
    assert slope > 1e-2


# Mistakes that the exact map finds: each replaces what an objective calls, and the judge must see it.


def _lagrangian(change):
    """The Lagrangian residual with something changed in F - (t - s) dF/ds - u(X, s)."""

    def residual(estimator, field, jump, progress=0.0):
        average, slope = estimator.derivative(jump, ds=1.0)
        gap = identities.expand_time(jump.t - jump.s, jump.x)
        with torch.no_grad():
            value = change(average.detach(), gap, slope, field, jump.x, jump.s, jump.condition)
        return identities.Residual(average, value)

    return residual


LAGRANGIAN = {
    "right": (lambda f, gap, d, u, x, s, c: f - gap * d - u(x - gap * f, s, c), False),
    "derivative of the wrong sign": (lambda f, gap, d, u, x, s, c: f + gap * d - u(x - gap * f, s, c), True),
    "no derivative": (lambda f, gap, d, u, x, s, c: f - u(x - gap * f, s, c), True),
    "factor t - s dropped": (lambda f, gap, d, u, x, s, c: f - d - u(x - gap * f, s, c), True),
    "teacher at the start": (lambda f, gap, d, u, x, s, c: f - gap * d - u(x, s, c), True),
    "teacher at the start time": (
        lambda f, gap, d, u, x, s, c: f - gap * d - u(x - gap * f, s + gap[:, 0], c),
        True,
    ),
    "student in the other sign": (lambda f, gap, d, u, x, s, c: f - gap * d - u(x + gap * f, s, c), True),
    "teacher in the other sign": (lambda f, gap, d, u, x, s, c: f - gap * d + u(x - gap * f, s, c), True),
}


@pytest.mark.parametrize("name", LAGRANGIAN)
def test_mutants_of_the_lagrangian_identity(name, monkeypatch):
    change, wrong = LAGRANGIAN[name]
    monkeypatch.setattr(freeflow, "lagrangian", _lagrangian(change))
    teacher = GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())
    residual, slope = judge(prediction(), GaussianFlowMap(teacher), teacher, prior_states(teacher, n=512))
    assert (residual > 0.1) == wrong
    assert (slope > 0.05) == wrong


class _Directed(GeneratingVelocity):
    """A derivative whose direction is changed on its way to `Jvp`."""

    def __init__(self, change):
        self.change = change

    def derivative(self, jump, *, dx=None, dt=0.0, ds=0.0, progress=0.0):
        dx, dt, ds = self.change(dx, dt, ds)
        return bound(Jvp(), self.student).derivative(jump, dx=dx, dt=dt, ds=ds)


DIRECTIONS = {
    "right": (lambda v, dt, ds: (v, 1.0, 0.0), False),
    "(v, 0, 0)": (lambda v, dt, ds: (v, 0.0, 0.0), True),
    "(0, 1, 0)": (lambda v, dt, ds: (torch.zeros_like(v), 1.0, 0.0), True),
    "(v, 0, 1)": (lambda v, dt, ds: (v, 0.0, 1.0), True),
    "(v, 1, 1)": (lambda v, dt, ds: (v, 1.0, 1.0), True),
    "(-v, -1, 0)": (lambda v, dt, ds: (-v, -1.0, 0.0), True),
    "(-v, 1, 0)": (lambda v, dt, ds: (-v, 1.0, 0.0), True),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_mutants_of_the_eulerian_tangent(name):
    change, wrong = DIRECTIONS[name]
    teacher = GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())
    objective = distillation()
    objective.estimator = _Directed(change)
    residual, slope = judge(objective, GaussianFlowMap(teacher), teacher, path_states(teacher, n=512))
    assert (residual > 0.1) == wrong
    assert (slope > 0.05) == wrong


EULERIAN = {
    "right": (lambda f, v, gap, d: f - v + gap * d, False),
    "factor t - s dropped": (lambda f, v, gap, d: f - v + d, True),
    "derivative of the wrong sign": (lambda f, v, gap, d: f - v - gap * d, True),
    "velocity of the wrong sign": (lambda f, v, gap, d: f + v + gap * d, True),
}


@pytest.mark.parametrize("name", EULERIAN)
def test_mutants_of_the_eulerian_identity(name, monkeypatch):
    change, wrong = EULERIAN[name]

    def residual(estimator, velocity, jump, progress=0.0):
        average, slope = estimator.derivative(jump, dx=velocity, dt=1.0)
        gap = identities.expand_time(jump.t - jump.s, jump.x)
        return identities.Residual(average, change(average.detach(), velocity, gap, slope))

    monkeypatch.setattr(meanflow, "eulerian", residual)
    teacher = GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())
    residual_size, slope = judge(distillation(), GaussianFlowMap(teacher), teacher, path_states(teacher, n=512))
    assert (residual_size > 0.1) == wrong
    assert (slope > 0.05) == wrong


def test_a_conditional_velocity_is_seen_in_the_loss(monkeypatch):
    """The teacher's velocity in the target and another in the tangent leave a residual."""
    teacher = GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())
    states = path_states(teacher, n=512)
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    objective = MeanFlowDistillation(power=0.0, pairs=WithDiagonal(share=0.0))
    objective.estimator = _Directed(lambda v, dt, ds: (v + noise, dt, ds))
    residual, _ = judge(objective, GaussianFlowMap(teacher), teacher, states)
    assert residual > 0.1


# Mistakes that are invisible at the exact map: seen away from it, where the gradient is known in closed form.


def expected_gradient(student, average, residual, weight):
    """2 E[w <R, dF>], with the mean over elements: what a detached target and a detached weight give."""
    scale = 2 * weight[:, None] * residual / residual[0].numel() / len(residual)
    return gradient((scale.detach() * average).sum(), student)


@given(teacher=gaussian_teachers(max_dim=8), power=st.sampled_from(POWERS))
@settings(max_examples=10)
def test_gradient_off_the_optimum_is_that_of_a_detached_target(teacher, power):
    student, states = perturbed(teacher), path_states(teacher)
    estimator = bound(Jvp(), student)
    for residual in (
        identities.lagrangian(estimator, teacher.velocity, states),
        identities.eulerian(estimator, teacher.velocity(states.x, states.t), states),
    ):
        weight = (residual.value.square().mean(1) + 1e-3) ** -power
        wanted = expected_gradient(student, residual.average, residual.value, weight)
        output = identities.pull(residual, power=power, eps=1e-3)
        torch.testing.assert_close(gradient(output.loss, student), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("power", POWERS)
def test_an_undetached_target_or_weight_is_seen(power, monkeypatch):
    """The objective's gradient away from the truth, with a detached residual and with one that has a graph."""
    teacher = GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())
    student, states = perturbed(teacher), prior_states(teacher)
    objective = prediction(power)

    def with_graph(estimator, field, jump, progress=0.0):
        def average(time):
            return student.average_velocity(jump.x, jump.t, time)

        value, slope = torch.func.jvp(average, (jump.s,), (torch.ones_like(jump.s),))
        gap = identities.expand_time(jump.t - jump.s, jump.x)
        residual = value - gap * slope - teacher.velocity(jump.x - gap * value, jump.s)
        kept.append((value, residual))
        return identities.Residual(value, residual)

    def loss_gradient():
        generator = torch.Generator().manual_seed(1)
        return gradient(loss_of(objective, student, teacher, states, step=0, generator=generator).loss, student)

    kept: list = []
    right = loss_gradient()
    monkeypatch.setattr(freeflow, "lagrangian", with_graph)
    mutant = loss_gradient()
    value, residual = kept[0]
    weight = (residual.detach().square().mean(1) + 1e-3) ** -power
    wanted = expected_gradient(student, value, residual.detach(), weight)
    torch.testing.assert_close(right, wanted, rtol=1e-9, atol=1e-12)
    assert (mutant - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("power", POWERS)
def test_pull_weights(power, reduction):
    """The loss and the reported norm against the formula, row by row."""
    g = torch.Generator().manual_seed(0)
    average = torch.randn(5, 3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(5, 3, 2, generator=g, dtype=torch.float64)
    output = identities.pull(identities.Residual(average, residual), power=power, eps=0.01, reduction=reduction)
    squares = residual.square().flatten(1).sum(1) / (6 if reduction == "mean" else 1)
    weight = 1 / (squares + 0.01) ** power
    torch.testing.assert_close(output.loss, (weight * squares).mean())
    (slope,) = torch.autograd.grad(output.loss, average)
    elements = 6 if reduction == "mean" else 1
    torch.testing.assert_close(slope, 2 * weight[:, None, None] * residual / elements / 5)
    torch.testing.assert_close(output.residual_norm, residual.flatten(1).norm(dim=1).mean())
    torch.testing.assert_close(output.metrics["error"], squares.mean())


def test_residuals_are_detached_and_values_are_not():
    teacher = GaussianTeacher(torch.zeros(2).double(), torch.ones(2).double())
    student, states = perturbed(teacher), path_states(teacher)
    for estimator in (Jvp(), FiniteDifference(), FiniteDifference(scheme="central")):
        bound(estimator, student)
        for residual in (
            identities.lagrangian(estimator, teacher.velocity, states),
            identities.eulerian(estimator, states.x, states),
        ):
            assert residual.average.requires_grad
            assert not residual.value.requires_grad
            assert residual.attached.requires_grad


def test_meanflow_from_data_has_no_mean_gradient_at_the_exact_map():
    """Only on average: over 64 batches the mean gradient is within 4 standard errors of zero, in every component."""
    teacher = GaussianTeacher(torch.tensor([0.5, -1.0]).double(), torch.tensor([0.4, 1.5]).double())
    student = GaussianFlowMap(teacher)
    objective = meanflow.MeanFlow(power=0.0, pairs=WithDiagonal(share=0.25))
    gradients = []
    for seed in range(64):
        g = torch.Generator().manual_seed(seed)
        clean, noise = teacher.sample_data(512, g), teacher.sample_prior(512, g)
        t = torch.rand(512, generator=g, dtype=torch.float64)
        x = identities.interpolate(clean, noise, t)
        states = States(x=x, t=t, s=below(t), condition=Condition(), clean=clean, noise=noise)
        loss = loss_of(objective, student, None, states, step=0, generator=g).loss
        gradients.append(gradient(loss, student))
    stacked = torch.stack(gradients)
    error = stacked.std(0) / len(stacked) ** 0.5
    assert (stacked.mean(0).abs() < 4 * error).all()
    moved = perturbed(teacher)
    loss = loss_of(objective, moved, None, states, step=0, generator=g).loss
    assert (gradient(loss, moved).abs() > 4 * error).any()
