"""Laws of times in [0, 1], from which training draws."""

from __future__ import annotations

from abc import abstractmethod

import attrs
import torch
from attrs.validators import ge, gt, instance_of, le
from torch import Tensor

from flowdistill.interfaces import TimeSampler
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_time_sampler


class EndSampler(TimeSampler):
    """A law that can also be drawn from below given times: of the end s of a jump from t."""

    @abstractmethod
    def sample_below(self, t: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one time for each of t (B,), at most t."""


class ContinuousLaw(EndSampler):
    """A law with a distribution function, drawn from below a time as the law conditioned on T <= t."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """P(T <= t)."""

    @abstractmethod
    def quantile(self, p: Tensor) -> Tensor:
        """The inverse of `cdf`."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` times."""
        return self.quantile(torch.rand(n, generator=generator, device=generator.device))

    def sample_below(self, t: Tensor, generator: torch.Generator) -> Tensor:
        """Draw one time for each of t (B,) from this law conditioned on T <= t.

        If t is the larger of two independent draws of the law, the result has the law of the smaller one.
        """
        unit = torch.rand(len(t), generator=generator, device=generator.device)
        return torch.minimum(self.quantile(unit * self.cdf(t)), t)


@register_time_sampler("uniform")
@attrs.frozen(kw_only=True)
class Uniform(ContinuousLaw):
    """The uniform law on [low, high], a part of [0, 1].

    Examples:
        >>> Uniform(low=0.2).sample(1000, torch.Generator()).min() >= 0.2
        tensor(True)
    """

    low: float = attrs.field(default=0.0, validator=ge(0.0))
    """The lower end."""
    high: float = attrs.field(default=1.0, validator=le(1.0))
    """The upper end."""

    def __attrs_post_init__(self) -> None:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")

    def cdf(self, t: Tensor) -> Tensor:
        """(t - low) / (high - low), cut to [0, 1]."""
        return ((t - self.low) / (self.high - self.low)).clamp(0.0, 1.0)

    def quantile(self, p: Tensor) -> Tensor:
        """Low + p (high - low)."""
        return self.low + (self.high - self.low) * p


@register_time_sampler("logit_normal")
@attrs.frozen(kw_only=True)
class LogitNormal(ContinuousLaw):
    """sigmoid(mean + std N(0, 1)): positive means favour noise (t = 1), negative ones data."""

    mean: float = 0.0
    """The mean of the normal law."""
    std: float = attrs.field(default=1.0, validator=gt(0.0))
    """The standard deviation of the normal law."""

    def cdf(self, t: Tensor) -> Tensor:
        """Phi((logit t - mean) / std)."""
        probability: Tensor = torch.special.ndtr((torch.logit(t) - self.mean) / self.std)
        return probability

    def quantile(self, p: Tensor) -> Tensor:
        """sigmoid(mean + std Phi^-1(p))."""
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(p))


@register_time_sampler("arctan_log_normal")
@attrs.frozen(kw_only=True)
class ArctanLogNormal(ContinuousLaw):
    """(2/pi) atan(exp(mean + std N(0, 1))): the angle of TrigFlow as a time, of log-normal tangent."""

    mean: float = -0.8
    """The mean of the normal law."""
    std: float = attrs.field(default=1.6, validator=gt(0.0))
    """The standard deviation of the normal law."""

    def cdf(self, t: Tensor) -> Tensor:
        """Phi((log tan(pi t/2) - mean) / std)."""
        log_tangent = (torch.pi / 2 * t).sin().log() - (torch.pi / 2 * (1 - t)).sin().log()
        probability: Tensor = torch.special.ndtr((log_tangent - self.mean) / self.std)
        return probability

    def quantile(self, p: Tensor) -> Tensor:
        """(2/pi) atan(exp(mean + std Phi^-1(p)))."""
        return torch.atan(torch.exp(self.mean + self.std * torch.special.ndtri(p))) * (2 / torch.pi)


@register_time_sampler("always")
@attrs.frozen(kw_only=True)
class Always(EndSampler):
    """One and the same time: 0 as the end of all jumps makes a flow map a consistency model."""

    value: float = attrs.field(default=0.0, validator=[ge(0.0), le(1.0)])
    """The time, in [0, 1]."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """The value ``n`` times."""
        return torch.full((n,), self.value, device=generator.device)

    def sample_below(self, t: Tensor, generator: torch.Generator) -> Tensor:
        """The value, or t where that is smaller."""
        return t.clamp(max=self.value)


@register_time_sampler("grid")
@attrs.frozen(kw_only=True)
class Grid(EndSampler):
    """The times of a sampler of equal steps: k / steps with k = 1, ..., steps, and ends among them or 0."""

    steps: int = attrs.field(default=4, validator=ge(1))
    """The steps of the sampler."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` times, all equally likely."""
        return torch.randint(1, self.steps + 1, (n,), generator=generator, device=generator.device) / self.steps

    def sample_below(self, t: Tensor, generator: torch.Generator) -> Tensor:
        """Draw from the times of the grid below t, 0 included."""
        below = (t * self.steps - 1e-3).ceil().clamp(min=1)
        unit = torch.rand(len(t), generator=generator, device=generator.device)
        return torch.minimum((unit * below).floor().to(t.dtype) / self.steps, t)


@register_time_sampler("with_point_mass")
@attrs.frozen(kw_only=True)
class WithPointMass(EndSampler):
    """Another law, of which a fraction of the draws is replaced by one value.

    A one-step student is used at the duration 1 alone, a value that a continuous law never draws.
    """

    law: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    """The other law."""
    value: float = attrs.field(default=1.0, validator=[ge(0.0), le(1.0)])
    """The value, in [0, 1]."""
    fraction: float = attrs.field(default=0.25, validator=[ge(0.0), le(1.0)])
    """The probability of the value, in [0, 1]."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` times."""
        return self._replace(self.law.sample(n, generator), generator)

    def sample_below(self, t: Tensor, generator: torch.Generator) -> Tensor:
        """The other law's draws below t, a fraction of them replaced by the value, or by t where that is smaller."""
        if not isinstance(self.law, EndSampler):
            raise ConfigError(f"{type(self.law).__name__} cannot be drawn from below a time")
        return torch.minimum(self._replace(self.law.sample_below(t, generator), generator), t)

    def _replace(self, times: Tensor, generator: torch.Generator) -> Tensor:
        replaced = torch.rand(len(times), generator=generator, device=generator.device) < self.fraction
        return times.masked_fill(replaced, self.value)
