"""Terminal velocity matching (Zhou et al. 2025, arXiv 2511.19797)."""

from flowdistill.algorithms.tvm.objective import TerminalVelocityMatching

__all__ = ["TerminalVelocityMatching"]
