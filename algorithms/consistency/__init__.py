"""Consistency models: discrete, continuous, and the latter with score distillation (arXiv 2303.01469, 2410.11081)."""

from flowdistill.algorithms.consistency.continuous import SCT, SCDWithVSD
from flowdistill.algorithms.consistency.discrete import Consistency

__all__ = ["Consistency", "SCDWithVSD", "SCT"]
