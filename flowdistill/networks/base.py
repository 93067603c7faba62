"""What a network must offer to serve as a teacher's or a student's backbone."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class VelocityNetwork(nn.Module, ABC):
    """A network that predicts velocities in this library's convention: t = 1 noise, u = dx/dt.

    Attributes:
        sample_shape: shape of one sample, without the batch.
        num_classes: number of classes; None for an unconditional network.
        embedding_size: size of the vector that conditions every block.
    """

    sample_shape: tuple[int, ...]
    num_classes: int | None
    embedding_size: int

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, labels: Tensor | None = None, embedding: Tensor | None = None) -> Tensor:
        """The velocity u(x, t), of the shape of x ``(B, *sample_shape)``.

        Args:
            x: states.
            t: times (B,), in [0, 1].
            labels: classes (B,), with NULL_LABEL for none; None is the null label for all.
            embedding: (B, embedding_size), added to the vector that conditions every block; by it students learn of
                durations and guidance scales.
        """
