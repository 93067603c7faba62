"""alpha-Flow: from flow matching along trajectories to MeanFlow (Zhang et al. 2026, arXiv 2510.20771)."""

from flowdistill.algorithms.alphaflow.objective import AlphaFlow

__all__ = ["AlphaFlow"]
