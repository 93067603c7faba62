"""The exact teachers against Runge-Kutta, automatic differentiation and each other, in float64."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from flowdistill import Condition, ConfigError, load_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.teachers.gaussian import (
    GaussianFlowMap,
    GaussianMixtureTeacher,
    GaussianTeacher,
    ProductMixtureFlowMap,
    ProductMixtureTeacher,
)


def runge_kutta(teacher, x, t, s, condition=None, steps=400):
    h = (s - t) / steps
    for i in range(steps):
        now = t + i * h
        k1 = teacher.velocity(x, now, condition)
        k2 = teacher.velocity(x + h[:, None] / 2 * k1, now + h / 2, condition)
        k3 = teacher.velocity(x + h[:, None] / 2 * k2, now + h / 2, condition)
        k4 = teacher.velocity(x + h[:, None] * k3, now + h, condition)
        x = x + h[:, None] / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


@st.composite
def gaussians(draw, classes=None):
    """A Gaussian teacher of up to 32 dimensions with a diagonal or full covariance."""
    dim = draw(st.integers(1, 32))
    seed = draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(dim, generator=g, dtype=torch.float64)
    variances = torch.exp(1.5 * torch.randn(dim, generator=g, dtype=torch.float64))
    covariance = variances
    if draw(st.booleans()):
        q = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
        covariance = q @ torch.diag(variances) @ q.T
        covariance = (covariance + covariance.T) / 2
    means = None
    if classes:
        means = torch.randn(classes, dim, generator=g, dtype=torch.float64)
    return GaussianTeacher(mean, covariance, means)


@st.composite
def pairs(draw):
    """Times 0 <= s < t <= 1 of a batch of 4, as float64."""
    t = [draw(st.floats(0.05, 1.0)) for _ in range(4)]
    s = [draw(st.floats(0.0, 0.95)) * time for time in t]
    return torch.tensor(t, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)


def normal(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(gaussians(), pairs())
def test_gaussian_map_is_the_ode_solution(teacher, times):
    t, s = times
    x = 2 * normal(4, teacher.sample_shape[0])
    exact = GaussianFlowMap(teacher)(x, t, s)
    torch.testing.assert_close(runge_kutta(teacher, x, t, s), exact, rtol=1e-5, atol=1e-5)


@given(gaussians(), pairs())
def test_gaussian_map_satisfies_its_identities(teacher, times):
    t, s = times
    x = 2 * normal(4, teacher.sample_shape[0])
    flow_map = GaussianFlowMap(teacher).requires_grad_(False)
    gap = (t - s)[:, None]
    average = flow_map.average_velocity(x, t, s)
    velocity = teacher.velocity(x, t)
    torch.testing.assert_close(flow_map.velocity(x, t), velocity)
    middle = (t + s) / 2
    torch.testing.assert_close(flow_map(flow_map(x, t, middle), middle, s), flow_map(x, t, s))
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    jump = flow_map.average_velocity
    _, along = torch.func.jvp(jump, (x, t, s), (velocity, one, zero))
    torch.testing.assert_close(average, velocity - gap * along)  # Eulerian
    _, end = torch.func.jvp(jump, (x, t, s), (0 * x, zero, one))
    torch.testing.assert_close(average - gap * end, teacher.velocity(x - gap * average, s))  # Lagrangian
    # on the diagonal the derivative at fixed s is half the acceleration
    _, half = torch.func.jvp(jump, (x, t, t), (velocity, one, zero))
    _, acceleration = torch.func.jvp(teacher.velocity, (x, t), (velocity, one))
    torch.testing.assert_close(half, acceleration / 2)


def test_gaussian_average_velocity_keeps_its_digits():
    teacher = GaussianTeacher([0.5], 2.0)
    x, t = normal(256, 1).float(), torch.full((256,), 0.6)
    s = t - 1e-4
    flow_map = GaussianFlowMap(teacher).requires_grad_(False)
    truth = GaussianFlowMap(teacher).double().average_velocity(x.double(), t.double(), s.double())
    stable = flow_map.average_velocity(x, t, s)
    naive = (x - flow_map(x, t, s)) / (t - s)[:, None]
    assert (stable - truth).abs().max() < 2e-6
    assert (naive - truth).abs().max() > 1e-4


def test_gaussian_samples_have_its_moments(generator):
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]])
    teacher = GaussianTeacher([1.0, -2.0], covariance, class_means=[[5.0, 5.0], [0.0, 3.0]])
    data = teacher.sample_data(100_000, generator)
    torch.testing.assert_close(data.mean(0), torch.tensor([1.0, -2.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(data.T.cov(), covariance, atol=0.04, rtol=0)
    labels = torch.tensor([1, 0, -1])
    means = torch.stack(
        [teacher.sample_data(20_000, generator, Condition(label.expand(20_000))).mean(0) for label in labels]
    )
    torch.testing.assert_close(means, torch.tensor([[0.0, 3.0], [5.0, 5.0], [1.0, -2.0]]), atol=0.05, rtol=0)


def test_one_step_map_of_standard_data_is_the_identity_where_euler_collapses():
    teacher = GaussianTeacher([0.0, 0.0], 1.0)
    z = normal(8, 2).float()
    torch.testing.assert_close(GaussianFlowMap(teacher).sample(z), z)
    assert (z - teacher.velocity(z, torch.ones(8))).abs().max() < 1e-6


@settings(max_examples=10)
@given(gaussians(classes=3), pairs(), st.floats(0.5, 4.0), st.booleans())
def test_guided_map_is_the_ode_solution(teacher, times, scale, whole):
    t, s = times
    interval = (0.0, 1.0) if whole else (0.25, 0.6)
    guided = GuidedTeacher(teacher, scale, interval)
    condition = Condition(torch.tensor([0, 2, 1, -1]))
    x = normal(4, teacher.sample_shape[0])
    exact = GaussianFlowMap(guided).requires_grad_(False)
    ends = x
    for high, low in ((1.0, 0.6), (0.6, 0.25), (0.25, 0.0)):  # a kink of the field at every edge
        ends = runge_kutta(
            GuidedTeacher(teacher, scale if whole or low == 0.25 else 1.0),
            ends,
            t.clamp(max=high).clamp(min=s),
            t.clamp(max=low).clamp(min=s),
            condition,
            steps=100,
        )
    torch.testing.assert_close(exact(x, t, s, condition), ends, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(exact.velocity(x, t, condition), guided.velocity(x, t, condition))


@st.composite
def mixtures(draw):
    dim, count = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    means = 2 * torch.randn(count, dim, generator=g, dtype=torch.float64)
    root = torch.randn(count, dim, dim, generator=g, dtype=torch.float64) / 2
    full = root @ root.mT + 0.05 * torch.eye(dim, dtype=torch.float64)
    covariance = full if draw(st.booleans()) else full.diagonal(dim1=1, dim2=2)
    weights = 0.1 + torch.rand(count, generator=g, dtype=torch.float64)
    return GaussianMixtureTeacher(means, covariance, weights)


@given(mixtures(), st.floats(0.02, 0.98))
def test_mixture_velocity_is_its_score(teacher, time):
    x = normal(8, teacher.sample_shape[0])
    t = torch.full((8,), time, dtype=torch.float64)
    score = torch.func.grad(lambda x: teacher.log_prob(x, t).sum())(x)
    torch.testing.assert_close(teacher.velocity(x, t), -(x + time * score) / (1 - time))


@given(mixtures())
def test_mixture_is_finite_at_both_ends(teacher):
    x = 5 * normal(16, teacher.sample_shape[0]).float()
    for time in (0.0, 1e-4, 1.0):
        assert teacher.float().velocity(x, torch.full((16,), time)).isfinite().all()
    centre = (teacher.log_weights.exp()[:, None] * teacher.means).sum(0)
    torch.testing.assert_close(teacher.velocity(x, torch.ones(16)), x - centre, rtol=1e-4, atol=1e-4)


def test_mixture_of_one_is_the_gaussian():
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.4]], dtype=torch.float64)
    mean = torch.tensor([1.0, -1.0], dtype=torch.float64)
    x, t = normal(9, 2), torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(
        GaussianMixtureTeacher(mean[None], covariance[None]).velocity(x, t),
        GaussianTeacher(mean, covariance).velocity(x, t),
    )


def test_mixture_labels_choose_components_row_by_row(generator):
    teacher = load_teacher("two_moons")
    x, t = normal(6, 2).float(), torch.full((6,), 0.4)
    labels = torch.tensor([0, 1, -1, 1, 0, -1])
    mixed = teacher.velocity(x, t, Condition(labels))
    for label in (0, 1):
        rows = labels == label
        alone = GaussianMixtureTeacher(
            teacher.means[teacher.component_labels == label], teacher.variances[teacher.component_labels == label]
        )
        torch.testing.assert_close(mixed[rows], alone.velocity(x[rows], t[rows]))
        data = teacher.sample_data(500, generator, Condition(torch.full((500,), label)))
        nearest = torch.cdist(data, teacher.means).argmin(1)
        assert (teacher.component_labels[nearest] == label).float().mean() > 0.97
    torch.testing.assert_close(mixed[labels == -1], teacher.velocity(x, t)[labels == -1])


def test_mixture_samples_follow_the_weights(generator):
    teacher = GaussianMixtureTeacher([[-3.0], [0.0], [3.0]], 0.01, weights=[1, 2, 5])
    data = teacher.sample_data(40_000, generator)
    shares = [((data - m).abs() < 1).float().mean().item() for m in (-3, 0, 3)]
    assert shares == pytest.approx([0.125, 0.25, 0.625], abs=0.01)
    assert data[data > 2].var() == pytest.approx(0.01, rel=0.1)


@settings(max_examples=8)
@given(pairs())
def test_product_map_is_the_ode_solution(times):
    t, s = times
    teacher = ProductMixtureTeacher().double()
    x = normal(4, 2)
    exact = ProductMixtureFlowMap(teacher)(x, t, s)
    torch.testing.assert_close(runge_kutta(teacher, x, t, s, steps=1000), exact, rtol=0, atol=1e-5)


def test_product_map_has_exact_derivatives():
    teacher = ProductMixtureTeacher().double()
    flow_map = ProductMixtureFlowMap(teacher).requires_grad_(False)
    x, t = normal(64, 2), torch.linspace(0.2, 1, 64, dtype=torch.float64)
    s = t * torch.linspace(0, 0.9, 64, dtype=torch.float64)
    one, gap = torch.ones_like(t), (t - s)[:, None]
    average = flow_map.average_velocity(x, t, s)
    velocity = teacher.velocity(x, t)
    _, along = torch.func.jvp(flow_map.average_velocity, (x, t, s), (velocity, one, 0 * one))
    torch.testing.assert_close(average, velocity - gap * along, rtol=1e-7, atol=1e-7)
    # the Jacobian is the ratio of the densities
    _, slope = torch.func.jvp(lambda x: flow_map(x, t, s), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(slope, teacher.density(x, t) / teacher.density(flow_map(x, t, s), s))
    torch.testing.assert_close(flow_map.velocity(x, t), velocity)


def test_product_teacher_is_the_mixture_in_one_dimension(generator):
    product = ProductMixtureTeacher([[-2.0, 1.5]], [[0.09, 0.25]], [[0.3, 0.7]])
    mixture = GaussianMixtureTeacher([[-2.0], [1.5]], [[0.09], [0.25]], [0.3, 0.7])
    x, t = normal(20, 1).float(), torch.linspace(0, 1, 20)
    torch.testing.assert_close(product.velocity(x, t), mixture.velocity(x, t), rtol=1e-4, atol=1e-5)
    data = product.sample_data(40_000, generator)
    assert (data < -0.5).float().mean() == pytest.approx(0.3, abs=0.01)
    assert data.mean() == pytest.approx(0.3 * -2 + 0.7 * 1.5, abs=0.03)


def test_ring_has_its_modes(generator):
    teacher = load_teacher("ring", labelled=True)
    data = teacher.sample_data(8000, generator)
    counts = torch.bincount(torch.cdist(data, teacher.means).argmin(1), minlength=8)
    assert counts.min() > 850
    radius = data.norm(dim=1)
    assert radius.mean() == pytest.approx(1.0, abs=0.01)
    assert teacher.num_classes == 8
    assert math.isclose(
        float(torch.cdist(data, teacher.means).min(1).values.square().mean()), 2 * 0.08**2, rel_tol=0.05
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"means": [[0.0]], "covariance": -1.0}, "negative"),
        ({"means": [[0.0]], "covariance": 0.0}, "positive"),
        ({"means": [[0.0]], "covariance": [1.0, 2.0]}, "fits neither"),
        ({"means": [[0.0, 0.0]], "covariance": [[[1.0, 0.5], [0.0, 1.0]]]}, "symmetric"),
        ({"means": [0.0]}, "2 dimensions"),
        ({"means": "origin"}, "array of numbers"),
        ({"means": [[0.0], [1.0]], "weights": [1.0, 0.0]}, "positive numbers"),
        ({"means": [[0.0], [1.0]], "labels": [0, 2]}, "without gaps"),
    ],
)
def test_bad_mixtures_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        GaussianMixtureTeacher(**arguments)
