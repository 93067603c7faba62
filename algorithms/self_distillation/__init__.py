"""Self-distillation of flow maps by three identities (Boffi, Albergo and Vanden-Eijnden 2025, arXiv 2505.18825)."""

from flowdistill.algorithms.self_distillation.objective import ESD, LSD, Semigroup

__all__ = ["ESD", "LSD", "Semigroup"]
