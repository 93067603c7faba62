"""The SiT teacher and the reading of its checkpoints."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from flowdistill.decoders import StableDiffusionVae
from flowdistill.networks.sit import SIZES, SiT
from flowdistill.networks.sit_files import (
    HEADS,
    OF_REPA,
    arguments_of,
    built,
    check_square,
    check_training,
    classes_of,
    heads_of,
    read_sit,
)
from flowdistill.plumbing.dry import weights_unread
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import check_tensors, fill_module
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_teacher, unknown_name
from flowdistill.runs.pretrained import locate
from flowdistill.wrapped_teachers import NetworkTeacher

VARIANTS = [
    f"sit-{size}/{patch}-{repa}{pixels}"
    for repa, size, patch, pixels in itertools.product(("", "repa-"), SIZES, (2, 4, 8), (256, 512))
]
"""The published architectures: ``sit-xl/2-256``, ``sit-xl/2-repa-256``, ..."""


@register_teacher("sit_teacher", variants=VARIANTS)
class SiTTeacher(NetworkTeacher):
    """A SiT from a checkpoint of the authors of SiT (arXiv 2401.08740) or REPA (arXiv 2410.06940).

    The files are bare state dictionaries, or training checkpoints of which the average is taken; they are read as data.
    Samples are latents of unit variance, (4, 32, 32) for 256 pixels. For guidance wrap the teacher by ``guided``: the
    published samples of SiT guide the first 3 channels, those of REPA all.

    Args:
        checkpoint: a ``.pt``, ``.pth`` or ``.safetensors`` file, or where HuggingFace has it, see `locate`.
        variant: the architecture that the file must have, as in ``load_teacher("sit-xl/2-256", checkpoint=...)``; None
            takes what the shapes say.
        vae: the autoencoder of the decoder, see `StableDiffusionVae`.
        num_heads: attention heads, which few shapes tell; None is what the file says, or that of a published width.
        noise_time: the time of the noise, 0 as SiT trains or 1 as REPA does; None is that of ``variant``, and without
            one 0 where the output is doubled (``learn_sigma``) and 1 where there are REPA's projectors or options.
        num_classes: the number of classes; the table of labels has one row more if labels were dropped in training, and
            only then there is classifier-free guidance. None is what the file says, or 1000 of 1001 rows.

    Raises:
        CheckpointError: no such file, or one that is damaged, hostile, of another architecture, or trained for another
            path or prediction.
        ConfigError: the file leaves ``num_heads``, ``noise_time`` or ``num_classes`` open.
    """

    suffixes = (".pt", ".pth", ".safetensors")
    citation = bibtex("ma2024sit", "yu2025repa")

    def __init__(
        self,
        checkpoint: str | Path,
        variant: str | None = None,
        vae: str | None = None,
        num_heads: int | None = None,
        noise_time: Literal[0, 1] | None = None,
        num_classes: int | None = None,
    ) -> None:
        if weights_unread():
            super().__init__(_of_variant(variant, num_classes or 1000))
            return
        if variant is not None:
            _parts(variant)
        path = locate(checkpoint)
        file = read_sit(path)
        tensors, said, source = file.tensors, file.options, file.source
        useful = {name: v for name, v in tensors.items() if not name.startswith("projectors.")}
        arguments = arguments_of(tensors)
        if arguments["hidden_size"] % 4:
            raise CheckpointError(f"{path} is {arguments['hidden_size']} wide, and a SiT's width is divisible by 4")
        heads = num_heads or said.get("num_heads") or heads_of(tensors) or HEADS.get(arguments["hidden_size"])
        check_tensors(built(path, **arguments, num_heads=heads or 1), useful, f"{source}, read as a SiT,")
        check_training(path, said, arguments)
        check_square(path, tensors["pos_embed"][0])
        arguments |= classes_of(path, arguments["num_classes"] + 1, num_classes, said)
        of_repa = len(useful) < len(tensors) or bool(OF_REPA & said.keys())
        if variant is not None:
            _check_variant(path, variant, arguments, of_repa)
            noise_time = (1 if "repa" in variant else 0) if noise_time is None else noise_time
        elif noise_time is None and (arguments["learn_sigma"] or of_repa):
            noise_time = 1 if of_repa else 0
        if noise_time is None:
            raise ConfigError(f"{path} may be of SiT (noise_time=0) or of REPA (noise_time=1): say which")
        if heads is None:
            raise ConfigError(f"{path} is {arguments['hidden_size']} wide, which no published SiT is: give num_heads")
        network = built(path, **arguments, num_heads=heads, noise_time=noise_time)
        fill_module(network, useful, source, assign=True)
        super().__init__(network, StableDiffusionVae(vae=vae, rounding="down" if noise_time else "nearest"))


def _of_variant(variant: str | None, num_classes: int) -> SiT:
    """The network of a variant, with fresh weights."""
    if variant is None:
        raise ConfigError("a plan reads no checkpoint: give sit_teacher.variant")
    size, patch, repa, pixels = _parts(variant)
    arguments: dict[str, Any] = {"input_size": int(pixels) // 8, "patch_size": int(patch), **SIZES[size]}
    return SiT(**arguments, num_classes=num_classes, learn_sigma=not repa, noise_time=1 if repa else 0)


def _parts(variant: str) -> tuple[str, str, str | None, str]:
    match = re.fullmatch(r"sit-(\w+)/(\d)-(repa-)?(\d+)", variant)
    if match is None or variant not in VARIANTS:
        raise unknown_name("variant", variant, VARIANTS)
    return match[1], match[2], match[3], match[4]


def _check_variant(path: Path, variant: str, arguments: Mapping[str, Any], of_repa: bool) -> None:
    size, patch, repa, pixels = _parts(variant)
    expected = {"patch_size": int(patch), "input_size": int(pixels) // 8, **SIZES[size]}
    del expected["num_heads"]
    wrong = [f"{name} {arguments[name]} in place of {v}" for name, v in expected.items() if arguments[name] != v]
    if repa and arguments["learn_sigma"]:
        wrong.append("a doubled output, which REPA never has")
    if not repa and of_repa:
        wrong.append("the projectors of REPA, or its options")
    if wrong:
        raise CheckpointError(f"{path} is not {variant}: it has {', '.join(wrong)}")
