"""Estimators of the student's generating velocity (`Jvp`, `FiniteDifference`) and noising velocity (the others)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import attrs
import torch
from attrs.validators import ge, gt, in_, instance_of, is_callable, optional
from torch import Tensor, nn

from flowdistill import differentiation
from flowdistill.flow_maps import NetworkFlowMap, from_teacher
from flowdistill.interfaces import (
    Condition,
    FlowMap,
    GeneratingVelocity,
    NoisingVelocity,
    Teacher,
)
from flowdistill.networks import VelocityNetwork, add_lora
from flowdistill.paths import denoised_to_velocity, interpolate
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_velocity_estimator
from flowdistill.times import TimeSampler, Uniform


@register_velocity_estimator("jvp")
@attrs.define(kw_only=True)
class Jvp(GeneratingVelocity):
    """The exact derivative, by a Jacobian-vector product.

    Attributes:
        graph: let gradients flow through the derivative, as terminal velocity matching does.
    """

    graph: bool = False

    def derivative(
        self,
        student: FlowMap,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        condition: Condition | None,
        *,
        dx: Tensor | None = None,
        dt: float = 0.0,
        ds: float = 0.0,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See `differentiation.jvp`."""
        return differentiation.jvp(student, x, t, s, condition, dx=dx, dt=dt, ds=ds, graph=self.graph)


@register_velocity_estimator("finite_difference")
@attrs.define(kw_only=True)
class FiniteDifference(GeneratingVelocity):
    """The derivative by a finite difference, whose step may shrink during training.

    A step h caps the factor delta dF/d delta by which the identity amplifies the student's own errors, at delta/h:
    early in training a backward difference with a large h is the better teacher, late its bias of O(h) asks for a small
    one.

    Attributes:
        scheme: "backward" (towards shorter durations) or "central".
        h: step in the duration t - s, in (0, 1].
        final_h: step at the end of the annealing; None keeps h.
        anneal: training steps (first, last) between which h goes to ``final_h`` geometrically.
    """

    scheme: Literal["backward", "central"] = attrs.field(default="backward", validator=in_(("backward", "central")))
    h: float = attrs.field(default=0.1, validator=gt(0.0))
    final_h: float | None = attrs.field(default=None, validator=optional(gt(0.0)))
    anneal: tuple[int, int] = (0, 0)

    def step_size(self, step: int) -> float:
        """The step h at a training step."""
        first, last = self.anneal
        if self.final_h is None or step <= first:
            return self.h
        progress = min((step - first) / max(last - first, 1), 1.0)
        return float(self.h ** (1 - progress) * self.final_h**progress)

    def derivative(
        self,
        student: FlowMap,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        condition: Condition | None,
        *,
        dx: Tensor | None = None,
        dt: float = 0.0,
        ds: float = 0.0,
        step: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """See `differentiation.finite_difference`."""
        h = self.step_size(step)
        return differentiation.finite_difference(
            student, x, t, s, condition, dx=dx, dt=dt, ds=ds, h=h, scheme=self.scheme
        )


@register_velocity_estimator("online_network")
@attrs.define(kw_only=True, eq=False, slots=False)
class OnlineNetwork(NoisingVelocity):
    """A velocity network g trained by flow matching on the student's own samples while the student trains.

    It starts as a copy of the teacher's network; for a teacher without one, as the teacher plus a fresh ``network``
    whose output starts at zero.

    Attributes:
        lora_rank: rank of low-rank updates of a frozen copy; 0 trains the whole copy.
        times: law of the noising times on which it is trained.
        network: builds the fresh network for a teacher that has none.
    """

    lora_rank: int = attrs.field(default=0, validator=ge(0))
    times: TimeSampler = attrs.field(factory=Uniform, validator=instance_of(TimeSampler))
    network: Callable[[], VelocityNetwork] | None = attrs.field(default=None, validator=optional(is_callable()))

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Start the online network from the teacher; ConfigError without one."""
        if teacher is None:
            raise ConfigError("online_network starts from a teacher: set train.teacher")
        guidance = getattr(student, "guidance", None)
        network = None if self.network is None else self.network()
        self._model: NetworkFlowMap = from_teacher(
            teacher, conditioning="instantaneous", guidance=guidance, network=network
        )
        if self.lora_rank:
            add_lora(self._model.network, self.lora_rank)

    def modules(self) -> Mapping[str, nn.Module]:
        """The network g."""
        return {"online": self._model}

    def module_loss(self, name: str, samples: Tensor, condition: Condition, *, generator: torch.Generator) -> Tensor:
        """Flow matching on student samples x: mean over elements of (g(x_r, r) - (n - x))^2, shape (B,)."""
        r = self.times.sample(len(samples), generator)
        noise = torch.randn(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)
        velocity = self._model.velocity(interpolate(samples, noise, r), r, condition)
        return (velocity - (noise - samples)).square().flatten(1).mean(1)

    @torch.no_grad()
    def velocity(
        self, x: Tensor, r: Tensor, condition: Condition | None = None, *, samples: Tensor | None = None
    ) -> Tensor:
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
        """Keep the student; ConfigError for one that is anchored at t = 1 and so has no diagonal."""
        if student.anchored:
            raise ConfigError("pseudo_velocity needs a student that is not anchored, such as conditioning = 'two_time'")
        self._student = student

    @torch.no_grad()
    def velocity(
        self, x: Tensor, r: Tensor, condition: Condition | None = None, *, samples: Tensor | None = None
    ) -> Tensor:
        """F(x, r, r)."""
        return self._student.velocity(x, r, condition)


@register_velocity_estimator("minibatch")
@attrs.define(kw_only=True)
class Minibatch(NoisingVelocity):
    """The exact noising velocity of the batch of student samples itself, for small problems and tests.

    For the empirical distribution of samples x_k the posterior of the clean sample is a softmax,

        v_N(x, r) = (x - sum_k p_k x_k) / r,   p_k ~ exp(-|x - (1 - r) x_k|^2 / (2 r^2)),

    over the samples of the same label. It approaches the student's velocity as the batch grows, quickly only in few
    dimensions and at high noise.
    """

    @torch.no_grad()
    def velocity(
        self, x: Tensor, r: Tensor, condition: Condition | None = None, *, samples: Tensor | None = None
    ) -> Tensor:
        """The closed form over ``samples``, for r > 0."""
        if samples is None:
            raise ConfigError("minibatch needs the student samples of the batch")
        flat, points, r = x.flatten(1), samples.flatten(1), r.to(x.dtype)
        distances = (flat[:, None] - (1 - r)[:, None, None] * points).square().sum(-1)
        logits = -distances / (2 * r.square())[:, None]
        if condition is not None and condition.labels is not None:
            logits = logits.masked_fill(condition.labels[:, None] != condition.labels, -torch.inf)
        denoised = (logits.softmax(1) @ points).reshape(x.shape)
        return denoised_to_velocity(x, r, denoised)


@register_velocity_estimator("exact")
@attrs.define(kw_only=True)
class Exact(NoisingVelocity):
    """The velocity of a teacher that describes the student's distribution: for analytic students in tests.

    Attributes:
        distribution: the teacher of the student's samples.
    """

    distribution: Teacher = attrs.field(validator=instance_of(Teacher))

    @torch.no_grad()
    def velocity(
        self, x: Tensor, r: Tensor, condition: Condition | None = None, *, samples: Tensor | None = None
    ) -> Tensor:
        """The marginal velocity of ``distribution``."""
        return self.distribution.velocity(x, r, condition)
