"""Inductive moment matching (Zhou, Ermon, Song 2025, arXiv 2503.07565)."""

from flowdistill.algorithms.imm.objective import IMM

__all__ = ["IMM"]
