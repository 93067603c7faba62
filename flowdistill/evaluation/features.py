"""Feature extractors trained by this library, and the stored features of real data."""

from __future__ import annotations

import functools
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.registry import unknown_name

WEIGHTS = Path(__file__).parent / "weights"


class DigitClassifier(nn.Module):
    """A classifier of handwritten digits: three convolutions and two linear layers, between which lie the 64 features.

    Features are multiplied by ``scale``, chosen when the network was trained such that two sets of real digits are at
    the Frechet distance that its card names.

    Args:
        size: height and width of the images.
    """

    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.SiLU(),
        )
        self.features = nn.Linear(64 * (size // 4) ** 2, 64)
        self.head = nn.Linear(64, 10)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, 10) of images (B, 1, size, size) in [-1, 1]."""
        hidden = self.features(self.convolutions(images).flatten(1))
        return hidden * self.scale, self.head(F.silu(hidden))


_EXTRACTORS = {"digits": 8, "mnist": 28}  # sizes of the images


@functools.cache
def load_features(name: str) -> nn.Module:
    """A trained feature extractor, which maps images to (features, logits).

    Raises:
        ConfigError: an unknown name; the nearest are listed.
    """
    if name not in _EXTRACTORS:
        raise unknown_name("feature extractor", name, list(_EXTRACTORS))
    network = DigitClassifier(_EXTRACTORS[name])
    tensors = safetensors.torch.load_file(WEIGHTS / f"{name}.safetensors")
    network.load_state_dict({key: tensors[key] for key in network.state_dict()})
    return network.eval().requires_grad_(False)


def load_reference(name: str) -> Tensor:
    """The stored features (N, D) of the real data that an extractor belongs to, float32: no data set is read.

    Raises:
        ConfigError: an unknown name; the nearest are listed.
    """
    if name not in _EXTRACTORS:
        raise unknown_name("feature extractor", name, list(_EXTRACTORS))
    return safetensors.torch.load_file(WEIGHTS / f"{name}.safetensors")["reference"].float()
