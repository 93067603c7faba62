"""FACM: consistency to s = 0 and its anchor, the relaxed target, the expanded condition, the law of times."""

import math

import pytest
import torch
from exact import (
    assert_exact,
    below,
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

from flowdistill import Condition, ConfigError, States
from flowdistill.algorithms import identities
from flowdistill.algorithms.facm import FACM
from flowdistill.algorithms.facm import objective as facm
from flowdistill.flow_maps import NetworkFlowMap, from_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import FlowMap
from flowdistill.networks import EDM2, MLP, SiT, VelocityNetwork
from flowdistill.pairs import ToData
from flowdistill.plumbing import config
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.testing import check_flow_map, check_objective
from flowdistill.times import ArctanLogNormal
from flowdistill.velocities import ConditionalVelocity
from flowdistill.wrapped_teachers import NetworkTeacher

MEAN, VARIANCES = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double()


def teacher():
    return GaussianTeacher(MEAN, VARIANCES)


def evaluate(objective, student, states, of=None):
    return loss_of(objective, student, of or teacher(), states, step=0, generator=torch.Generator())


def close(a, b, rtol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("draw", [path_states, prior_states, data_states])
@given(of=gaussian_teachers())
@settings(max_examples=5)
def test_exact_map_has_no_residual_and_no_gradient(draw, of):
    assert_exact(FACM(), of, draw(of))


def test_both_losses_vanish_at_the_exact_map():
    output = evaluate(FACM(), GaussianFlowMap(teacher()), path_states(teacher(), n=4096))
    assert output.loss < 1e-14
    assert output.metrics["error"] < 1e-28
    assert output.metrics["anchor_error"] < 1e-28


# Away from the optimum, against the published losses in their own time tau = 1 - t and velocity G = -F.


def published(student, states, alpha, beta, limit=1.0, p=0.5, anchor=1.0, cosine=1.0, target_graph=False):
    x, tau = states.x, 1 - states.t

    def shortcut(x, tau):
        return -student.average_velocity(x, 1 - tau, torch.zeros_like(tau))

    velocity = -teacher().velocity(x, states.t)
    average, slope = torch.func.jvp(shortcut, (x, tau), (velocity, torch.ones_like(tau)))
    kept = average if target_graph else average.detach()
    g = kept - velocity - (1 - tau)[:, None] * (slope if target_graph else slope.detach())
    target = kept - alpha(tau)[:, None] * (g if limit is None else g.clamp(-limit, limit))
    e = (average - target).square().mean(1)
    consistency = (beta(tau) * e / (e + 1e-3).detach() ** p).mean()
    field = -student.velocity(x, states.t)
    cos = (field * velocity).sum(1) / (field.norm(dim=1) * velocity.norm(dim=1))
    return consistency + anchor * ((field - velocity).square().mean() + cosine * (1 - cos).mean())


def relaxation(tau):
    return 1 - tau**0.5


def weight(tau):
    return torch.cos(tau * math.pi / 2)


def test_loss_and_gradient_are_the_published_ones():
    student, states = perturbed(teacher(), 0.3), path_states(teacher())
    output, wanted = evaluate(FACM(), student, states), published(student, states, relaxation, weight)
    close(output.loss, wanted)
    close(gradient(output.loss, student), gradient(wanted, student))


WRONG = {
    "no relaxation": {"alpha": torch.ones_like},
    "linear relaxation": {"alpha": lambda tau: 1 - tau},
    "no weight in time": {"beta": torch.ones_like},
    "weight of the other end": {"beta": lambda tau: torch.sin(tau * math.pi / 2)},
    "no clamp": {"limit": None},
    "unweighted": {"p": 0.0},
    "no anchor": {"anchor": 0.0},
    "no angle": {"cosine": 0.0},
    "target not detached": {"target_graph": True},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_losses_have_another_gradient(name):
    student, states = perturbed(teacher(), 0.3), path_states(teacher())
    right = gradient(evaluate(FACM(), student, states).loss, student)
    wrong = gradient(published(student, states, **{"alpha": relaxation, "beta": weight, **WRONG[name]}), student)
    assert (wrong - right).norm() > 2e-3 * right.norm()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("no relaxation", {"relaxation": None}),
        ("no clamp", {"clamp": None}),
        ("unweighted", {"power": 0.0}),
        ("no anchor", {"anchor": 0.0}),
        ("no angle", {"cosine": 0.0}),
    ],
)
def test_switches(name, arguments):
    student, states = perturbed(teacher(), 0.3), path_states(teacher())
    wanted = published(student, states, **{"alpha": relaxation, "beta": weight, **WRONG[name]})
    close(evaluate(FACM(**arguments), student, states).loss, wanted)


@pytest.mark.parametrize(("t", "factor"), [(0.99, 0.94), (0.5, 0.68), (0.1, 0.16), (0.02, 0.03)])
def test_relaxation_acts_near_the_data_only(t, factor, monkeypatch):
    """The size of the gradient for a residual of 0.1: the weight normalises the relaxation away elsewhere."""
    average = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    constant = identities.Residual(average, torch.full_like(average, 0.1).detach())
    monkeypatch.setattr(facm, "eulerian", lambda *args, **kwargs: constant)
    states = States(
        x=torch.ones(1, 2).double(),
        t=torch.tensor([t]).double(),
        s=below(torch.tensor([t]).double()),
        condition=Condition(),
    )
    loss = evaluate(FACM(anchor=0.0), GaussianFlowMap(teacher()), states).loss
    (slope,) = torch.autograd.grad(loss, average)
    assert float(slope[0, 0]) / math.sin(math.pi * t / 2) == pytest.approx(factor, abs=0.006)


def test_evaluations_a_row():
    """The student for the derivative, the jump and the anchor; the teacher once, or twice where it is guided."""
    student, states = GaussianFlowMap(teacher()), path_states(teacher(), n=8)
    for of, count in ((teacher(), 8), (GuidedTeacher(teacher(), 2.0, guide=teacher()), 16)):
        before = student.evaluations, of.evaluations
        evaluate(FACM(), student, states, of)
        assert (student.evaluations - before[0], of.evaluations - before[1]) == (24, count)


def test_derivative_of_a_network_that_normalises_its_weights_in_training():
    """EDM2 replaces its weights in its first pass after a change, which must not be that of the derivative."""
    torch.manual_seed(0)
    of = NetworkTeacher(EDM2(8, 1, 3, 8, (1, 2), num_blocks=1, attn_resolutions=()))
    student = from_teacher(of).train()
    weight = next(p for p in student.network.parameters() if p.ndim == 4)
    with torch.no_grad():
        weight.mul_(2)
    states = States(x=of.sample_prior(2), t=torch.ones(2), s=below(torch.ones(2)), condition=Condition.in_turn(3, 2))
    assert evaluate(FACM(), student, states, of).loss.isfinite()
    torch.testing.assert_close(weight.square().mean((1, 2, 3)), torch.ones(len(weight)), rtol=1e-3, atol=0)


# From data.


def mean_gradient(objective, student, batches=100):
    """The mean over batches of data, and its standard error."""
    rows = []
    for seed in range(batches):
        states = data_states(teacher(), n=256, seed=seed, low=0.2)
        rows.append(
            gradient(loss_of(objective, student, None, states, step=0, generator=torch.Generator()).loss, student)
        )
    stacked = torch.stack(rows)
    return stacked.mean(0), stacked.std(0) / batches**0.5


def from_data(**kwargs):
    return FACM(**{"target": ConditionalVelocity(), "clamp": None, "power": 0.0, "cosine": 0.0, **kwargs})


def test_from_data_the_mean_gradient_vanishes_at_the_map_without_clamp_weight_and_angle():
    assert from_data().needs_data
    assert not from_data().needs_teacher
    mean, error = mean_gradient(from_data(), GaussianFlowMap(teacher()))
    assert (mean.abs() < 4 * error).all()
    mean, error = mean_gradient(from_data(), perturbed(teacher(), 0.3))
    assert (mean.abs() > 20 * error).any()


class Constant(FlowMap):
    """One average velocity everywhere."""

    sample_shape = (2,)

    def __init__(self, value):
        super().__init__()
        self.value = torch.nn.Parameter(value)

    def average_velocity(self, x, t, s, condition=None):
        return self.value + 0 * x


@pytest.mark.parametrize(
    ("arguments", "biased"), [({}, False), ({"clamp": 1.0}, True), ({"power": 0.5}, True), ({"cosine": 1.0}, True)]
)
def test_from_data_clamp_weight_and_angle_are_biased(arguments, biased):
    """One state from two pairs of data and noise, one three times as likely, at the mean of their velocities."""
    clean = torch.tensor([[-4.0, 0.0], [0.0, -1.0], [0.0, -1.0], [0.0, -1.0]], dtype=torch.float64)
    zero = torch.zeros_like(clean)
    states = States(
        x=zero,
        t=torch.full((4,), 0.5).double(),
        s=below(torch.full((4,), 0.5).double()),
        condition=Condition(),
        clean=clean,
        noise=zero,
    )
    student = Constant(-clean.mean(0))
    slope = gradient(evaluate(from_data(**arguments), student, states).loss, student).norm()
    assert (slope > 0.05) == biased
    assert biased or slope < 1e-12


# The expanded condition.


class TwoHalves(VelocityNetwork):
    """A network whose output is an exact velocity at times t >= 0 and the exact jump to 0 at times -t < 0."""

    def __init__(self, field, jump):
        super().__init__()
        self.field, self.jump = field, jump
        self.sample_shape, self.num_classes, self.embedding_size, self.early_blocks = field.sample_shape, None, 1, 1

    def velocity(self, x, t, labels=None, embedding=None, late_time=None):
        forward = self.field.average_velocity(x, t, t)
        back = self.jump.average_velocity(x, -t, torch.zeros_like(t))
        return torch.where(t[:, None] < 0, back, forward)


def halves(field=GaussianFlowMap, jump=GaussianFlowMap):
    return NetworkFlowMap(TwoHalves(field(teacher()), jump(teacher())), "expanded")


def test_expanded_condition_is_exact_and_continuous_at_t_0():
    student, states = halves(), path_states(teacher())
    error, slope = judge(FACM(), student, teacher(), states)
    assert error < 1e-14
    assert slope < 1e-14
    zero = torch.zeros_like(states.t)
    values = [student.average_velocity(states.x, zero + t, zero) for t in (1e-6, 0.0)]
    torch.testing.assert_close(*values, rtol=0, atol=1e-4)


def test_each_loss_reaches_its_half_alone():
    """Without the anchor the velocity is never trained: whatever it is, loss and gradient are zero."""
    states, consistency = path_states(teacher()), FACM(anchor=0.0)
    student = halves(field=perturbed)
    output = evaluate(consistency, student, states)
    assert output.loss < 1e-20
    assert gradient(output.loss, student).norm() < 1e-9
    assert output.metrics["anchor_error"] > 0.01
    anchored = evaluate(FACM(), student, states).loss
    assert gradient(anchored, student.network.field).norm() > 0.01
    assert gradient(anchored, student.network.jump).norm() < 1e-9
    shortcut = evaluate(FACM(), halves(jump=perturbed), states)
    assert shortcut.metrics["anchor_error"] < 1e-20
    assert shortcut.metrics["error"] > 1e-4


def test_the_derivative_runs_through_the_change_of_time(monkeypatch):
    """A derivative that takes the network's time for t, with d(-t)/dt = 1, leaves a residual."""

    def residual(estimator, velocity, jump, progress):
        x, t, s, _ = jump
        average = estimator.student.average_velocity(x, t, s)
        _, slope = torch.func.jvp(estimator.student.network.velocity, (x, -t), (velocity, torch.ones_like(t)))
        value = average.detach() - velocity + identities.expand_time(t, x) * slope.detach()
        return identities.Residual(average, value)

    monkeypatch.setattr(facm, "eulerian", residual)
    assert judge(FACM(), halves(), teacher(), path_states(teacher()))[0] > 0.1


@pytest.mark.parametrize("family", ["mlp", "sit", "exact"])
def test_students_with_the_expanded_condition(family):
    torch.manual_seed(0)
    if family == "exact":
        of = GaussianTeacher([1.0, 0.0], 0.5)
        student = from_teacher(of, "expanded", network=MLP(dim=2, hidden_size=16))
    else:
        sit = {"depth": 2, "hidden_size": 16, "num_heads": 2, "in_channels": 1, "num_classes": 3}
        network = MLP(dim=2, hidden_size=16) if family == "mlp" else SiT(4, 2, **sit)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        of = NetworkTeacher(network)
        student = from_teacher(of, "expanded")
    x, t = of.sample_prior(6), torch.linspace(0, 1, 6)
    condition = Condition.in_turn(of.num_classes, 6)
    torch.testing.assert_close(student.velocity(x, t, condition), of.velocity(x, t, condition))
    check_flow_map(student)
    check_objective(FACM(), student, of)


def test_expanded_condition_is_refused_for_edm2():
    with pytest.raises(ConfigError, match="EDM2"):
        NetworkFlowMap(EDM2(8, 1, 3, 8, (1, 2), num_blocks=1, attn_resolutions=()), "expanded")


# Times and guidance.


def test_times_follow_the_published_law():
    law = ArctanLogNormal()
    for time, beyond in ((0.95, 1.8e-2), (0.99, 1e-3)):
        assert 1 - float(law.cdf(torch.tensor(time).double())) == pytest.approx(beyond, rel=0.05)
    assert law.cdf(torch.tensor([0.0, 1.0])).tolist() == [0.0, 1.0]
    assert float(law.quantile(torch.tensor(0.5).double())) == pytest.approx(2 / math.pi * math.atan(math.exp(-0.8)))
    p = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    close(law.cdf(law.quantile(p)), p)
    generator = torch.Generator().manual_seed(0)
    draws = law.sample(20_000, generator).sort().values.double()
    empirical = (torch.arange(20_000) + 0.5) / 20_000
    assert (law.cdf(draws) - empirical).abs().max() < 1.95 / 20_000**0.5
    t = law.sample(1000, generator)
    assert (law.sample_below(t, generator) <= t).all()


def test_recipes_guide_away_from_the_prior_only():
    with config.parsed(config.composed("facm", "digits"), []):
        assert config.value("train.teacher").interval == (0.0, 0.875)
        assert config.value("train.objective").pairs == ToData(starts=ArctanLogNormal(mean=-0.8, std=1.6))
