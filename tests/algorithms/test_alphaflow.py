"""alpha-Flow: its curriculum, what it is at alpha = 1, 1/2 and 0, and the order in which it becomes MeanFlow."""

import itertools
import math

import attrs
import pytest
import torch
from exact import (
    STEPS,
    assert_exact,
    below,
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

from flowdistill import OBJECTIVES, Condition, States
from flowdistill.algorithms.alphaflow import AlphaFlow
from flowdistill.algorithms.alphaflow import objective as alphaflow
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Jump, TargetVelocity
from flowdistill.networks import MLP
from flowdistill.pairs import SortedPair, ToData, WithDiagonal
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.times import LogitNormal
from flowdistill.velocities import ConditionalVelocity, TeacherVelocity


def teacher():
    return GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@attrs.define(kw_only=True)
class Constant(AlphaFlow):
    """The objective at one alpha."""

    value: float

    def alpha(self, progress):
        return self.value


def at(value, **kwargs) -> Constant:
    return Constant(**{"value": value, "target": TeacherVelocity(), **kwargs})


def meanflow(of: AlphaFlow):
    """MeanFlow with the settings that it shares with another objective."""
    names = ("target", "pairs", "power", "eps", "reduction")
    return OBJECTIVES.build("meanflow", **{name: getattr(of, name) for name in names})


def residual(of, student, states, s):
    return residual_of(of, student, teacher(), attrs.evolve(states, s=s), step=0, generator=generator())


def close(a, b, rtol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-12)


# The curriculum.


def test_alpha_falls_from_1_to_0_by_a_sigmoid():
    of = AlphaFlow(anneal=(0.1, 0.3))
    for step in range(0, 4000, 10):
        alpha = 1 - 1 / (1 + math.exp(-25 * (step - 2000) / 2000))
        alpha = 0.0 if alpha < 5e-3 else 1.0 if alpha > 1 - 5e-3 else alpha
        alpha = 1.0 if step < 1000 else 0.0 if step >= 3000 else alpha
        assert of.alpha(step / STEPS) == pytest.approx(alpha, abs=1e-12)
    assert of.alpha(0.2) == pytest.approx(0.5)
    values = [of.alpha(step / STEPS) for step in range(4000)]
    assert values == sorted(values, reverse=True)
    assert 0 < min(v for v in values if v) == pytest.approx(5e-3, rel=0.02)
    assert 1 > max(v for v in values if v < 1) == pytest.approx(1 - 5e-3, rel=0.02)


def test_a_curriculum_of_no_length_is_a_step():
    of = AlphaFlow(anneal=(0.1, 0.1))
    assert [of.alpha(progress) for progress in (0.09, 0.1)] == [1.0, 0.0]


def test_published_settings():
    """Those of the XL/2 with guidance."""
    of = AlphaFlow()
    assert of.anneal == (600_000 / 1_200_000, 1_000_000 / 1_200_000)
    assert (of.sharpness, of.switch) == (25.0, 5e-3)
    assert (of.power, of.eps, of.reduction) == (1.0, 1e-3, "mean")
    assert of.pairs == WithDiagonal(pairs=SortedPair(first=LogitNormal(mean=-0.4, std=1.0)), share=0.5)


# alpha = 0: MeanFlow.


@pytest.mark.parametrize("step", [700, 1000])
@pytest.mark.parametrize("velocity", [TeacherVelocity(), ConditionalVelocity()])
def test_below_the_switch_it_is_meanflow_bit_for_bit(step, velocity):
    of = AlphaFlow(target=velocity, anneal=(0.0, 900 / STEPS))
    assert 1 / (1 + math.exp(25 * (700 / 900 - 0.5))) < of.switch
    states, student = data_states(teacher()), perturbed(teacher())
    ours, theirs = (
        loss_of(objective, student, teacher(), states, step=step, generator=generator()).loss
        for objective in (of, meanflow(of))
    )
    assert torch.equal(ours, theirs)
    assert torch.equal(gradient(ours, student), gradient(theirs, student))


@given(of=gaussian_teachers(), power=st.sampled_from((0.0, 1.0)))
@settings(max_examples=10)
def test_after_the_curriculum_the_exact_map_has_no_residual_and_no_gradient(of, power):
    objective = AlphaFlow(target=TeacherVelocity(), anneal=(0.0, 10 / STEPS), power=power)
    assert_exact(objective, of, path_states(of), step=10)


# Between: what is left at the exact map, and how fast the rest becomes MeanFlow.

ALPHAS = (0.08, 0.04, 0.02, 0.01)


def sizes(tensors):
    return [float(r.norm()) for r in tensors]


def assert_first_order(found):
    ratios = [a / b for a, b in itertools.pairwise(found)]
    assert ratios[-1] == pytest.approx(2, abs=0.05)
    assert all(abs(a - 2) >= abs(b - 2) for a, b in itertools.pairwise(ratios))


def test_the_exact_map_leaves_a_residual_of_order_alpha():
    states, student = path_states(teacher(), n=512), GaussianFlowMap(teacher())
    found = sizes(residual(at(alpha), student, states, 0.3 * states.t)[1] for alpha in ALPHAS)
    assert found[0] > 0.5
    assert_first_order(found)


@pytest.mark.parametrize("velocity", [TeacherVelocity(), ConditionalVelocity()])
def test_it_becomes_meanflows_residual_at_order_alpha(velocity):
    states, student = data_states(teacher(), n=512), perturbed(teacher(), 0.3)
    s = 0.3 * states.t
    limit = residual(meanflow(at(0.5, target=velocity)), student, states, s)[1]
    found = sizes(residual(at(a, target=velocity), student, states, s)[1] - limit for a in ALPHAS)
    assert found[-1] < 0.05 * float(limit.norm())
    assert_first_order(found)


def test_its_gradient_becomes_meanflows():
    states, student = path_states(teacher(), n=512), perturbed(teacher(), 0.3)
    found = []
    for alpha in ALPHAS:
        of = at(alpha, power=0.0)
        ours, theirs = (
            gradient(loss_of(o, student, teacher(), states, step=0, generator=generator()).loss, student)
            for o in (of, meanflow(of))
        )
        found.append(float((ours - theirs).norm()))
    assert_first_order(found)


def _changed(change):
    """The semigroup residual with its arguments changed."""
    right = alphaflow.semigroup

    def mutant(student, second, first, jump, r):
        first, x, t, r = change(first, jump.x, jump.t, r, jump.s)
        return right(student, second, first, Jump(x, t, jump.s, jump.condition), r)

    return mutant


MUTANTS = {
    "right": (lambda v, x, t, r, s: (v, x, t, r), False),
    "r close to s": (lambda v, x, t, r, s: (v, x, t, t + s - r), True),
    "the other direction": (lambda v, x, t, r, s: (-v, x, t, r), True),
    "another first step": (lambda v, x, t, r, s: (v + 1, x, t, r), True),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_the_limit(name, monkeypatch):
    change, wrong = MUTANTS[name]
    monkeypatch.setattr(alphaflow, "semigroup", _changed(change))
    states, student = path_states(teacher(), n=512), GaussianFlowMap(teacher())
    error, slope = judge(at(0.01, power=0.0), student, teacher(), states)
    assert (error > 0.1) == wrong
    assert (slope > 0.05) == wrong


def test_a_residual_that_is_not_divided_by_alpha_is_seen():
    """Without the division the gradient would shrink with alpha."""
    states, student = path_states(teacher()), perturbed(teacher(), 0.3)
    norms = [
        float(
            gradient(
                loss_of(at(a, power=0.0), student, teacher(), states, step=0, generator=generator()).loss, student
            ).norm()
        )
        for a in (0.02, 0.01)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


# Away from the optimum, against the paper's loss alpha^-1 |F - sg(alpha v + (1 - alpha) F(x_r, r, s))|^2.


def published(student, states, alpha, s):
    x, t = states.x, states.t
    velocity = teacher().velocity(x, t)
    r = alpha * s + (1 - alpha) * t
    with torch.no_grad():
        second = student.average_velocity(x - (t - r)[:, None] * velocity, r, s)
        target = alpha * velocity + (1 - alpha) * second
    return (student.average_velocity(x, t, s) - target).square().mean(1)


@pytest.mark.parametrize("alpha", [0.01, 0.3, 0.5, 0.9, 1.0])
def test_the_gradient_is_that_of_the_published_loss(alpha):
    """The loss itself is the published one over alpha: MeanFlow's in scale."""
    states, student = path_states(teacher()), perturbed(teacher(), 0.3)
    of = at(alpha, pairs=ToData(), power=0.0)
    states = attrs.evolve(states, s=0 * states.t)
    loss = loss_of(of, student, teacher(), states, step=0, generator=generator()).loss
    wanted = published(student, states, alpha, torch.zeros_like(states.t)).mean() / alpha
    close(gradient(loss, student), gradient(wanted, student))
    close(loss, wanted.detach() / alpha)


@pytest.mark.parametrize("alpha", [0.05, 0.5])
def test_the_adaptive_weight_is_the_published_one_with_a_scaled_constant(alpha):
    """alpha / (e + c) there, with e = |F - target|^2, and alpha / (e + alpha^2 c) here."""
    states, student = path_states(teacher()), perturbed(teacher(), 0.3)
    of = at(alpha, pairs=ToData(), eps=0.1)
    states = attrs.evolve(states, s=0 * states.t)
    loss = loss_of(of, student, teacher(), states, step=0, generator=generator()).loss
    e = published(student, states, alpha, torch.zeros_like(states.t))
    close(gradient(loss, student), gradient((alpha / (e.detach() + alpha**2 * 0.1) * e).mean(), student))


def test_at_alpha_1_it_is_flow_matching_along_trajectories():
    states, student = data_states(teacher()), perturbed(teacher(), 0.3)
    s = 0.3 * states.t
    average, found = residual(at(1.0, target=ConditionalVelocity()), student, states, s)
    close(found, (average - (states.noise - states.clean)).detach())
    close(average, student.average_velocity(states.x, states.t, s))


class _FirstJump(TargetVelocity):
    """The student's own average velocity over the first half of the way to 0."""

    @torch.no_grad()
    def __call__(self, states):
        return self.student.average_velocity(states.x, states.t, states.t / 2, states.condition)


def test_at_one_half_it_is_the_two_step_consistency_of_shortcut_models():
    """Half of R is F - (F_1 + F_2)/2 for jumps to r = t/2 and to 0: with the first jump as velocity, all of it."""
    states, student = path_states(teacher()), perturbed(teacher(), 0.3)
    x, t = states.x, states.t
    with torch.no_grad():
        first = student.average_velocity(x, t, t / 2)
        second = student.average_velocity(x - (t / 2)[:, None] * first, t / 2, 0 * t)
    average, found = residual(at(0.5, target=_FirstJump()), student, states, 0 * t)
    close(found / 2, (average - (first + second) / 2).detach())
    # with the velocity at the state as first step, the target is the same formula with v for F_1
    velocity = teacher().velocity(x, t)
    with torch.no_grad():
        second = student.average_velocity(x - (t / 2)[:, None] * velocity, t / 2, 0 * t)
    average, found = residual(at(0.5), student, states, 0 * t)
    close(found / 2, (average - (velocity + second) / 2).detach())


def test_with_shortcuts_first_jump_the_exact_map_has_no_residual():
    of, states = at(0.5, target=_FirstJump(), pairs=ToData()), path_states(teacher())
    states = attrs.evolve(states, s=0 * states.t)
    error, slope = judge(of, GaussianFlowMap(teacher()), teacher(), states)
    assert error < 1e-12
    assert slope < 1e-9


# From data.


@pytest.mark.parametrize("alpha", [0.0, 0.1, 1.0])
def test_the_mean_residual_from_data_is_that_of_the_teacher(alpha):
    """For a flow map that is linear in x, R is linear in v: with its mean for v, R is that of distillation."""
    states, student = path_states(teacher()), perturbed(teacher(), 0.3)
    u, t = teacher().velocity(states.x, states.t), states.t[:, None]
    states = attrs.evolve(states, clean=states.x - t * u, noise=states.x + (1 - t) * u)
    s = 0.3 * states.t
    from_data = residual(at(alpha, target=ConditionalVelocity()), student, states, s)
    close(from_data[1], residual(at(alpha), student, states, s)[1], rtol=1e-7)


def test_after_the_curriculum_there_is_no_mean_gradient_from_data():
    """Over 48 batches within 4 standard errors of zero, in every component."""
    of = AlphaFlow(anneal=(0.0, 10 / STEPS), power=0.0)
    student, moved = GaussianFlowMap(teacher()), perturbed(teacher())
    found = {student: [], moved: []}
    for seed in range(48):
        states = data_states(teacher(), n=512, seed=seed, low=0.0)
        for model, gradients in found.items():
            gradients.append(gradient(loss_of(of, model, None, states, step=10, generator=generator(seed)).loss, model))
    scores = {model: torch.stack(g).mean(0) / torch.stack(g).std(0) * 48**0.5 for model, g in found.items()}
    assert (scores[student].abs() < 4).all()
    assert (scores[moved].abs() > 8).any()


# Cost and numbers.


@pytest.mark.parametrize(("alpha", "evaluations"), [(1.0, 1), (0.3, 2), (0.0, 2)])
def test_evaluations_a_row(alpha, evaluations):
    """Of the student off the diagonal; the derivative costs as many as the second jump. The teacher's is one a row."""
    student, of = GaussianFlowMap(teacher()), teacher()
    loss_of(at(alpha, pairs=WithDiagonal(share=0.25)), student, of, path_states(of), step=0, generator=generator())
    assert student.evaluations == 16 + 48 * evaluations
    assert of.evaluations == 64


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_jumps_of_no_length_are_harmless(alpha):
    states = attrs.evolve(path_states(teacher()), t=torch.linspace(0, 1, 64).double())
    _, found = residual(at(alpha), perturbed(teacher()), states, states.t)
    assert found.isfinite().all()


def test_half_precision_is_kept_out_of_a_difference_that_is_divided_by_alpha():
    torch.manual_seed(0)
    student = NetworkFlowMap(MLP(dim=2, hidden_size=32))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    n = 64
    states = States(x=torch.randn(n, 2), t=torch.rand(n), s=below(torch.rand(n)), condition=Condition())

    def found(autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return residual(at(0.01), student, states, 0.3 * states.t)

    for full, half in zip(found(False), found(True), strict=True):
        assert torch.equal(full, half)
    with torch.autocast("cpu", torch.bfloat16):
        r = 0.01 * 0.3 * states.t + 0.99 * states.t
        velocity = teacher().velocity(states.x, states.t)
        mutant = alphaflow.semigroup(student, student, velocity, states.to(0.3 * states.t), r).value
    assert (mutant / 0.01 - found(False)[1]).abs().max() > 0.1
