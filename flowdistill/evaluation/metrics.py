"""Distances between sets of samples, as functions of tensors, and the registered metrics that rest on them.

A metric compares a generated `SampleSet` with a reference. `measure` takes metrics by their names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.evaluation.neighbours import covered, squared_radii
from flowdistill.plumbing.errors import ConfigError, DataError, NonFiniteError
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.registry import METRICS, register_metric
from flowdistill.plumbing.torch_fidelity import torch_fidelity

if TYPE_CHECKING:
    from flowdistill.evaluation.samples import SampleSet

_NEIGHBOURS = 3  # of precision and recall, as in their paper


def _check(minimum: int, *sets: Tensor) -> None:
    for values in sets:
        if values.ndim != 2 or len(values) < minimum:
            raise DataError(f"a metric needs sets (N, D) with N >= {minimum}, not of shape {tuple(values.shape)}")
    if len({values.shape[1] for values in sets}) > 1:
        raise DataError(f"the sets differ in dimension: {[values.shape[1] for values in sets]}")


Moments = tuple[Tensor, Tensor]
"""Mean (D,) and covariance (D, D), float64."""


def moments(features: Tensor) -> Moments:
    """The mean and the unbiased covariance of features (N, D), by torch-fidelity in float64."""
    _check(2, features)
    statistics = torch_fidelity("metric_fid").fid_features_to_statistics(features.detach().cpu().double())
    mean, covariance = (torch.from_numpy(np.asarray(statistics[name])) for name in ("mu", "sigma"))
    return mean, covariance.reshape(len(mean), len(mean))


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """The Frechet distance of two Gaussians, given or fitted to sets of features (N, D), by torch-fidelity in float64.

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    It is biased upwards by about D^2 / (2N) in whitened features: compare sets of equal sizes, and look at the noise
    floor. With Inception features it is FID (Heusel et al. 2017, arXiv 1706.08500).

    Args:
        a: features (N, D), or mean (D,) and covariance (D, D).
        b: the same.

    Examples:
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(x, x + 3.0), 6)
        18.0
        >>> frechet_distance((torch.zeros(2), torch.eye(2)), (torch.ones(2), 4 * torch.eye(2)))  # 2 + 2 (2 - 1)^2
        4.0
    """
    gaussians = [moments(v) if isinstance(v, Tensor) else v for v in (a, b)]
    _check(1, *(mean[None] for mean, _ in gaussians))
    missing = 1 if len(gaussians[0][0]) == 1 else 0  # torch-fidelity refuses D = 1; a constant feature changes nothing
    statistics = [
        {
            "mu": F.pad(mean.double(), (0, missing)).numpy(),
            "sigma": F.pad(covariance.double(), (0, missing, 0, missing)).numpy(),
        }
        for mean, covariance in gaussians
    ]
    result = torch_fidelity("metric_fid").fid_statistics_to_metric(*statistics, verbose=False)
    return max(float(result["frechet_inception_distance"]), 0.0)


def kernel_distance(a: Tensor, b: Tensor, subset: int = 1000) -> float:
    """The squared MMD of features (N, D) under the kernel (x.y/D + 1)^3, by torch-fidelity; it may be below 0.

    It is the mean of 100 unbiased estimates, each from ``subset`` random rows of either set, or from as many as the
    smaller set has. With Inception features it is KID (Binkowski et al. 2018, arXiv 1801.01401).

    Examples:
        >>> x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
        >>> kernel_distance(x, x + 1.0) > 1
        True
    """
    _check(2, a, b)
    result = torch_fidelity("metric_kid").kid_features_to_metric(
        a.detach().cpu().double(),
        b.detach().cpu().double(),
        kid_subset_size=min(subset, len(a), len(b)),
        verbose=False,
    )
    return float(result["kernel_inception_distance_mean"])


def class_information(logits: Tensor) -> float:
    """The Inception score of a classifier's logits (N, K), by torch-fidelity; in [1, K].

        exp E_x KL(p(y|x) | p(y)),   the mean over 10 parts of the samples

    It is the larger, the surer the classes and the more of them there are (Salimans et al. 2016, arXiv 1606.03498).

    Examples:
        >>> round(class_information(100.0 * torch.eye(4).repeat(1000, 1)), 1)  # all of 4 classes, each certain
        4.0
    """
    _check(10, logits)
    return float(torch_fidelity("metric_isc").isc_features_to_metric(logits.detach().cpu())["inception_score_mean"])


def precision_recall(reference: Tensor, generated: Tensor, neighbours: int = _NEIGHBOURS) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991).

    Precision is the fraction of generated samples within the distance of some reference sample to its k-th nearest
    other; recall is the same with the sets exchanged. It is computed on the device of the sets, in blocks, and all is
    decided as in float64.

    Args:
        reference: (N, D).
        generated: (M, D).
        neighbours: k.

    Returns:
        Precision and recall, in [0, 1].

    Examples:
        >>> real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> precision_recall(real, torch.tensor([[0.5], [0.6], [20.5]]), neighbours=1)  # 20.5 covers 1, 10 and 11
        (0.6666666666666666, 0.75)
    """
    _check(neighbours + 1, reference, generated)
    return _shares(reference, squared_radii(reference, neighbours), generated, squared_radii(generated, neighbours))


