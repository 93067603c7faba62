"""Improved MeanFlow: the tangent is the student's own velocity, and the data's velocity is a target alone."""

import attrs
import pytest
import torch
from exact import (
    assert_exact,
    bound,
    data_states,
    gaussian_teachers,
    gradient,
    judge,
    loss_of,
    path_states,
    perturbed,
    residual_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdistill import OBJECTIVES, Condition
from flowdistill.algorithms.imeanflow import ImprovedMeanFlow
from flowdistill.algorithms.imeanflow import objective as imeanflow
from flowdistill.interfaces import GeneratingVelocity
from flowdistill.pairs import SortedPair, WithDiagonal
from flowdistill.paths import expand_time
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.times import LogitNormal
from flowdistill.velocities import ConditionalVelocity, Jvp, TeacherVelocity

LABELLED = GaussianTeacher(
    torch.tensor([0.5, -0.5]).double(),
    torch.tensor([0.3, 2.0]).double(),
    class_means=torch.tensor([[2.0, 0.0], [0.0, -1.5]]).double(),
)


def teacher():
    return GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(**kwargs) -> ImprovedMeanFlow:
    return ImprovedMeanFlow(**kwargs)


def distilling(**kwargs) -> ImprovedMeanFlow:
    return objective(target=TeacherVelocity(), **kwargs)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def residual(of, student, states, s, against=None):
    """F and R of an objective for given ends."""
    return residual_of(of, student, against, attrs.evolve(states, s=s), step=0, generator=generator())


@given(of=gaussian_teachers(), power=st.sampled_from((0.0, 1.0)))
@settings(max_examples=10)
def test_exact_map_has_no_residual_and_no_gradient(of, power):
    assert_exact(distilling(power=power), of, path_states(of))
    assert_exact(distilling(power=power), of, data_states(of))


@pytest.mark.parametrize("guidance", [None, (1.0, 8.0)])
def test_from_data_the_exact_map_has_no_mean_residual(guidance):
    """R is linear in n - x_0, here replaced by its mean given the state and the label, which may be the null label."""
    states = data_states(LABELLED, n=256)
    scales = None if guidance is None else 1 + 7 * torch.rand(256, generator=generator(), dtype=torch.float64)
    condition = Condition(torch.randint(-1, 2, (256,), generator=generator()), scales)
    u, t = LABELLED.velocity(states.x, states.t, condition), states.t[:, None]
    states = attrs.evolve(states, condition=condition, clean=states.x - t * u, noise=states.x + (1 - t) * u)
    velocity = ConditionalVelocity() if guidance is None else ConditionalVelocity(kappa=None)
    error, slope = judge(objective(target=velocity), GaussianFlowMap(LABELLED), None, states)
    assert error < 1e-9
    assert slope < 1e-9
    moved = GaussianFlowMap(LABELLED)
    with torch.no_grad():
        moved.class_means += 0.1
    error, slope = judge(objective(target=velocity), moved, None, states)
    assert error > 1e-2
    assert slope > 1e-3


def test_from_data_there_is_no_mean_gradient_at_the_exact_map():
    """With noisy velocities: over 48 batches within 4 standard errors of zero, in every component."""
    of = objective(power=0.0)
    student, moved = GaussianFlowMap(teacher()), perturbed(teacher())
    found = {student: [], moved: []}
    for seed in range(48):
        states = data_states(teacher(), n=512, seed=seed, low=0.0)
        for model, gradients in found.items():
            loss = loss_of(of, model, None, states, step=0, generator=generator(seed)).loss
            gradients.append(gradient(loss, model))
    scores = {model: torch.stack(g).mean(0) / torch.stack(g).std(0) * 48**0.5 for model, g in found.items()}
    assert (scores[student].abs() < 4).all()
    assert (scores[moved].abs() > 8).any()


def test_the_noise_of_the_data_is_not_multiplied_by_the_jacobian():
    """At the exact map R = u - v here, against J (u - v) of MeanFlow, with J = sigma_s / sigma_t."""
    states, student = data_states(teacher()), GaussianFlowMap(teacher())
    s = 0.4 * states.t
    deviation = teacher().velocity(states.x, states.t) - (states.noise - states.clean)
    _, ours = residual(objective(), student, states, s)
    close(ours, deviation)
    _, theirs = residual(OBJECTIVES.build("meanflow"), student, states, s)
    variances = teacher().variances
    sigma_s, sigma_t = (((1 - t[:, None]) ** 2 * variances + t[:, None] ** 2).sqrt() for t in (s, states.t))
    close(theirs, sigma_s / sigma_t * deviation)


def test_with_a_teacher_it_is_meanflow_distillation_up_to_the_tangent():
    """R - R_MeanFlow = (t - s) (d_x F) (F(x, t, t) - u) away from the optimum."""
    states, student = path_states(teacher()), perturbed(teacher(), 0.3)
    s = 0.3 * states.t
    average, ours = residual(distilling(), student, states, s, teacher())
    wanted, theirs = residual(OBJECTIVES.build("meanflow_distillation"), student, states, s, teacher())
    assert torch.equal(average, wanted)
    error = student.velocity(states.x, states.t) - teacher().velocity(states.x, states.t)
    _, change = torch.func.jvp(lambda x: student.average_velocity(x, states.t, s), (states.x,), (error,))
    assert change.abs().max() > 0.05
    close(ours - theirs, (states.t - s)[:, None] * change)


class _Bent(GaussianFlowMap):
    """The teacher's velocity on the diagonal, and no flow map away from it."""

    def average_velocity(self, x, t, s, condition=None):
        return super().average_velocity(x, t, s, condition) + 0.5 * expand_time(t - s, x) * x.sin()


def test_it_is_meanflow_distillation_where_the_students_velocity_is_the_teachers():
    states, student = path_states(teacher()), _Bent(teacher())
    settings_of_both = {"pairs": WithDiagonal(share=0.25), "power": 1.0}
    losses = [
        loss_of(of, student, teacher(), states, step=0, generator=generator()).loss
        for of in (
            distilling(**settings_of_both),
            OBJECTIVES.build("meanflow_distillation", **settings_of_both),
        )
    ]
    assert losses[0] > 0.01
    close(*losses)
    close(*(gradient(loss, student) for loss in losses))


# What the exact map cannot show.


def written_out(student, states, rows, power, eps, graph=False):
    """The loss from its formula, both parts; with a graph through the target as a mistake."""
    on, off, s = states[:rows], states[rows:], states.s
    diagonal = student.velocity(on.x, on.t)
    velocity = student.velocity(off.x, off.t)
    average, slope = torch.func.jvp(
        lambda x, t: student.average_velocity(x, t, s[rows:]), (off.x, off.t), (velocity, torch.ones_like(off.t))
    )
    slope = slope if graph else slope.detach()
    compound = average + (off.t - s[rows:])[:, None] * slope
    target = states.noise - states.clean
    errors = (torch.cat([diagonal, compound]) - target).square().sum(1)
    return (errors * (errors.detach() + eps) ** -power).mean()


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_gradient_away_from_the_optimum_is_that_of_both_regressions(power):
    states, student = data_states(teacher()), perturbed(teacher(), 0.3)
    of = objective(power=power, pairs=WithDiagonal(share=0.25))
    loss = loss_of(of, student, None, states, step=0, generator=generator()).loss
    wanted, mutant = (gradient(written_out(student, states, 16, power, 0.01, graph), student) for graph in (0, 1))
    close(loss, written_out(student, states, 16, power, 0.01))
    close(gradient(loss, student), wanted)
    assert (mutant - wanted).norm() > 0.05 * wanted.norm()


class _Directed(GeneratingVelocity):
    """A derivative along another tangent."""

    def __init__(self, tangent):
        self.tangent = tangent

    def derivative(self, jump, *, dx=None, dt=0.0, ds=0.0, progress=0.0):
        dx = self.tangent(self.student, jump.x, jump.t, jump.s, dx)
        return bound(Jvp(), self.student).derivative(jump, dx=dx, dt=dt, ds=ds)


TANGENTS = {
    "right": (lambda f, x, t, s, dx: dx, False),
    "average velocity of the jump": (lambda f, x, t, s, dx: f.average_velocity(x, t, s).detach(), True),
    "velocity at the end": (lambda f, x, t, s, dx: f.velocity(x, s).detach(), True),
    "none": (lambda f, x, t, s, dx: torch.zeros_like(x), True),
    "negated": (lambda f, x, t, s, dx: -dx, True),
}


@pytest.mark.parametrize("name", TANGENTS)
def test_mutants_of_the_tangent(name):
    tangent, wrong = TANGENTS[name]
    of = distilling(power=0.0, reduction="mean", estimator=_Directed(tangent))
    error, slope = judge(of, GaussianFlowMap(teacher()), teacher(), path_states(teacher(), n=512))
    assert (error > 0.1) == wrong
    assert (slope > 0.05) == wrong


def test_a_conditional_tangent_is_seen_in_the_noise(monkeypatch):
    right = imeanflow.eulerian
    states, student = data_states(teacher()), GaussianFlowMap(teacher())
    deviation = teacher().velocity(states.x, states.t) - (states.noise - states.clean)
    monkeypatch.setattr(imeanflow, "eulerian", lambda *a, tangent, **k: right(*a, **k))
    _, mutant = residual(objective(), student, states, 0.4 * states.t)
    assert (mutant - deviation).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("velocity", "students", "teachers"),
    [(ConditionalVelocity(), 2, 0), (ConditionalVelocity(omega=1.5), 4, 0), (TeacherVelocity(), 2, 1)],
)
def test_evaluations_a_row(velocity, students, teachers):
    """On the diagonal 1, elsewhere 3: the tangent, the derivative, and F. Guidance takes 2 more on all rows."""
    states = data_states(LABELLED)
    states = attrs.evolve(states, condition=Condition(torch.zeros(64, dtype=torch.long)))
    of, student = GaussianTeacher(LABELLED.mean, LABELLED.variances, LABELLED.class_means), GaussianFlowMap(LABELLED)
    loss_of(objective(target=velocity), student, of, states, step=0, generator=generator())
    assert student.evaluations == students * 64
    assert of.evaluations == teachers * 64


def test_published_settings():
    of = ImprovedMeanFlow()
    assert (of.power, of.eps, of.reduction) == (1.0, 0.01, "sum")
    assert of.pairs == WithDiagonal(pairs=SortedPair(first=LogitNormal(mean=-0.4, std=1.0)), share=0.5)
    assert of.needs_data
    assert not of.needs_teacher
