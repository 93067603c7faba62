"""Laws of the pairs of times (t, s) at which jumps start and end.

Each law draws both times of a pair, so that nothing has to be guessed about the one from the other.
An objective owns its law, and any state source draws from it.
"""

from __future__ import annotations

import attrs
import torch
from attrs.validators import and_, ge, instance_of, le, optional
from torch import Tensor

from flowdistill.interfaces import OneStep, Pairs, TimeSampler
from flowdistill.plumbing.registry import register_pairs
from flowdistill.times import Always, EndSampler, Uniform, WithPointMass

register_pairs("one_step")(OneStep)


@register_pairs("sorted_pair")
@attrs.frozen(kw_only=True)
class SortedPair(Pairs):
    """The larger and the smaller of two independent draws: the pairs of MeanFlow (Geng et al. 2025).

    With two laws they are those of Decoupled MeanFlow (Lee et al. 2025).

    Examples:
        >>> from flowdistill.times import LogitNormal
        >>> t, s = SortedPair(first=LogitNormal(mean=-0.4)).sample(1000, torch.Generator())
        >>> bool((s <= t).all())
        True
    """

    first: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    """The law of one draw."""
    second: TimeSampler | None = attrs.field(default=None, validator=optional(instance_of(TimeSampler)))
    """The law of the other draw; None is the same law."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs."""
        first = self.first.sample(n, generator)
        second = (self.second or self.first).sample(n, generator)
        return torch.maximum(first, second), torch.minimum(first, second)


@register_pairs("below")
@attrs.frozen(kw_only=True)
class Below(Pairs):
    """A start t of one law, and an end s of another law on the condition s <= t."""

    starts: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    """The law of t."""
    ends: EndSampler = attrs.field(factory=Uniform, validator=instance_of(EndSampler))
    """The law of s, before the condition."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs."""
        t = self.starts.sample(n, generator)
        return t, self.ends.sample_below(t, generator)


@register_pairs("to_data")
@attrs.frozen(kw_only=True)
class ToData(Pairs):
    """Jumps to data, s = 0, from times of a law: the jumps of consistency models."""

    starts: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    """The law of t."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs."""
        t = self.starts.sample(n, generator)
        return t, torch.zeros_like(t)


@register_pairs("durations")
@attrs.frozen(kw_only=True)
class Durations(Pairs):
    """Jumps over a part delta of the way to data, s = t (1 - delta); from noise, t = 1, those of FreeFlow."""

    law: TimeSampler = attrs.field(factory=WithPointMass, validator=instance_of(TimeSampler))
    """The law of delta."""
    starts: TimeSampler = attrs.field(factory=lambda: Always(value=1.0), validator=instance_of(TimeSampler))
    """The law of t."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs."""
        t = self.starts.sample(n, generator)
        return t, t * (1 - self.law.sample(n, generator))


@register_pairs("short")
@attrs.frozen(kw_only=True)
class Short(Pairs):
    """Jumps no longer than a step of a sampler: of length d ~ U(0, 1/steps), from t ~ U(d, 1).

    They are the jumps of the secant losses in their authors' code (Liu and Yue 2025).
    """

    steps: int = attrs.field(default=4, validator=ge(1))
    """The steps of the sampler."""
    from_grid: bool = False
    """Whether jumps start where the sampler's do, at the next time k / steps from t on."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` jumps."""
        length, place = torch.rand(2, n, generator=generator, device=generator.device)
        length = length / self.steps
        t = length + place * (1 - length)
        if self.from_grid:
            t = ((t * self.steps).ceil() / self.steps).clamp(max=1.0)
        return t, (t - length).clamp_min(0.0)


@register_pairs("dyadic")
@attrs.frozen(kw_only=True)
class Dyadic(Pairs):
    """The jumps of samplers of 1, 2, 4, ..., 2^(levels - 1) equal steps: a level, then one of its steps.

    They are the jumps of shortcut models (Frans et al. 2024).
    """

    levels: int = attrs.field(default=7, validator=ge(1))
    """How many samplers."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` jumps: a uniform level, and a uniform step of it."""
        count = 2.0 ** torch.randint(self.levels, (n,), generator=generator, device=generator.device)
        step = (torch.rand(n, generator=generator, device=generator.device) * count).floor().minimum(count - 1)
        return (step + 1) / count, step / count


@register_pairs("diagonal")
@attrs.frozen(kw_only=True)
class Diagonal(Pairs):
    """No jumps at all, s = t: the times of flow matching."""

    times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    """The law of t."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` times."""
        t = self.times.sample(n, generator)
        return t, t

    def on_diagonal(self, n: int) -> int:
        """All."""
        return n


@register_pairs("with_diagonal")
@attrs.frozen(kw_only=True)
class WithDiagonal(Pairs):
    """Another law, of which a share of the rows is put on the diagonal s = t.

    Examples:
        >>> t, s = WithDiagonal(pairs=SortedPair(), share=0.25).sample(4, torch.Generator())
        >>> (s == t).tolist()
        [True, False, False, False]
    """

    pairs: Pairs = attrs.field(factory=SortedPair, validator=instance_of(Pairs))
    """The other law."""
    share: float = attrs.field(default=0.5, validator=and_(ge(0.0), le(1.0)))
    """The share of rows with s = t; they are the first ones."""
    times: TimeSampler | None = attrs.field(default=None, validator=optional(instance_of(TimeSampler)))
    """The law of t on the diagonal; None is that of the other law's ``t`` or ``s``."""
    at_ends: bool = False
    """Whether the other law's s is taken on the diagonal, in place of its t."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs."""
        t, s = self.pairs.sample(n, generator)
        rows = self.on_diagonal(n)
        diagonal = s if self.at_ends else t
        if self.times is not None:
            diagonal = self.times.sample(n, generator)
        return torch.cat([diagonal[:rows], t[rows:]]), torch.cat([diagonal[:rows], s[rows:]])

    def on_diagonal(self, n: int) -> int:
        """The share of ``n``, rounded."""
        return round(self.share * n)


@register_pairs("grouped")
@attrs.frozen(kw_only=True)
class Grouped(Pairs):
    """Another law whose draws each serve a group of consecutive rows."""

    pairs: Pairs = attrs.field(factory=ToData, validator=instance_of(Pairs))
    """The other law."""
    size: int = attrs.field(default=4, validator=ge(1))
    """The rows of a group."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs, equal in each group."""
        t, s = self.pairs.sample(-(-n // self.size), generator)
        return t.repeat_interleave(self.size)[:n], s.repeat_interleave(self.size)[:n]


def rows_of(share: float, n: int) -> int:
    """How many of ``n`` rows are a share of them, if both the share and the rest have at least one row."""
    return min(max(1, round(share * n)), n - 1)


@attrs.frozen(kw_only=True)
class Joined(Pairs):
    """One law for the first rows of a batch, and another for the others."""

    first: Pairs
    """The law of the first rows."""
    others: Pairs
    """The law of the others."""
    share: float
    """The share of the first rows, see `rows_of`."""

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs."""
        rows = rows_of(self.share, n)
        drawn = self.first.sample(rows, generator), self.others.sample(n - rows, generator)
        t, s = (torch.cat(times) for times in zip(*drawn, strict=True))
        return t, s