def _shares(reference: Tensor, reference_radii: Tensor, generated: Tensor, radii: Tensor) -> tuple[float, float]:
    inside = covered(generated, radii, reference, reference_radii)
    precision, recall = (float(which.double().mean()) for which in inside)
    return precision, recall


def label_agreement(logits: Tensor, labels: Tensor) -> float:
    """Fraction of samples whose largest logit (N, K) is that of the label (N,)."""
    if len(logits) != len(labels) or not len(labels):
        raise DataError(f"{len(logits)} rows of logits for {len(labels)} labels")
    return float((logits.argmax(1) == labels).double().mean())


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """The exact 2-Wasserstein distance of two sets of points (N, D) and (M, D), in the unit of the points.

    Points that are repeated until there are equally many are an assignment problem. Where that takes too many, a linear
    program is solved, which is slow. The time grows as N^3 and the bias is large in many dimensions: take equal numbers
    of a few thousand points in few dimensions.

    Examples:
        >>> wasserstein2(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [1.0]]))  # each point moves by 1
        1.0
    """
    from scipy.optimize import linear_sum_assignment, linprog
    from scipy.sparse import eye, kron, vstack
    from scipy.spatial.distance import cdist

    _check(1, a, b)
    cost = cdist(*(v.detach().cpu().double().numpy() for v in (a, b)), "sqeuclidean")
    n, m = cost.shape
    if not np.isfinite(cost).all():
        raise NonFiniteError("some points are NaN or infinite: nothing can be measured")
    if (size := math.lcm(n, m)) <= 4 * max(n, m):
        repeated = cost.repeat(size // n, axis=0).repeat(size // m, axis=1)
        return float(repeated[linear_sum_assignment(repeated)].mean() ** 0.5)
    sums = vstack([kron(eye(n), np.ones((1, m))), kron(np.ones((1, n)), eye(m))])
    mass = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    unit = cost.max() or 1.0  # the solver's tolerances are absolute
    return float((unit * max(linprog(cost.ravel() / unit, A_eq=sums, b_eq=mass).fun, 0.0)) ** 0.5)


def sliced_wasserstein2(a: Tensor, b: Tensor, projections: int = 200, seed: int = 0) -> float:
    """The 2-Wasserstein distance of two sets (N, D) and (M, D), averaged (in square) over random directions.

    Along a direction it is the mean squared difference of the quantiles.

    Examples:
        >>> sliced_wasserstein2(torch.tensor([[0.0], [2.0]]), torch.tensor([[3.0], [1.0]]))
        1.0
    """
    _check(1, a, b)
    directions = np.random.RandomState(seed).randn(a.shape[1], projections)
    directions /= np.sqrt(np.square(directions).sum(0))
    x, y = (np.sort(v.detach().cpu().double().numpy() @ directions, axis=0) for v in (a, b))
    n, m = len(x), len(y)
    edges = np.union1d(m * np.arange(n + 1), n * np.arange(m + 1))  # of the quantiles, times n m
    squared = np.square(x[edges[:-1] // m] - y[edges[:-1] // n])
    return float((np.diff(edges) @ squared / (n * m)).mean() ** 0.5)


def energy_distance(a: Tensor, b: Tensor) -> float:
    """The squared MMD of two sets (N, D) and (M, D) under the kernel -|x - y|, unbiased, in the unit of the points.

        2 E|x - y| - E|x - x'| - E|y - y'|,   without the distances of points to themselves

    This kernel has no bandwidth to choose, tells all distributions apart, and is the energy distance (Szekely and Rizzo
    2013; as an MMD, Sejdinovic et al. 2013, arXiv 1207.6076). It may be below 0.

    Examples:
        >>> energy_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]]))  # 2 - 2 - 0
        0.0
    """
    _check(2, a, b)
    x, y = (v.detach().cpu().double() for v in (a, b))

    def total(p: Tensor, q: Tensor) -> float:
        parts = (torch.cdist(part, q, compute_mode="donot_use_mm_for_euclid_dist") for part in torch.split(p, 500))
        return sum((float(distances.sum()) for distances in parts), 0.0)

    n, m = len(x), len(y)
    return 2 * total(x, y) / (n * m) - total(x, x) / (n * (n - 1)) - total(y, y) / (m * (m - 1))


def modes_found(samples: Tensor, centres: Tensor, radius: float) -> tuple[float, float]:
    """How many modes are found, and how many samples are near one.

    Args:
        samples: (N, D).
        centres: of the modes, (K, D), taken as equally likely.
        radius: what counts as near.

    Returns:
        The fraction of modes with at least a quarter of their share N/K of samples near, and the fraction of samples
        near any.
    """
    _check(1, samples, centres)
    distance, nearest = torch.cdist(samples, centres.to(samples.dtype)).min(1)
    near = distance <= radius
    counts = torch.bincount(nearest[near], minlength=len(centres))
    found = counts >= len(samples) / len(centres) / 4
    return float(found.double().mean()), float(near.double().mean())


@register_metric("fid")
def fid(generated: SampleSet, reference: SampleSet) -> float:
    """Frechet distance of the features; lower is better."""
    return frechet_distance(generated.moments, reference.moments)


@register_metric("kid")
def kid(generated: SampleSet, reference: SampleSet) -> float:
    """Kernel distance of the features, which unlike fid is unbiased; lower is better."""
    return kernel_distance(generated.features, reference.features)


@register_metric("inception_score")
def inception_score(generated: SampleSet, reference: SampleSet) -> float:
    """How sure and how varied the classes of the samples are; higher is better. It does not see the reference."""
    if generated.logits is None:
        raise ConfigError("inception_score needs a feature extractor that classifies")
    return class_information(generated.logits)


@register_metric("precision")
def precision(generated: SampleSet, reference: SampleSet) -> float:
    """Fraction of the samples that look real; in [0, 1]."""
    return _precision_recall(generated, reference)[0]


@register_metric("recall")
def recall(generated: SampleSet, reference: SampleSet) -> float:
    """Fraction of the real data that the samples cover; in [0, 1]."""
    return _precision_recall(generated, reference)[1]


@functools.lru_cache(maxsize=1)
def _precision_recall(generated: SampleSet, reference: SampleSet) -> tuple[float, float]:
    """Both, which take the same distances; where the reference says."""
    real, fake = (samples.features.to(reference.device) for samples in (reference, generated))
    _check(_NEIGHBOURS + 1, real, fake)
    return _shares(real, _reference_radii(reference), fake, squared_radii(fake, _NEIGHBOURS))


@functools.lru_cache(maxsize=1)
def _reference_radii(reference: SampleSet) -> Tensor:
    """Kept, since many sets are measured against one reference."""
    return squared_radii(reference.features.to(reference.device), _NEIGHBOURS)


@register_metric("accuracy")
def accuracy(generated: SampleSet, reference: SampleSet) -> float:
    """Fraction of the samples that a classifier gives the label that was asked for; in [0, 1]."""
    if generated.labels is None or generated.logits is None:
        raise ConfigError(
            "accuracy needs a class-conditional model and a feature extractor that classifies as its labels do"
        )
    return label_agreement(generated.logits, generated.labels)


@register_metric("w2")
def w2(generated: SampleSet, reference: SampleSet) -> float:
    """Exact 2-Wasserstein distance of the two sets; for a few thousand samples in few dimensions."""
    return wasserstein2(generated.features, reference.features)


@register_metric("sliced_w2")
def sliced_w2(generated: SampleSet, reference: SampleSet) -> float:
    """Sliced 2-Wasserstein distance of the two sets."""
    return sliced_wasserstein2(generated.features, reference.features)


@register_metric("mmd")
def mmd(generated: SampleSet, reference: SampleSet) -> float:
    """Squared MMD of the two sets under the kernel -|x - y|, the energy distance; lower is better."""
    return energy_distance(generated.features, reference.features)


@register_metric("mode_coverage")
def mode_coverage(generated: SampleSet, reference: SampleSet) -> float:
    """Fraction of an exact mixture's components that the samples find; in [0, 1]."""
    if reference.modes is None:
        raise ConfigError("mode_coverage needs an exact teacher that is a mixture of equal weights, and no features")
    centres, radius = reference.modes
    return modes_found(generated.features, centres, radius)[0]


def measure(names: Sequence[str], generated: SampleSet, reference: SampleSet) -> dict[str, float]:
    """The metrics of those names."""
    metrics = {}
    for name in names:
        with progress(f"measuring {name}", None):
            metrics[name] = float(METRICS.get(name)(generated, reference))
    return metrics


def spread(
    names: Sequence[str], generated: SampleSet, reference: SampleSet, resamples: int, seed: int = 0
) -> dict[str, float]:
    """The standard deviations of metrics over other draws of the samples, estimated from these.

    They are those of the metrics of ``resamples`` random halves. A half drawn without replacement from N samples
    varies, given these, by sigma^2 (2/N - 1/N), just as N fresh samples do. Unlike the usual bootstrap it repeats no
    sample, which nearest neighbours and transport would notice. The mean over the halves is no better figure: where few
    samples make a bias, it has more of it.

    Raises:
        ConfigError: fewer than 2 halves.

    Examples:
        >>> import flowdistill
        >>> from flowdistill.evaluation import reference_set
        >>> ring = flowdistill.load_teacher("ring")
        >>> a, b = (reference_set(None, ring, 400, seed) for seed in (0, 1))
        >>> spread(["sliced_w2"], a, b, resamples=8)["sliced_w2"] < 0.1
        True
    """
    if resamples < 2:
        raise ConfigError(f"a spread takes at least 2 resamples, not {resamples}")
    generator = torch.Generator().manual_seed(seed)
    halves = [torch.randperm(len(generated), generator=generator)[: len(generated) // 2] for _ in range(resamples)]
    halved = []
    with progress("estimating spreads", resamples) as phase:
        for half in halves:
            halved.append(measure(names, generated[half], reference))
            phase.advance(1)
    return {name: float(torch.tensor([row[name] for row in halved], dtype=torch.float64).std()) for name in names}
