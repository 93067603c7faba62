"""Products of one-dimensional mixtures, whose flow map is exact although it has many modes.

In one dimension a flow preserves quantiles: with P_t the distribution function of the marginal at t, X(x, t, s) =
P_s^-1(P_t(x)). A product of one-dimensional mixtures moves each coordinate by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowdistill.interfaces import Condition, ExactTeacher, FlowMap
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_flow_map, register_teacher
from flowdistill.teachers.gaussian._arrays import tensor


@register_teacher("product_mixture")
class ProductMixtureTeacher(ExactTeacher):
    """Data whose coordinates are independent one-dimensional Gaussian mixtures.

    Args:
        means: (D, K), of the K components of each coordinate.
        variances: (D, K), positive.
        weights: (D, K), positive, normalised here; None is equal weights.

    Raises:
        ConfigError: shapes that differ, or values that are not positive.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor

    def __init__(
        self,
        means: Any = ((-2.0, 1.5), (-2.0, 1.5)),
        variances: Any = ((0.09, 0.25), (0.09, 0.25)),
        weights: Any = ((0.3, 0.7), (0.3, 0.7)),
    ) -> None:
        super().__init__()
        centres = tensor(means, "means", 2)
        spread = tensor(variances, "variances", 2).to(centres)
        mass = torch.ones_like(centres) if weights is None else tensor(weights, "weights", 2).to(centres)
        if not centres.shape == spread.shape == mass.shape:
            raise ConfigError("means, variances and weights must have the same shape (D, K)")
        if not bool((spread > 0).all() and (mass > 0).all()):
            raise ConfigError("variances and weights must be positive")
        self.register_buffer("means", centres)
        self.register_buffer("variances", spread)
        self.register_buffer("weights", mass / mass.sum(1, keepdim=True))
        self.sample_shape = (len(centres),)

    def _standardized(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(x - m_t) / sigma_t and sigma_t, (B, D, K)."""
        t = expand_time(t, x)[..., None]
        sigma = ((1 - t).square() * self.variances.to(x.dtype) + t.square()).sqrt()
        return (x[..., None] - (1 - t) * self.means.to(x.dtype)) / sigma, sigma

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The velocity of each coordinate's mixture."""
        z, sigma = self._standardized(x, t)
        weights = self.weights.to(x.dtype)
        responsibilities = (weights.log() - sigma.log() - z.square() / 2).softmax(-1)
        time = expand_time(t, x)[..., None]
        slope = (time - (1 - time) * self.variances.to(x.dtype)) / sigma * z
        return torch.sum(responsibilities * (slope - self.means.to(x.dtype)), dim=-1)

    def cdf(self, x: Tensor, t: Tensor) -> Tensor:
        """The distribution function P_t of each coordinate."""
        return torch.sum(self.weights.to(x.dtype) * torch.special.ndtr(self._standardized(x, t)[0]), dim=-1)

    def survival(self, x: Tensor, t: Tensor) -> Tensor:
        """1 - P_t of each coordinate, exact in the upper tail."""
        return torch.sum(self.weights.to(x.dtype) * torch.special.ndtr(-self._standardized(x, t)[0]), dim=-1)

    def density(self, x: Tensor, t: Tensor) -> Tensor:
        """The density of each coordinate."""
        z, sigma = self._standardized(x, t)
        normal = torch.exp(-z.square() / 2) / (sigma * (2 * torch.pi) ** 0.5)
        return torch.sum(self.weights.to(x.dtype) * normal, dim=-1)

    def sample_data(
        self, n: int, generator: torch.Generator | None = None, condition: Condition | None = None
    ) -> Tensor:
        """Draw ``n`` samples (n, D)."""
        chosen = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        spread = self.variances.sqrt().gather(1, chosen).T
        return self.means.gather(1, chosen).T + spread * self.sample_prior(n, generator)


@register_flow_map("exact_product_mixture")
class ProductMixtureFlowMap(FlowMap):
    """The exact flow map of a `ProductMixtureTeacher`, by quantiles.

    P_s is inverted by bisection, in the upper half by the survival function, and one Newton step from the root gives
    the result exact first derivatives. ``shift``, a parameter that starts at 0, is added to F, so that objectives can
    be tried on it.

    Args:
        teacher: the teacher.
    """

    def __init__(self, teacher: ProductMixtureTeacher) -> None:
        super().__init__()
        self.teacher = teacher
        self.sample_shape = teacher.sample_shape
        self.shift = torch.nn.Parameter(torch.zeros_like(teacher.means[:, 0]))

    @torch.no_grad()
    def _bisect(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        lower, upper = self.teacher.cdf(x, t), self.teacher.survival(x, t)
        reach = 40 * (1 + self.teacher.variances.max().sqrt()) + self.teacher.means.abs().max()
        low, high = torch.full_like(x, -float(reach)), torch.full_like(x, float(reach))
        for _ in range(80 if x.dtype == torch.float64 else 40):
            middle = (low + high) / 2
            below = torch.where(
                lower < 0.5, self.teacher.cdf(middle, s) < lower, self.teacher.survival(middle, s) > upper
            )
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """(x - X) / (t - s), and u at t = s."""
        root = self._bisect(x.detach(), t.detach(), s.detach())
        upper = self.teacher.cdf(root, s) > 0.5
        excess = torch.where(
            upper,
            self.teacher.survival(x, t) - self.teacher.survival(root, s),
            self.teacher.cdf(root, s) - self.teacher.cdf(x, t),
        )
        end = root - excess / self.teacher.density(root, s).clamp_min(torch.finfo(x.dtype).tiny)
        gap = expand_time(t - s, x)
        slope = (x - end) / torch.where(gap == 0, torch.ones_like(gap), gap)
        exact = torch.where(gap == 0, self.teacher.velocity(x, t), slope)
        return exact + self.shift.to(x.dtype)
