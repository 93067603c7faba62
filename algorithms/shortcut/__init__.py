"""Shortcut models: flow maps that double their own jumps (Frans et al. 2024, arXiv 2410.12557)."""

from flowdistill.algorithms.shortcut.objective import Shortcut

__all__ = ["Shortcut"]
