"""Samplers of a teacher: solvers of dx/dt = u(x, t), and of the SDE with the same marginals, from noise to data.

States may be in float64 while the teacher computes in float32: a solver hands over and takes back what each needs.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, Protocol

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, lt
from torch import Tensor

from flowdistill.interfaces import Condition, Teacher
from flowdistill.paths import expand_time, velocity_to_denoised
from flowdistill.plumbing.registry import register_solver


def _velocity(teacher: Teacher, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
    return teacher.velocity(x.to(teacher.dtype), t, condition).to(x.dtype)


Draws = torch.Generator | Sequence[torch.Generator]
"""One generator for a batch, or one for each row."""


def _gaussian(like: Tensor, generator: Draws | None) -> Tensor:
    """Standard normal noise of the shape of ``like``."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    rows = [torch.randn(like.shape[1:], generator=own, dtype=like.dtype) for own in generator]
    return torch.stack(rows).to(like.device)


class Slope(Protocol):
    """The right-hand side dx/dtau of the ODE in the rescaled time."""

    def __call__(self, tau: float, x: Tensor, asked_at: float | None = None) -> Tensor:
        """dx/dtau; ``asked_at`` is the time that decides whether to guide, in place of ``tau``."""


class Solver(ABC):
    """Carries noise to samples of a teacher."""

    @abstractmethod
    def solve(
        self,
        teacher: Teacher,
        x: Tensor,
        condition: Condition | None = None,
        *,
        generator: Draws | None = None,
    ) -> Tensor:
        """Carry noise x (B, ...) at t = 1 to data at t = 0.

        Args:
            teacher: whose distribution is sampled.
            x: standard normal noise; its dtype is that of the states.
            condition: labels and guidance of the batch.
            generator: of the random numbers of a stochastic solver; or one on the CPU for each row, by which samples do
                not depend on the batch that they are in.
        """


class OdeSolver(Solver):
    """Integrates a teacher's velocity between any two times, with steps that all rows share."""

    @abstractmethod
    def _integrate(self, slope: Slope, x: Tensor) -> Tensor:
        """Solve dx/dtau = slope(tau, x) from tau = 0 to 1."""

    def solve(
        self,
        teacher: Teacher,
        x: Tensor,
        condition: Condition | None = None,
        *,
        start: float | Tensor = 1.0,
        end: float | Tensor = 0.0,
        generator: Draws | None = None,
    ) -> Tensor:
        """Carry x (B, ...) along dx/dt = u(x, t) from time ``start`` to ``end``.

        Each is one time for all or a tensor (B,) of times; the rows share the steps of the rescaled time tau,
        t = start + tau (end - start).
        """
        t0 = torch.as_tensor(start, device=x.device, dtype=x.dtype).expand(len(x))
        span = torch.as_tensor(end, device=x.device, dtype=x.dtype).expand(len(x)) - t0
        rate = expand_time(span, x)

        def slope(tau: float, x: Tensor, asked_at: float | None = None) -> Tensor:
            told = condition
            if asked_at is not None:
                told = (condition or Condition()).guided(asked_at=t0 + asked_at * span)
            return rate * _velocity(teacher, x, t0 + tau * span, told)

        return self._integrate(slope, x)


@register_solver("euler")
@attrs.frozen(kw_only=True)
class Euler(OdeSolver):
    """Euler's method with equal steps; one evaluation a step.

    Examples:
        >>> from flowdistill import load_teacher
        >>> ring = load_teacher("ring")
        >>> Euler(steps=16).solve(ring, ring.sample_prior(100)).shape, ring.evaluations
        (torch.Size([100, 2]), 1600)
    """

    steps: int = attrs.field(default=64, validator=ge(1))
    """The number of steps."""

    def _integrate(self, slope: Slope, x: Tensor) -> Tensor:
        for i in range(self.steps):
            x = x + slope(i / self.steps, x) / self.steps
        return x


