"""Secant losses: what vanishes on average over r, the laws that this needs, and what a single r leaves."""

import attrs
import numpy
import pytest
import torch
from exact import (
    below,
    bound,
    data_states,
    gaussian_teachers,
    gradient,
    loss_of,
    path_states,
    perturbed,
    prior_states,
    residual_of,
)
from hypothesis import given, settings

from flowdistill import OBJECTIVES as REGISTERED
from flowdistill import Condition, ConfigError, States, Step
from flowdistill.algorithms import identities
from flowdistill.algorithms.secant import SDEE, SDEI
from flowdistill.algorithms.secant import objective as secant
from flowdistill.data import ExactSamples
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import FlowMap, Jump
from flowdistill.networks import MLP
from flowdistill.pairs import Short, WithDiagonal
from flowdistill.states import NoisedData, Prior, TeacherTrajectories
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.testing import check_objective
from flowdistill.times import Grid, Uniform, WithPointMass
from flowdistill.training import Training
from flowdistill.velocities import ConditionalVelocity, TeacherVelocity

STEE = REGISTERED.get("stee")

STEI = REGISTERED.get("stei")

NODES, WEIGHTS = (torch.from_numpy(a) / 2 for a in numpy.polynomial.legendre.leggauss(64))
NODES = NODES + 0.5  # in (0, 1), where the weights add up to 1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def example():
    return GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())


def over_nodes(states):
    """Each state once for every node, and the weight of each row."""
    rows = torch.arange(len(states)).repeat_interleave(len(NODES))
    return states[rows], NODES.repeat(len(states)), (WEIGHTS / len(states)).repeat(len(states))


def expectation(average, residual, weights, student):
    """The mean residual of each state over r, and the mean gradient."""
    mean = (weights[:, None] * residual).unflatten(0, (-1, len(NODES))).sum(1) * (len(residual) // len(NODES))
    return float(mean.norm(dim=1).max()), float(gradient((weights[:, None] * residual * average).sum(), student).norm())


def interior(objective, student, teacher, states, monkeypatch, end=0.3):
    """The expectation of what an objective with interior points does, by Gauss-Legendre quadrature over r."""
    states, nodes, weights = over_nodes(states)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", lambda n, **_: nodes)
        states = attrs.evolve(states, s=end * states.t)
        parts = residual_of(objective, student, teacher, states, step=0, generator=generator())
    return *expectation(*parts, weights, student), float(parts[1].square().mean().sqrt())


def end_point(student, teacher, starts, t, s, residual=identities.end_point):
    """The expectation of the end-point residual for states whose images at t are ``starts``, for all r."""
    states, nodes, weights = over_nodes(starts)
    t, s = torch.full_like(nodes, t), torch.full_like(nodes, s)
    r = s + nodes * (t - s)
    x = GaussianFlowMap(teacher)(states.x, t, r).detach()
    found = residual(student, teacher.velocity(x, r), Jump(x, r, r, states.condition), t, s)
    spread = float(found.value.square().mean().sqrt())
    return *expectation(found.average, found.value, weights, student), spread


@pytest.mark.parametrize("objective", [SDEI(), STEI(pairs=WithDiagonal(share=0.0))], ids=["sdei", "stei"])
@pytest.mark.parametrize("draw", [prior_states, path_states])
@given(teacher=gaussian_teachers(max_dim=8))
@settings(max_examples=8)
def test_interior_points_are_exact_on_average_over_r(objective, draw, teacher):
    states = draw(teacher, n=8)
    with pytest.MonkeyPatch.context() as patch:
        residual, slope, single = interior(objective, GaussianFlowMap(teacher), teacher, states, patch)
        assert residual < 1e-10
        assert slope < 1e-10
        assert single > 1e-3  # one r leaves how u varies along the path
        residual, slope, _ = interior(objective, perturbed(teacher), teacher, states, patch)
    if not objective.needs_teacher:  # a flow map has its own diagonal as its velocity, whatever the data
        assert residual < 1e-10
    else:
        assert residual > 1e-2
        assert slope > 1e-3


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.2), (1.0, 0.0), (0.2, 0.9), (0.0, 1.0)])
@given(teacher=gaussian_teachers(max_dim=8))
@settings(max_examples=8)
def test_end_points_are_exact_on_average_over_r(t, s, teacher):
    starts = path_states(teacher, n=8)
    residual, slope, single = end_point(GaussianFlowMap(teacher), teacher, starts, t, s)
    assert residual < 1e-10
    assert slope < 1e-10
    assert single > 1e-3
    moved = perturbed(teacher)
    assert end_point(moved, teacher, starts, t, s)[0] > 1e-2
    assert end_point(moved, teacher, starts, t, s)[1] > 1e-3


