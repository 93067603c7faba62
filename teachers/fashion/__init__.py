"""A trained teacher of Fashion-MNIST; ``card.md`` beside it says how it was made and how good it is."""

from __future__ import annotations

from pathlib import Path

from flowdistill.plumbing.registry import register_teacher
from flowdistill.runs.pretrained import load_model
from flowdistill.wrapped_teachers import NetworkTeacher


@register_teacher("fashion_sit")
def fashion_sit() -> NetworkTeacher:
    """A small class-conditional SiT on Fashion-MNIST: (1, 28, 28) in [-1, 1], 10 classes, with a null label.

    Examples:
        >>> import torch
        >>> teacher = fashion_sit()
        >>> teacher.velocity(teacher.sample_prior(3), torch.ones(3)).shape
        torch.Size([3, 1, 28, 28])
    """
    return load_model(Path(__file__).parent / "sit")
