"""Solvers of a teacher's probability-flow ODE dx/dt = u(x, t), from noise (t = 1) to data (t = 0)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import attrs
import torch
from attrs.validators import ge, gt
from torch import Tensor

from flowdistill.interfaces import Condition, Teacher
from flowdistill.paths import expand_time
from flowdistill.registry import register_solver


class Solver(ABC):
    """Integrates a teacher's velocity."""

    @abstractmethod
    def _integrate(self, slope: Callable[[float, Tensor], Tensor], x: Tensor) -> Tensor:
        """Solve dx/dtau = slope(tau, x) from tau = 0 to 1."""

    def solve(
        self,
        teacher: Teacher,
        x: Tensor,
        condition: Condition | None = None,
        *,
        start: float | Tensor = 1.0,
        end: float | Tensor = 0.0,
    ) -> Tensor:
        """Carry x (B, ...) along dx/dt = u(x, t) from time ``start`` to ``end``.

        Each is one time for all or a tensor (B,) of times; the rows share the steps of the rescaled time tau,
        t = start + tau (end - start).
        """
        t0 = torch.as_tensor(start, device=x.device, dtype=x.dtype).expand(len(x))
        span = torch.as_tensor(end, device=x.device, dtype=x.dtype).expand(len(x)) - t0
        rate = expand_time(span, x)
        return self._integrate(lambda tau, x: rate * teacher.velocity(x, t0 + tau * span, condition), x)


@register_solver("euler")
@attrs.frozen(kw_only=True)
class Euler(Solver):
    """Euler's method with equal steps; one evaluation a step.

    Examples:
        >>> from flowdistill import load_teacher
        >>> ring = load_teacher("ring")
        >>> Euler(steps=16).solve(ring, ring.sample_prior(100)).shape, ring.evaluations
        (torch.Size([100, 2]), 1600)
    """

    steps: int = attrs.field(default=64, validator=ge(1))

    def _integrate(self, slope: Callable[[float, Tensor], Tensor], x: Tensor) -> Tensor:
        for i in range(self.steps):
            x = x + slope(i / self.steps, x) / self.steps
        return x


@register_solver("heun")
@attrs.frozen(kw_only=True)
class Heun(Solver):
    """Heun's second-order method with equal steps; two evaluations a step."""

    steps: int = attrs.field(default=32, validator=ge(1))

    def _integrate(self, slope: Callable[[float, Tensor], Tensor], x: Tensor) -> Tensor:
        for i in range(self.steps):
            first = slope(i / self.steps, x)
            second = slope((i + 1) / self.steps, x + first / self.steps)
            x = x + (first + second) / (2 * self.steps)
        return x


@register_solver("dopri5")
@attrs.frozen(kw_only=True)
class Dopri5(Solver):
    """The adaptive fifth-order method of Dormand and Prince, through torchdiffeq."""

    atol: float = attrs.field(default=1e-6, validator=gt(0.0))
    rtol: float = attrs.field(default=1e-4, validator=gt(0.0))

    def _integrate(self, slope: Callable[[float, Tensor], Tensor], x: Tensor) -> Tensor:
        from torchdiffeq import odeint

        ends = torch.tensor([0.0, 1.0], device=x.device, dtype=x.dtype)
        path: Tensor = odeint(slope, x, ends, method="dopri5", atol=self.atol, rtol=self.rtol)
        return path[-1]
