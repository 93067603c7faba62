"""The model to be distilled."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from flowdistill.interfaces._counting import counted
from flowdistill.interfaces.condition import Condition
from flowdistill.interfaces.decoder import Decoder


class Teacher(nn.Module, ABC):
    """A marginal velocity field u(x, t) = dx/dt of the linear path, t = 1 noise, t = 0 data.

    Subclasses set ``sample_shape`` and, if class-conditional, ``num_classes``, and implement
    `velocity` on all of t in [0, 1]. A teacher stays in evaluation mode; gradients flow only to an
    ``x`` that asks for them once its parameters are frozen, as the trainer does.

    Attributes:
        sample_shape: shape of one sample, without the batch.
        num_classes: number of classes; None for an unconditional teacher.
        decoder: turns samples into images; None where the samples themselves are shown.

    Examples:
        >>> class Straight(Teacher):  # all data at the origin: x_t = t n, u = x / t at t > 0
        ...     sample_shape = (2,)
        ...     def velocity(self, x, t, condition=None):
        ...         return x / t[:, None].clamp_min(1e-6)
        >>> teacher = Straight()
        >>> teacher.velocity(torch.ones(3, 2), torch.ones(3)).shape, teacher.evaluations
        (torch.Size([3, 2]), 3)
    """

    sample_shape: tuple[int, ...]
    num_classes: int | None = None
    decoder: Decoder | None = None
    _evaluations: int = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "velocity" in cls.__dict__:
            cls.velocity = counted(cls.velocity)  # type: ignore[method-assign]

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The velocity u(x, t), of the shape of x, for x ``(B, *sample_shape)`` and t (B,) in [0, 1]."""

    def forward(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The same as `velocity`."""
        return self.velocity(x, t, condition)

    def held(self, t: Tensor) -> Teacher:
        """This teacher with what it decides by the time, such as whether to guide, decided by t (B,) for good."""
        return self

    @property
    def evaluations(self) -> int:
        """Evaluations of a network (or closed form) so far, counted per sample."""
        return self._evaluations

    @property
    def device(self) -> torch.device:
        """Where the parameters and buffers lie; the CPU for a teacher without any."""
        tensor = next(itertools.chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the samples: float64 for a float64 teacher, float32 for all others."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return torch.float64 if any(v.dtype == torch.float64 for v in tensors) else torch.float32

    def sample_prior(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` standard normal noises of shape ``(n, *sample_shape)``."""
        shape = (n, *self.sample_shape)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode whatever is asked: a teacher is never trained."""
        return super().train(False)
