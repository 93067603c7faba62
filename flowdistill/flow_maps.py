"""Students: networks made into flow maps."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from flowdistill.interfaces import Condition, Decoder, FlowMap, Jumps, Teacher
from flowdistill.interfaces._counting import count
from flowdistill.networks import ScalarEmbedding, VelocityNetwork
from flowdistill.paths import expand_time
from flowdistill.plumbing.dry import placed
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.fields import short
from flowdistill.plumbing.registry import register_flow_map
from flowdistill.solvers import Solver

Conditioning = Literal["two_time", "end_time", "anchored", "to_data", "decoupled", "expanded", "instantaneous"]
GuidanceInput = Literal["scale", "inverse", "one_minus_inverse", "null_label"]

_JUMPS = {
    "two_time": Jumps.ANY,
    "end_time": Jumps.ANY,
    "anchored": Jumps.FROM_NOISE,
    "to_data": Jumps.TO_DATA,
    "decoupled": Jumps.ANY,
    "expanded": Jumps.TO_DATA,
    "instantaneous": Jumps.NONE,
}
_NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "scale": lambda scale: scale,
    "inverse": lambda scale: 1 / scale,
    "one_minus_inverse": lambda scale: 1 - 1 / scale,
}


@register_flow_map("network")
class NetworkFlowMap(FlowMap):
    """A velocity network made into a flow map by new embeddings of the duration and the guidance scale.

        F(x, t, s) = network(x, t; e_duration(t - s) + e_guidance(gamma))

    The network's own time slot sees t, and the new embeddings, added to the vector that conditions its blocks, start
    at zero. So a network that is a velocity field starts as F(x, t, s) = u(x, t), which is exact on the diagonal.

    Decoupled conditioning (Lee et al. 2025, Decoupled MeanFlow, arXiv 2510.24474) has no embedding of the duration: the
    early blocks see t and the late ones s, so that a velocity field is a flow map with F(x, t, t) = u(x, t) as it
    stands.

    Expanded conditioning (Peng et al. 2025, FACM, arXiv 2507.03738) is for maps to s = 0 alone. The sign of the time
    that the network sees tells them from the velocity: t for F(x, t, t), -t for F(x, t, 0), which meet at t = 0. The
    network must do no more with its time than to embed it.

    A guidance scale is embedded, as a number that ``guidance_input`` names. "null_label" embeds nothing: it guides at
    each evaluation by a second one without the label, which no training with scales needs,

        F = F_null + gamma (F - F_null)   where t lies in the condition's interval, and F elsewhere.

    Args:
        network: the backbone.
        conditioning: "two_time" for all s <= t; "end_time" for the same with an embedding of s in place of t - s;
            "anchored" for t = 1 alone, as FreeFlow trains it; "decoupled" for all s <= t without new parameters;
            "to_data" for s = 0 (and s = t), as consistency models are trained; "expanded" for these without new
            parameters; "instantaneous" for a plain velocity field, which ignores s.
        guidance: makes the map take guidance scales, and is the scale of samples that name none; None is a map
            without guidance input.
        early_blocks: blocks that see t under "decoupled"; None is the network's own choice: two thirds of a
            transformer, the encoder of a U-Net.
        decoder: turns samples into images.
        guidance_input: the number that is embedded: "scale" gamma, "inverse" 1/gamma, "one_minus_inverse"
            1 - 1/gamma; or "null_label".
        guidance_range: (low, high), from which the number is brought to (0, 1) before it is embedded.
        guidance_output: multiply the network's output by gamma.
        start: the first time of samples, where the state is taken to be noise alone.
        shift: of the times of several steps, see `flowdistill.paths.shifted`.
    """

    def __init__(
        self,
        network: VelocityNetwork,
        conditioning: Conditioning = "two_time",
        guidance: float | None = None,
        early_blocks: int | None = None,
        decoder: Decoder | None = None,
        guidance_input: GuidanceInput = "scale",
        guidance_range: tuple[float, float] = (0.0, 1.0),
        guidance_output: bool = False,
        start: float = 1.0,
        shift: float = 1.0,
    ) -> None:
        super().__init__()
        if conditioning not in get_args(Conditioning):
            raise ConfigError(f"conditioning must be one of {get_args(Conditioning)}, not {conditioning!r}")
        if guidance_input not in get_args(GuidanceInput):
            raise ConfigError(f"guidance_input must be one of {get_args(GuidanceInput)}, not {guidance_input!r}")
        if not (guidance_range[0] < guidance_range[1] and 0 < start <= 1 and shift > 0):
            raise ConfigError("guidance_range is (low, high) with low < high, start in (0, 1], and shift positive")
        if guidance is not None and guidance_input == "null_label" and not (network.num_classes and network.null_label):
            raise ConfigError("guidance_input = 'null_label' needs a network of classes, with a null label")
        if early_blocks is not None and conditioning != "decoupled":
            raise ConfigError("early_blocks belongs to conditioning = 'decoupled'")
        if conditioning == "expanded" and not network.only_embeds_time:
            raise ConfigError(
                f"conditioning = 'expanded' is not for {type(network).__name__}, which scales inputs and outputs "
                "by the time"
            )
        self.network, self.guidance, self.decoder = network, guidance, decoder
        self.sample_shape, self.num_classes = network.sample_shape, network.num_classes
        self.conditioning, self.jumps = conditioning, _JUMPS[conditioning]
        size = network.embedding_size
        if early_blocks is not None:
            network.early_blocks = early_blocks
        has_second = conditioning in ("two_time", "end_time", "anchored", "to_data")
        self.duration_embedding = ScalarEmbedding(size, zero_init=True) if has_second else None
        embeds_guidance = guidance is not None and guidance_input != "null_label"
        self.guidance_embedding = ScalarEmbedding(size, zero_init=True) if embeds_guidance else None
        self.guidance_input, self.guidance_range = guidance_input, guidance_range
        self.guidance_output = guidance_output
        self.first_time, self.time_shift = start, shift

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """F(x, t, s)."""
        condition = Condition() if condition is None else condition
        if self.guidance is None:
            return self._conditioned(x, t, s, condition.labels, None)
        scale = condition.scale
        scale = torch.full_like(t, self.guidance) if scale is None else scale
        if self.guidance_input != "null_label":
            output = self._conditioned(x, t, s, condition.labels, scale)
            return expand_time(scale, x) * output if self.guidance_output else output
        if condition.labels is None or (self.guidance == 1.0 and condition.scale is None):
            return self._conditioned(x, t, s, condition.labels, None)
        count(self, x)  # beside those that are counted
        both = torch.cat([condition.labels, condition.unlabelled().labels])  # type: ignore[list-item]
        twice = [torch.cat([value, value]) for value in (x, t, s)]
        output = self._conditioned(twice[0], twice[1], twice[2], both, None)
        strong, weak = output[: x.shape[0]], output[x.shape[0] :]  # len would fix the batch of an exported program
        low, high = (condition.guidance and condition.guidance.interval) or (0.0, 1.0)
        excess = torch.where((t >= low) & (t <= high), scale.to(t.dtype) - 1, torch.zeros_like(t))
        guided: Tensor = strong + expand_time(excess, x) * (strong - weak)
        return guided

    def _conditioned(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None, scale: Tensor | None) -> Tensor:
        """The network's output, with embeddings of what it is to know beside the time and the label."""
        embedding: Tensor | None = None
        if self.duration_embedding is not None:
            end = self.conditioning == "end_time"
            duration = t - s if self.network.time_factor == 1.0 else self.network.time_factor * (t - s)
            embedding = self.duration_embedding(self.network.own_time(s) if end else duration)
        if self.guidance_embedding is not None and scale is not None:
            low, high = self.guidance_range
            guided = self.guidance_embedding((_NUMBERS[self.guidance_input](scale) - low) / (high - low))
            embedding = guided if embedding is None else embedding + guided
        time = torch.where(s < t, -t, t) if self.conditioning == "expanded" else t
        return self.network.velocity(x, time, labels, embedding, s if self.conditioning == "decoupled" else None)

    def built_by(self) -> tuple[str, dict[str, Any]]:
        """Its own arguments."""
        return "network", {
            "network": self.network,
            "conditioning": self.conditioning,
            "guidance": self.guidance,
            "early_blocks": self.network.early_blocks if self.conditioning == "decoupled" else None,
            "decoder": self.decoder,
            "guidance_input": self.guidance_input,
            "guidance_range": self.guidance_range,
            "guidance_output": self.guidance_output,
            "start": self.first_time,
            "shift": self.time_shift,
        }

    @property
    def backbone(self) -> nn.Module | None:
        """The network, if no further embedding is added to it."""
        plain = self.duration_embedding is None and self.guidance_embedding is None
        return self.network if plain else None


