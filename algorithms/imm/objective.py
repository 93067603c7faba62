"""The objective of inductive moment matching."""

from __future__ import annotations

import attrs
import torch
from attrs.validators import ge, gt, instance_of
from torch import Tensor

from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.differentiation import evaluate
from flowdistill.interfaces import FlowMap, ObjectiveOutput, States, TargetVelocity, Teacher
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import EndSampler, Uniform
from flowdistill.velocities.targets import ConditionalVelocity

SHORTEST = 1e-6
"""The shortest duration by which anything is divided."""


@register_objective("imm")
@attrs.define(kw_only=True)
class IMM(VelocityObjective):
    """Jumps from t and jumps from r just below t must land on one distribution at s.

    For a group of M states at one time t, with x_r = x_t - (t - r) v,

        loss = w(t)/M^2 sum_jk [k(y_j, y_k) + k(y'_j, y'_k) - 2 k(y_j, y'_k)],
        y_j = X(x_t^j, t, s),   y'_j = sg X(x_r^j, r, s),   k(a, b) = exp(-max(|a - b|, 1e-8) / (D (t - s) data_std)),

    an estimate of the squared maximum mean discrepancy of the two distributions that includes the terms j = k. D is the
    number of elements of a sample. r is lower than t by a constant in t/(1 - t), and not below s.

    The terms j = k add (2/M)(1 - E k(y_j, y'_j)) to the expected loss. It does not vanish at the flow map and, with
    conditional velocities, biases the gradient there by the order of t - r; all else has no mean gradient. With a
    teacher's velocity x_r is an Euler step, and the minimum is off by its error, of the order of (t - r)^2.

    The states of a group are consecutive rows with one time (`Grouped`), below 1: at t = 1 the formula gives r = 1, and
    nothing is learnt.

    Attributes:
        velocity: v at the states: the conditional velocity n - x_0, or the teacher's.
        ends: law of s given t.
        group_size: M, which divides the batch size.
        decrement: t/(1 - t) - r/(1 - r); 160/2^k in the paper, with k = 12 for ImageNet and 15 for CIFAR-10.
        data_std: standard deviation of the data.
        weight_shift: b of the weight w(t) = sigmoid(b - l) (1 - t)^(a - 1) / (t ((1 - t)^2 + t^2)) with the
            log-signal-to-noise ratio l = 2 log((1 - t)/t).
        weight_power: a of the weight.
    """

    citation = """\
@inproceedings{zhou2025inductive,
  title     = {Inductive Moment Matching},
  author    = {Zhou, Linqi and Ermon, Stefano and Song, Jiaming},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
}"""

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    ends: EndSampler = attrs.field(factory=Uniform, validator=instance_of(EndSampler))
    group_size: int = attrs.field(default=4, validator=ge(1))
    decrement: float = attrs.field(default=160 / 2**12, validator=gt(0.0))
    data_std: float = attrs.field(default=0.5, validator=gt(0.0))
    weight_shift: float = 4.0
    weight_power: float = attrs.field(default=1.0, validator=ge(1.0))

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

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The weighted discrepancy, averaged over the groups; two evaluations of the student."""
        x, t, condition, size = states.x, states.t, states.condition, self.group_size
        if len(states) % size:
            raise ConfigError(f"imm.group_size = {size} does not divide the {len(states)} states of a batch")
        start = t[::size]
        if step == 0 and bool((t != start.repeat_interleave(size)).any()):
            raise ConfigError(
                f"imm needs states whose times are equal in groups of {size} rows: set the times of train.states to "
                f"@grouped() with grouped.size = {size}"
            )
        end = self.ends.sample_below(start, generator)
        s = end.repeat_interleave(size)
        r = self.before(t, s)
        velocity = self.velocity.velocity(student, teacher, states)
        with torch.no_grad():
            target = student(x - expand_time(t - r, x) * velocity, r, s, condition)
        y = x - expand_time(t - s, x) * evaluate(student, x, t, s, condition)
        error = self.discrepancy(
            y.reshape(len(start), size, -1), target.reshape(len(start), size, -1), (start - end).to(x.dtype)
        )
        weight = self.weight(start).to(error.dtype)
        return ObjectiveOutput((weight * error).mean(), {"error": error.detach().mean()})
