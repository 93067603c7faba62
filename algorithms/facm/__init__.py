"""FACM: flow-anchored consistency models (Peng et al. 2025, arXiv 2507.03738)."""

from flowdistill.algorithms.facm.objective import FACM

__all__ = ["FACM"]
