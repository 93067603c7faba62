"""Mixtures in the plane that everybody draws."""

from __future__ import annotations

import math

import torch

from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_teacher
from flowdistill.teachers.gaussian.mixture import GaussianMixtureTeacher


@register_teacher("ring")
class Ring(GaussianMixtureTeacher):
    """Equal round Gaussians on a circle.

    Args:
        modes: how many.
        radius: of the circle.
        std: of each Gaussian.
        labelled: give each mode a class of its own.
    """

    def __init__(self, modes: int = 8, radius: float = 1.0, std: float = 0.08, labelled: bool = False) -> None:
        if modes < 1:
            raise ConfigError(f"modes must be at least 1, not {modes}")
        angles = torch.arange(modes) * (2 * math.pi / modes)
        means = radius * torch.stack([angles.cos(), angles.sin()], 1)
        super().__init__(means, std**2, labels=list(range(modes)) if labelled else None)


@register_teacher("checkerboard")
class Checkerboard(GaussianMixtureTeacher):
    """The dark squares of a 4x4 board on [-2, 2]^2, each an even grid of 5x5 Gaussians.

    Args:
        std: of each Gaussian; the squares have side 1, so it blurs their edges.
    """

    def __init__(self, std: float = 0.1) -> None:
        grid = (torch.arange(5) + 0.5) / 5
        inner = torch.cartesian_prod(grid, grid)
        squares = [(i - 2, j - 2) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
        super().__init__(torch.cat([torch.tensor(corner) + inner for corner in squares]), std**2)


@register_teacher("two_moons")
class TwoMoons(GaussianMixtureTeacher):
    """Two interleaved half circles of radius 1.5, each 24 Gaussians; the class is the moon.

    Args:
        std: of each Gaussian.
    """

    def __init__(self, std: float = 0.1) -> None:
        angles = torch.linspace(0, math.pi, 24)
        upper = torch.stack([angles.cos() - 0.5, angles.sin() - 0.25], 1)
        super().__init__(1.5 * torch.cat([upper, -upper]), std**2, labels=[0] * 24 + [1] * 24)


@register_teacher("pinwheel")
class Pinwheel(GaussianMixtureTeacher):
    """Bent arms around the origin, each a chain of elongated Gaussians; the class is the arm.

    Args:
        arms: how many.
    """

    def __init__(self, arms: int = 5) -> None:
        if arms < 1:
            raise ConfigError(f"arms must be at least 1, not {arms}")
        per_arm = 8
        radius = torch.linspace(0.5, 2.4, per_arm).repeat(arms)
        arm = torch.arange(arms).repeat_interleave(per_arm)
        angle = 2 * math.pi * arm / arms + 0.35 * radius
        outward = torch.stack([angle.cos(), angle.sin()], 1)
        across = torch.stack([-angle.sin(), angle.cos()], 1)
        along = outward + 0.35 * radius[:, None] * across  # the tangent of the bent arm
        along = along / along.norm(dim=1, keepdim=True)
        normal = torch.stack([-along[:, 1], along[:, 0]], 1)
        covariance = 0.15**2 * along[:, :, None] * along[:, None] + 0.07**2 * normal[:, :, None] * normal[:, None]
        super().__init__(radius[:, None] * outward, covariance, labels=arm)