@register_solver("heun")
@attrs.frozen(kw_only=True)
class Heun(OdeSolver):
    """Heun's second-order method with equal steps; two evaluations a step."""

    steps: int = attrs.field(default=32, validator=ge(1))
    """The number of steps."""
    repa: bool = False
    """Whether it is the variant of REPA's sampler: the last step is one of Euler's method, and a guidance interval is
    asked at the start of a step for both of its evaluations."""

    def _integrate(self, slope: Slope, x: Tensor) -> Tensor:
        for i in range(self.steps):
            first = slope(i / self.steps, x)
            if self.repa and i == self.steps - 1:
                return x + first / self.steps
            asked_at = i / self.steps if self.repa else None
            second = slope((i + 1) / self.steps, x + first / self.steps, asked_at)
            x = x + (first + second) / (2 * self.steps)
        return x


@register_solver("rk4")
@attrs.frozen(kw_only=True)
class RungeKutta4(OdeSolver):
    """Kutta's fourth-order 3/8 rule with equal steps, through torchdiffeq; four evaluations a step."""

    steps: int = attrs.field(default=16, validator=ge(1))
    """The number of steps."""

    def _integrate(self, slope: Slope, x: Tensor) -> Tensor:
        return _torchdiffeq(slope, x, method="rk4", options={"step_size": 1 / self.steps})


@register_solver("dopri5")
@attrs.frozen(kw_only=True)
class Dopri5(OdeSolver):
    """The adaptive fifth-order method of Dormand and Prince, through torchdiffeq."""

    atol: float = attrs.field(default=1e-6, validator=gt(0.0))
    """The absolute tolerance of a step."""
    rtol: float = attrs.field(default=1e-4, validator=gt(0.0))
    """The relative tolerance of a step."""

    def _integrate(self, slope: Slope, x: Tensor) -> Tensor:
        return _torchdiffeq(slope, x, method="dopri5", atol=self.atol, rtol=self.rtol)


def _torchdiffeq(slope: Slope, x: Tensor, **kwargs: object) -> Tensor:
    from torchdiffeq import odeint

    ends = torch.tensor([0.0, 1.0], device=x.device, dtype=x.dtype)
    path: Tensor = odeint(slope, x, ends, **kwargs)
    return path[-1]


