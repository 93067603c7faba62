"""The training loop and what it needs: optimisers, averages, checkpoints, the log of a run."""

from flowdistill.ema import Averaging, Ema, PowerEma
from flowdistill.plumbing.randomness import step_generator
from flowdistill.training.optimization import Schedule
from flowdistill.training.trainer import TrainResult, train

__all__ = [
    "Averaging",
    "Ema",
    "PowerEma",
    "Schedule",
    "TrainResult",
    "step_generator",
    "train",
]
