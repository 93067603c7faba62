"""The correction, the joint objective, and what FreeFlow does without data."""

import attrs
import pytest
import torch
from exact import STEPS, auxiliary_loss_of, below, gradient, loss_of, perturbed, prior_states
from hypothesis import given, settings
from hypothesis import strategies as st
from packaged import packaged

import flowdistill
from flowdistill import Condition, ConfigError, States
from flowdistill.algorithms.freeflow import FreeFlow, FreeFlowCorrection, FreeFlowPrediction
from flowdistill.algorithms.identities import Residual, pull
from flowdistill.flow_maps import from_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.networks import MLP
from flowdistill.pairs import Durations
from flowdistill.plumbing.registry import DATASETS
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.times import Always, Uniform
from flowdistill.velocities import Exact, FiniteDifference, Jvp, Minibatch, OnlineNetwork


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean, variance=0.5):
    return GaussianTeacher(torch.as_tensor(mean).double(), torch.full((len(mean),), variance).double())


def correction_gradient(student, teacher, noising, n=2048, seed=0, **kwargs):
    """The correction's gradient with respect to the student's mean."""
    objective = FreeFlowCorrection(noising=noising, times=Uniform(low=0.02, high=0.98), **kwargs)
    objective.setup(student, teacher)
    output = loss_of(objective, student, teacher, prior_states(teacher, n), step=0, generator=generator(seed))
    return torch.autograd.grad(output.loss, student.mean)[0]


