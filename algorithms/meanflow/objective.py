"""The MeanFlow objectives."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, le
from torch import Tensor

from flowdistill.algorithms.identities import eulerian_residual, pull, velocity_residual
from flowdistill.interfaces import (
    FlowMap,
    GeneratingVelocity,
    Objective,
    ObjectiveOutput,
    States,
    Teacher,
)
from flowdistill.registry import register_objective
from flowdistill.times import ContinuousLaw, LogitNormal
from flowdistill.velocity_estimators import Jvp

CITATION = """\
@article{geng2025meanflow,
  title   = {Mean Flows for One-step Generative Modeling},
  author  = {Geng, Zhengyang and Deng, Mingyang and Bai, Xingjian and Kolter, J. Zico and He, Kaiming},
  journal = {arXiv preprint arXiv:2505.13447},
  year    = {2025},
}"""


@attrs.define(kw_only=True)
class _MeanFlow(Objective):
    citation = CITATION

    ends: ContinuousLaw = attrs.field(
        factory=lambda: LogitNormal(mean=-0.4, std=1.0), validator=instance_of(ContinuousLaw)
    )
    equal: float = attrs.field(default=0.75, validator=and_(ge(0.0), le(1.0)))
    estimator: GeneratingVelocity = attrs.field(factory=Jvp, validator=instance_of(GeneratingVelocity))
    power: float = attrs.field(default=1.0, validator=ge(0.0))
    eps: float = attrs.field(default=0.01, validator=gt(0.0))
    reduction: Literal["mean", "sum"] = attrs.field(default="sum", validator=in_(("mean", "sum")))

    @abstractmethod
    def _velocity(self, teacher: Teacher | None, states: States) -> Tensor:
        """The dx/dt that stands for the teacher's at the states."""

    def loss(
        self,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        *,
        step: int,
        generator: torch.Generator,
    ) -> ObjectiveOutput:
        """The weighted squared residual; rows with s = t skip the derivative, which they multiply by 0."""
        with torch.no_grad():
            velocity = self._velocity(teacher, states)
        s = self.ends.sample_below(states.t, generator)
        rows = round(self.equal * len(states))
        on, off = states[:rows], states[rows:]
        parts = []
        if len(on):
            parts.append(velocity_residual(student, velocity[:rows], on.x, on.t, on.condition))
        if len(off):
            parts.append(
                eulerian_residual(
                    student, velocity[rows:], self.estimator, off.x, off.t, s[rows:], off.condition, step=step
                )
            )
        average, residual = (torch.cat(part) for part in zip(*parts, strict=True))
        return pull(average, residual, power=self.power, eps=self.eps, reduction=self.reduction)


@register_objective("meanflow")
@attrs.define(kw_only=True)
class MeanFlow(_MeanFlow):
    """The Eulerian identity with the conditional velocity n - x_0 in target and tangent: training from data.

    The residual vanishes at the flow map only on average over (x_0, n), so a ``power`` above 0 is biased where samples
    have few dimensions: use 0 there.

    Attributes:
        ends: law of the end time s, conditioned on s <= t. With states at the larger of two draws of the same law
            (`Maximum`), (t, s) are the paper's sorted pairs.
        equal: fraction of the batch with s = t, where the loss is flow matching.
        estimator: how the derivative along the trajectory is computed.
        power: exponent p of the weight 1 / (squared residual + eps)^p.
        eps: see ``power``.
        reduction: how the squared residual adds up elements; belongs to ``power`` and ``eps``.
    """

    needs_data = True
    needs_teacher = False

    def _velocity(self, teacher: Teacher | None, states: States) -> Tensor:
        assert states.noise is not None
        assert states.clean is not None
        return states.noise - states.clean


@register_objective("meanflow_distillation")
@attrs.define(kw_only=True)
class MeanFlowDistillation(_MeanFlow):
    """The Eulerian identity with the teacher's velocity in target and tangent; any state source will do.

    The residual vanishes at the teacher's flow map at every state, whatever the weight and the laws of the times.

    Attributes:
        ends: see `MeanFlow`.
        equal: see `MeanFlow`.
        estimator: see `MeanFlow`.
        power: see `MeanFlow`.
        eps: see `MeanFlow`.
        reduction: see `MeanFlow`.
    """

    def _velocity(self, teacher: Teacher | None, states: States) -> Tensor:
        assert teacher is not None
        return teacher.velocity(states.x, states.t, states.condition)
