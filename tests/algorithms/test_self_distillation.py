"""Self-distillation: three identities with the student's own diagonal for the velocity."""

import attrs
import pytest
import torch
from exact import assert_exact, bent, bound, data_states, gradient, judge, loss_of, path_states, perturbed, prior_states

from flowdistill import OBJECTIVES
from flowdistill.algorithms.freeflow import FreeFlowPrediction
from flowdistill.algorithms.identities import Residual
from flowdistill.algorithms.self_distillation import ESD, LSD, Semigroup
from flowdistill.algorithms.self_distillation import objective as module
from flowdistill.algorithms.shortcut import Shortcut
from flowdistill.data import ExactSamples
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Teacher
from flowdistill.networks import MLP
from flowdistill.pairs import Below, Dyadic, WithDiagonal
from flowdistill.states import NoisedData
from flowdistill.teachers.gaussian import (
    GaussianFlowMap,
    GaussianTeacher,
    ProductMixtureFlowMap,
    ProductMixtureTeacher,
)
from flowdistill.testing import check_objective
from flowdistill.velocities import FiniteDifference, Jvp, TeacherVelocity

MeanFlowDistillation = OBJECTIVES.get("meanflow_distillation")

NAMES = ("semigroup", "lsd", "esd")


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian() -> GaussianTeacher:
    return GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())


def distillation(name, share=0.25, **fields):
    return OBJECTIVES.build(name, target=TeacherVelocity(), pairs=WithDiagonal(share=share), **fields)


def ending(states, s):
    """The states with jumps to one time."""
    return attrs.evolve(states, s=torch.full_like(states.t, s))


VARIANTS = [
    ("semigroup", {}),
    ("semigroup", {"middle": "uniform"}),
    ("semigroup", {"power": 1.0}),
    ("lsd", {}),
    ("lsd", {"estimator": Jvp()}),
    ("esd", {}),
    ("esd", {"estimator": Jvp()}),
]


@pytest.mark.parametrize("draw", [path_states, data_states])
@pytest.mark.parametrize(("name", "fields"), VARIANTS)
def test_exact_map_has_no_residual_and_no_gradient(name, fields, draw):
    teacher = gaussian()
    assert_exact(distillation(name, **fields), teacher, draw(teacher))


@pytest.mark.parametrize(("name", "fields"), VARIANTS)
def test_off_the_diagonal_jumps_must_be_those_of_the_own_diagonal(name, fields):
    """No residual at the exact map of any distribution, and one where jumps do not follow the diagonal."""
    teacher = gaussian()
    objective = distillation(name, share=0.0, **fields)
    for student, right in ((GaussianFlowMap(teacher), True), (perturbed(teacher), True), (bent(teacher), False)):
        residual, slope = judge(objective, student, teacher, path_states(teacher))
        assert (residual < 1e-9, slope < 1e-9) == (right, right)
        assert right or min(residual, slope) > 1e-2


MIXTURE = {"lsd": {"estimator": Jvp()}, "esd": {"estimator": Jvp()}}  # its map has no second derivatives


