"""Sets of samples, and the registered metrics that compare a generated set with a reference."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from flowdistill.errors import ConfigError, DataError
from flowdistill.evaluation.features import load_features, load_reference
from flowdistill.evaluation.metrics import (
    frechet_distance,
    label_agreement,
    precision_recall,
    sliced_wasserstein2,
    wasserstein2,
)
from flowdistill.interfaces import Decoder, Teacher
from flowdistill.registry import METRICS, register_metric


@attrs.frozen(eq=False)
class SampleSet:
    """Samples as metrics see them.

    Attributes:
        features: (N, D); the samples themselves, flattened, where there is no feature extractor.
        labels: the classes that were asked for, (N,), where there are classes.
        logits: a classifier's, (N, num_classes), where the feature extractor is one.
    """

    features: Tensor
    labels: Tensor | None = None
    logits: Tensor | None = None


@torch.no_grad()
def sample_set(
    samples: Tensor, labels: Tensor | None, features: str | None, decoder: Decoder | None = None
) -> SampleSet:
    """Samples (N, ...) and what the feature extractor of that name says of them, or of the images they decode to."""
    if not bool(torch.isfinite(samples).all()):
        raise DataError("some samples are NaN or infinite: nothing can be measured")
    if features is None:
        return SampleSet(samples.flatten(1), labels)
    extractor = load_features(features)
    images = (part.float() if decoder is None else decoder.decode(part) for part in torch.split(samples, 500))
    parts = [extractor(part) for part in images]
    extracted, logits = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return SampleSet(extracted, labels, logits)


def reference_set(features: str | None, teacher: Teacher | None, n: int, seed: int) -> SampleSet:
    """The truth: stored features of the real data, or ``n`` draws of an exact teacher's distribution.

    Raises:
        ConfigError: no features are named, and the teacher cannot draw data.
    """
    if features is not None:
        return SampleSet(load_reference(features))
    if not hasattr(teacher, "sample_data"):
        raise ConfigError("nothing to compare with: name the features of an evaluation, or use an exact teacher")
    generator = torch.Generator().manual_seed(seed + 10_000)
    return SampleSet(teacher.sample_data(n, generator).flatten(1))  # type: ignore[union-attr, operator]


@register_metric("fid")
def fid(generated: SampleSet, reference: SampleSet) -> float:
    """Frechet distance of the features; lower is better."""
    return frechet_distance(generated.features, reference.features)


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
        raise ConfigError("accuracy needs a class-conditional model and a feature extractor that classifies")
    return label_agreement(generated.logits, generated.labels)


@register_metric("w2")
def w2(generated: SampleSet, reference: SampleSet) -> float:
    """Exact 2-Wasserstein distance of the two sets; for a few thousand samples in few dimensions."""
    return wasserstein2(generated.features, reference.features)


@register_metric("sliced_w2")
def sliced_w2(generated: SampleSet, reference: SampleSet) -> float:
    """Sliced 2-Wasserstein distance of the two sets."""
    return sliced_wasserstein2(generated.features, reference.features)


def measure(names: Sequence[str], generated: SampleSet, reference: SampleSet) -> dict[str, float]:
    """The metrics of those names."""
    return {name: float(METRICS.get(name)(generated, reference)) for name in names}
