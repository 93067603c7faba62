"""What a network must offer to serve as a teacher's or a student's backbone."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.networks.compilation import Compilable, compilable
from flowdistill.networks.linear import Linear
from flowdistill.plumbing.dry import weights
from flowdistill.plumbing.errors import ConfigError


class VelocityNetwork(nn.Module, Compilable, ABC):
    """A network that predicts velocities in this library's convention: t = 1 noise, u = dx/dt."""

    sample_shape: tuple[int, ...]
    """The shape of one sample, without the batch."""
    num_classes: int | None
    """The number of classes; None for an unconditional network."""
    null_label: bool = True
    """Whether a conditional network has a velocity without a class, as classifier-free guidance needs."""
    embedding_size: int
    """The size of the vector that conditions every block."""
    early_blocks: int
    """How many of the blocks see t when ``late_time`` is given."""
    only_embeds_time: bool = True
    """Whether the time conditions blocks alone, and scales neither inputs nor outputs."""
    time_factor: float = 1.0
    """The factor of times and durations before they are embedded."""
    arguments: dict[str, Any]
    """The arguments with which the network was built, defaults included; they build it again."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        init = cls.__init__

        @functools.wraps(init)
        def recording(self: VelocityNetwork, *args: Any, **kwargs: Any) -> None:
            with weights():
                init(self, *args, **kwargs)
            if type(self) is cls:
                bound = inspect.signature(init).bind(self, *args, **kwargs)
                bound.apply_defaults()
                self.arguments = dict(list(bound.arguments.items())[1:])

        cls.__init__ = recording  # type: ignore[method-assign, assignment]
        if "velocity" in cls.__dict__:
            cls.velocity = compilable(cls.velocity)  # type: ignore[method-assign]

    @abstractmethod
    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        embedding: Tensor | None = None,
        late_time: Tensor | None = None,
    ) -> Tensor:
        """The velocity u(x, t), of the shape of x ``(B, *sample_shape)``.

        Args:
            x: states.
            t: times (B,), in [0, 1].
            labels: classes (B,), with NULL_LABEL for none; None is the null label for all.
            embedding: (B, embedding_size), added to the vector that conditions every block; by it students learn of
                durations and guidance scales.
            late_time: times (B,) that the blocks after the first ``early_blocks`` see in place of t; None is t.
        """

    @property
    def layer_modules(self) -> Sequence[nn.Module]:
        """The modules that hold most of the weights and are called one after another; a network may name none.

        They are what processes share out for themselves, and whose activations may be computed again.
        """
        return ()

    def own_time(self, t: Tensor) -> Tensor:
        """What the network embeds of a time (B,): a network of others may count from the data, or in thousandths."""
        return t if self.time_factor == 1.0 else self.time_factor * t

    def widen_output(self, velocities: int, extra: int = 0) -> None:
        """Replace the output layer, such that `velocity` gives several velocities and further channels.

        For samples (C, ...) the output becomes ``(B, velocities * C + extra, ...)``. Every velocity starts as the
        present one, and the further channels at 0. It can be done once, and ``arguments`` do not tell of it.

        Raises:
            ConfigError: the network has no output layer of its own.
        """
        raise ConfigError(f"{type(self).__name__} has no output layer that could be widened")


def widened(layer: nn.Linear, channels: int, kept: int, copies: int, extra: int) -> Linear:
    """A layer that repeats the outputs of another.

    Of each group of ``channels`` outputs it has the first ``kept``, ``copies`` times, and then ``extra`` outputs of 0.
    """

    def rows(values: Tensor) -> Tensor:
        groups = values.detach().reshape(-1, channels, values[0].numel())[:, :kept].repeat(1, copies, 1)
        return F.pad(groups, (0, 0, 0, extra)).reshape(-1, *values.shape[1:])

    weight, bias = rows(layer.weight), rows(layer.bias)
    wide = Linear(layer.in_features, len(weight), device=weight.device, dtype=weight.dtype)
    wide.weight.data.copy_(weight)
    wide.bias.data.copy_(bias)
    return wide


def check_sizes(**sizes: int | None) -> None:
    """ConfigError unless all sizes that are given are possible, and no slips of the pen, which would run for years."""
    for name, size in sizes.items():
        least, most = _RANGES.get(name, (1, 100_000))
        if size is not None and not least <= size <= most:
            raise ConfigError(f"{name} must be from {least} to {most}, not {size}")


_RANGES = {"depth": (0, 1000), "num_blocks": (1, 1000), "num_classes": (0, 100_000)}
