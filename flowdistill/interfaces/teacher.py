"""The model to be distilled."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from flowdistill.interfaces._counting import Counted, counted
from flowdistill.interfaces.condition import Condition
from flowdistill.interfaces.decoder import Decoder


class Teacher(nn.Module, Counted, ABC):
    """A marginal velocity field u(x, t) = dx/dt of the linear path, t = 1 noise, t = 0 data.

    Subclasses set ``sample_shape`` and, if class-conditional, ``num_classes``, and implement
    `velocity` on all of t in [0, 1].
    A teacher stays in evaluation mode.
    The trainer freezes its parameters, so that gradients flow only to an ``x`` that asks for them.

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
    """The shape of one sample, without the batch."""
    num_classes: int | None = None
    """The number of classes; None for an unconditional teacher."""
    decoder: Decoder | None = None
    """Turns samples into images; None if the samples themselves are shown."""
    takes_guidance: bool = False
    """Whether the velocity follows the guidance of its condition."""
    suffixes: ClassVar[tuple[str, ...]] = ()
    """The suffixes of other people's files that a teacher reads from its argument ``checkpoint``."""
    citation: ClassVar[str] = ""
    """The BibTeX of its papers."""

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

    @property
    def backbone(self) -> nn.Module | None:
        """The network that is this velocity and that a student may copy; None if there is none."""
        return None

    @property
    def has_null_label(self) -> bool:
        """Whether a conditional teacher has a velocity without a class, as classifier-free guidance needs."""
        return getattr(self.backbone, "has_null_label", True)

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


class ExactTeacher(Teacher):
    """A teacher whose data distribution is known: the truth that samples can be compared with."""

    @abstractmethod
    def sample_data(
        self, n: int, generator: torch.Generator | None = None, condition: Condition | None = None
    ) -> Tensor:
        """Draw ``n`` samples of the data distribution, ``(n, *sample_shape)``, of the condition's labels if any."""

    @property
    def modes(self) -> tuple[Tensor, float] | None:
        """The centres (K, D) of a mixture of equal weights, and the radius that counts as near; None for others."""
        return None