class SolvedTeacher(FlowMap):
    """A teacher's sampler as the one jump from noise to data, so that teachers are measured as students are.

        F(x, 1, 0) = x - solve(x)

    States are in float64. A stochastic solver draws for each sample from a generator whose seed is a hash of its noise.
    So neither the batch nor the device changes a sample, up to rounding.

    Args:
        teacher: the teacher, guided as it is to be sampled.
        solver: see `flowdistill.solvers`.

    Examples:
        >>> from flowdistill import load_teacher
        >>> from flowdistill.solvers import Euler
        >>> sampler = SolvedTeacher(load_teacher("ring"), Euler(steps=4))
        >>> sampler.sample(torch.randn(3, 2)).shape, sampler.evaluations
        (torch.Size([3, 2]), 12)
    """

    jumps = Jumps.ONE_STEP

    def __init__(self, teacher: Teacher, solver: Solver) -> None:
        super().__init__()
        self.teacher, self.solver = teacher, solver
        self.sampler = repr(solver)  # by which stored samples are known
        self.sample_shape, self.num_classes, self.decoder = teacher.sample_shape, teacher.num_classes, teacher.decoder

    @property
    def evaluations(self) -> int:
        """Those of the teacher."""
        return self.teacher.evaluations

    @torch.no_grad()
    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """F(x, 1, 0); other times are not asked for."""
        digests = [hashlib.sha256(row.tobytes()).digest() for row in x.cpu().numpy()]
        own = [torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")) for digest in digests]
        return x - self.solver.solve(self.teacher, x.double(), condition, generator=own).to(x.dtype)


class _ResidualNetwork(VelocityNetwork):
    """A fixed teacher plus a network: lets a student of a teacher without a network start as that teacher."""

    def __init__(self, teacher: Teacher, network: VelocityNetwork) -> None:
        super().__init__()
        self.teacher = teacher
        self.network = network
        self.sample_shape, self.num_classes = network.sample_shape, network.num_classes
        self.embedding_size, self.only_embeds_time = network.embedding_size, network.only_embeds_time
        self.null_label = teacher.null_label and network.null_label

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        embedding: Tensor | None = None,
        late_time: Tensor | None = None,
    ) -> Tensor:
        condition = None if labels is None else Condition(labels)
        base = self.teacher.velocity(x, t.abs(), condition)  # expanded conditioning gives -t for t
        return base + self.network.velocity(x, t, labels, embedding, late_time)


