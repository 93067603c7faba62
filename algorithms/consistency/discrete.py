"""Consistency between neighbouring times."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, lt, optional
from torch import Tensor

from flowdistill.algorithms.identities import pull, semigroup_residual
from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.interfaces import FlowMap, ObjectiveOutput, States, TargetVelocity, Teacher
from flowdistill.paths import expand_time, noise_level_to_time, time_to_noise_level
from flowdistill.plumbing.registry import register_objective
from flowdistill.velocities.targets import ConditionalVelocity

CITATION = """\
@inproceedings{song2023consistency,
  title     = {Consistency Models},
  author    = {Song, Yang and Dhariwal, Prafulla and Chen, Mark and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year      = {2023},
  note      = {arXiv:2303.01469},
}

@inproceedings{geng2025ect,
  title     = {Consistency Models Made Easy},
  author    = {Geng, Zhengyang and Pokle, Ashwini and Luo, William and Lin, Justin and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  note      = {arXiv:2406.14548},
}"""


@register_objective("consistency")
@attrs.define(kw_only=True)
class Consistency(VelocityObjective):
    """The student's samples X(x, t, 0) and X(x_r, r, 0) agree at neighbouring times r < t of one trajectory.

    The second state is one step of the velocity away, x_r = x - (t - r) u, and its sample is a fixed target. With the
    conditional velocity it is consistency training, where both states share data and noise, with the teacher's it is
    consistency distillation by Euler steps. The loss is

        weight (sqrt(|X(x, t, 0) - sg X(x_r, r, 0)|^2 + c^2) - c)

    as far as gradients go, with the norm over all elements of a sample. At r = 0 the target is the data x - t u.

    The times r come closer to t in stages (easy consistency tuning): with the noise level sigma = t / (1 - t),

        sigma_r = sigma - sigma q^-(1 + stage) (1 + k sigmoid(-sigma)),

    at least 0. The flow map has a residual of second order in t - r, and the student an error of first order. Beyond
    ``sigma_max`` a state steps to the same r as at ``sigma_max``: at t = 1 no ratio of noise levels is a step.

    Attributes:
        velocity: u at the states: the teacher's, or the conditional one of the data.
        q: the factor by which each stage brings the times closer.
        k: how much farther apart the times are at low noise.
        stages: how many.
        stage_length: training steps of a stage.
        largest_ratio: of sigma_r to sigma.
        sigma_max: the noise level that stands for t = 1.
        huber: c; None is the squared distance in place of the whole bracket, which alone is unbiased from data whose
            conditional distributions are not symmetric.
        weighting: "gap" for 1 / (sigma - sigma_r), or "edm" for 1/sigma^2 + 1/sigma_data^2.
        sigma_data: standard deviation of the data, for "edm".
    """

    citation = CITATION

    velocity: TargetVelocity = attrs.field(factory=ConditionalVelocity, validator=instance_of(TargetVelocity))
    q: float = attrs.field(default=2.0, validator=gt(1.0))
    k: float = attrs.field(default=8.0, validator=ge(0.0))
    stages: int = attrs.field(default=8, validator=ge(1))
    stage_length: int = attrs.field(default=50_000, validator=ge(1))
    largest_ratio: float = attrs.field(default=0.999, validator=and_(gt(0.0), lt(1.0)))
    sigma_max: float = attrs.field(default=80.0, validator=gt(0.0))
    huber: float | None = attrs.field(factory=lambda: 1e-8, validator=optional(gt(0.0)))
    weighting: Literal["gap", "edm"] = attrs.field(default="gap", validator=in_(("gap", "edm")))
    sigma_data: float = attrs.field(default=0.5, validator=gt(0.0))

    def levels(self, t: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The noise levels sigma and sigma_r of times t (B,) at a training step."""
        stage = min(step // self.stage_length, self.stages - 1)
        sigma = time_to_noise_level(t).clamp(max=self.sigma_max)
        ratio = 1 - self.q ** -(1 + stage) * (1 + self.k * torch.sigmoid(-sigma))
        return sigma, sigma * ratio.clamp(0.0, self.largest_ratio)

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """The loss; ``error`` is the squared distance of the samples."""
        x, t = states.x, states.t
        velocity = self.velocity.velocity(student, teacher, states)
        sigma, lower = self.levels(t, step)
        with torch.autocast(x.device.type, enabled=False):  # close to each other, the two outputs differ by rounding
            average, residual = semigroup_residual(
                student, student, velocity, x, t, noise_level_to_time(lower), torch.zeros_like(t), states.condition
            )
        if self.weighting == "gap":
            weight = 1 / (sigma - lower).clamp_min(1e-12)
        else:
            weight = sigma.clamp_min(1e-6) ** -2 + self.sigma_data**-2
        length = expand_time(t, x)
        if self.huber is None:
            return pull(length * average, length * residual, reduction="sum", scale=weight)
        # twice the gradient of the square root
        return pull(
            length * average, length * residual, power=0.5, eps=self.huber**2, reduction="sum", scale=weight / 2
        )
