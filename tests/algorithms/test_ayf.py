"""Align Your Flow: both identities, the normalised residual, the warm-up and its bias, the limits s = 0 and s = t."""

import itertools

import attrs
import numpy as np
import pytest
import torch
from exact import (
    STEPS,
    assert_exact,
    bound,
    data_states,
    gaussian_teachers,
    gradient,
    judge,
    loss_of,
    path_states,
    perturbed,
    prior_states,
)
from hypothesis import given, settings

from flowdistill import OBJECTIVES, Condition
from flowdistill.algorithms import identities
from flowdistill.algorithms.ayf import AyfEmd, AyfLmd
from flowdistill.algorithms.ayf import objective as ayf
from flowdistill.algorithms.freeflow import FreeFlowPrediction
from flowdistill.guidance import GuidedTeacher
from flowdistill.pairs import WithDiagonal
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.velocities import ConditionalVelocity, Jvp

MeanFlowDistillation = OBJECTIVES.get("meanflow_distillation")

MEAN, VARIANCES = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double()


def teacher():
    return GaussianTeacher(MEAN, VARIANCES)


def emd(**kwargs):
    return AyfEmd(**{"warmup": 0.0, "final": 1.0, **kwargs})


def lmd(**kwargs):
    return AyfLmd(**kwargs)


def evaluate(objective, student, states, step=0, of=None):
    g = torch.Generator().manual_seed(1)
    return loss_of(objective, student, of or teacher(), states, step=step, generator=g)


def close(a, b, rtol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-13)


BUILDERS = {"emd": emd, "lmd": lmd}


@pytest.mark.parametrize("normalization", [0.1, None])
@pytest.mark.parametrize("draw", [path_states, prior_states, data_states])
@pytest.mark.parametrize("name", BUILDERS)
@given(of=gaussian_teachers())
@settings(max_examples=5)
def test_exact_map_has_no_residual_and_no_gradient(name, draw, normalization, of):
    assert_exact(BUILDERS[name](normalization=normalization), of, draw(of))


