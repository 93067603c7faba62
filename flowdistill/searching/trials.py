"""What a search may do: draw noises and try them, within a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import attrs
import torch
from torch import Tensor

from flowdistill.interfaces import Condition, FlowMap, Jumps, Teacher, Verifier
from flowdistill.plumbing.errors import ConfigError, DataError
from flowdistill.plumbing.flops import Flops
from flowdistill.solvers import Euler


@attrs.frozen(eq=False)
class Candidates:
    """Noises that have been tried, K for each of B samples.

    Examples:
        >>> x = torch.tensor([[1.0], [3.0], [2.0]])
        >>> Candidates(x, x, x).top(2).scores
        tensor([[3.],
                [2.]])
    """

    noise: Tensor
    """The noises ``(K, B, *sample_shape)``, on the CPU."""
    samples: Tensor
    """What a model has made of them, of the same shape, on the CPU."""
    scores: Tensor
    """The verifier's scores, (K, B)."""

    def top(self, k: int) -> Candidates:
        """The k best of each sample, the best first."""
        order = self.scores.argsort(dim=0, descending=True, stable=True)[:k]
        columns = torch.arange(self.scores.shape[1])
        return Candidates(self.noise[order, columns], self.samples[order, columns], self.scores[order, columns])

    def __add__(self, other: Candidates) -> Candidates:
        """These and those."""
        pairs = ((self.noise, other.noise), (self.samples, other.samples), (self.scores, other.scores))
        return Candidates(*(torch.cat(pair) for pair in pairs))


class PricedModel:
    """A student or a teacher as a search sees it: noises to samples, at a price.

    An evaluation costs its floating-point operations (matrix products, convolutions and attention) over those of one
    evaluation of the teacher's network; closed forms, which have none to count, cost 1.

    Args:
        model: the student or the teacher, which is sampled by Euler's method.
        unit: operations of one evaluation of the teacher's network on one sample.
        condition: of any sample; guidance scales are for models that take them.
        bf16: evaluate it under autocast.

    Attributes:
        evaluations: of one sample at one step: 1, or 2 under guidance.
        price: of an evaluation.
        single: whether the model knows one step alone.
    """

    def __init__(self, model: FlowMap | Teacher, unit: int, condition: Condition, bf16: bool = False) -> None:
        self.model = model
        self._bf16 = bf16
        self._like = next(itertools.chain(model.parameters(), model.buffers()), torch.zeros(()))
        self.single = isinstance(model, FlowMap) and model.jumps in (Jumps.FROM_NOISE, Jumps.TO_DATA)
        before = model.evaluations
        with Flops() as flops:  # type: ignore[no-untyped-call]
            self(torch.zeros((1, *model.sample_shape)), 1, condition[:1])
        self.evaluations = model.evaluations - before
        self.price = flops.total / self.evaluations / unit if unit and flops.total else 1.0

    def cost(self, steps: int) -> float:
        """What a sample costs."""
        return steps * self.evaluations * self.price

    @torch.no_grad()
    def __call__(self, noise: Tensor, steps: int, condition: Condition) -> Tensor:
        """Samples (B, ...) of noise (B, ...), in the model's dtype and where it lies."""
        noise, condition = noise.to(self._like), condition.to(self._like.device)
        with torch.autocast(noise.device.type, torch.bfloat16, enabled=self._bf16):
            if isinstance(self.model, Teacher):
                return Euler(steps=steps).solve(self.model, noise, condition)
            if self.model.guidance is None:
                condition = attrs.evolve(condition, guidance=None)
            return self.model.sample(noise, steps, condition)


def evaluation_flops(teacher: Teacher, condition: Condition) -> int:
    """Operations of one evaluation of the teacher on one sample: the unit of budgets; 0 for closed forms.

    It is the mean over the evaluations that a step takes, where a guide has another network.
    """
    before = teacher.evaluations
    noise = torch.zeros((1, *teacher.sample_shape), dtype=teacher.dtype, device=teacher.device)
    with Flops() as flops, torch.no_grad():  # type: ignore[no-untyped-call]
        teacher.velocity(noise, noise.new_ones(1), attrs.evolve(condition[:1].to(teacher.device), guidance=None))
    operations: int = flops.total // (teacher.evaluations - before)
    return operations


