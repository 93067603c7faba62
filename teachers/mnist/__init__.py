"""Trained teachers of MNIST, one of each family; ``card.md`` says how they were made and how good they are."""

from __future__ import annotations

from pathlib import Path

from flowdistill.plumbing.registry import register_teacher
from flowdistill.runs.pretrained import load_model
from flowdistill.wrapped_teachers import NetworkTeacher


@register_teacher("mnist_sit")
def mnist_sit() -> NetworkTeacher:
    """A small class-conditional SiT on MNIST: (1, 28, 28) in [-1, 1], 10 classes, with a null label.

    Examples:
        >>> import torch
        >>> teacher = mnist_sit()
        >>> teacher.velocity(teacher.sample_prior(3), torch.ones(3)).shape
        torch.Size([3, 1, 28, 28])
    """
    return load_model(Path(__file__).parent / "sit")


@register_teacher("mnist_edm2")
def mnist_edm2() -> NetworkTeacher:
    """A small class-conditional EDM2 network on MNIST padded to (1, 32, 32), in [-1, 1], 10 classes, with a null label.

    Its decoder takes the padding off.

    Examples:
        >>> import torch
        >>> teacher = mnist_edm2()
        >>> samples = teacher.sample_prior(3)
        >>> samples.shape, teacher.decoder.decode(samples).shape
        (torch.Size([3, 1, 32, 32]), torch.Size([3, 1, 28, 28]))
    """
    return load_model(Path(__file__).parent / "edm2")
