"""The EDM2 teacher."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowdistill.decoders import EDM2_LATENTS, Pixels, StableDiffusionVae
from flowdistill.interfaces import Decoder
from flowdistill.networks.edm2 import EDM2, SIZES
from flowdistill.plumbing.dry import weights_unread
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import fill_module
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_teacher, unknown_name
from flowdistill.runs.pretrained import locate
from flowdistill.teachers.edm2.release import read_release
from flowdistill.wrapped_teachers import NetworkTeacher

VARIANTS = [
    f"edm2-{size}-{pixels}{unconditional}"
    for unconditional, pixels, size in itertools.product(("", "-uncond"), (512, 64), SIZES)
]
"""The published architectures: ``edm2-s-512``, ``edm2-xs-512-uncond``, ``edm2-s-64``, ..."""


@register_teacher("edm2_teacher", variants=VARIANTS)
class EDM2Teacher(NetworkTeacher):
    """An EDM2 network from a file of its authors (Karras et al. 2024, arXiv 2312.02696).

    The files are pickles that carry source code; weights and constructor arguments are read from them and nothing is
    executed. The authors' weights and code are licensed CC BY-NC-SA 4.0. Samples have unit variance: latents (4, 64,
    64) for 512 pixels, scaled images (3, 64, 64) for 64. To guide it, give a weaker network to ``guided`` as ``guide``:
    an unconditional one as in the paper's classifier-free guidance, a smaller or less trained one as in autoguidance
    (arXiv 2406.02507).

    Args:
        checkpoint: a ``.pkl`` file of the release, or where HuggingFace has it, see `locate`.
        variant: the architecture that the file must have, as in ``load_teacher("edm2-s-512", checkpoint=...)``; None
            takes any.
        vae: the autoencoder of the decoder, see `StableDiffusionVae`; the authors used ``stabilityai/sd-vae-ft-mse``.

    Raises:
        CheckpointError: no such file, or one that is damaged, hostile, or of another architecture.
    """

    suffixes = (".pkl",)
    citation = bibtex("karras2024edm2")

    def __init__(self, checkpoint: str | Path, variant: str | None = None, vae: str | None = None) -> None:
        if weights_unread():
            super().__init__(_of_variant(variant), null_label=False)
            return
        path = locate(checkpoint)
        stored, tensors = read_release(path)
        arguments: dict[str, Any] = {**stored, "dropout": 0.0}  # a student must not see its teacher's dropout
        if variant is not None:
            _check_variant(path, variant, arguments)
        try:
            with torch.device("meta"):
                network = EDM2(**arguments)
        except (TypeError, ValueError, ConfigError, ZeroDivisionError, RuntimeError) as error:
            raise CheckpointError(f"{path} describes no EDM2 network: {error}") from None
        fill_module(network, tensors, path, assign=True)
        decoder: Decoder = Pixels(scale=network.data_scale)
        if network.sample_shape[0] == 4:
            decoder = StableDiffusionVae(vae=vae, **EDM2_LATENTS)
        super().__init__(network, decoder, null_label=False)  # the authors dropped no labels


def _expected(variant: str) -> dict[str, Any]:
    """What a variant has of the arguments of `EDM2`."""
    match = re.fullmatch(r"edm2-(\w+)-(512|64)(-uncond)?", variant)
    if match is None or variant not in VARIANTS:
        raise unknown_name("variant", variant, VARIANTS)
    return {
        "model_channels": SIZES[match[1]],
        "img_channels": 4 if match[2] == "512" else 3,
        "label_dim": 0 if match[3] else 1000,
    }


def _of_variant(variant: str | None) -> EDM2:
    """The network of a variant, with fresh weights."""
    if variant is None:
        raise ConfigError("a plan reads no checkpoint: give edm2_teacher.variant")
    return EDM2(img_resolution=64, **_expected(variant))


def _check_variant(path: Path, variant: str, arguments: Mapping[str, Any]) -> None:
    expected = _expected(variant)
    wrong = [
        f"{name} {arguments.get(name)} in place of {v}" for name, v in expected.items() if arguments.get(name) != v
    ]
    if wrong:
        raise CheckpointError(f"{path} is not {variant}: it has {', '.join(wrong)}")
