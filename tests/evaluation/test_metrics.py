"""Metrics against closed forms, and the stored classifier and its reference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaged import packaged
from scipy.spatial.distance import cdist, pdist

from flowdistill import METRICS, ConfigError, DataError, NonFiniteError
from flowdistill.data import Digits
from flowdistill.evaluation import features, metrics
from flowdistill.evaluation.metrics import measure
from flowdistill.evaluation.references import reference_set
from flowdistill.evaluation.samples import sample_set
from flowdistill.teachers.gaussian import Ring


def normal(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(dim=st.integers(1, 8), seed=st.integers(0, 100), shift=st.floats(0, 3), scale=st.floats(0.5, 2))
def test_frechet_distance_of_an_affine_image(dim, seed, shift, scale):
    """y = scale x + shift: |mean|^2 + (scale - 1)^2 tr(cov), exactly, for the fitted Gaussians."""
    x = normal(200, dim, seed)
    y = scale * x + shift
    covariance = torch.cov(x.T).reshape(dim, dim)
    wanted = (y.mean(0) - x.mean(0)).square().sum() + (scale - 1) ** 2 * covariance.trace()
    assert metrics.frechet_distance(x, y) == pytest.approx(float(wanted), rel=1e-5, abs=1e-7)


def test_precision_and_recall_tell_missing_modes_from_bad_samples():
    real = torch.cat([normal(300, 2), normal(300, 2, 1) + 20])
    half = normal(300, 2, 2)
    precision, recall = metrics.precision_recall(real, half)
    assert precision > 0.9
    assert 0.4 < recall < 0.6
    precision, recall = metrics.precision_recall(half, real)
    assert 0.4 < precision < 0.6
    assert recall > 0.9
    assert metrics.precision_recall(real, real + 100) == (0.0, 0.0)


def test_wasserstein_distances():
    x = normal(100, 3)
    shift = torch.tensor([1.0, -2.0, 2.0]).double()
    assert metrics.wasserstein2(x, (x + shift)[torch.randperm(100)]) == pytest.approx(3.0)
    assert metrics.sliced_wasserstein2(x, x + shift) == pytest.approx(3.0 / math.sqrt(3), rel=0.1)
    assert metrics.wasserstein2(x, x) == pytest.approx(0.0, abs=1e-6)
    assert metrics.wasserstein2(x, x[:60]) > 0


@given(dim=st.integers(1, 4), seed=st.integers(0, 100))
def test_wasserstein_distance_of_an_optimal_map(dim, seed):
    """The gradient of a convex function, as between two Gaussians, is the optimal map of samples to their images."""
    x = normal(60, dim, seed)
    root = normal(dim, dim, seed + 1)
    y = x @ (root @ root.T + 0.1 * torch.eye(dim).double()) + 1.0
    wanted = (x - y).square().sum(1).mean().sqrt()
    assert metrics.wasserstein2(x, y[torch.randperm(60)]) == pytest.approx(float(wanted), rel=1e-6)
    if dim == 1:
        assert metrics.sliced_wasserstein2(x, y) == pytest.approx(float(wanted), rel=1e-6)


@given(n=st.integers(1, 12), m=st.integers(1, 12), copies=st.integers(1, 3), dim=st.integers(1, 3))
def test_wasserstein_distances_of_different_numbers(n, m, copies, dim):
    """Repeated points change neither distance, whether an assignment or a linear program is solved."""
    x, y = normal(n, dim), normal(m, dim, 1) + 0.3
    for distance in (metrics.wasserstein2, metrics.sliced_wasserstein2):
        wanted = distance(x.repeat(m, 1), y.repeat(n, 1))
        assert distance(x, y) == pytest.approx(wanted, rel=1e-7)
        assert distance(x.repeat(copies, 1), y) == pytest.approx(wanted, rel=1e-7)
        assert distance(y, x) == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize(("n", "m"), [(200, 200), (200, 100), (60, 100), (31, 37)])
def test_wasserstein_distances_are_pots(n, m):
    ot = pytest.importorskip("ot")
    x, y = normal(n, 3).numpy(), normal(m, 3, 1).numpy() + 0.3
    exact = float(ot.emd2([], [], ot.dist(x, y, metric="sqeuclidean"))) ** 0.5
    sliced = float(ot.sliced_wasserstein_distance(x, y, n_projections=200, seed=7))
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    assert metrics.wasserstein2(x, y) == pytest.approx(exact, rel=1e-12)
    assert metrics.sliced_wasserstein2(x, y, seed=7) == pytest.approx(sliced, rel=1e-12)


@given(n=st.integers(2, 700), m=st.integers(2, 50), dim=st.integers(1, 5))
def test_energy_distance_is_scipys(n, m, dim):
    x, y = normal(n, dim), normal(m, dim, 1) + 0.3
    wanted = 2 * cdist(x, y).mean() - pdist(x).mean() - pdist(y).mean()
    assert metrics.energy_distance(x, y) == pytest.approx(wanted, abs=1e-9)


def test_energy_distance_of_gaussians():
    """E|x - y| of x - y ~ N(m, v) is (2v/pi)^(1/2) exp(-m^2/2v) + m erf(m/(2v)^(1/2)); of one distribution it is 0."""

    def mean(m, v):
        return math.sqrt(2 * v / math.pi) * math.exp(-m * m / (2 * v)) + m * math.erf(m / math.sqrt(2 * v))

    wanted = 2 * mean(1.0, 1.0 + 0.25) - mean(0.0, 2.0) - mean(0.0, 0.5)
    found = metrics.energy_distance(normal(4000, 1), 0.5 * normal(4000, 1, 1) + 1.0)
    assert found == pytest.approx(wanted, rel=0.06)
    same = torch.tensor([metrics.energy_distance(normal(20, 2, i), normal(20, 2, 1000 + i)) for i in range(200)])
    assert abs(same.mean()) < 3 * same.std() / 200**0.5  # unbiased: about half of them are negative


def test_kernel_distance_of_equal_sets_is_unbiased():
    """From the definition, where all rows of both sets are in every subset."""
    x, y = normal(50, 3), normal(50, 3, 1) + 0.5
    kernel = lambda a, b: (a @ b.T / 3 + 1) ** 3  # noqa: E731
    off = 1 - torch.eye(50).double()
    wanted = ((kernel(x, x) + kernel(y, y)) * off).sum() / (50 * 49) - 2 * kernel(x, y).mean()
    assert metrics.kernel_distance(x, y) == pytest.approx(float(wanted), rel=1e-6)


def test_class_information_of_known_classes():
    sure = 100.0 * torch.eye(5).repeat(400, 1)
    assert metrics.class_information(sure) == pytest.approx(5.0, rel=0.03)  # all classes, each certain
    assert metrics.class_information(torch.zeros(100, 5)) == pytest.approx(1.0)  # nothing known
    assert metrics.class_information(sure[:1].repeat(100, 1)) == pytest.approx(1.0)  # one class alone
    with pytest.raises(DataError, match="N >= 10"):
        metrics.class_information(sure[:9])


def test_label_agreement():
    logits = torch.eye(4)[[0, 1, 2, 2]]
    assert metrics.label_agreement(logits, torch.tensor([0, 1, 2, 3])) == 0.75


def test_modes_found():
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0], [5.0, 5.0]])
    samples = centres[[0, 0, 0, 1, 1, 1, 2, 2]] + 0.01
    found, near = metrics.modes_found(torch.cat([samples, torch.full((2, 2), 9.0)]), centres, radius=0.1)
    assert (found, near) == (0.75, 0.8)


def test_sets_that_cannot_be_compared():
    with pytest.raises(DataError, match="dimension"):
        metrics.frechet_distance(normal(10, 2), normal(10, 3))
    with pytest.raises(DataError, match="N >= 4"):
        metrics.precision_recall(normal(3, 2), normal(10, 2))
    with pytest.raises(NonFiniteError, match="NaN"):
        sample_set(torch.tensor([[math.nan]]), None, None)


def test_stored_classifier_knows_the_digits():
    """The stored reference is what the stored network makes of the real images; it classifies held-out ones."""
    digits = Digits()
    network = features.load_features("digits")
    with torch.no_grad():
        extracted, logits = network(digits.images)
    reference = features.load_reference("digits")
    torch.testing.assert_close(extracted, reference, rtol=0, atol=5e-3 * float(reference.abs().max()))
    assert (logits.argmax(1) == digits.labels).float().mean() > 0.99
    noise = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert metrics.frechet_distance(network(noise)[0].detach(), reference) > 20


def test_real_halves_are_at_the_stated_distance():
    """The unit of the features: two halves of the real images are about 2.1 apart."""
    reference = features.load_reference("digits")
    order = torch.randperm(len(reference), generator=torch.Generator().manual_seed(0))
    halves = reference[order].chunk(2)
    assert 1.8 < metrics.frechet_distance(*halves) < 2.5


def test_registered_metrics_have_their_ideal_values_at_the_truth():
    teacher = Ring()
    truth = reference_set(None, teacher, 400, 0)
    again = reference_set(None, teacher, 400, 1)
    measured = measure(
        [name for name in packaged(METRICS) if name not in ("accuracy", "inception_score")], again, truth
    )
    assert measured["fid"] < 0.05
    assert measured["precision"] > 0.9
    assert measured["recall"] > 0.9
    assert measured["w2"] < 0.4
    assert measured["sliced_w2"] < 0.2
    assert abs(measured["kid"]) < 0.05
    assert abs(measured["mmd"]) < 0.01
    assert measured["mode_coverage"] == 1.0


def test_what_cannot_be_measured():
    x = sample_set(torch.randn(20, 2), None, None)
    with pytest.raises(ConfigError, match="class-conditional"):
        measure(["accuracy"], x, x)
    with pytest.raises(ConfigError, match="classifies"):
        measure(["inception_score"], x, x)
    with pytest.raises(ConfigError, match="mixture of equal weights"):
        measure(["mode_coverage"], x, x)
    with pytest.raises(ConfigError, match="did you mean fid"):
        measure(["fdi"], x, x)
    with pytest.raises(ConfigError, match="nothing to compare"):
        reference_set(None, None, 10, 0)
    with pytest.raises(ConfigError, match="digits"):
        features.load_features("digit")


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1e3])
def test_distances_of_unequal_numbers_of_points_have_the_unit_of_the_points(scale):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(30, 2, generator=generator).double(), torch.randn(47, 2, generator=generator).double()
    unit = metrics.wasserstein2(a, b)
    assert metrics.wasserstein2(scale * a, scale * b) == pytest.approx(scale * unit, rel=1e-6)


def test_distances_of_points_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError):
        metrics.wasserstein2(torch.full((3, 2), float("nan")), torch.zeros(3, 2))
