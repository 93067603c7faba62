"""Optimisers by their torch names, and the schedule of the learning rate."""

from __future__ import annotations

import inspect
import math
from typing import Literal

import attrs
import gin
import torch
from attrs.validators import and_, ge, in_, le

for _name, _class in inspect.getmembers(torch.optim, inspect.isclass):
    if issubclass(_class, torch.optim.Optimizer) and _class is not torch.optim.Optimizer:
        gin.register(_name, module="torch.optim")(_class)


@gin.register("schedule", module="training")
@attrs.frozen(kw_only=True)
class Schedule:
    """A factor of the learning rate as a function of the step: linear warm-up, then decay."""

    warmup: float = attrs.field(default=0.0, validator=and_(ge(0.0), le(1.0)))
    """The part of the training that the warm-up takes; 0 is none."""
    decay: Literal["constant", "linear", "cosine", "inverse_sqrt"] = attrs.field(
        default="constant", validator=in_(("constant", "linear", "cosine", "inverse_sqrt"))
    )
    """"constant", "linear" or "cosine" to ``final`` at the last step, or "inverse_sqrt" from the end of the warm-up."""
    final: float = attrs.field(default=0.0, validator=and_(ge(0.0), le(1.0)))
    """The factor at the last step for "linear" and "cosine"."""

    def factor(self, step: int, steps: int) -> float:
        """The factor at a step in [0, steps)."""
        warmup = round(self.warmup * steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(steps - warmup, 1)
        if self.decay == "linear":
            return 1 - (1 - self.final) * progress
        if self.decay == "cosine":
            return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2
        if self.decay == "inverse_sqrt":
            return math.sqrt(max(warmup, 1) / max(step, warmup, 1))
        return 1.0
