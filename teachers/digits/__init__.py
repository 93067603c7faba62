"""A trained teacher of 8x8 handwritten digits; ``card.md`` beside it says how it was made and how good it is."""

from __future__ import annotations

from importlib import resources

from safetensors.torch import load_model

from flowdistill.flow_maps import NetworkTeacher
from flowdistill.networks import SiT
from flowdistill.registry import register_teacher


@register_teacher("digits_teacher")
class DigitsTeacher(NetworkTeacher):
    """A small class-conditional SiT on scikit-learn's digits: (1, 8, 8) in [-1, 1], 10 classes, with a null label.

    Examples:
        >>> import torch
        >>> teacher = DigitsTeacher()
        >>> teacher.velocity(teacher.sample_prior(3), torch.ones(3)).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self) -> None:
        network = SiT(
            input_size=8,
            patch_size=2,
            in_channels=1,
            hidden_size=64,
            depth=4,
            num_heads=4,
            num_classes=10,
            learn_sigma=False,
        )
        with resources.as_file(resources.files(__name__) / "digits.safetensors") as path:
            load_model(network, path)
        super().__init__(network)
