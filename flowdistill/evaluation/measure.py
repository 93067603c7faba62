"""The registered metrics, which compare a generated set of samples with a reference; their noise floors and spreads."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from flowdistill.evaluation.metrics import (
    energy_distance,
    frechet_distance,
    kernel_distance,
    label_agreement,
    precision_recall,
    sliced_wasserstein2,
    wasserstein2,
)
from flowdistill.evaluation.metrics import inception_score as _inception_score
from flowdistill.evaluation.metrics import mode_coverage as _mode_coverage
from flowdistill.evaluation.samples import SampleSet
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import METRICS, register_metric


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
    return _inception_score(generated.logits)


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
    """Both, which take the same distances."""
    return precision_recall(reference.features, generated.features)


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
    return _mode_coverage(generated.features, centres, radius)[0]


def measure(names: Sequence[str], generated: SampleSet, reference: SampleSet) -> dict[str, float]:
    """The metrics of those names."""
    return {name: float(METRICS.get(name)(generated, reference)) for name in names}


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
    figures = [measure(names, generated[half], reference) for half in halves]
    return {name: float(torch.tensor([f[name] for f in figures], dtype=torch.float64).std()) for name in names}