MUTANTS = {
    "right": (lambda f, u, gap, d: f - u + gap * d, False),
    "derivative of the wrong sign": (lambda f, u, gap, d: f - u - gap * d, True),
    "factor t - s dropped": (lambda f, u, gap, d: f - u + d, True),
    "no derivative": (lambda f, u, gap, d: f - u, True),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_emd_leave_a_residual_at_the_exact_map(name, monkeypatch):
    change, wrong = MUTANTS[name]

    def residual(estimator, velocity, jump, progress, *, warmup):
        average, slope = estimator.derivative(jump, dx=velocity, dt=1.0)
        gap = identities.expand_time(jump.t - jump.s, jump.x)
        return identities.Residual(average, change(average.detach(), velocity, gap, slope))

    monkeypatch.setattr(ayf, "eulerian", residual)
    error, slope = judge(emd(), GaussianFlowMap(teacher()), teacher(), path_states(teacher(), n=512))
    assert (error > 0.1) == wrong
    assert (slope > 0.02) == wrong


# The normalised residual.


def formula(student, average, residual, c):
    """2 E[<R / (|R| + c), dF>] over elements."""
    normalized = residual / (residual.square().sum(1, keepdim=True).sqrt() + c)
    return gradient((2 * normalized.detach() * average).mean(1).mean(), student)


def raw_residual(name, student, states):
    estimator = bound(Jvp(), student)
    if name == "emd":
        found = identities.eulerian(estimator, teacher().velocity(states.x, states.t), states)
    else:
        found = identities.lagrangian(estimator, teacher().velocity, states)
    return found.average, found.value


def ending(states, s):
    """The states with jumps to a time, or to t if that is earlier."""
    return attrs.evolve(states, s=states.t.clamp(max=s))


@pytest.mark.parametrize("name", BUILDERS)
def test_gradient_is_that_of_the_normalised_residual_and_metrics_are_of_the_raw_one(name):
    student, states = perturbed(teacher(), 0.3), ending(path_states(teacher()), 0.2)
    output = evaluate(BUILDERS[name](), student, states)
    average, residual = raw_residual(name, student, states)
    close(gradient(output.loss, student), formula(student, average, residual, 0.1))
    close(output.metrics["error"], residual.square().mean())
    close(output.residual_norm, residual.norm(dim=1).mean())


WRONG_NORMS = {
    "over the batch": lambda r, c: r / (r.norm() + c),
    "root mean square": lambda r, c: r / (r.square().mean(1, keepdim=True).sqrt() + c),
    "constant inside": lambda r, c: r / (r.square().sum(1, keepdim=True) + c).sqrt(),
    "none": lambda r, c: r,
}


@pytest.mark.parametrize("wrong", WRONG_NORMS)
def test_another_normalisation_is_seen(wrong, monkeypatch):
    student, states = perturbed(teacher(), 0.3), ending(path_states(teacher()), 0.2)
    average, residual = raw_residual("emd", student, states)
    monkeypatch.setattr(ayf, "normalize", WRONG_NORMS[wrong])
    output = evaluate(emd(), student, states)
    wanted = formula(student, average, residual, 0.1)
    assert (gradient(output.loss, student) - wanted).norm() > 0.02 * wanted.norm()


# The warm-up.


def test_without_warmup_factor_the_loss_is_the_distance_to_the_velocity():
    """At step 0, at all s."""
    student, states = perturbed(teacher()), path_states(teacher())
    output = evaluate(emd(warmup=0.01, normalization=None), student, states)
    average = student.average_velocity(states.x, states.t, states.s)
    wanted = (average - teacher().velocity(states.x, states.t)).square().mean()
    close(output.loss, wanted)
    close(gradient(output.loss, student), gradient(wanted, student))


def test_warmup_goes_from_0_to_its_final_value(monkeypatch):
    seen = []

    def spy(*args, warmup, **kwargs):
        seen.append(warmup)
        return identities.eulerian(*args, warmup=warmup, **kwargs)

    monkeypatch.setattr(ayf, "eulerian", spy)
    for step in (0, 500, 1000, 1960, 2000, STEPS):
        evaluate(AyfEmd(warmup=0.2), GaussianFlowMap(teacher()), path_states(teacher(), n=2), step)
    assert seen == pytest.approx([0.0, 0.25, 0.5, 0.98, 0.99, 0.99])


class Weighted(GaussianFlowMap):
    """The mean of the velocities on the way with the density a^(1/w - 1) / w at the share a of the way from s."""

    w = 0.5

    def average_velocity(self, x, t, s, condition=None):
        nodes, weights = np.polynomial.legendre.leggauss(24)
        total = 0
        for a, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            r = s + a * (t - s)
            x_r = x - identities.expand_time(t - r, x) * super().average_velocity(x, t, r)
            total = total + weight * a ** (1 / self.w - 1) / self.w * super().average_velocity(x_r, r, r)
        return total


def test_with_a_warmup_factor_below_1_the_solution_lies_between_the_velocity_and_the_map():
    """u along a trajectory of a Gaussian is monotone, so a mean that favours the start is on the start's side."""
    student, exact, states = Weighted(teacher()), GaussianFlowMap(teacher()), path_states(teacher())
    half = emd(final=0.5)
    error, slope = judge(half, student, teacher(), states)
    assert error < 1e-9
    assert slope < 1e-9
    assert judge(emd(final=1.0), student, teacher(), states)[0] > 0.1
    assert judge(half, exact, teacher(), states)[0] > 0.1
    s = states.t / 4
    average, velocity = exact.average_velocity(states.x, states.t, s), teacher().velocity(states.x, states.t)
    share = (student.average_velocity(states.x, states.t, s) - average) / (velocity - average)
    assert ((share > 0.05) & (share < 0.95)).all()
    student.w = 0.99
    share = (student.average_velocity(states.x, states.t, s) - average) / (velocity - average)
    assert (share.abs() < 0.02).all()


# Limits and relatives.


def test_full_warmup_is_meanflow_distillation():
    student, states = perturbed(teacher()), path_states(teacher())
    ours = evaluate(emd(normalization=None), student, states)
    theirs = evaluate(
        MeanFlowDistillation(power=0.0, reduction="mean", pairs=WithDiagonal(share=0.0)),
        student,
        states,
    )
    close(ours.loss, theirs.loss)
    close(gradient(ours.loss, student), gradient(theirs.loss, student))


def test_to_s_0_it_is_continuous_consistency():
    """The gradient of <X(x, t, 0), sg dX/dt> / t, with dX/dt along the trajectory by another derivation."""
    student, states = perturbed(teacher()), ending(path_states(teacher()), 0.0)
    output = evaluate(emd(normalization=None), student, states)
    zero = torch.zeros_like(states.t)
    tangents = (teacher().velocity(states.x, states.t), torch.ones_like(states.t))
    jump, slope = torch.func.jvp(lambda x, t: student(x, t, zero), (states.x, states.t), tangents)
    consistency = (2 / states.t[:, None] * jump * slope.detach()).mean(1).mean()
    close(gradient(output.loss, student), gradient(consistency, student))


def test_at_s_equal_t_it_is_flow_matching():
    student, states = perturbed(teacher()), ending(path_states(teacher()), 1.0)
    output = evaluate(emd(normalization=None), student, states)
    matching = (student.velocity(states.x, states.t) - teacher().velocity(states.x, states.t)).square().mean()
    close(gradient(output.loss, student), gradient(matching, student))


@pytest.mark.parametrize("normalised", [False, True])
def test_lmd_from_the_prior_is_the_prediction_of_freeflow(normalised):
    """Unweighted they are one loss; normalised with c to 0, FreeFlow's k = 1/2 times the root of the dimension."""
    student, states = perturbed(teacher()), ending(prior_states(teacher()), 0.3)
    ours = evaluate(lmd(normalization=1e-12 if normalised else None), student, states)
    prediction = FreeFlowPrediction(estimator=Jvp(), power=0.5 if normalised else 0.0, eps=1e-12)
    theirs = evaluate(prediction, student, states)
    close(ours.metrics["error"], theirs.metrics["error"], rtol=1e-6)
    factor = 2**0.5 if normalised else 1.0
    close(factor * gradient(ours.loss, student), gradient(theirs.loss, student), rtol=1e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_autoguidance_by_the_scale_of_each_sample(name):
    """Two Gaussians of one covariance guide each other to a third; the scale comes with the states."""
    weak = GaussianTeacher(torch.zeros(2).double(), VARIANCES)
    guided = GuidedTeacher(teacher(), guide=weak)
    student = GaussianFlowMap(GaussianTeacher(2.5 * MEAN, VARIANCES))
    states = path_states(teacher())
    scales = torch.full((len(states),), 2.5).double()
    told = attrs.evolve(states, condition=Condition(guidance=scales))

    class Unguided(GaussianFlowMap):
        def average_velocity(self, x, t, s, condition=None):
            return student.average_velocity(x, t, s)

    exact = Unguided(teacher())
    assert evaluate(BUILDERS[name](), exact, told, of=guided).metrics["error"] < 1e-20
    assert evaluate(BUILDERS[name](), exact, states, of=guided).metrics["error"] > 0.1


@pytest.mark.parametrize("name", BUILDERS)
def test_evaluations_a_row(name):
    """The student in the product and with a graph, the teacher once, a guide once more."""
    plain, student, states = teacher(), GaussianFlowMap(teacher()), path_states(teacher(), n=8)
    guided = GuidedTeacher(plain, 2.0, guide=GaussianTeacher(MEAN, VARIANCES))
    for of, count in ((plain, 8), (guided, 16)):
        before = student.evaluations, of.evaluations
        evaluate(BUILDERS[name](), student, states, of=of)
        assert (student.evaluations - before[0], of.evaluations - before[1]) == (16, count)


def mean_gradient(objective, student, batches=100):
    """The mean over batches of data, and its standard error."""
    rows = []
    for seed in range(batches):
        output = loss_of(
            objective,
            student,
            None,
            data_states(teacher(), n=256, seed=seed, low=0.2),
            step=0,
            generator=torch.Generator().manual_seed(seed),
        )
        rows.append(gradient(output.loss, student))
    stacked = torch.stack(rows)
    return stacked.mean(0), stacked.std(0) / batches**0.5


def test_from_data_the_mean_gradient_vanishes_at_the_map():
    objective = emd(target=ConditionalVelocity(), normalization=None)
    assert objective.needs_data
    assert not objective.needs_teacher
    mean, error = mean_gradient(objective, GaussianFlowMap(teacher()))
    assert (mean.abs() < 4 * error).all()
    mean, error = mean_gradient(objective, perturbed(teacher(), 0.3))
    assert (mean.abs() > 20 * error).any()


class Imperfect(GaussianFlowMap):
    """The exact map with a constant error in F."""

    def average_velocity(self, x, t, s, condition=None):
        return super().average_velocity(x, t, s) + 0.05 * x


@torch.no_grad()
def distance(steps, consistency):
    """W2 between N(0, 1/4) and what ``steps`` steps make of noise, where every step multiplies by a number."""
    student = Imperfect(GaussianTeacher([0.0], 0.25))
    variance, grid = 1.0, torch.linspace(1, 0, steps + 1)
    for t, s in itertools.pairwise(grid):
        end = torch.zeros(1) if consistency else s[None]
        variance *= float(student(torch.ones(1, 1), t[None], end)) ** 2
        if consistency:
            variance = float(1 - s) ** 2 * variance + float(s) ** 2
    return abs(variance**0.5 - 0.5)


def test_more_steps_hurt_an_imperfect_consistency_model_and_not_a_flow_map():
    few, some, many = (distance(steps, consistency=True) for steps in (4, 16, 64))
    assert few < some < many
    few, some, many = (distance(steps, consistency=False) for steps in (4, 16, 64))
    assert few >= some >= many
