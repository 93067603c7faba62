"""Estimators of the two velocities that a student has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flowdistill.interfaces.condition import Condition
from flowdistill.interfaces.flow_map import FlowMap
from flowdistill.interfaces.teacher import Teacher
from flowdistill.paths import expand_time


class VelocityEstimator(ABC):
    """Estimates a velocity of the *student*: either `GeneratingVelocity` or `NoisingVelocity`."""

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Build what depends on the models; called once before training."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Trainable modules by name; see `Objective.modules`."""
        return {}

    def module_loss(
        self,
        name: str,
        samples: Tensor,
        condition: Condition,
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """The loss (B,) by which the module ``name`` learns from the student's detached samples."""
        raise KeyError(f"{type(self).__name__} has no module named {name!r}")


class GeneratingVelocity(VelocityEstimator):
    """The velocity with which the student's own jump moves as its end time changes."""

    @abstractmethod
    def derivative(
        self,
        student: FlowMap,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        condition: Condition | None,
        *,
        dx: Tensor | None = None,
        dt: float = 0.0,
        ds: float = 0.0,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """F(x, t, s) with a graph, and its derivative along the direction (dx, dt, ds).

        The derivative is detached, unless the estimator was asked to keep its graph.
        """

    def velocity(
        self,
        student: FlowMap,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        condition: Condition | None = None,
        *,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """F(x, t, s) with a graph, and dX(x, t, s)/ds = F - (t - s) dF/ds, detached if the derivative is.

        With t = 1 and s = 1 - delta this is FreeFlow's generating velocity v_G = F + delta dF/d delta.
        """
        average, slope = self.derivative(student, x, t, s, condition, ds=1.0, step=step)
        return average, (average if slope.requires_grad else average.detach()) - expand_time(t - s, x) * slope


class NoisingVelocity(VelocityEstimator):
    """The marginal velocity of the student's distribution after noising it along the linear path."""

    @abstractmethod
    def velocity(
        self, x: Tensor, r: Tensor, condition: Condition | None = None, *, samples: Tensor | None = None
    ) -> Tensor:
        """v_N(x, r), detached, at noised student samples x (B, ...) and times r (B,) in (0, 1].

        ``samples`` are the clean student samples of the same batch, for estimators that work from them.
        """
