"""A teacher whose velocity is known exactly."""

import math

import torch

import flowdistill
from flowdistill.teachers.gaussian import GaussianMixtureTeacher


@flowdistill.register_teacher("spiral")
class Spiral(GaussianMixtureTeacher):
    """Round Gaussians on the spiral of Archimedes, at distances from the origin that grow with the angle to 1.5.

    Args:
        modes: how many Gaussians.
        turns: of the spiral.
        std: of each Gaussian.
    """

    def __init__(self, modes: int = 40, turns: float = 1.5, std: float = 0.08) -> None:
        along = torch.linspace(0.15, 1.0, modes)
        angles = 2 * math.pi * turns * along
        super().__init__(1.5 * along[:, None] * torch.stack([angles.cos(), angles.sin()], 1), std**2)
