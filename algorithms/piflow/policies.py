"""Policies: velocity fields in closed form, whose parameters a network gives in one evaluation.

A network that is evaluated at a state x_src at time t_src gives the parameters; the policy is then the velocity at any
state x and time t <= t_src, without the network. Both policies here predict the denoised sample x_0 and have the
velocity (x - x_0)/t. Parameters are in the space of velocities: an output v stands for the denoised x_src - t_src v.
"""

from __future__ import annotations

import functools
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import gin
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from flowdistill.interfaces import Condition
from flowdistill.networks import LabelEmbedding, ScalarEmbedding
from flowdistill.paths import expand_time, shifted, velocity_to_denoised
from flowdistill.plumbing.errors import ConfigError


class Policy(ABC):
    """A velocity field for each sample of a batch."""

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt at x (B, ...) and times t (B,), at most those at which the network was evaluated."""

    def dropout(self, rate: float, generator: torch.Generator) -> Self:
        """The field without some of its parts, for training; by default it has no parts."""
        return self


@attrs.frozen(eq=False)
class DXPolicy(Policy):
    """Denoised samples at times from ``end`` to ``t_src``, linear in between.

    The times are evenly spaced before their shift. Later and earlier the outermost sample holds.
    """

    x_src: Tensor
    """The states (B, ...) at which the network was evaluated."""
    t_src: Tensor
    """The times (B,) of these states."""
    end: Tensor
    """The earliest times (B,)."""
    outputs: Tensor
    """The velocities (B, N, ...), N >= 2, the first at ``end``, the last at ``t_src``."""
    shift: float = 1.0
    """The shift of the times, see `shifted`."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """(x - x_0(t))/t."""
        first, last, now = (shifted(time, 1 / self.shift) for time in (self.end, self.t_src, t))
        intervals = self.outputs.shape[1] - 1
        place = intervals * ((now - first) / (last - first).clamp_min(1e-6)).clamp(0, 1)
        nodes = torch.arange(intervals + 1, device=t.device)
        weights = F.relu(1 - (place[:, None] - nodes).abs()).to(x.dtype)
        output = (weights.reshape(*weights.shape, *[1] * (x.ndim - 1)) * self.outputs).sum(1)
        denoised = velocity_to_denoised(self.x_src, self.t_src, output)
        return (x - denoised) / expand_time(t.clamp_min(1e-4), x)


@attrs.frozen(eq=False)
class GMFlowPolicy(Policy):
    """The velocity of a Gaussian mixture of denoised samples, each position having a mixture of its own.

    Given x_src the denoised sample is taken to be a mixture of K Gaussians with means mu_k = x_src - t_src v_k,
    weights w_k and the standard deviation S = t_src e^``log_std``. Given x as well, for a = 1 - t, a' = 1 - t_src and
    q = t/t_src its posterior has

        nu = a x - a' q^2 x_src,   zeta = a^2 - a'^2 q^2,   d = S^2 zeta + t^2,
        x_0k = (S^2 nu + t^2 mu_k)/d,   log w'_k = log w_k + mu_k (nu - zeta mu_k/2)/d,

    and the velocity is (x - sum_k w'_k x_0k)/t (GMFlow, Chen et al. 2025, arXiv 2504.05304). Here it is computed in a
    form that divides by d alone, and so goes on to t = 0:

        [S^2 (-a x + t/t_src^2 a' (x_src - a' x)) + t (x - sum_k w'_k mu_k)]/d.

    If the data are a mixture of Gaussians of one variance, some v_k, w_k and S give the exact velocity at all x and t.
    """

    x_src: Tensor
    """The states (B, C, ...) at which the network was evaluated."""
    t_src: Tensor
    """The times (B,) of these states."""
    outputs: Tensor
    """The velocities v_k, (B, K, C, ...)."""
    logits: Tensor
    """The logarithms of the weights w_k up to a constant, (B, K, 1, ...), for each position."""
    log_std: Tensor
    """The logarithm of S/t_src, (B,)."""

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The closed form above; sums over the channels are elementwise, lest autocast turn them into bf16."""
        t, t_src = expand_time(t, x), expand_time(self.t_src.clamp_min(1e-4), x)
        variance = t_src.square() * (2 * expand_time(self.log_std, x)).exp()
        a, a_src, q2 = 1 - t, 1 - t_src, (t / t_src).square()
        nu, zeta = a * x - a_src * q2 * self.x_src, a.square() - a_src.square() * q2
        d = variance * zeta + t.square()
        means = self.x_src[:, None] - t_src[:, None] * self.outputs
        exponent = (means * (nu[:, None] - zeta[:, None] * means / 2)).sum(2, keepdim=True)
        weights = (self.logits + exponent / d[:, None]).softmax(1)
        known = -a * x + t / t_src.square() * a_src * (self.x_src - a_src * x)
        return (variance * known + t * (x - (weights * means).sum(1))) / d

    def dropout(self, rate: float, generator: torch.Generator) -> Self:
        """Without each component with probability ``rate``, the same at all positions; one always stays."""
        if not rate:
            return self
        unit = torch.rand(self.logits.shape[:2], generator=generator, device=generator.device)
        dropped = (unit < rate) & (unit < unit.amax(1, keepdim=True))
        mask = dropped.reshape(*dropped.shape, *[1] * (self.logits.ndim - 2))
        return attrs.evolve(self, logits=self.logits.masked_fill(mask, -math.inf))


class PolicyHead(nn.Module, ABC):
    """Makes the wide output of a network into a policy."""

    velocities: int
    """The velocities that the network must give."""
    extra: int = 0
    """The further channels that it must give."""

    def built_by(self) -> dict[str, Any]:
        """Its name and the arguments that build it again, as `head_of` takes them; ConfigError if it has none."""
        raise ConfigError(f"a {type(self).__name__} does not tell what builds it: its class lacks built_by")

    @abstractmethod
    def forward(self, outputs: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, ...]:
        """The numbers of the policies, from the network's outputs (B, ...) at times t (B,), and in their dtype."""

    @abstractmethod
    def policy(self, x: Tensor, t: Tensor, end: Tensor, numbers: tuple[Tensor, ...], shift: float) -> Policy:
        """The policy of a segment from ``t`` to ``end`` (B,) that starts at x (B, C, ...), by its numbers."""


@gin.register("dx", module="policies")
class DXHead(PolicyHead):
    """The head of `DXPolicy`: one velocity for each of its times.

    Args:
        sample_shape: of the network.
        num_classes: of the network.
        points: N, how many times.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int | None, points: int = 10) -> None:
        super().__init__()
        if points < 2:
            raise ConfigError(f"dx.points must be at least 2, not {points}")
        self.velocities = points

    def built_by(self) -> dict[str, Any]:
        """See `PolicyHead.built_by`."""
        return {"head": "dx", "points": self.velocities}

    def forward(self, outputs: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, ...]:
        """The velocities (B, N, C, ...)."""
        return (outputs.reshape(len(outputs), self.velocities, -1, *outputs.shape[2:]),)

    def policy(self, x: Tensor, t: Tensor, end: Tensor, numbers: tuple[Tensor, ...], shift: float) -> Policy:
        """See `PolicyHead.policy`."""
        (velocities,) = numbers
        return DXPolicy(x, t, end, velocities, shift)


@gin.register("gmflow", module="policies")
class GMFlowHead(PolicyHead):
    """The head of `GMFlowPolicy`: a velocity and a logit for each component.

    The logarithm of the standard deviation, which starts as that of 0.05, comes from the time and the label alone. A
    constant that is added to each component's velocity starts as a draw of N(0, 0.05^2): with equal components all
    gradients would be equal.

    Args:
        sample_shape: of the network.
        num_classes: of the network.
        components: K.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_classes: int | None, components: int = 32) -> None:
        super().__init__()
        if components < 1:
            raise ConfigError(f"gmflow.components must be at least 1, not {components}")
        self.velocities = self.extra = components
        channels, *positions = sample_shape
        self.offset = nn.Parameter(0.05 * torch.randn(components, channels, *[1] * len(positions)))
        self.time_embedding, self.time_factor = ScalarEmbedding(64), 1.0
        self.label_embedding = None if num_classes is None else LabelEmbedding(num_classes, 64)
        last = nn.Linear(64, 1)
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(0.05))
        self.log_std: nn.Module = last

    def built_by(self) -> dict[str, Any]:
        """See `PolicyHead.built_by`."""
        return {"head": "gmflow", "components": self.velocities}

    def forward(self, outputs: Tensor, t: Tensor, condition: Condition | None) -> tuple[Tensor, ...]:
        """The velocities (B, K, C, ...), the logits (B, K, 1, ...), and the logarithm of the deviation (B,)."""
        offset = self.offset.to(outputs.dtype)
        count = self.velocities * offset.shape[1]
        velocities = outputs[:, :count].reshape(len(outputs), self.velocities, -1, *outputs.shape[2:]) + offset
        hidden = self.time_embedding(self.time_factor * t)
        if self.label_embedding is not None:
            labels = None if condition is None else condition.labels
            if labels is None:
                labels = torch.full((len(t),), self.label_embedding.num_classes, device=t.device)
            hidden = hidden + self.label_embedding(labels)
        log_std = self.log_std(F.silu(hidden))[:, 0].to(outputs.dtype)
        return velocities, outputs[:, count:].unsqueeze(2), log_std

    def policy(self, x: Tensor, t: Tensor, end: Tensor, numbers: tuple[Tensor, ...], shift: float) -> Policy:
        """See `PolicyHead.policy`."""
        velocities, logits, log_std = numbers
        return GMFlowPolicy(x, t, velocities, logits, log_std)


def head_of(description: Mapping[str, Any]) -> Callable[[tuple[int, ...], int | None], PolicyHead]:
    """The builder of a head by what `PolicyHead.built_by` says of it; ConfigError if it says something else."""
    known: dict[Any, type[PolicyHead]] = {"dx": DXHead, "gmflow": GMFlowHead}
    name, arguments = description.get("head"), {key: v for key, v in description.items() if key != "head"}
    if name not in known or not inspect.signature(known[name]).parameters.keys() >= arguments.keys():
        raise ConfigError(
            f"a policy's head is described as in {{'head': 'gmflow', 'components': 32}}, not {description}"
        )
    return functools.partial(known[name], **arguments)