@attrs.frozen(kw_only=True, eq=False)
class Trials:
    """The trials of a search for the noises of B samples, each of which has a budget of its own."""

    proposer: PricedModel
    """The model that noises are tried with: the student, or the teacher itself."""
    teacher: PricedModel
    """The model that the chosen noises are given to."""
    teacher_steps: int
    """The steps of the teacher."""
    verifier: Verifier
    """The verifier that scores samples."""
    decode: Callable[[Tensor], Tensor]
    """The function that turns samples into the images that the verifier sees."""
    budget: float
    """The budget of each sample, in evaluations of the teacher's network on one sample."""
    condition: Condition
    """The condition of the B samples."""
    generators: Sequence[torch.Generator]
    """A generator for each of them, so that what is found for one depends on no other."""
    batch_size: int
    """The samples that are evaluated at a time."""
    progress: Callable[[float], None] = lambda cost: None
    """The function that is told the cost of every batch."""

    @property
    def alone(self) -> bool:
        """Whether the teacher searches alone, so that what it has tried needs no further evaluation."""
        return self.proposer is self.teacher

    @property
    def final_cost(self) -> float:
        """Of one sample of the teacher."""
        return self.teacher.cost(self.teacher_steps)

    @property
    def proposals(self) -> int:
        """How many noises the budget lets the proposer try beside the teacher's sample of the best; or ConfigError."""
        reserved, price = (0.0, self.final_cost) if self.alone else (self.final_cost, self.proposer.cost(1))
        count = affordable(self.budget - reserved, price)
        if count < 1:
            self.refuse(reserved + price)
        return count

    def refuse(self, least: float) -> NoReturn:
        """ConfigError that names the least budget."""
        raise ConfigError(
            f"a budget of {self.budget:g} evaluations is too small: one sample of the teacher at {self.teacher_steps} "
            f"steps costs {self.final_cost:g}, and this search at least {math.ceil(100 * least - 1e-6) / 100:g}"
        )

    def draw(self, k: int) -> Tensor:
        """Fresh noises (k, B, *sample_shape)."""
        shape = (k, *self.teacher.model.sample_shape)
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators], 1)

    def propose(self, noise: Tensor, steps: int | None = None) -> Candidates:
        """The proposer's samples of noise (K, B, ...); None is a student's one step, or all steps of the teacher."""
        return self._try(self.proposer, noise, steps or (self.teacher_steps if self.alone else 1))

    def finish(self, noise: Tensor) -> Candidates:
        """The teacher's samples of noise (K, B, ...)."""
        return self._try(self.teacher, noise, self.teacher_steps)

    def conclude(self, best: Candidates) -> Candidates:
        """The teacher's samples of the noises that the proposer found best."""
        return best if self.alone else self.finish(best.noise)

    def _try(self, model: PricedModel, noise: Tensor, steps: int) -> Candidates:
        k, b = noise.shape[:2]
        condition = self.condition[torch.arange(b).repeat(k)]
        flat, samples, scores = noise.flatten(0, 1), [], []
        for part in (slice(i, i + self.batch_size) for i in range(0, k * b, self.batch_size)):
            made = model(flat[part], steps, condition[part])
            found = self.verifier.scores(self.decode(made), condition[part].to(made.device)).detach().float().cpu()
            if found.shape != (len(made),) or not bool(torch.isfinite(found).all()):
                raise DataError(
                    f"a verifier must give {len(made)} finite scores of {len(made)} images, not {_short(found)}"
                )
            samples.append(made.cpu())
            scores.append(found)
            self.progress(len(made) * model.cost(steps))
        return Candidates(noise, torch.cat(samples).reshape(noise.shape), torch.cat(scores).reshape(k, b))


def affordable(budget: float, price: float) -> int:
    """How many things of a price a budget pays; what rounding errors take from a whole number is given back.

    Examples:
        >>> affordable(80 - 32, 1.0), affordable(0.3, 0.1), affordable(-1.0, 2.0)
        (48, 3, 0)
    """
    return max(0, math.floor(budget / price * (1 + 1e-9)))


def _short(scores: Tensor) -> str:
    return f"shape {tuple(scores.shape)}" if scores.ndim != 1 else f"{len(scores)}, some not finite"
