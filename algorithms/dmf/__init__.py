"""Decoupled MeanFlow (Lee et al. 2025, arXiv 2510.24474)."""

from flowdistill.algorithms.dmf.objective import DecoupledMeanFlow

__all__ = ["DecoupledMeanFlow"]
