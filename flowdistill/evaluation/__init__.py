"""Metrics over feature extractors and exact distributions, and the report of a run."""

from flowdistill.evaluation.features import load_features, load_reference
from flowdistill.evaluation.measure import SampleSet, measure, reference_set, sample_set
from flowdistill.evaluation.metrics import (
    frechet_distance,
    label_agreement,
    mode_coverage,
    precision_recall,
    sliced_wasserstein2,
    wasserstein2,
)

__all__ = [
    "SampleSet",
    "frechet_distance",
    "label_agreement",
    "load_features",
    "load_reference",
    "measure",
    "mode_coverage",
    "precision_recall",
    "reference_set",
    "sample_set",
    "sliced_wasserstein2",
    "wasserstein2",
]
