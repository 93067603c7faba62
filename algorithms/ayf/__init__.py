"""Align Your Flow: Eulerian and Lagrangian distillation of flow maps (Sabour et al. 2025, arXiv 2506.14603)."""

from flowdistill.algorithms.ayf.objective import AyfEmd, AyfLmd

__all__ = ["AyfEmd", "AyfLmd"]
