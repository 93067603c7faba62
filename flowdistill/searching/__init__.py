"""Search for good noises at inference, with a one-step student in place of its slow teacher."""

from flowdistill.searching.noises import search
from flowdistill.searching.result import SearchResult
from flowdistill.searching.strategies import BestOf, SearchStrategy, SuccessiveHalving, ZeroOrder
from flowdistill.searching.trials import Candidates, PricedModel, Trials
from flowdistill.searching.verifiers import ClassLogProbability, ClipScore, FeatureDistance

__all__ = [
    "BestOf",
    "Candidates",
    "ClassLogProbability",
    "ClipScore",
    "FeatureDistance",
    "PricedModel",
    "SearchResult",
    "SearchStrategy",
    "SuccessiveHalving",
    "Trials",
    "ZeroOrder",
    "search",
]
