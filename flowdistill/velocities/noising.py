"""Estimators of the marginal velocity of a student's distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import attrs
import torch
from attrs.validators import ge, instance_of, is_callable, optional
from torch import Tensor, nn

from flowdistill.flow_maps import NetworkFlowMap, from_teacher
from flowdistill.interfaces import Condition, FlowMap, NoisingVelocity, Teacher, TimeSampler
from flowdistill.networks import VelocityNetwork, add_lora
from flowdistill.paths import denoised_to_velocity, interpolate
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_velocity_estimator
from flowdistill.times import Uniform


@register_velocity_estimator("online_network")
@attrs.define(kw_only=True, eq=False, slots=False)
class OnlineNetwork(NoisingVelocity):
    """A velocity network g trained by flow matching on the student's own samples while the student trains.

    It starts as a copy of the teacher's network.
    For a teacher without one it starts as the teacher plus a fresh ``network``, whose output starts at zero.
    """

    lora_rank: int = attrs.field(default=0, validator=ge(0))
    """The rank of low-rank updates of a frozen copy; 0 trains the whole copy."""
    times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    """The law of the noising times on which it is trained."""
    network: Callable[[], VelocityNetwork] | None = attrs.field(default=None, validator=optional(is_callable()))
    """Builds the fresh network for a teacher that has none."""

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Start the online network from the teacher; ConfigError without one."""
        super().setup(student, teacher)
        network = None if self.network is None else self.network()
        self._model: NetworkFlowMap = from_teacher(
            self.teacher, conditioning="instantaneous", guidance=student.guidance, network=network
        )
        if self.lora_rank:
            add_lora(self._model.network, self.lora_rank)

    def modules(self) -> Mapping[str, nn.Module]:
        """The network g."""
        return {"online": self._model}

    def module_loss(self, name: str, samples: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
        """Flow matching on student samples x: mean over elements of (g(x_r, r) - (n - x))^2, shape (B,)."""
        r = self.times.sample(len(samples), generator)
        noise = torch.randn(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)
        velocity = self._model.velocity(interpolate(samples, noise, r), r, condition)
        return (velocity - (noise - samples)).square().flatten(1).mean(1)

    @torch.no_grad()
    def estimate(self, x: Tensor, r: Tensor, condition: Condition, *, samples: Tensor) -> Tensor:
        """g(x, r)."""
        return self._model.velocity(x, r, condition)


@register_velocity_estimator("pseudo_velocity")
@attrs.define(kw_only=True, eq=False, slots=False)
class PseudoVelocity(NoisingVelocity):
    """The student's own diagonal F(x, r, r): no further network, and nothing of its own to train.

    It is the noising velocity only as far as something trains the diagonal on the student's own samples, as
    ``freeflow_pseudo`` does.
    """

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take the student; ConfigError for one that is anchored at t = 1 and so has no diagonal."""
        if not student.has_velocity:
            raise ConfigError("pseudo_velocity needs a student that is not anchored, such as conditioning = 'two_time'")
        super().setup(student, teacher)

    @torch.no_grad()
    def estimate(self, x: Tensor, r: Tensor, condition: Condition, *, samples: Tensor) -> Tensor:
        """F(x, r, r)."""
        return self.student.velocity(x, r, condition)


@register_velocity_estimator("minibatch")
@attrs.define(kw_only=True, slots=False)
class Minibatch(NoisingVelocity):
    """The exact noising velocity of the batch of student samples itself, for small problems and tests.

    For the empirical distribution of samples x_k the posterior of the clean sample is a softmax,

        v_N(x, r) = (x - sum_k p_k x_k) / r,   p_k ~ exp(-|x - (1 - r) x_k|^2 / (2 r^2)),

    over the samples of the same label.
    It approaches the student's velocity as the batch grows, quickly only in few dimensions and at high noise.
    """

    @torch.no_grad()
    def estimate(self, x: Tensor, r: Tensor, condition: Condition, *, samples: Tensor) -> Tensor:
        """The closed form over ``samples``, for r > 0."""
        flat, points, r = x.flatten(1), samples.flatten(1), r.to(x.dtype)
        distances = (flat[:, None] - (1 - r)[:, None, None] * points).square().sum(-1)
        logits = -distances / (2 * r.square())[:, None]
        if condition.labels is not None:
            logits = logits.masked_fill(condition.labels[:, None] != condition.labels, -torch.inf)
        denoised = (logits.softmax(1) @ points).reshape(x.shape)
        return denoised_to_velocity(x, r, denoised)


@register_velocity_estimator("exact")
@attrs.define(kw_only=True, slots=False)
class Exact(NoisingVelocity):
    """The velocity of a teacher that describes the student's distribution: for analytic students in tests."""

    distribution: Teacher = attrs.field(validator=instance_of(Teacher))
    """The teacher of the student's samples."""

    @torch.no_grad()
    def estimate(self, x: Tensor, r: Tensor, condition: Condition, *, samples: Tensor) -> Tensor:
        """The marginal velocity of ``distribution``."""
        return self.distribution.velocity(x, r, condition)
