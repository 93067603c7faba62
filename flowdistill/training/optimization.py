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


def fuse(optimizer: torch.optim.Optimizer, device: str = "cuda") -> None:
    """Let an optimiser update all parameters on a device by one kernel, where it can and nobody chose otherwise.

    Such a kernel asks that gradients lie in memory as their parameters do, see `laid_out`.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)):
        return
    for group in optimizer.param_groups:
        free = group["fused"] is None and group["foreach"] is None and not group["differentiable"]
        if free and all(parameter.device.type == device for parameter in group["params"]):
            group["fused"] = True


def laid_out(optimizer: torch.optim.Optimizer) -> None:
    """Give gradients the strides of their parameters, where a fused kernel reads them.

    Those of a convolution in channels-last memory may have others.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            gradient = parameter.grad
            if gradient is not None and gradient.stride() != parameter.stride():
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