def test_a_single_r_leaves_the_spread_of_the_velocity_along_the_path():
    teacher = example()
    states, nodes, _ = over_nodes(prior_states(teacher, n=4))
    student = GaussianFlowMap(teacher)
    residual = identities.secant(student, teacher.velocity, states.to(0.0), nodes).value
    velocity = teacher.velocity(student(states.x, states.t, nodes), nodes).unflatten(0, (4, -1))
    spread = velocity - (WEIGHTS[:, None] * velocity).sum(1, keepdim=True)
    torch.testing.assert_close(residual, -spread.flatten(0, 1).detach(), rtol=0, atol=1e-10)


# Laws.


@pytest.mark.parametrize(
    "cuts", [Uniform(), Grid(steps=4), WithPointMass(fraction=0.5)], ids=["uniform", "grid", "mass"]
)
def test_r_is_uniform_given_the_pair(cuts):
    r = torch.rand(200_000, generator=generator(), dtype=torch.float64)
    t, s = SDEE(cuts=cuts).around(r, generator(1))
    assert_uniform_inside(r, t, s)
    assert abs(float((t < s).double().mean()) - 0.5) < 0.01
    if isinstance(cuts, Grid):
        pairs = {(round(4 * float(a)), round(4 * float(b))) for a, b in zip(t[:5000], s[:5000], strict=True)}
        assert pairs == {(i, j) for i in range(5) for j in range(5) if i != j}
        assert (torch.stack([4 * t, 4 * s]) % 1 == 0).all()
    if isinstance(cuts, WithPointMass):
        assert abs(float(((t - s).abs() == 1).double().mean()) - 0.25) < 0.01


@pytest.mark.parametrize("longest", [0.125, 1.0])
def test_r_is_uniform_inside_short_jumps(longest):
    r = torch.rand(200_000, generator=generator(), dtype=torch.float64)
    t, s = SDEE(longest=longest).around(r, generator(1))
    length = (t - s).abs()
    inner = (torch.minimum(t, s) > 0) & (torch.maximum(t, s) < 1)
    assert_uniform_inside(r[inner], t[inner], s[inner])
    assert_uniform_inside(r[~inner], t[~inner], s[~inner])
    assert float(length.max()) <= longest
    assert abs(float((t < s).double().mean()) - 0.5) < 0.01
    if longest < 0.5:  # away from the ends the length is uniform
        middle = length[(r - 0.5).abs() < 0.5 - longest] / longest
        assert float(middle.mean()) == pytest.approx(0.5, abs=5e-3)
        assert float(middle.var()) == pytest.approx(1 / 12, abs=2e-3)


def assert_uniform_inside(r, t, s):
    """Kolmogorov-Smirnov of r in (s, t), for all pairs and for those of some lengths, starts and ends."""
    low, high = torch.minimum(t, s), torch.maximum(t, s)
    assert (low <= r).all()
    assert (r <= high).all()
    share = (r - low) / (high - low)
    length = high - low
    groups = (length > 0, length < 0.4, length > 0.6, low == 0, high == 1, (low > 0.2) & (high < 0.9), t > s, t < s)
    for chosen in groups:
        kept = share[chosen].sort().values
        if len(kept) > 500:
            steps = torch.arange(1, len(kept) + 1) / len(kept)
            assert float((kept - steps).abs().max()) < 2.2 / len(kept) ** 0.5


def test_ends_drawn_independently_on_both_sides_are_not():
    r = torch.rand(200_000, generator=generator(), dtype=torch.float64)
    s, t = Uniform().sample_below(r, generator(1)), 1 - Uniform().sample_below(1 - r, generator(2))
    with pytest.raises(AssertionError):
        assert_uniform_inside(r, t, s)


@pytest.mark.parametrize("end", [0.0, 0.25])
def test_interior_times_are_uniform(end, monkeypatch):
    seen = []

    def residual(student, field, jump, r):
        seen.append((jump.t, r, jump.s))
        return identities.secant(student, field, jump, r)

    monkeypatch.setattr(secant, "secant", residual)
    teacher = example()
    states = path_states(teacher, n=20_000)
    states = attrs.evolve(states, s=states.t.clamp(max=end))
    loss_of(SDEI(), GaussianFlowMap(teacher), teacher, states, step=0, generator=generator())
    ((t, r, s),) = seen
    assert torch.equal(s, states.t.clamp(max=end))
    inside = t > s
    assert_uniform_inside(r[inside], t[inside], s[inside])


