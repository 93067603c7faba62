"""Consistency between neighbouring times."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, le, lt, optional
from torch import Tensor

from flowdistill.algorithms.identities import Residual, pull, semigroup
from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.interfaces import Jumps, ObjectiveOutput, Pairs, States, Step, TargetVelocity
from flowdistill.pairs import ToData
from flowdistill.paths import expand_time, noise_level_to_time, time_to_noise_level
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.velocities import ConditionalVelocity


@register_objective("consistency")
@attrs.define(kw_only=True, slots=False)
class Consistency(VelocityObjective):
    """The student's samples X(x, t, 0) and X(x_r, r, 0) agree at neighbouring times r < t of one trajectory.

    The second state is one step of the velocity away, x_r = x - (t - r) u, and its sample is a fixed target.
    With the conditional velocity it is consistency training, where both states share data and noise.
    With the teacher's it is consistency distillation by Euler steps.
    The loss is

        weight (sqrt(|X(x, t, 0) - sg X(x_r, r, 0)|^2 + c^2) - c)

    as far as gradients go, with the norm over all elements of a sample. At r = 0 the target is the data x - t u.

    The times r come closer to t in stages (easy consistency tuning): with the noise level sigma = t / (1 - t),

        sigma_r = sigma - sigma q^-(1 + stage) (1 + k sigmoid(-sigma)),

    at least 0. The flow map has a residual of second order in t - r, and the student an error of first order.
    Beyond ``sigma_max`` a state steps to the same r as at ``sigma_max``: at t = 1 no ratio of noise levels is a step.
    """

    citation = bibtex("song2023consistency", "geng2025ect")
    trains = Jumps.TO_DATA

    target: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    pairs: Pairs = attrs.field(factory=ToData, validator=instance_of(Pairs))
    """The law of t, with s = 0."""
    q: float = attrs.field(default=2.0, validator=gt(1.0))
    """The factor by which each stage brings the times closer."""
    k: float = attrs.field(default=8.0, validator=ge(0.0))
    """How much farther apart the times are at low noise."""
    stages: int = attrs.field(default=8, validator=ge(1))
    """How many stages there are; the last one lasts to the end."""
    stage_length: float = attrs.field(default=0.125, validator=and_(gt(0.0), le(1.0)))
    """The part of the training that a stage takes."""
    largest_ratio: float = attrs.field(default=0.999, validator=and_(gt(0.0), lt(1.0)))
    """The largest ratio of sigma_r to sigma."""
    sigma_max: float = attrs.field(default=80.0, validator=gt(0.0))
    """The noise level that stands for t = 1."""
    huber: float | None = attrs.field(factory=lambda: 1e-8, validator=optional(gt(0.0)))
    """c; None is the squared distance in place of the whole bracket.
    The squared distance alone is unbiased from data whose conditional distributions are not symmetric."""
    weighting: Literal["gap", "edm"] = attrs.field(default="gap", validator=in_(("gap", "edm")))
    """"gap" is 1 / (sigma - sigma_r), "edm" is 1/sigma^2 + 1/sigma_data^2."""
    sigma_data: float = attrs.field(default=0.5, validator=gt(0.0))
    """The standard deviation of the data, for "edm"."""

    def levels(self, t: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """The noise levels sigma and sigma_r of times t (B,) when a part of the training is done."""
        stage = min(int(progress / self.stage_length + 1e-9), self.stages - 1)
        sigma = time_to_noise_level(t).clamp(max=self.sigma_max)
        ratio = 1 - self.q ** -(1 + stage) * (1 + self.k * torch.sigmoid(-sigma))
        return sigma, sigma * ratio.clamp(0.0, self.largest_ratio)

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The loss; ``error`` is the squared distance of the samples."""
        sigma, lower = self.levels(states.t, step.progress)
        velocity = self.target(states)
        with torch.autocast(states.x.device.type, enabled=False):  # close to each other, the outputs differ by rounding
            residual = semigroup(self.student, self.student, velocity, states.to(0.0), noise_level_to_time(lower))
        if self.weighting == "gap":
            weight = 1 / (sigma - lower).clamp_min(1e-12)
        else:
            weight = sigma.clamp_min(1e-6) ** -2 + self.sigma_data**-2
        length = expand_time(states.t, states.x)
        distance = Residual(length * residual.average, length * residual.value)
        if self.huber is None:
            return pull(distance, reduction="sum", scale=weight)
        # twice the gradient of the square root
        return pull(distance, power=0.5, eps=self.huber**2, reduction="sum", scale=weight / 2)
