"""Distribution matching by the difference of two velocities, alone or with a discriminator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import attrs
import torch
import torch.nn.functional as F
from attrs.validators import ge, in_, instance_of, is_callable, optional
from torch import Tensor, nn

from flowdistill.algorithms.corrections import CorrectionObjective, one_step_samples
from flowdistill.algorithms.identities import noised, pull
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Condition, Counted, FlowMap, ObjectiveOutput, States, Step, Teacher, TimeSampler
from flowdistill.networks import Linear, VelocityNetwork
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_objective
from flowdistill.times import Uniform


@register_objective("vsd")
@attrs.define(kw_only=True, slots=False)
class VSD(CorrectionObjective):
    """The fake score minus the teacher's, by denoised samples, as in distribution matching distillation.

    DMD moves a one-step sample x against the difference of two denoised samples,

        (x_fake - x_teacher) / W,   x_fake = x_r - r v_N,   x_teacher = x_r - r u,   W = mean |x - x_teacher|,

    which is (u - v_N) / mean |u - (n - x)|: the time cancels.
    The fake score is that of the online network.
    """

    citation = bibtex("wang2023prolificdreamer", "yin2024dmd")

    times: TimeSampler = attrs.field(factory=lambda: Uniform(low=0.02, high=0.98), validator=instance_of(TimeSampler))
    weighting: Literal["none", "dmd"] = attrs.field(default="dmd", validator=in_(("none", "dmd")))


class _Discriminator(nn.Module, Counted):
    """The logit of a noised sample: a linear layer on the output of a network."""

    def __init__(self, network: VelocityNetwork, guidance: float | None) -> None:
        super().__init__()
        self.features = NetworkFlowMap(network, "instantaneous", guidance)
        self.logit = Linear(math.prod(network.sample_shape), 1)

    @property
    def evaluations(self) -> int:
        """Evaluations of the network."""
        return self.features.evaluations

    def forward(self, x: Tensor, r: Tensor, condition: Condition) -> Tensor:
        """The logits (B,) of samples x at times r (B,)."""
        logits: Tensor = self.logit(self.features.velocity(x, r, condition).flatten(1))
        return logits[:, 0]


@register_objective("dmd2")
@attrs.define(kw_only=True, slots=False)
class DMD2(VSD):
    """VSD with several updates of the fake score for each of the student and, if asked for, a discriminator D.

    The student adds w softplus(-D(x_r, r)) to its loss; the discriminator, which sees data, minimises

        softplus(D(x_r, r)) + softplus(-D(y_r, r))

    with x the student's samples and y the data, both noised to times of the law ``times``.
    """

    citation = bibtex("yin2024dmd2")

    auxiliary_updates: int = attrs.field(default=5, validator=ge(1))
    """Updates of fake score and discriminator for each of the student."""
    discriminator: Callable[[], VelocityNetwork] | None = attrs.field(default=None, validator=optional(is_callable()))
    """Builds the network under the discriminator's linear layer; None is no discriminator, and no need of data."""
    discriminator_weight: float = attrs.field(default=3e-3, validator=ge(0.0))
    """w."""
    _judge: _Discriminator | None = attrs.field(default=None, init=False, repr=False, eq=False)

    @property
    def needs_data(self) -> bool:
        """Whether there is a discriminator."""
        return self.discriminator is not None

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take the models and build the discriminator; ConfigError for a network of another shape."""
        super().setup(student, teacher)
        if self.discriminator is None:
            return
        network = self.discriminator()
        if network.sample_shape != student.sample_shape:
            raise ConfigError(
                f"the discriminator's samples have shape {network.sample_shape}, the student's {student.sample_shape}"
            )
        self._judge = _Discriminator(network, student.guidance)

    def modules(self) -> Mapping[str, nn.Module]:
        """The fake score as ``online``, and ``discriminator`` if there is one."""
        return {**super().modules(), **({} if self._judge is None else {"discriminator": self._judge})}

    def _noised(self, x: Tensor, condition: Condition, generator: torch.Generator) -> States:
        return noised(x, self.times.sample(len(x), generator).to(x.dtype), condition, generator)

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The loss of VSD, and the adversarial loss through a discriminator whose parameters are held."""
        start = states.at_prior().to(0.0)
        residual = self.residual(start, step)
        output = pull(residual)
        if self._judge is None:
            return output
        seen = self._noised(start.land(residual.average), start.condition, step.generator)
        # The gradient of the samples alone: the discriminator's own parameters are held.
        x = seen.x.detach().requires_grad_()
        value = F.softplus(-self._judge(x, seen.t, seen.condition)).mean()
        (slope,) = torch.autograd.grad(value, x)
        adversarial = value.detach() + (slope * (seen.x - x.detach())).sum()
        metrics = {**output.metrics, "adversarial": adversarial.detach()}
        return attrs.evolve(output, loss=output.loss + self.discriminator_weight * adversarial, metrics=metrics)

    def auxiliary_loss(self, name: str, states: States, step: Step) -> ObjectiveOutput | None:
        """The loss of VSD for the fake score, that of telling samples from data for the discriminator."""
        if name != "discriminator":
            return super().auxiliary_loss(name, states, step)
        assert self._judge is not None
        assert states.clean is not None
        samples = one_step_samples(self.student, states.at_prior())
        fake = self._noised(samples, states.condition, step.generator)
        real = self._noised(states.clean, states.condition, step.generator)
        logits = [self._judge(seen.x, seen.t, seen.condition) for seen in (fake, real)]
        return ObjectiveOutput((F.softplus(logits[0]) + F.softplus(-logits[1])).mean())
