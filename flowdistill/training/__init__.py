"""The training loop and what it needs: settings, optimisers, the log of a run."""

from flowdistill.training.loop import Loop
from flowdistill.training.optimization import Schedule
from flowdistill.training.settings import Training

__all__ = ["Loop", "Schedule", "Training"]
