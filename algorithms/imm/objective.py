"""The objective of inductive moment matching."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, gt, instance_of
from torch import Tensor

from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.differentiation import evaluate
from flowdistill.interfaces import Jump, ObjectiveOutput, Pairs, States, Step, TargetVelocity
from flowdistill.pairs import Below, Grouped
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.velocities import ConditionalVelocity

SHORTEST = 1e-6
"""The shortest duration by which anything is divided."""


@register_objective("imm")
@attrs.define(kw_only=True, slots=False)
class IMM(VelocityObjective):
    """Jumps from t and jumps from r just below t must land on one distribution at s.

    For a group of M states at one time t, with x_r = x_t - (t - r) v,

        loss = w(t)/M^2 sum_jk [k(y_j, y_k) + k(y'_j, y'_k) - 2 k(y_j, y'_k)],
        y_j = X(x_t^j, t, s),   y'_j = sg X(x_r^j, r, s),   k(a, b) = exp(-max(|a - b|, 1e-8) / (D (t - s) data_std)),

    an estimate of the squared maximum mean discrepancy of the two distributions that includes the terms j = k.
    D is the number of elements of a sample.
    r is lower than t by a constant in t/(1 - t), and not below s.

    The terms j = k add (2/M)(1 - E k(y_j, y'_j)) to the expected loss.
    It does not vanish at the flow map.
    With conditional velocities it biases the gradient there by the order of t - r; all else has no mean gradient.
    With a teacher's velocity x_r is an Euler step, and the minimum is off by its error, of the order of (t - r)^2.

    At t = 1 the formula gives r = 1, and nothing is learnt.
    """

    citation = bibtex("zhou2025inductive")
    needs_all_times = True

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    pairs: Pairs = attrs.field(factory=Below, validator=instance_of(Pairs))
    """The law of the times (t, s) of a group."""
    group_size: int = attrs.field(default=4, validator=ge(1))
    """M, which divides the batch size."""
    decrement: float = attrs.field(default=160 / 2**12, validator=gt(0.0))
    """t/(1 - t) - r/(1 - r); 160/2^k in the paper, with k = 12 for ImageNet and 15 for CIFAR-10."""
    data_std: float = attrs.field(default=0.5, validator=gt(0.0))
    """The standard deviation of the data."""
    weight_shift: float = 4.0
    """b of the weight w(t) = sigmoid(b - l) (1 - t)^(a - 1) / (t ((1 - t)^2 + t^2)), where l = 2 log((1 - t)/t) is the
    log-signal-to-noise ratio."""
    weight_power: float = attrs.field(default=1.0, validator=ge(1.0))
    """a of the weight."""

    def law(self, progress: float) -> Pairs:
        """One pair for each group."""
        return Grouped(pairs=self.pairs, size=self.group_size)

    def before(self, t: Tensor, s: Tensor) -> Tensor:
        """The times r (B,): lower than t by ``decrement`` in t/(1 - t), and not below s."""
        drop = self.decrement * (1 - t)
        return torch.maximum((t - drop).clamp_min(0) / (1 - drop).clamp_min(SHORTEST), s)

    def weight(self, t: Tensor) -> Tensor:
        """w(t)."""
        t = t.clamp_min(SHORTEST)
        return (
            torch.sigmoid(self.weight_shift + 2 * torch.logit(t))
            * (1 - t) ** (self.weight_power - 1)
            / (t * ((1 - t).square() + t.square()))
        )

    def discrepancy(self, y: Tensor, target: Tensor, gap: Tensor) -> Tensor:
        """The squared discrepancies (G,) of G groups of samples (G, M, D) reached by jumps of lengths (G,)."""
        width = y.shape[2] * self.data_std * gap.clamp_min(SHORTEST)[:, None, None]

        def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
            distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
            return torch.exp(-distance.clamp_min(1e-8) / width).mean((1, 2))

        return mean_kernel(y, y) + mean_kernel(target, target) - 2 * mean_kernel(y, target)

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The weighted discrepancy, averaged over the groups; two evaluations of the student."""
        x, t, s, condition = states
        size = self.group_size
        if len(states) % size:
            raise ConfigError(f"imm.group_size = {size} does not divide the {len(states)} states of a batch")
        r = self.before(t, s)
        earlier = Jump(x - expand_time(t - r, x) * self.target(states), r, s, condition)
        with torch.no_grad():
            target = self.student(*earlier)
        y = states.land(evaluate(self.student, states))
        groups = (len(states) // size, size, -1)
        gap = (t - s)[::size].to(x.dtype)
        error = self.discrepancy(y.reshape(groups), target.reshape(groups), gap)
        weight = self.weight(t[::size]).to(error.dtype)
        return ObjectiveOutput((weight * error).mean(), {"error": error.detach().mean()})
