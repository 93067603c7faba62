"""MeanFlow's loss in zhuyu-cs/MeanFlow, on our student and our data.

flowdistill bench speed --only meanflow --peer benchmarks/peers/zhuyu_meanflow.py CHECKOUT
"""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowdistill.interfaces import Condition
from flowdistill.training import Loop

METHOD = "meanflow"  # the method beside which it is measured


def step(loop: Loop, checkout: Path) -> Callable[[], None]:
    """A loss of theirs and its gradients. Their function sees our student as a module of theirs."""
    loss = runpy.run_path(str(checkout / "loss.py"))["SILoss"](weighting="adaptive", label_dropout_prob=0.0)
    states = loop.draw(torch.Generator(loop.device).manual_seed(0))
    condition: Condition = states.condition

    def model(x: Tensor, r: Tensor, t: Tensor) -> Any:
        return loop.student.average_velocity(x, t, r, condition)

    def call() -> None:
        with loop.autocast(), sdpa_kernel(SDPBackend.MATH):
            value, _ = loss(model, states.clean)
        value.mean().backward()
        loop.student.zero_grad()

    return call
