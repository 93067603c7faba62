"""Secant losses: the average velocity is the mean of velocities (Liu and Yue 2025, arXiv 2505.14502)."""

from flowdistill.algorithms.secant.objective import SDEE, SDEI

__all__ = ["SDEE", "SDEI"]
