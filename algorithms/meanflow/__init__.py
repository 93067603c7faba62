"""MeanFlow, from data and with a teacher (Geng et al. 2025, arXiv 2505.13447)."""

from flowdistill.algorithms.meanflow.objective import MeanFlow

__all__ = ["MeanFlow"]
