"""A spiral as a teacher, and FreeFlow's prediction by another distance, for flowdistill."""

from flowdistill_spiral.objective import LogCoshPrediction
from flowdistill_spiral.teacher import Spiral

__all__ = ["LogCoshPrediction", "Spiral"]
