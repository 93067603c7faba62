"""Continuous consistency: the paper's algorithm in TrigFlow, the learned weight, and with score distillation."""

import copy

import attrs
import pytest
import torch
from exact import (
    STEPS,
    assert_exact,
    auxiliary_loss_of,
    below,
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

from flowdistill import OBJECTIVES, Condition, ConfigError, States
from flowdistill.algorithms import identities
from flowdistill.algorithms.combined import Combined
from flowdistill.algorithms.consistency import SCT, SCDWithVSD, continuous
from flowdistill.algorithms.weighting import LearnedWeighting
from flowdistill.flow_maps import NetworkFlowMap, from_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import StateSource
from flowdistill.networks import MLP
from flowdistill.paths import from_trigflow, interpolate, to_trigflow, velocity_to_trigflow
from flowdistill.teachers.gaussian import (
    GaussianFlowMap,
    GaussianTeacher,
    ProductMixtureFlowMap,
    ProductMixtureTeacher,
)
from flowdistill.testing import check_objective
from flowdistill.velocities import Exact, Jvp, OnlineNetwork, TeacherVelocity

SCD = OBJECTIVES.get("scd")

MEAN, VARIANCES = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double()


def teacher():
    return GaussianTeacher(MEAN, VARIANCES)


def scd(**kwargs):
    return SCD(**{"warmup": 0, "weighting": None, **kwargs})


def sct(**kwargs):
    return SCT(**{"warmup": 0, "weighting": None, **kwargs})


def evaluate(objective, student, states, step=0, of=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    return loss_of(objective, student, of or teacher(), states, step=step, generator=g)


def close(a, b, rtol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=1e-13)


# The exact map.


@pytest.mark.parametrize("draw", [path_states, data_states])
@pytest.mark.parametrize("normalization", [0.1, None])
@given(of=gaussian_teachers())
@settings(max_examples=8)
def test_exact_map_has_no_residual_and_no_gradient(draw, normalization, of):
    assert_exact(scd(normalization=normalization), of, draw(of))


def test_states_at_the_prior_have_no_weight():
    """So that no student learns from them: other states must be the source."""
    student = perturbed(teacher())
    output = evaluate(scd(), student, prior_states(teacher()))
    assert output.metrics["error"] > 1e-2
    assert gradient(output.loss, student).norm() == 0
    assert evaluate(SCD(weighting=None), student, prior_states(teacher())).loss == 0


DIRECTIONS = {
    "right": (lambda v, dt, ds: (v, 1.0, 0.0), False),
    "(0, 1, 0)": (lambda v, dt, ds: (torch.zeros_like(v), 1.0, 0.0), True),
    "(v, 0, 0)": (lambda v, dt, ds: (v, 0.0, 0.0), True),
    "(v, 1, 1)": (lambda v, dt, ds: (v, 1.0, 1.0), True),
    "(-v, 1, 0)": (lambda v, dt, ds: (-v, 1.0, 0.0), True),
}


class _Directed(Jvp):
    """A derivative whose direction is changed on its way."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def derivative(self, jump, *, dx=None, dt=0.0, ds=0.0, progress=0.0):
        dx, dt, ds = self.change(dx, dt, ds)
        return super().derivative(jump, dx=dx, dt=dt, ds=ds)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_mutants_of_the_tangent_leave_a_residual(name):
    change, wrong = DIRECTIONS[name]
    objective = scd(estimator=_Directed(change))
    residual, slope = judge(objective, GaussianFlowMap(teacher()), teacher(), path_states(teacher(), n=512))
    assert (residual > 0.1) == wrong
    assert (slope > 0.01) == wrong


# Algorithm 1 of the paper, on a network wrapped for TrigFlow.


def student_of(seed=0):
    torch.manual_seed(seed)
    student = NetworkFlowMap(MLP(dim=2, hidden_size=16, depth=2)).double()
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return student


def algorithm_1(student, of, states, data_std, warmup, c, weight=None):
    """The paper's loss, with its network F(y / sd, angle) around the student and, if distilled, around the teacher."""
    sd = data_std

    def wrapped(velocity):
        def network(scaled, angle):
            y, cos, sin = sd * scaled, torch.cos(angle), torch.sin(angle)
            norm = (cos + sd * sin)[:, None]
            inner = velocity(y / norm, sd * sin / (cos + sd * sin))
            return ((sd * cos - sin)[:, None] / norm * y + sd / norm * inner) / sd

        return network

    _, angle = to_trigflow(states.x, states.t, sd)
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    z = sd * states.noise
    y = cos * states.clean + sin * z
    rate = cos * z - sin * states.clean if of is None else sd * wrapped(of.velocity)(y / sd, angle)
    network = wrapped(lambda x, t: student.average_velocity(x, t, torch.zeros_like(t)))
    fixed, slope = torch.func.jvp(network, (y / sd, angle), (rate / sd, torch.ones_like(angle)))
    fixed, slope = fixed.detach(), slope.detach()
    g = -(cos**2) * (sd * fixed - rate) - warmup * cos * sin * (y + sd * slope)
    if c is not None:
        g = g / (g.norm(dim=1, keepdim=True) + c)
    error = (network(y / sd, angle) - fixed - g).square().mean(1)
    return (error if weight is None else weight * error).mean(), g.square().mean(1)


KINDS = {"sct": (SCT, None), "scd": (SCD, teacher())}


@pytest.mark.parametrize("c", [0.1, None])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("data_std", [0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_algorithm_1_in_trigflow(kind, data_std, warmup, c):
    build, of = KINDS[kind]
    student, states = student_of(), data_states(teacher())
    objective = build(sigma_data=data_std, warmup=0.1, normalization=c, weighting=None)
    output = evaluate(objective, student, states, step=round(0.1 * STEPS * warmup))
    wanted, _ = algorithm_1(student, of, states, data_std, warmup, c)
    ours, theirs = gradient(output.loss, student), gradient(wanted, student)
    assert theirs.norm() > 1e-2
    assert (ours - theirs).norm() < 1e-12 * theirs.norm()


@pytest.mark.parametrize("data_std", [0.5, 1.0, 2.0])
def test_the_wrapper_keeps_the_consistency_function(data_std):
    student, states = student_of(), path_states(teacher())
    zero = torch.zeros_like(states.t)
    average = student.average_velocity(states.x, states.t, zero)
    y, angle = to_trigflow(states.x, states.t, data_std)
    network = velocity_to_trigflow(states.x, states.t, average, data_std)
    jump = torch.cos(angle)[:, None] * y - torch.sin(angle)[:, None] * network
    close(jump, student(states.x, states.t, zero))
    close(from_trigflow(y, angle, data_std)[0], states.x)


def _unscaled(t, data_std):
    return torch.full_like(t, data_std)


def _squared(residual, constant):
    return residual / (residual.square().sum(1, keepdim=True) + constant).sqrt()


def _root_mean_square(residual, constant):
    return residual / (residual.square().mean(1, keepdim=True).sqrt() + constant)


def _batch(residual, constant):
    return residual / (residual.norm() + constant)


def _half_warmed(*args, warmup, **kwargs):
    return identities.eulerian(*args, warmup=warmup**2, **kwargs)


def _unwarmed(*args, warmup, **kwargs):
    return identities.eulerian(*args, **kwargs)


def _with_graph(estimator, velocity, jump, progress, *, warmup):
    right = identities.eulerian(bound(Jvp(graph=True), estimator.student), velocity, jump, warmup=warmup)
    return identities.Residual(right.average, right.value + right.average - right.average.detach())


MISTAKES = {
    "no factor of the wrapper": ("state_std", _unscaled),
    "another norm": ("normalize", _squared),
    "root mean square": ("normalize", _root_mean_square),
    "norm of the batch": ("normalize", _batch),
    "another warm-up": ("eulerian", _half_warmed),
    "no warm-up": ("eulerian", _unwarmed),
    "gradient through the target": ("eulerian", _with_graph),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_seen_in_the_gradient(mistake, monkeypatch):
    student, states = perturbed(teacher(), 0.3), data_states(teacher())
    wanted = gradient(algorithm_1(student, teacher(), states, 0.5, 0.3, 0.1)[0], student)
    right = gradient(evaluate(scd(warmup=10 / STEPS), student, states, step=3).loss, student)
    assert (right - wanted).norm() < 1e-12 * wanted.norm()
    name, wrong = MISTAKES[mistake]
    monkeypatch.setattr(continuous, name, wrong)
    output = evaluate(scd(warmup=10 / STEPS), student, states, step=3)
    assert (gradient(output.loss, student) - wanted).norm() > 0.02 * wanted.norm()


def test_metrics_are_those_of_the_residual_itself():
    student, states = student_of(), data_states(teacher())
    output = evaluate(scd(), student, states)
    velocity = teacher().velocity(states.x, states.t)
    residual = identities.eulerian(bound(Jvp(), student), velocity, states.to(0.0)).value
    close(output.metrics["error"], residual.square().mean())
    close(output.residual_norm, residual.norm(dim=1).mean())


def test_before_the_warm_up_it_is_flow_matching_of_jumps_to_data(monkeypatch):
    seen = []

    def spy(*args, warmup, **kwargs):
        seen.append(float(warmup.max()))
        return identities.eulerian(*args, warmup=warmup, **kwargs)

    monkeypatch.setattr(continuous, "eulerian", spy)
    student, states = perturbed(teacher()), data_states(teacher())
    output = evaluate(SCD(weighting=None), student, states)
    difference = student.average_velocity(states.x, states.t, 0 * states.t) - teacher().velocity(states.x, states.t)
    close(output.metrics["error"], difference.square().mean().detach())
    t, weight = states.t, []
    for step in (500, 1000, 2000):  # the warm-up takes a tenth
        evaluate(SCD(weighting=None), student, states, step)
        w, spread = min(step / 1000, 1.0), (1 - t) ** 2 / 4 + t**2
        factor = w * spread / ((1 - t) / 4 + w * (t**2 - t * (1 - t) / 4))
        weight.append(float(factor.max()))
    assert seen[0] == 0
    close(torch.tensor(seen[1:]), torch.tensor(weight), 1e-6)
    assert abs(seen[-1] - 1) < 1e-12
    evaluate(SCD(weighting=None), student, prior_states(teacher()))  # 0/0 at t = 1 before the warm-up
    assert seen[-1] == 0


# From data.


def mean_gradient(objective, student, of, batches=60, n=256):
    rows = []
    for seed in range(batches):
        states = _noised(of, n, seed)
        rows.append(gradient(evaluate(objective, student, states).loss, student))
    stacked = torch.stack(rows)
    return stacked.mean(0), stacked.std(0) / batches**0.5


def _noised(of, n, seed):
    g = torch.Generator().manual_seed(seed)
    clean, noise = of.sample_data(n, g).double(), torch.randn(n, 2, generator=g, dtype=torch.float64)
    t = 0.3 + 0.6 * torch.rand(n, generator=g, dtype=torch.float64)
    return States(x=interpolate(clean, noise, t), t=t, s=below(t), condition=Condition(), clean=clean, noise=noise)


def test_training_has_no_mean_gradient_at_the_map_of_a_gaussian():
    for normalization in (None, 0.1):  # which for a Gaussian is symmetric
        objective = sct(normalization=normalization)
        mean, error = mean_gradient(objective, GaussianFlowMap(teacher()), teacher())
        assert (mean.abs() < 4 * error).all()
        mean, error = mean_gradient(objective, perturbed(teacher(), 0.3), teacher())
        assert (mean.abs() > 15 * error).any()


def test_a_normalised_tangent_is_biased_on_a_mixture():
    """And a plain one is not."""
    means = torch.tensor([[-2.0, 1.5], [2.0, 0.0]], dtype=torch.float64)
    weights = torch.tensor([[0.9, 0.5], [0.1, 0.5]], dtype=torch.float64)
    of = ProductMixtureTeacher(means, torch.full((2, 2), 0.05).double(), weights)
    student = ProductMixtureFlowMap(of)
    mean, error = mean_gradient(sct(normalization=None), student, of, batches=20, n=256)
    assert (mean.abs() < 4 * error).all()
    mean, error = mean_gradient(sct(), student, of, batches=20, n=256)
    assert (mean.abs() > 6 * error).any()


@pytest.mark.parametrize(("kind", "queries"), [("sct", 0), ("scd", 8)])
def test_evaluations_a_row(kind, queries):
    """The student in the product and with a graph; a guided teacher twice."""
    build, _ = KINDS[kind]
    of = GaussianTeacher(MEAN, VARIANCES)
    student, states = GaussianFlowMap(of), data_states(of, n=8)
    evaluate(build(weighting=None), student, states, of=of)
    assert (student.evaluations, of.evaluations) == (16, queries)
    assert build().needs_data == (kind == "sct")
    assert build().needs_teacher == (kind == "scd")


def test_guidance_of_each_sample_reaches_teacher_and_student():
    plain = GaussianTeacher(MEAN, VARIANCES, class_means=torch.eye(2).double())
    guided, student = GuidedTeacher(plain, 1.0), GaussianFlowMap(GuidedTeacher(plain, 1.0))
    states = data_states(plain)
    labels, scales = torch.arange(64) % 2, 1 + torch.rand(64, generator=torch.Generator().manual_seed(0)).double()
    states = attrs.evolve(states, condition=Condition(labels, scales))
    assert evaluate(scd(), student, states, of=guided).metrics["error"] < 1e-20
    assert evaluate(scd(), student, states, of=plain).metrics["error"] > 1e-2


# The learned weight.


def trained(weighting, errors, steps=300):
    """The weighting after training on errors that depend on the time alone."""
    weighting.setup(None, None)
    optimizer = torch.optim.Adam(next(iter(weighting.modules().values())).parameters(), lr=1e-2)
    for step in range(steps):
        t = torch.rand(256, generator=torch.Generator().manual_seed(step))
        weighting(t, errors(t), step)
        optimizer.zero_grad()
        weighting.loss().loss.backward()
        optimizer.step()
    return weighting


def test_learned_weight_is_the_reciprocal_of_the_error():
    torch.manual_seed(0)
    weighting = trained(LearnedWeighting(size=32), lambda t: torch.exp(2 * t - 3))
    t = torch.linspace(0.1, 0.9, 9)
    weights = weighting(t, t, 1000)
    assert not weights.requires_grad
    assert ((weights * torch.exp(2 * t - 3)).log().abs() < 0.1).all()


def test_learned_weight_is_one_at_first_and_keeps_the_rows_of_a_step():
    weighting = LearnedWeighting()
    weighting.setup(None, None)
    assert weighting.loss() is None
    t, error = torch.rand(8), torch.rand(8)
    assert torch.equal(weighting(t, error, 0), torch.ones(8))
    weighting(1 - t, 3 * error, 0)
    torch.testing.assert_close(weighting.loss().loss, 2 * error.mean())  # both parts of an accumulated batch
    weighting(t, 5 * error, 1)
    torch.testing.assert_close(weighting.loss().loss, 5 * error.mean())


def test_weighted_gradient_and_the_loss_of_the_weight():
    """Both of Algorithm 1, e^w / D |F - F - g|^2 - w, at a weight that is not 1."""
    student, states = student_of(), data_states(teacher())
    objective = SCD(warmup=0, weighting=LearnedWeighting(size=16, name="mine"))
    objective.setup(student, teacher())
    (network,) = objective.modules().values()
    assert list(objective.modules()) == ["mine"]
    torch.manual_seed(1)
    torch.nn.init.normal_(network[-1].weight, std=20.0)
    output = evaluate(objective, student, states)
    logarithm = network(states.t)[:, 0]
    assert logarithm.std() > 0.02
    wanted, error = algorithm_1(student, teacher(), states, 0.5, 1.0, 0.1, logarithm.detach().exp().double())
    ours, theirs = gradient(output.loss, student), gradient(wanted, student)
    assert (ours - theirs).norm() < 1e-6 * theirs.norm()  # the network is float32
    assert all(p.grad is None for p in network.parameters())
    auxiliary = auxiliary_loss_of(objective, "mine", student, teacher(), states, step=0, generator=torch.Generator())
    torch.testing.assert_close(auxiliary.loss, (logarithm.exp() * error - logarithm).mean())


@pytest.mark.parametrize("name", ["sct", "scd"])
def test_conformance_with_and_without_a_weight(name):
    of = GaussianTeacher([1.0, -0.5], 0.5)
    for weighting in (None, LearnedWeighting(size=8)):
        objective = OBJECTIVES.build(name, weighting=weighting, target=TeacherVelocity())
        check_objective(objective, student_of().float(), of, states=_Fixed(of))


class _Fixed(StateSource):
    """A state source of noised data."""

    needs_data = True

    def __init__(self, of):
        self.of = of

    def sample(self, n, pairs, generator):
        states = data_states(self.of, n=n)
        return attrs.evolve(states, x=states.x.float(), t=states.t.float(), s=states.s.float())


# With score distillation.


def joint(build, **kwargs):
    noising = Exact(distribution=GaussianTeacher(MEAN + 0.3, VARIANCES))
    return build(
        prediction=SCD(warmup=0, weighting=LearnedWeighting(size=8)),
        correction=OBJECTIVES.build("vsd", noising=noising),
        **kwargs,
    )


def test_scd_vsd_is_combined_to_the_bit():
    student, states = perturbed(teacher()), data_states(teacher())
    results = []
    for objective in (joint(SCDWithVSD), joint(Combined, correction_fraction=0.5, balance="fixed")):
        torch.manual_seed(0)
        objective.setup(student, teacher())
        output = evaluate(objective, student, states)
        auxiliary = auxiliary_loss_of(
            objective, "weighting", student, teacher(), states, step=0, generator=torch.Generator()
        )
        results.append((output.loss.detach(), gradient(output.loss, student), auxiliary.loss.detach()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_scd_vsd_adds_the_losses_of_two_halves():
    student, states = perturbed(teacher()), data_states(teacher())
    objective = joint(SCDWithVSD)
    objective.setup(student, teacher())
    output = evaluate(objective, student, states)
    g = torch.Generator().manual_seed(1)
    prediction = loss_of(objective.prediction, student, teacher(), states[32:], step=0, generator=g)
    correction = loss_of(objective.correction, student, teacher(), states[:32], step=0, generator=g)
    close(output.loss, prediction.loss + correction.loss)
    assert output.metrics["lambda"] == 1
    assert set(output.metrics) == {"error", "correction_error", "lambda"}


def test_scd_vsd_vanishes_at_the_exact_map():
    objective = joint(SCDWithVSD)
    objective.correction.noising = Exact(distribution=teacher())
    objective.prediction.weighting = None
    student, states = GaussianFlowMap(teacher()), data_states(teacher())
    output = evaluate(objective, student, states)
    assert gradient(output.loss, student).norm() < 1e-9
    assert output.metrics["error"] + output.metrics["correction_error"] < 1e-18
    objective.correction.noising = Exact(distribution=GaussianTeacher(MEAN + 0.3, VARIANCES))
    student = perturbed(teacher())
    output = evaluate(objective, student, states)
    assert gradient(output.loss, student).norm() > 1e-2
    assert min(output.metrics["error"], output.metrics["correction_error"]) > 1e-2


def test_scd_vsd_by_default():
    objective = OBJECTIVES.build("scd_vsd")
    assert isinstance(objective.prediction, SCT)
    assert isinstance(objective.prediction.target, TeacherVelocity)
    assert type(objective.correction) is OBJECTIVES.get("vsd")
    assert "lu2025scm" in objective.citation
    assert objective.needs_teacher
    assert not objective.needs_data


def test_scd_vsd_conforms():
    of = GaussianTeacher([1.0, -0.5], 0.5)
    noising = OnlineNetwork(network=lambda: MLP(dim=2, hidden_size=16))
    objective = SCDWithVSD(correction=OBJECTIVES.build("vsd", noising=noising))
    student = from_teacher(of, network=MLP(dim=2, hidden_size=16))
    for parameter in student.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    check_objective(objective, student, of, states=_Fixed(of))


def test_two_weightings_of_one_name_are_refused():
    student = perturbed(teacher())
    alike = Combined(prediction=SCD(), correction=SCT())
    alike.setup(student, teacher())
    with pytest.raises(ConfigError, match="have a module named weighting"):
        alike.modules()
    both = Combined(prediction=SCD(), correction=SCT(weighting=LearnedWeighting(name="other")))
    both.setup(student, teacher())
    assert sorted(both.modules()) == ["other", "weighting"]


def test_copies_weigh_apart():
    objective = SCD(warmup=0)
    objective.setup(perturbed(teacher()), teacher())
    other = copy.deepcopy(objective)
    evaluate(objective, perturbed(teacher()), data_states(teacher()))
    assert other.weighting.loss() is None