@given(dim=st.integers(1, 32), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_correction_vanishes_where_the_distributions_coincide(dim, seed):
    mean = torch.randn(dim, generator=generator(seed), dtype=torch.float64)
    teacher = gaussian(mean)
    student = GaussianFlowMap(teacher)
    assert correction_gradient(student, teacher, Exact(distribution=teacher)).norm() < 1e-12


@given(dim=st.integers(1, 32), seed=st.integers(0, 1000))
@settings(max_examples=15)
def test_correction_points_from_the_students_mean_to_the_teachers(dim, seed):
    """Gaussians of equal covariance: descent moves the student's mean straight towards the teacher's."""
    offset = torch.randn(dim, generator=generator(seed), dtype=torch.float64)
    teacher = gaussian(torch.zeros(dim))
    student = GaussianFlowMap(gaussian(offset))
    step = -correction_gradient(student, teacher, Exact(distribution=gaussian(offset)))
    assert torch.nn.functional.cosine_similarity(step, -offset, dim=0) > 1 - 1e-9


def test_correction_of_point_masses_moves_the_sample():
    """The sign in the plainest case: a student at +1, a teacher at -1."""
    teacher = gaussian([-1.0], 1e-4)
    student = GaussianFlowMap(gaussian([1.0], 1e-4))
    objective = FreeFlowCorrection(noising=Exact(distribution=gaussian([1.0], 1e-4)), times=Uniform(low=0.1, high=0.9))
    optimizer = torch.optim.SGD([student.mean], lr=0.05)
    for step in range(200):
        loss = loss_of(
            objective, student, teacher, prior_states(teacher, 64, step), step=step, generator=generator(step)
        )
        optimizer.zero_grad()
        loss.loss.backward()
        optimizer.step()
        objective.noising = Exact(distribution=gaussian(student.mean.detach(), 1e-4))
    torch.testing.assert_close(student.mean.detach(), torch.tensor([-1.0]).double(), atol=0.02, rtol=0)


def test_online_network_learns_the_students_velocity():
    """After training on a fixed student the online network's velocity is that of the student's distribution."""
    teacher = GaussianTeacher([0.0, 0.0], 0.5)
    student = GaussianFlowMap(GaussianTeacher([1.0, -0.5], 0.3))
    torch.manual_seed(0)
    noising = OnlineNetwork(network=lambda: MLP(dim=2, hidden_size=64, depth=2))
    noising.setup(student, teacher)
    (module,) = noising.modules().values()
    optimizer = torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=3e-3)
    truth = GaussianTeacher([1.0, -0.5], 0.3)
    x, r = torch.randn(512, 2, generator=generator(9)), torch.linspace(0.2, 0.95, 512)
    x = x * (0.3 * (1 - r) ** 2 + r**2).sqrt()[:, None] + (1 - r)[:, None] * truth.mean

    def error():
        return (noising.estimate(x, r, Condition(), samples=x) - truth.velocity(x, r)).square().mean().sqrt()

    before = error()
    for step in range(600):
        samples = student.sample(torch.randn(256, 2, generator=generator(step))).detach()
        loss = noising.module_loss("online", samples, Condition(), generator=generator(1000 + step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 0.3
    assert error() < 0.35 * before


def joint(**kwargs):
    return FreeFlow(
        prediction=FreeFlowPrediction(estimator=Jvp(), power=1.0),
        correction=FreeFlowCorrection(noising=Exact(distribution=gaussian([0.3, 0.3])), times=Uniform(low=0.1)),
        **kwargs,
    )


def test_the_correction_looks_at_high_noise():
    """The quantiles of logit-normal(0.8, 1.6): t = 1 is noise, and the median 1 / (1 + exp(-0.8)) = 0.69."""
    r = FreeFlowCorrection().times.sample(200_000, generator())
    levels = torch.tensor([0.1, 0.5, 0.9])
    wanted = torch.sigmoid(0.8 + 1.6 * torch.special.ndtri(levels))
    torch.testing.assert_close(r[:100_000].quantile(levels), wanted, rtol=0, atol=0.01)
    assert float(wanted[1]) == pytest.approx(0.69, abs=0.001)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_norm_of_weighted_residuals(power):
    """By hand: E[w |R|] with w = (|R|^2/D + eps)^-k."""
    value = torch.randn(7, 3, generator=generator(), dtype=torch.float64)
    output = pull(Residual(torch.zeros(7, 3, dtype=torch.float64, requires_grad=True), value), power=power, eps=0.1)
    weights = (value.square().mean(1) + 0.1) ** -power
    torch.testing.assert_close(output.weighted_norm, (weights * value.norm(dim=1)).mean())
    torch.testing.assert_close(output.residual_norm, value.norm(dim=1).mean())


def test_weighted_residuals_balance_the_joint_loss():
    teacher = gaussian([1.0, 0.0])
    student, states = perturbed(teacher, 0.3), prior_states(teacher, 100)
    objective = joint(alpha=0.5, balance="weighted")
    output = loss_of(objective, student, teacher, states, step=0, generator=generator(4))
    again = generator(4)
    prediction = loss_of(objective.prediction, student, teacher, states[25:], step=0, generator=again)
    correction = loss_of(objective.correction, student, teacher, states[:25], step=0, generator=again)
    wanted = 0.5 * prediction.weighted_norm / correction.residual_norm
    assert abs(float(wanted / (0.5 * prediction.residual_norm / correction.residual_norm)) - 1) > 0.1
    torch.testing.assert_close(output.metrics["lambda"], wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_joint_loss_is_prediction_plus_lambda_correction(alpha):
    teacher = gaussian([1.0, 0.0])
    student, states = perturbed(teacher, 0.3), prior_states(teacher, 100)
    objective = joint(alpha=alpha)
    shared = generator(4)
    output = loss_of(objective, student, teacher, states, step=0, generator=shared)
    again = generator(4)
    prediction = loss_of(objective.prediction, student, teacher, states[25:], step=0, generator=again)
    correction = loss_of(objective.correction, student, teacher, states[:25], step=0, generator=again)
    wanted = alpha * prediction.residual_norm / correction.residual_norm
    torch.testing.assert_close(output.metrics["lambda"], wanted, rtol=1e-6, atol=0)
    total = gradient(prediction.loss, student) + wanted * gradient(correction.loss, student)
    torch.testing.assert_close(gradient(output.loss, student), total, rtol=1e-6, atol=1e-12)


def test_lambda_is_bounded_where_the_velocities_are_equal():
    """v_N = u up to rounding: the correction's share stays a rounding error."""
    teacher = gaussian([1.0, 0.0])
    student, states = perturbed(teacher, 0.3), prior_states(teacher)
    objective = joint(alpha=0.5)
    objective.correction.noising = Exact(distribution=gaussian([1.0 + 1e-12, 0.0]))
    output = loss_of(objective, student, teacher, states, step=0, generator=generator())
    assert output.metrics["lambda"] <= 0.5e4 * 1.000001
    rows = round(objective.correction_fraction * len(states))
    alone = loss_of(objective.prediction, student, teacher, states[rows:], step=0, generator=generator())
    torch.testing.assert_close(gradient(output.loss, student), gradient(alone.loss, student), rtol=1e-5, atol=1e-7)


def test_lambda_is_not_differentiated():
    teacher = gaussian([1.0, 0.0])
    student = perturbed(teacher, 0.3)
    output = loss_of(joint(), student, teacher, prior_states(teacher), step=0, generator=generator())
    assert not output.metrics["lambda"].requires_grad


def test_prediction_alone_until_the_correction_starts():
    teacher = gaussian([1.0, 0.0])
    student, states = perturbed(teacher, 0.3), prior_states(teacher)
    objective = joint(correction_start=10 / STEPS)
    early = loss_of(objective, student, teacher, states, step=9, generator=generator())
    alone = loss_of(objective.prediction, student, teacher, states, step=9, generator=generator())
    assert torch.equal(early.loss, alone.loss)
    assert "lambda" in loss_of(objective, student, teacher, states, step=10, generator=generator()).metrics


def test_online_network_is_trained_from_its_warm_up_on():
    teacher = GaussianTeacher([0.0, 0.0], 0.5)
    student = from_teacher(teacher, "anchored", network=MLP(dim=2, hidden_size=16))
    correction = FreeFlowCorrection(noising=OnlineNetwork(network=lambda: MLP(dim=2, hidden_size=16)))
    objective = FreeFlow(correction=correction, correction_start=10 / STEPS, online_warmup=4 / STEPS)
    objective.setup(student, teacher)
    states = States(x=torch.randn(8, 2), t=torch.ones(8), s=below(torch.ones(8)), condition=Condition())

    def auxiliary(step):
        return auxiliary_loss_of(objective, "online", student, teacher, states, step=step, generator=generator())

    assert auxiliary(5) is None
    assert auxiliary(6).loss.requires_grad


def test_correction_has_a_guidance_interval_of_its_own():
    """With the interval [0, 0.7] a guided teacher is plain above it; prediction keeps the teacher's own interval."""
    plain = GaussianTeacher(torch.zeros(2).double(), 0.5, class_means=torch.eye(2).double())
    teacher = GuidedTeacher(plain, 2.0)
    student = GaussianFlowMap(plain)
    x = torch.zeros(64, 2, dtype=torch.float64)
    states = States(
        x=x,
        t=torch.ones(64).double(),
        s=below(torch.ones(64).double()),
        condition=Condition(torch.zeros(64, dtype=torch.long)),
    )

    def residual(**kwargs):
        times = Uniform(low=0.8, high=0.9)
        objective = FreeFlowCorrection(noising=Exact(distribution=plain), times=times, **kwargs)
        objective.setup(student, teacher)
        return loss_of(objective, student, teacher, states, step=0, generator=generator()).metrics["error"]

    assert residual(guidance_interval=(0.0, 0.7)) < 1e-20
    assert residual() > 1e-2
    with pytest.raises(ConfigError, match="guided teacher"):
        FreeFlowCorrection(guidance_interval=(0.0, 0.7)).setup(student, plain)


def test_durations_scale_the_way_from_any_start():
    """From states at t < 1 the end time is t (1 - delta): at delta = 0 the residual is F - u at the state itself."""
    t, s = Durations(law=Always(value=0.25), starts=Always(value=0.8)).sample(3, generator())
    torch.testing.assert_close(torch.stack([t, s]), torch.tensor([[0.8], [0.6]]).expand(2, 3))
    teacher = gaussian([1.0, 0.0])
    student = perturbed(teacher, 0.3)
    objective = FreeFlowPrediction()
    t = torch.full((64,), 0.6).double()
    states = attrs.evolve(prior_states(teacher), t=t, s=t)
    error = loss_of(objective, student, teacher, states, step=0, generator=generator()).metrics["error"]
    plain = student.velocity(states.x, states.t) - teacher.velocity(states.x, states.t)
    torch.testing.assert_close(error, plain.square().mean().detach())


@pytest.mark.parametrize("name", ["prediction", "correction"])
def test_teacher_is_queried_once_a_row(name):
    teacher = GaussianTeacher([0.0, 0.0], 0.5)
    student = GaussianFlowMap(teacher)
    objective = {"prediction": FreeFlowPrediction(), "correction": FreeFlowCorrection(noising=Minibatch())}[name]
    states = States(x=torch.randn(32, 2), t=torch.ones(32), s=below(torch.ones(32)), condition=Condition())
    before = teacher.evaluations
    loss_of(objective, student, teacher, states, step=0, generator=generator())
    assert teacher.evaluations - before == 32


def test_a_data_free_run_touches_no_data(tmp_path, monkeypatch):
    """Every data set refuses to be built, read or imported; the run does not notice."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("a data-free run has built a data set")

    for name in packaged(DATASETS):
        monkeypatch.setattr(DATASETS.get(name), "__init__", refuse)
        monkeypatch.setattr(DATASETS.get(name), "sample", refuse)
    monkeypatch.setattr("numpy.load", refuse)
    with pytest.raises(AssertionError):
        DATASETS.build("digits")
    bindings = [
        "train.steps = 3",
        "freeflow.correction_start = 0.3",
        "evaluation.num_samples = 20",
        "train.batch_size = 8",
    ]
    result = flowdistill.train(
        gin_file="freeflow/digits.gin",
        gin_bindings=[*bindings, "evaluation.teacher_steps = (1,)", "train.sample_every = 0"],
        workdir=tmp_path / "run",
    )
    assert result.steps == 3


def test_finite_difference_is_the_default():
    estimator = FreeFlowPrediction().estimator
    assert (type(estimator), estimator.scheme, estimator.h) == (FiniteDifference, "backward", 0.1)
