"""Flow matching: how teachers are trained (Lipman et al. 2022, arXiv 2210.02747)."""

from flowdistill.algorithms.flow_matching.objective import FlowMatching

__all__ = ["FlowMatching"]