@register_flow_map("from_teacher")
def from_teacher(
    teacher: Teacher,
    conditioning: Conditioning = "two_time",
    guidance: float | None = None,
    network: VelocityNetwork | None = None,
    early_blocks: int | None = None,
) -> NetworkFlowMap:
    """A student that starts as its teacher: F(x, t, t) = u(x, t), without guidance; in evaluation mode.

    In a gin file it is named without parentheses, ``train.flow_map = @from_teacher``; the trainer calls it with the
    teacher.

    Args:
        teacher: the teacher; where it has a network, the student's is a trainable copy of it.
        conditioning: see `NetworkFlowMap`.
        guidance: see `NetworkFlowMap`.
        network: for a teacher without a network, such as an exact one, a fresh network whose output starts at zero; the
            student is the teacher plus this network.
        early_blocks: see `NetworkFlowMap`.

    Raises:
        ConfigError: a teacher without a network, and no network given.

    Examples:
        >>> from flowdistill import load_teacher
        >>> teacher = load_teacher("digits_teacher")
        >>> student = from_teacher(teacher, "anchored")
        >>> z, one, zero = teacher.sample_prior(4), torch.ones(4), torch.zeros(4)
        >>> torch.allclose(student.average_velocity(z, one, zero), teacher.velocity(z, one), atol=1e-5)
        True
    """
    own = teacher.backbone
    if own is not None:
        network = cast("VelocityNetwork", copy.deepcopy(own).requires_grad_(True))
    elif network is None:
        raise ConfigError(
            f"{type(teacher).__name__} has no network that is its velocity and can be copied: give from_teacher a "
            "network, such as @mlp()"
        )
    elif network.sample_shape != teacher.sample_shape:
        raise ConfigError(
            f"the network's samples have shape {network.sample_shape}, the teacher's {teacher.sample_shape}"
        )
    else:
        network = _ResidualNetwork(copy.deepcopy(teacher).requires_grad_(False), network)
    student = NetworkFlowMap(network, conditioning, guidance, early_blocks, teacher.decoder)
    return placed(student, teacher.device).eval()


def build_flow_map(flow_map: FlowMap | Callable[[Teacher | None], FlowMap], teacher: Teacher | None) -> FlowMap:
    """The student that ``train.flow_map`` describes; ConfigError if it does not fit the teacher."""
    if not isinstance(flow_map, FlowMap) and not callable(flow_map):
        raise ConfigError(f"train.flow_map must be a flow map or build one, not {short(flow_map)}")
    student = flow_map if isinstance(flow_map, FlowMap) else flow_map(teacher)
    if not isinstance(student, FlowMap):
        raise ConfigError(f"train.flow_map must build a flow map, not {short(student)}")
    if teacher is not None:
        for name, ours, theirs in (
            ("sample_shape", student.sample_shape, teacher.sample_shape),
            ("num_classes", student.num_classes, teacher.num_classes),
        ):
            if ours != theirs:
                raise ConfigError(f"{name} of the student is {ours}, of the teacher {theirs}")
    return student