@register_solver("edm")
@attrs.frozen(kw_only=True)
class Edm(Solver):
    """The sampler of Karras et al. 2022 (EDM, arXiv 2206.00364, algorithm 2), by which EDM2 is measured.

    Heun's method for dz/dsigma = (z - D(z; sigma))/sigma, where z = y + sigma n is the data plus noise and
    D = E[y | z], at noise levels

        sigma_i = (sigma_max^(1/rho) + i/(N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,   sigma_N = 0,

    the last step being one of Euler's method: 2N - 1 evaluations. Any teacher of the linear path is sampled, by
    t = sigma/(sigma + S), x_t = z/(sigma + S), D = S (x_t - t u).
    """

    steps: int = attrs.field(default=32, validator=ge(2))
    """The number N of noise levels above 0."""
    sigma_min: float = attrs.field(default=0.002, validator=gt(0.0))
    """The last noise level before 0."""
    sigma_max: float = attrs.field(default=80.0, validator=gt(0.0))
    """The first noise level."""
    rho: float = attrs.field(default=7.0, validator=gt(0.0))
    """The exponent of the levels: a larger one puts more steps at low noise."""
    data_scale: float = attrs.field(default=0.5, validator=gt(0.0))
    """The scale S such that y = S x_0. With the default, 0.5, the levels are those of EDM for a teacher whose data have
    unit variance."""
    churn: float = attrs.field(default=0.0, validator=ge(0.0))
    """The amount S_churn of noise that is added anew; 0 is deterministic."""
    churn_range: tuple[float, float] = (0.0, math.inf)
    """The noise levels [S_min, S_max] at which noise is added."""
    churn_noise: float = attrs.field(default=1.0, validator=gt(0.0))
    """The standard deviation S_noise of the added noise over the right one."""

    def levels(self) -> Tensor:
        """The noise levels (steps + 1,), float64, from sigma_max to 0."""
        ramp = torch.arange(self.steps, dtype=torch.float64) / (self.steps - 1)
        high, low = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return torch.cat([(high + ramp * (low - high)) ** self.rho, torch.zeros(1, dtype=torch.float64)])

    def solve(
        self,
        teacher: Teacher,
        x: Tensor,
        condition: Condition | None = None,
        *,
        generator: Draws | None = None,
    ) -> Tensor:
        """See `Solver.solve`."""
        scale = self.data_scale

        def slope(z: Tensor, sigma: float) -> Tensor:
            t = torch.full((len(z),), sigma / (sigma + scale), device=z.device, dtype=torch.float64)
            state = z / (sigma + scale)
            denoised = scale * velocity_to_denoised(state, t, _velocity(teacher, state, t, condition))
            return (z - denoised) / sigma

        levels: list[float] = self.levels().tolist()
        z = levels[0] * x
        for sigma, following in itertools.pairwise(levels):
            low, high = self.churn_range
            if self.churn and low <= sigma <= high:
                raised = sigma * (1 + min(self.churn / self.steps, math.sqrt(2) - 1))
                noise = _gaussian(z, generator)
                z = z + math.sqrt(raised**2 - sigma**2) * self.churn_noise * noise
                sigma = raised
            first = slope(z, sigma)
            moved = z + (following - sigma) * first
            if following > 0:
                moved = z + (following - sigma) * (first + slope(moved, following)) / 2
            z = moved
        return z / scale


@register_solver("sde")
@attrs.frozen(kw_only=True)
class EulerMaruyama(Solver):
    """The Euler-Maruyama sampler of SiT (Ma et al. 2024, arXiv 2401.08740), which REPA uses too.

    The SDE, run from t = 1 to 0, has the marginals of the ODE for any w(t) >= 0:

        dx = (u(x, t) - w(t) score(x, t)) dt + sqrt(2 w(t)) dW,   score = -(x + (1 - t) u)/t.

    ``steps`` - 1 equal steps lead from 1 to ``last_step``, and a last one, without noise, to 0. One evaluation a step.
    """

    steps: int = attrs.field(default=250, validator=ge(2))
    """The number of steps, the last one included."""
    diffusion: Literal["sigma", "decreasing"] = attrs.field(default="sigma", validator=in_(("sigma", "decreasing")))
    """The function w(t): "sigma" is t, for which nothing is divided by t, and "decreasing" is (1 - cos(pi t))^2/4."""
    last_step: float = attrs.field(default=0.04, validator=and_(gt(0.0), lt(1.0)))
    """The size of the last step."""

    def _noise(self, x: Tensor, generator: Draws | None) -> Tensor:
        return _gaussian(x, generator)

    def _over_time(self, t: float) -> float:
        """w(t)/t."""
        return 1.0 if self.diffusion == "sigma" else (1 - math.cos(math.pi * t)) ** 2 / (4 * t)

    def solve(
        self,
        teacher: Teacher,
        x: Tensor,
        condition: Condition | None = None,
        *,
        generator: Draws | None = None,
    ) -> Tensor:
        """See `Solver.solve`."""
        size = (1 - self.last_step) / (self.steps - 1)
        for i in range(self.steps):
            t = 1 - i * size
            velocity = _velocity(teacher, x, x.new_full((len(x),), t), condition)
            ratio = self._over_time(t)
            drift = velocity + ratio * (x + (1 - t) * velocity)
            if i == self.steps - 1:
                return x - self.last_step * drift
            x = x - size * drift + math.sqrt(2 * ratio * t * size) * self._noise(x, generator)
        raise AssertionError("steps is at least 2")
