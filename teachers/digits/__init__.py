"""A trained teacher of 8x8 handwritten digits; ``card.md`` beside it says how it was made and how good it is."""

from __future__ import annotations

from pathlib import Path

from flowdistill.plumbing.registry import register_teacher
from flowdistill.runs.pretrained import load_model
from flowdistill.wrapped_teachers import NetworkTeacher


@register_teacher("digits_teacher")
def digits_teacher() -> NetworkTeacher:
    """A small class-conditional SiT on scikit-learn's digits: (1, 8, 8) in [-1, 1], 10 classes, with a null label.

    Examples:
        >>> import torch
        >>> teacher = digits_teacher()
        >>> teacher.velocity(teacher.sample_prior(3), torch.ones(3)).shape
        torch.Size([3, 1, 8, 8])
    """
    return load_model(Path(__file__).parent)
