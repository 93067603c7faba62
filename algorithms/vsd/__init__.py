"""Variational score distillation and DMD2 (Yin et al. 2024, arXiv 2311.18828 and 2405.14867)."""

from flowdistill.algorithms.vsd.objective import DMD2, VSD

__all__ = ["DMD2", "VSD"]
