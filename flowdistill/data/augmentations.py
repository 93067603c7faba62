"""Augmentations of images, which `flowdistill.states.NoisedData` applies before it adds noise."""

from __future__ import annotations

import attrs
import gin
import torch
import torch.nn.functional as F
from attrs.validators import ge, le
from torch import Tensor


@gin.register("random_affine", module="augmentations")
@attrs.frozen(kw_only=True)
class RandomAffine:
    """Random rotation, scaling and translation of images (B, C, H, W)."""

    strength: float = attrs.field(default=0.25, validator=[ge(0.0), le(1.0)])
    """1 rotates by up to 45 degrees, scales by up to a half and shifts by up to half the image."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Transform each image by its own draw."""
        unit = 2 * torch.rand(4, len(images), generator=generator, device=images.device) - 1
        angle, zoom, dx, dy = unit * self.strength * unit.new_tensor([[0.785], [0.5], [0.5], [0.5]])
        cos, sin = torch.cos(angle) * (1 + zoom), torch.sin(angle) * (1 + zoom)
        theta = torch.stack([torch.stack([cos, -sin, dx], -1), torch.stack([sin, cos, dy], -1)], 1)
        grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