# From data, and with states of a batch: the mean gradient.


def mean_gradient(objective, student, teacher, draw, batches=48):
    """The mean gradient in units of its standard error, largest component."""
    rows = []
    for seed in range(batches):
        loss = loss_of(objective, student, teacher, draw(seed), step=seed, generator=generator(1000 + seed)).loss
        rows.append(gradient(loss, student))
    stacked = torch.stack(rows)
    return float((stacked.mean(0) / (stacked.std(0) / batches**0.5)).abs().max())


OBJECTIVES = {
    "sdei": SDEI(),
    "sdei with a diagonal": SDEI(pairs=WithDiagonal(share=0.25)),
    "stei": STEI(),
    "stei with a teacher": STEI(target=TeacherVelocity()),
    "sdei from data": SDEI(target=ConditionalVelocity(), pairs=WithDiagonal(share=0.5)),
    "sdee": SDEE(),
    "stee": STEE(),
    "stee on a grid": STEE(cuts=Grid(steps=3)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_mean_gradient_at_the_exact_map(name):
    teacher, objective = example(), OBJECTIVES[name]

    def draw(seed):
        return data_states(teacher, n=512, seed=seed, low=0.0)

    assert mean_gradient(objective, GaussianFlowMap(teacher), teacher, draw) < 4
    assert mean_gradient(objective, perturbed(teacher), teacher, draw) > 12


def shifted(seed):
    """Data of another distribution than that of `example`."""
    return data_states(
        GaussianTeacher(torch.tensor([2.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double()), 512, seed, 0
    )


def test_end_points_need_states_of_the_teachers_distribution():
    """Elsewhere the image at t tells from which r it came, and the mean over r is not uniform."""
    teacher = example()
    assert mean_gradient(SDEE(), GaussianFlowMap(teacher), teacher, shifted) > 8
    assert mean_gradient(SDEI(), GaussianFlowMap(teacher), teacher, shifted) < 4


# Mistakes, planted.


INTERIOR = {
    "right": (lambda f, u, x, gap, r, t, c: u(x - gap * f, r, c), False),
    "velocity at the start": (lambda f, u, x, gap, r, t, c: u(x, t, c), True),
    "velocity at the start's time": (lambda f, u, x, gap, r, t, c: u(x - gap * f, t, c), True),
    "jump of the wrong sign": (lambda f, u, x, gap, r, t, c: u(x + gap * f, r, c), True),
    "velocity of the wrong sign": (lambda f, u, x, gap, r, t, c: -u(x - gap * f, r, c), True),
}


@pytest.mark.parametrize("name", INTERIOR)
def test_mutants_of_the_interior_point(name, monkeypatch):
    target, wrong = INTERIOR[name]

    def residual(student, field, jump, r):
        average = student.average_velocity(*jump)
        with torch.no_grad():
            inner = student.average_velocity(*jump.to(r))
            gap = (jump.t - r)[:, None]
            value = average - target(inner, field, jump.x, gap, r, jump.t, jump.condition)
        return identities.Residual(average, value)

    monkeypatch.setattr(secant, "secant", residual)
    teacher = example()
    mean, slope, _ = interior(SDEI(), GaussianFlowMap(teacher), teacher, path_states(teacher), monkeypatch)
    assert (mean > 0.1) == wrong
    assert (slope > 0.05) == wrong


def test_the_average_to_s_in_place_of_r_is_seen():
    """With F(x_t, t, s) for F(x_t, t, r) the path is a straight line."""
    teacher, student = example(), GaussianFlowMap(example())
    states, nodes, weights = over_nodes(path_states(teacher))
    s = 0.3 * states.t
    r = s + nodes * (states.t - s)
    average = student.average_velocity(states.x, states.t, s)
    residual = (average - teacher.velocity(states.x - (states.t - r)[:, None] * average, r)).detach()
    assert expectation(average, residual, weights, student)[0] > 0.1


def end_point_mutant(change):
    def residual(student, velocity, states, t, s):
        start, t, s = change(student, states.x, states.t, t, s)
        average = student.average_velocity(start.detach(), t, s, states.condition)
        return identities.Residual(average, average.detach() - velocity)

    return residual


END_POINT = {
    "right": (lambda student, x, r, t, s: (student(x, r, t), t, s), False),
    "state itself": (lambda student, x, r, t, s: (x, t, s), True),
    "jump of the wrong sign": (lambda student, x, r, t, s: (x - (t - r)[:, None] * student.velocity(x, r), t, s), True),
    "jump to the end": (lambda student, x, r, t, s: (student(x, r, s), t, s), True),
    "times exchanged": (lambda student, x, r, t, s: (student(x, r, t), s, t), True),
}


@pytest.mark.parametrize("name", END_POINT)
def test_mutants_of_the_end_point(name):
    change, wrong = END_POINT[name]
    teacher = example()
    residual = end_point_mutant(change)
    mean, slope, _ = end_point(GaussianFlowMap(teacher), teacher, path_states(teacher), 0.9, 0.2, residual)
    assert (mean > 0.1) == wrong
    assert (slope > 0.05) == wrong


# What zero gradients cannot see.


@pytest.mark.parametrize("name", ["sdei", "stei", "sdee", "stee"])
def test_gradient_off_the_optimum_is_that_of_a_detached_target(name, monkeypatch):
    """And one with a graph through the estimated point or through the target is another."""
    teacher, objective = example(), attrs.evolve(OBJECTIVES[name])
    student, states = perturbed(teacher), data_states(teacher)
    kept = []

    def keep(function, graph):
        def residual(*arguments):
            with torch.enable_grad():
                if function is identities.secant:
                    _, field, jump, r = arguments
                    average = student.average_velocity(*jump)
                    target = field(student(*jump.to(r)), r, jump.condition)
                else:
                    _, target, jump, t, s = arguments
                    average = student.average_velocity(student(*jump.to(t)), t, s, jump.condition)
            if graph:
                return identities.Residual(average, average - target)
            found = function(*arguments)
            kept.append((found.average, found.value))
            torch.testing.assert_close(found.value, (average - target).detach())
            return found

        return residual

    def loss_gradient(graph):
        for function in (identities.secant, identities.end_point):
            monkeypatch.setattr(secant, function.__name__, keep(function, graph))
        return gradient(loss_of(objective, student, teacher, states, step=0, generator=generator()).loss, student)

    right = loss_gradient(graph=False)
    average, residual = kept[0]
    wanted = gradient((2 * residual * average).sum() / (len(states) * 2), student)
    if name == "stei":
        on = states[: len(states) // 2]
        found = identities.diagonal(student, on.noise - on.clean, on)
        wanted = wanted + gradient((2 * found.value * found.average).sum() / (len(states) * 2), student)
    torch.testing.assert_close(right, wanted, rtol=1e-9, atol=1e-12)
    assert (loss_gradient(graph=True) - right).norm() > 0.02 * right.norm()


@pytest.mark.parametrize("equal", [0.25, 0.5])
def test_a_fraction_of_rows_is_a_weight_of_flow_matching(equal):
    """The mean over all rows is (1 - e) (secant + lambda diagonal) with lambda = e/(1 - e)."""
    teacher = example()
    student, states = perturbed(teacher), data_states(teacher, n=512)
    whole = loss_of(STEI(pairs=WithDiagonal(share=equal)), student, None, states, step=0, generator=generator())
    rows = round(equal * 512)
    diagonal = loss_of(
        STEI(pairs=WithDiagonal(share=1.0)), student, None, states[:rows], step=0, generator=generator()
    ).loss
    found = bound(STEI(), student).residual(states[rows:], Step(generator()))
    rest = identities.pull(found).loss
    torch.testing.assert_close(whole.loss, (1 - equal) * (rest + equal / (1 - equal) * diagonal))


def test_a_frozen_teacher_at_interior_points():
    """By hand: rows on the diagonal are told the scale 1 and follow the data, the others the guided teacher at x_r."""
    torch.manual_seed(0)
    teacher = GuidedTeacher(GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]]), 1.0)
    network = MLP(dim=2, hidden_size=16, num_classes=2)
    student = NetworkFlowMap(network, "two_time", guidance=1.0)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    student.double()
    source = NoisedData(dataset=ExactSamples(teacher.teacher), guidance=(1.5, 2.5))
    source.setup(student, teacher)
    pairs = WithDiagonal(pairs=Short(steps=2), share=0.5)
    drawn = source.sample(8, pairs, generator())
    tensors = {name: getattr(drawn, name).double() for name in ("x", "t", "s", "clean", "noise")}
    condition = Condition(drawn.condition.labels, drawn.condition.scale.double())
    states = States(condition=condition, **tensors)
    objective = STEI(pairs=pairs, frozen=True)
    assert objective.needs_teacher
    assert objective.needs_data
    found = loss_of(objective, student, teacher, states, step=0, generator=generator(3)).loss
    on, off = states[:4], states[4:]
    told = on.condition.guided(scale=torch.ones(4, dtype=torch.float64))
    diagonal = student.average_velocity(on.x, on.t, on.t, told) - (on.noise - on.clean)
    r = off.s + torch.rand(4, generator=generator(3)).double() * (off.t - off.s)
    middle = student(off.x, off.t, r, off.condition).detach()
    jump = student.average_velocity(*off) - teacher.velocity(middle, r, off.condition)
    wanted = torch.cat([diagonal, jump]).square().mean()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


COUNTS = {"sdei": (2, 1), "stei": (2, 0), "sdee": (2, 1), "stee": (2, 0)}


@pytest.mark.parametrize("name", COUNTS)
def test_evaluations(name):
    """Three for each secant row, two where the velocity is the data's; STEI adds one for a row of flow matching."""
    teacher, objective = example(), OBJECTIVES[name]
    student, states = GaussianFlowMap(teacher), data_states(teacher, n=64)
    loss_of(objective, student, teacher, states, step=0, generator=generator())
    assert (student.evaluations / 64, teacher.evaluations / 64) == COUNTS[name]
    if name == "stei":
        before = student.evaluations
        loss_of(
            attrs.evolve(objective, pairs=WithDiagonal(share=0.0)), student, None, states, step=0, generator=generator()
        )
        loss_of(
            attrs.evolve(objective, pairs=WithDiagonal(share=1.0)), student, None, states, step=0, generator=generator()
        )
        assert student.evaluations - before == (3 + 1) * 64


# Picard's iteration.


class _Picard(FlowMap):
    """The ``count``-th iterate of F <- E_r u(x - (t - r) F(x, t, r), r), by the secant residual, from F = u(x, t)."""

    def __init__(self, teacher, count):
        super().__init__()
        self.teacher, self.sample_shape = teacher, teacher.sample_shape
        self.previous = _Picard(teacher, count - 1) if count else None

    def average_velocity(self, x, t, s, condition=None):
        if self.previous is None:
            return self.teacher.velocity(x, t)
        nodes, weights = (torch.from_numpy(a) / 2 for a in numpy.polynomial.legendre.leggauss(12))
        wide = [a.repeat_interleave(12, 0) for a in (x, t, s)]
        r = wide[2] + (nodes + 0.5).repeat(len(x)) * (wide[1] - wide[2])
        found = identities.secant(self.previous, self.teacher.velocity, Jump(*wide), r)
        return (weights[:, None] * (found.average - found.value).unflatten(0, (len(x), 12))).sum(1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_each_mean_residual_is_a_picard_step(count):
    """From the velocity, ``count`` steps leave an error of the order count + 1 in the duration."""
    teacher = example()
    x = path_states(teacher, n=4).x
    errors = []
    for gap in (0.1, 0.05):
        t, s = torch.full((4,), 0.6).double(), torch.full((4,), 0.6 - gap).double()
        exact = GaussianFlowMap(teacher).average_velocity(x, t, s)
        errors.append(float((_Picard(teacher, count).average_velocity(x, t, s) - exact).detach().norm()))
    assert abs(numpy.log2(errors[0] / errors[1]) - (count + 1)) < 0.15


# Sources and interfaces.


def test_interior_points_need_no_data():
    assert not SDEI().needs_data
    teacher = example()
    states = prior_states(teacher)
    output = loss_of(
        SDEI(),
        perturbed(teacher),
        teacher,
        States(x=states.x, t=states.t, s=below(states.t), condition=Condition()),
        step=0,
        generator=generator(),
    )
    assert output.loss.isfinite()


@pytest.mark.parametrize("name", ["sdee", "stee"])
def test_end_points_refuse_the_prior(name):
    """Its states all have one time, so that r would not be uniform."""
    teacher = example()
    training = Training(
        objective=REGISTERED.build(name, target=TeacherVelocity()),
        flow_map=GaussianFlowMap(teacher),
        teacher=teacher,
        states=Prior(),
        steps=1,
        batch_size=8,
    )
    with pytest.raises(ConfigError, match="needs states at all times"):
        training.source()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_conformance(name):
    teacher = GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]])
    torch.manual_seed(0)
    student = NetworkFlowMap(MLP(dim=2, hidden_size=16, num_classes=2))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    source = NoisedData(dataset=ExactSamples(teacher))
    if not OBJECTIVES[name].needs_data:
        source = TeacherTrajectories(steps=4)
    check_objective(OBJECTIVES[name], student, teacher if OBJECTIVES[name].needs_teacher else None, source)
