"""Metrics over feature extractors and exact distributions, and the report of a run."""

from flowdistill.evaluation.features import FeatureExtractor, load_features, load_reference
from flowdistill.evaluation.metrics import (
    class_information,
    energy_distance,
    frechet_distance,
    kernel_distance,
    label_agreement,
    measure,
    modes_found,
    precision_recall,
    sliced_wasserstein2,
    spread,
    wasserstein2,
)
from flowdistill.evaluation.protocols import Protocol
from flowdistill.evaluation.references import load_images, reference_set
from flowdistill.evaluation.samples import SampleSet, sample_set
from flowdistill.evaluation.trajectories import ErrorAt, class_agreement, semigroup_error, trajectory_error

__all__ = [
    "ErrorAt",
    "FeatureExtractor",
    "Protocol",
    "SampleSet",
    "class_agreement",
    "class_information",
    "energy_distance",
    "frechet_distance",
    "kernel_distance",
    "label_agreement",
    "load_features",
    "load_images",
    "load_reference",
    "measure",
    "modes_found",
    "precision_recall",
    "reference_set",
    "sample_set",
    "semigroup_error",
    "sliced_wasserstein2",
    "spread",
    "trajectory_error",
    "wasserstein2",
]
