"""FreeFlow: distillation of a flow map from a teacher without data (Tong et al. 2025, arXiv 2511.19428)."""

from flowdistill.algorithms.freeflow.objective import FreeFlow, FreeFlowCorrection, FreeFlowPrediction
from flowdistill.algorithms.freeflow.pseudo import FreeFlowPseudo

__all__ = ["FreeFlow", "FreeFlowCorrection", "FreeFlowPrediction", "FreeFlowPseudo"]
