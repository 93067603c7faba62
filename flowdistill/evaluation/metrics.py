"""Distances between sets of samples, as pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.errors import DataError
from flowdistill.evaluation._torch_fidelity import torch_fidelity


def _check(minimum: int, *sets: Tensor) -> None:
    for values in sets:
        if values.ndim != 2 or len(values) < minimum:
            raise DataError(f"a metric needs sets (N, D) with N >= {minimum}, not of shape {tuple(values.shape)}")
    if len({values.shape[1] for values in sets}) > 1:
        raise DataError(f"the sets differ in dimension: {[values.shape[1] for values in sets]}")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of the Gaussians fitted to two sets of features (N, D), by torch-fidelity in float64.

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))

    It is biased upwards by about D^2 / (2N) in whitened features: compare sets of equal sizes, and look at the noise
    floor. With Inception features it is FID (Heusel et al. 2017, arXiv 1706.08500).

    Examples:
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> round(frechet_distance(x, x + 3.0), 6)
        18.0
    """
    _check(2, a, b)
    fid = torch_fidelity("metric_fid")
    missing = 1 if a.shape[1] == 1 else 0  # torch-fidelity refuses D = 1; a constant feature changes nothing
    wide = [F.pad(v.detach().cpu().double(), (0, missing)) for v in (a, b)]
    statistics = [fid.fid_features_to_statistics(v) for v in wide]
    result = fid.fid_statistics_to_metric(*statistics, verbose=False)
    return max(float(result["frechet_inception_distance"]), 0.0)


def precision_recall(reference: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991), by torch-fidelity.

    Precision is the fraction of generated samples within the distance of some reference sample to its k-th nearest
    other; recall is the same with the sets exchanged.

    Args:
        reference: (N, D).
        generated: (M, D).
        neighbours: k.

    Returns:
        Precision and recall, in [0, 1].
    """
    _check(neighbours + 1, reference, generated)
    result = torch_fidelity("metric_prc").prc_features_to_metric(
        generated.detach().cpu().double(),
        reference.detach().cpu().double(),
        prc_neighborhood=neighbours,
        prc_batch_size=10_000,
        save_cpu_ram=False,
        verbose=False,
    )
    return float(result["precision"]), float(result["recall"])


def label_agreement(logits: Tensor, labels: Tensor) -> float:
    """Fraction of samples whose largest logit (N, K) is that of the label (N,)."""
    if len(logits) != len(labels) or not len(labels):
        raise DataError(f"{len(logits)} rows of logits for {len(labels)} labels")
    return float((logits.argmax(1) == labels).double().mean())


def wasserstein2(a: Tensor, b: Tensor) -> float:
    """The exact 2-Wasserstein distance of two sets of points (N, D), in the unit of the points, by POT.

    Its time grows as N^3 and its bias is large in many dimensions: for a few thousand points in few dimensions.
    """
    import ot

    _check(1, a, b)
    x, y = (v.detach().cpu().double().numpy() for v in (a, b))
    squared = ot.emd2([], [], ot.dist(x, y, metric="sqeuclidean"), numItermax=10_000_000)
    return float(squared**0.5)


def sliced_wasserstein2(a: Tensor, b: Tensor, projections: int = 200, seed: int = 0) -> float:
    """The 2-Wasserstein distance averaged (in square) over random directions, by POT."""
    import ot

    _check(1, a, b)
    x, y = (v.detach().cpu().double().numpy() for v in (a, b))
    return float(ot.sliced_wasserstein_distance(x, y, n_projections=projections, seed=seed))


def mode_coverage(samples: Tensor, centres: Tensor, radius: float) -> tuple[float, float]:
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