@pytest.mark.parametrize("name", NAMES)
def test_exact_map_of_a_mixture(name):
    means = torch.tensor([[-2.0, 1.5], [-1.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    teacher = ProductMixtureTeacher(means, torch.full((3, 2), 0.3).double(), torch.full((3, 2), 0.5).double())
    student, objective = ProductMixtureFlowMap(teacher), distillation(name, **MIXTURE.get(name, {}))
    for moved in (0.0, 0.1):
        with torch.no_grad():
            student.shift += moved
        output = loss_of(objective, student, teacher, path_states(teacher, n=32), step=0, generator=generator(1))
        slope = gradient(output.loss, student).norm()
        assert (float(output.metrics["error"].sqrt()) > 1e-3, float(slope) > 1e-3) == (moved > 0, moved > 0)
        assert moved or float(slope) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_no_mean_gradient_from_data_at_the_exact_map(name):
    """Over 64 batches, within 4 standard errors; elsewhere far outside."""
    teacher = GaussianTeacher(torch.tensor([0.5, -1.0]).double(), torch.tensor([0.4, 1.5]).double())
    objective = OBJECTIVES.build(name)
    student, moved = bent(teacher, 0.0), bent(teacher)
    with torch.no_grad():
        moved.mean += 0.3
    exact, wrong = [], []
    for seed in range(64):
        states = data_states(teacher, n=256, seed=seed)
        for model, into in ((student, exact), (moved, wrong)):
            loss = loss_of(objective, model, None, states, step=0, generator=generator(seed)).loss
            into.append(gradient(loss, model))
    gradients = torch.stack(exact)
    error = gradients.std(0) / len(gradients) ** 0.5
    assert (gradients.mean(0).abs() < 4 * error).all()
    far = torch.stack(wrong).mean(0).abs() > 8 * error
    assert far[:2].any()  # the mean
    assert far[-1]  # the bend


# Gradients away from the optimum.


def pieces(student, x, t, s):
    """F, dF/ds, dF/dt and (d_x F) v for v = sg F(x, t, t), with a graph, by reverse-mode differentiation."""
    x, t, s = (value.detach().clone().requires_grad_() for value in (x, t, s))
    average = student.average_velocity(x, t, s)
    velocity = student.velocity(x, t).detach()
    dummy = torch.zeros_like(average, requires_grad=True)
    dx, dt, ds = torch.autograd.grad(average, (x, t, s), dummy, create_graph=True)
    along = {}
    for name, slope, direction in (("x", dx, velocity), ("t", dt, torch.ones_like(t)), ("s", ds, torch.ones_like(s))):
        (along[name],) = torch.autograd.grad(slope, dummy, direction, create_graph=True)
    return average, along["s"], along["t"], along["x"], velocity


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", ["lsd", "esd"])
def test_gradients_flow_through_the_derivative_where_it_has_a_graph(name, graph):
    """All of the residual but the velocity is differentiated, or F alone."""
    teacher = gaussian()
    student, states = bent(teacher), ending(path_states(teacher), 0.04)
    s, gap = states.s, (states.t - 0.04)[:, None]
    average, ds, dt, dx, velocity = pieces(student, states.x, states.t, s)
    if name == "lsd":
        landed = (states.x - gap * average).detach()
        residual = average - gap * ds - student.velocity(landed, s).detach()
    else:
        residual = average + gap * (dt + dx) - velocity
    if not graph:
        residual = average - (average - residual).detach()
    wanted = gradient(residual.square().mean(), student)
    assert wanted.norm() > 1e-2
    objective = distillation(name, share=0.0, estimator=Jvp(graph=graph))
    output = loss_of(objective, student, teacher, states, step=0, generator=generator())
    torch.testing.assert_close(output.metrics["error"], residual.detach().square().mean())
    torch.testing.assert_close(gradient(output.loss, student), wanted, rtol=1e-9, atol=1e-12)
    other = distillation(name, share=0.0, estimator=Jvp(graph=not graph))
    differs = gradient(loss_of(other, student, teacher, states, step=0, generator=generator()).loss, student) - wanted
    assert differs.norm() > 0.05 * wanted.norm()


@pytest.mark.parametrize("middle", ["midpoint", "uniform"])
def test_semigroup_detaches_both_jumps(middle, monkeypatch):
    teacher = gaussian()
    student, states = bent(teacher), ending(path_states(teacher), 0.04)
    s, kept = states.s, []
    inner = module.semigroup
    monkeypatch.setattr(module, "semigroup", lambda *a: kept.append(a[4]) or inner(*a))
    objective = distillation("semigroup", share=0.0, middle=middle)
    output = loss_of(objective, student, teacher, states, step=0, generator=generator())
    (r,) = kept
    part = (r - s) / (states.t - s)
    if middle == "midpoint":
        torch.testing.assert_close(part, torch.full_like(part, 0.5))
    else:
        assert ((part >= 0) & (part <= 1)).all()
        assert part.std() == pytest.approx(12**-0.5, abs=0.06)
    average = student.average_velocity(states.x, states.t, s)
    with torch.no_grad():
        end = student(student(states.x, states.t, r), r, s)
    wanted = gradient(((states.x - end) / (states.t - s)[:, None] - average).square().mean(), student)
    assert wanted.norm() > 1e-2
    torch.testing.assert_close(gradient(output.loss, student), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["lsd", "esd"])
def test_rows_on_the_diagonal_are_trained_beside_residuals_with_a_graph(name):
    """The loss of a batch is the mean of those of its parts, and so is its gradient."""
    teacher = gaussian()
    student, states = bent(teacher), ending(path_states(teacher), 0.04)

    with torch.no_grad():
        student.mean += 0.1  # the diagonal is wrong as well

    def slope(share, rows):
        objective = distillation(name, share=share)
        return gradient(loss_of(objective, student, teacher, rows, step=0, generator=generator()).loss, student)

    on, off = slope(1.0, states[:32]), slope(0.0, states[32:])
    assert min(on.norm(), off.norm()) > 1e-2
    torch.testing.assert_close(slope(0.5, states), (on + off) / 2)


# Planted mistakes.


class _VelocityAtTheStart(LSD):
    def residual(self, states, step):
        average, generating = self.estimator.estimate(states)
        return Residual(average, generating - self.student.velocity(states.x, states.t).detach())


class _WrongSign(ESD):
    def residual(self, states, step):
        velocity = -self.student.velocity(states.x, states.t).detach()
        return module.eulerian(bound(Jvp(), self.student), velocity, states)


class _NoTransport(ESD):
    def residual(self, states, step):
        velocity = self.student.velocity(states.x, states.t).detach()
        return module.eulerian(bound(Jvp(), self.student), velocity, states, tangent=torch.zeros_like(velocity))


class _SecondJumpFromTheStart(Semigroup):
    def residual(self, states, step):
        r = (states.t + states.s) / 2
        first = self.student.average_velocity(states.x, states.t, r).detach()
        second = self.student.average_velocity(states.x, r, states.s).detach()
        average = self.student.average_velocity(states.x, states.t, states.s)
        return Residual(average, average.detach() - (first + second) / 2)


@pytest.mark.parametrize("wrong", [_VelocityAtTheStart, _WrongSign, _NoTransport, _SecondJumpFromTheStart])
def test_mistakes_leave_a_residual_at_the_exact_map(wrong):
    teacher = gaussian()
    with pytest.raises(AssertionError):
        assert_exact(wrong(target=TeacherVelocity(), pairs=Below()), teacher, path_states(teacher))


# What each equals, and what it costs.


class _Diagonal(Teacher):
    """A student's diagonal as a teacher."""

    def __init__(self, student):
        super().__init__()
        self.student, self.sample_shape = [student], student.sample_shape

    def velocity(self, x, t, condition=None):
        return self.student[0].velocity(x, t, condition).detach()


def same(objective, other, student, teacher, states):
    losses = [loss_of(o, student, teacher, states, step=0, generator=generator(3)).loss for o in (objective, other)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(gradient(loss, student) for loss in losses))
    assert gradient(losses[0], student).norm() > 1e-3


def test_esd_with_a_detached_derivative_is_meanflow_towards_its_own_diagonal():
    student = bent(gaussian())
    own = distillation("esd", share=0.0, estimator=Jvp())
    other = MeanFlowDistillation(power=0.0, reduction="mean", pairs=WithDiagonal(share=0.0))
    same(own, other, student, _Diagonal(student), ending(path_states(gaussian()), 0.0))


def test_lsd_with_a_detached_derivative_is_freeflow_towards_its_own_diagonal():
    student = bent(gaussian())
    own = distillation("lsd", share=0.0, estimator=Jvp())
    other = FreeFlowPrediction(estimator=Jvp(), power=0.0)
    same(own, other, student, _Diagonal(student), ending(prior_states(gaussian()), 0.25))


def test_semigroup_on_dyadic_jumps_is_shortcut_above_its_finest_level():
    teacher, student = gaussian(), bent(gaussian())
    shortcut = Shortcut(target=TeacherVelocity(), target_decay=0.0, levels=20, share=0.25)
    t, s = (time.double() for time in Dyadic(levels=6).sample(64, generator()))
    states = attrs.evolve(path_states(teacher), t=t, s=s)
    same(distillation("semigroup"), shortcut, student, teacher, states)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_evaluations_of_a_step(name, taught):
    """Of 64 rows 16 jump: beside F at every row, two detached jumps or one velocity of each of these."""
    teacher = gaussian()
    for decay in (0.0, 0.9):
        student = GaussianFlowMap(teacher)
        objective = OBJECTIVES.build(name, target_decay=decay, **({"target": TeacherVelocity()} if taught else {}))
        objective.setup(student, teacher)
        before = teacher.evaluations
        loss_of(objective, student, teacher if taught else None, data_states(teacher), step=0, generator=generator())
        extra = 32 if name == "semigroup" else 16
        assert student.evaluations == 64 + (0 if decay else extra)
        if decay:
            assert objective.tutor.evaluations == extra
        assert teacher.evaluations - before == (48 if taught else 0)


def test_a_detached_derivative_costs_an_evaluation_more():
    teacher = gaussian()
    student = GaussianFlowMap(teacher)
    loss_of(LSD(estimator=Jvp()), student, None, data_states(teacher), step=0, generator=generator())
    assert student.evaluations == 64 + 16 + 16


@pytest.mark.parametrize("name", NAMES)
def test_they_pass_the_kit(name):
    torch.manual_seed(0)
    student = NetworkFlowMap(MLP(dim=2, hidden_size=16, num_classes=2), "two_time")
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    teacher = GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]])
    check_objective(distillation(name), student, teacher)
    check_objective(distillation(name, target_decay=0.9), student, teacher)
    check_objective(OBJECTIVES.build(name), student, None, NoisedData(dataset=ExactSamples(teacher)))
    if name != "semigroup":
        check_objective(distillation(name, estimator=FiniteDifference()), student, teacher)
