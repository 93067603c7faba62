"""What turns the samples of a model into images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from typing_extensions import Self


class Decoder(ABC):
    """Turns samples, which may be latents, into images.

    Teachers and flow maps carry one; copies of a model share it.
    """

    vae: str | None = None
    """The autoencoder that decodes latents, where there are any."""

    @property
    def ready(self) -> bool:
        """Whether `decode` can be called as things are; False for latents whose autoencoder was not given."""
        return True

    @abstractmethod
    def decode(self, samples: Tensor) -> Tensor:
        """Images (B, C, H, W), float32, of samples ``(B, *sample_shape)``; -1 is black and 1 is white, not clipped."""

    @abstractmethod
    def to_uint8(self, images: Tensor) -> Tensor:
        """Images as the bytes that metrics are computed on, with the rounding of the model's authors."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self
