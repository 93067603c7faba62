"""Strategies: how a budget is spent on noises (Ma et al. 2025, arXiv 2501.09732, has the first two)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import attrs
from attrs.validators import and_, deep_iterable, ge, gt, le, min_len

from flowdistill.plumbing.registry import register_search_strategy
from flowdistill.searching.trials import Candidates, Trials, affordable


class SearchStrategy(ABC):
    """Finds noises whose samples the verifier likes. Concrete strategies are attrs classes, known by their settings."""

    @abstractmethod
    def search(self, trials: Trials) -> Candidates:
        """The best noise of each sample with the teacher's sample of it, (1, B, ...), within the budget.

        All randomness comes from `Trials.draw`.
        """


@register_search_strategy("best_of")
@attrs.frozen
class BestOf(SearchStrategy):
    """The best of as many independent noises as the budget pays: random search."""

    def search(self, trials: Trials) -> Candidates:
        """See `SearchStrategy.search`."""
        return trials.conclude(trials.propose(trials.draw(trials.proposals)).top(1))


@register_search_strategy("zero_order")
@attrs.frozen(kw_only=True)
class ZeroOrder(SearchStrategy):
    """Rounds of neighbours of the best noise so far, which a better one replaces.

    The first round is of independent noises. A neighbour of z at the radius r is

        sqrt(1 - r^2) z + r n,   n ~ N(0, I)

    which of a random z is a random noise again; so neighbours keep the norm that a model expects of noise.
    """

    radius: float = attrs.field(default=0.3, validator=and_(gt(0.0), le(1.0)))
    """The radius r, in (0, 1]; 1 is random search."""
    neighbours: int = attrs.field(default=8, validator=ge(1))
    """The neighbours of a round."""

    def search(self, trials: Trials) -> Candidates:
        """See `SearchStrategy.search`."""
        left = trials.proposals
        best: Candidates | None = None
        while left:
            noise = trials.draw(min(self.neighbours, left))
            left -= len(noise)
            if best is None:
                best = trials.propose(noise).top(1)
            else:
                near = math.sqrt(1 - self.radius**2) * best.noise + self.radius * noise
                best = (best + trials.propose(near)).top(1)
        assert best is not None
        return trials.conclude(best)


@register_search_strategy("successive_halving")
@attrs.frozen(kw_only=True)
class SuccessiveHalving(SearchStrategy):
    """Many noises at few steps, half of them at more, and so on; the teacher decides between the last.

    Of n noises at the first number of steps the better half goes on to the next, until the finalists are given to the
    teacher, whose best sample is the result. The budget sets n. Halving as of bandits (Jamieson and Talwalkar 2016,
    arXiv 1502.07943), with the steps of a sampler as the resource.
    """

    steps: Sequence[int] = attrs.field(
        default=(1, 2, 4), converter=tuple, validator=and_(min_len(1), deep_iterable(ge(1)))
    )
    """The steps of the proposer, one number for each round. A student that knows a single jump has one round of one."""
    finalists: int = attrs.field(default=2, validator=ge(1))
    """The number of noises that the teacher tries."""

    def rounds(self, trials: Trials) -> list[tuple[int, int]]:
        """Steps and noises of each of the proposer's rounds; ConfigError for too small a budget."""
        steps = (1,) if trials.proposer.single else self.steps
        finals = self.finalists * trials.final_cost

        def sizes(n: int) -> list[tuple[int, int]]:
            return [(k, max(self.finalists, n >> i)) for i, k in enumerate(steps)]

        def cost(n: int) -> float:
            return sum(size * trials.proposer.cost(k) for k, size in sizes(n)) + finals

        n = affordable(trials.budget - finals, trials.proposer.cost(steps[0]))
        while n > self.finalists and affordable(trials.budget, cost(n)) < 1:
            n -= 1
        if n < self.finalists or affordable(trials.budget, cost(n)) < 1:
            trials.refuse(cost(self.finalists))
        return sizes(n)

    def search(self, trials: Trials) -> Candidates:
        """See `SearchStrategy.search`."""
        rounds = self.rounds(trials)
        noise = trials.draw(rounds[0][1])
        for (steps, _), size in zip(rounds, [*(size for _, size in rounds[1:]), self.finalists], strict=True):
            noise = trials.propose(noise, steps).top(size).noise
        return trials.finish(noise).top(1)
