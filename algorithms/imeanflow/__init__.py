"""Improved MeanFlow (Geng et al. 2025, arXiv 2512.02012)."""

from flowdistill.algorithms.imeanflow.objective import ImprovedMeanFlow

__all__ = ["ImprovedMeanFlow"]
