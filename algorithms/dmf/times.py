"""The pairs of times of decoupled MeanFlow."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import instance_of
from torch import Tensor

from flowdistill.plumbing.registry import register_time_sampler
from flowdistill.times import ContinuousLaw, EndSampler, LogitNormal


def _density(law: ContinuousLaw, t: Tensor) -> Tensor:
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        (density,) = torch.autograd.grad(law.cdf(t).sum(), t)
    return density


@register_time_sampler("sorted_pair")
@attrs.frozen(kw_only=True)
class SortedPair(EndSampler):
    """The larger and the smaller of independent draws of two laws: t from `sample`, s from `sample_below`.

    Which draw is the larger one is not told by t alone. `sample_below` draws it from its posterior given t,

        P(the first is t) = f_1(t) G_2(t) / (f_1(t) G_2(t) + f_2(t) G_1(t))

    with densities f and distribution functions G, and then s from the other law conditioned on s <= t.
    """

    first: ContinuousLaw = attrs.field(
        factory=lambda: LogitNormal(mean=0.4, std=1.0), validator=instance_of(ContinuousLaw)
    )
    """A law."""
    second: ContinuousLaw = attrs.field(
        factory=lambda: LogitNormal(mean=-1.2, std=1.0), validator=instance_of(ContinuousLaw)
    )
    """The other law."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw ``n`` of the larger times."""
        return torch.maximum(self.first.sample(n, generator), self.second.sample(n, generator))

    def sample_below(self, t: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the smaller time for each of t (B,); the second law's where t has no density, as at 0 and 1."""
        first = _density(self.first, t) * self.second.cdf(t)
        second = _density(self.second, t) * self.first.cdf(t)
        unit = torch.rand(len(t), generator=generator, device=generator.device)
        second_is_t = unit * (first + second) < second
        return torch.where(second_is_t, self.first.sample_below(t, generator), self.second.sample_below(t, generator))
