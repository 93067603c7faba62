"""Estimators of the two velocities that a student has."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from flowdistill.interfaces.condition import Condition
from flowdistill.interfaces.jump import Jump
from flowdistill.interfaces.part import Part
from flowdistill.paths import expand_time


class VelocityEstimator(Part, ABC):
    """Estimates a velocity of the *student*: either `GeneratingVelocity` or `NoisingVelocity`."""

    def module_loss(self, name: str, samples: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
        """The loss (B,) by which the module ``name`` learns from the student's detached samples."""
        raise KeyError(f"{type(self).__name__} has no module named {name!r}")


class GeneratingVelocity(VelocityEstimator):
    """The velocity with which the student's own jump moves as its end time changes."""

    @abstractmethod
    def derivative(
        self, jump: Jump, *, dx: Tensor | None = None, dt: float = 0.0, ds: float = 0.0, progress: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """F(x, t, s) with a graph, and its derivative along the direction (dx, dt, ds).

        The derivative is detached, unless the estimator was asked to keep its graph.
        ``progress`` is the part of the training that is done, in [0, 1].
        """

    def estimate(self, jump: Jump, progress: float = 0.0) -> tuple[Tensor, Tensor]:
        """F(x, t, s) with a graph, and dX(x, t, s)/ds = F - (t - s) dF/ds, detached if the derivative is.

        With t = 1 and s = 1 - delta this is FreeFlow's generating velocity v_G = F + delta dF/d delta.
        """
        average, slope = self.derivative(jump, ds=1.0, progress=progress)
        value = average if slope.requires_grad else average.detach()
        return average, value - expand_time(jump.t - jump.s, jump.x) * slope


class NoisingVelocity(VelocityEstimator):
    """The marginal velocity of the student's distribution after noising it along the linear path."""

    @abstractmethod
    def estimate(self, x: Tensor, r: Tensor, condition: Condition, *, samples: Tensor) -> Tensor:
        """v_N(x, r), detached, at noised student samples x (B, ...) and times r (B,) in (0, 1].

        ``samples`` are the clean student samples of the same batch, for estimators that work from them.
        """
