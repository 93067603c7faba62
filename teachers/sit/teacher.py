"""The SiT teacher and the reading of its checkpoints."""

from __future__ import annotations

import argparse
import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flowdistill.decoders import StableDiffusionVae
from flowdistill.networks.sit import SIZES, SiT
from flowdistill.plumbing.dry import files_unread
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import fill_module
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
        num_heads: attention heads, which no shape tells; None is the number of a published width.
        noise_time: the time of the noise, 0 as SiT trains or 1 as REPA does; None is that of ``variant``, and without
            one 0 where the output is doubled (``learn_sigma``) and 1 where there are REPA's projectors.

    Raises:
        CheckpointError: no such file, or one that is damaged, hostile, or of another architecture.
        ConfigError: the file leaves ``num_heads`` or ``noise_time`` open.
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
    ) -> None:
        if files_unread():
            super().__init__(_of_variant(variant))
            return
        path = locate(checkpoint)
        tensors = _read(path)
        try:
            arguments = _arguments(tensors)
        except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError):
            raise CheckpointError(f"{path} is not the state dictionary of a SiT") from None
        has_projectors = any(name.startswith("projectors.") for name in tensors)
        if variant is not None:
            _check_variant(path, variant, arguments, has_projectors)
            noise_time = (1 if "repa" in variant else 0) if noise_time is None else noise_time
        elif noise_time is None and (arguments["learn_sigma"] or has_projectors):
            noise_time = 1 if has_projectors else 0
        if noise_time is None:
            raise ConfigError(f"{path} may be of SiT (noise_time=0) or of REPA (noise_time=1): say which")
        num_heads = num_heads or _HEADS.get(arguments["hidden_size"])
        if num_heads is None:
            raise ConfigError(f"{path} is {arguments['hidden_size']} wide, which no published SiT is: give num_heads")
        try:
            with torch.device("meta"):
                network = SiT(**arguments, num_heads=num_heads, noise_time=noise_time)
        except RuntimeError as error:
            raise CheckpointError(f"{path} describes no SiT: {error}") from None
        useful = {name: v for name, v in tensors.items() if not name.startswith("projectors.")}
        fill_module(network, useful, path, assign=True)
        super().__init__(network, StableDiffusionVae(vae=vae, rounding="down" if noise_time else "nearest"))


_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}


def _read(path: Path) -> dict[str, Tensor]:
    """The state dictionary of a file, of the averaged weights where it has them, with the names of today."""
    try:
        if path.suffix == ".safetensors":
            mapped = safetensors.torch.load_file(path).items()  # copied, lest the teacher change, or die, with its file
            content: Any = {name: v.clone() for name, v in mapped}
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the options in training checkpoints
                content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        raise CheckpointError(f"{path} cannot be read as a checkpoint of SiT: {_reason(error)}") from None
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(_is_stored(v) for v in content.values()):
        raise CheckpointError(f"{path} holds no state dictionary")
    tensors = {str(name): v.float() for name, v in content.items()}
    early = _depth(tensors)  # REPA once named its later blocks decoder_blocks, counted from 0
    return {
        re.sub(r"^decoder_blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) + early}.", name): v
        for name, v in tensors.items()
    }


def _reason(error: Exception) -> str:
    """The line of a message that says what is wrong, without torch's advice to load the file by running it."""
    lines = [line.strip() for line in str(error).splitlines() if not re.search("weights.only", line, re.IGNORECASE)]
    return next(filter(None, lines), type(error).__name__)


def _is_stored(value: object) -> bool:
    """Whether it is a tensor all of whose numbers are in the file: a repeated one may claim to be of any size."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _depth(tensors: Mapping[str, Tensor]) -> int:
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def _arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell of the arguments of `SiT`."""
    hidden, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    outputs = len(tensors["final_layer.linear.weight"]) // patch**2
    perceptron = len(tensors["blocks.0.mlp.fc1.weight"])
    ratio = perceptron / hidden
    if hidden % 4:
        raise ValueError("the table of positions has four parts")
    return {
        "input_size": math.isqrt(tensors["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": _depth(tensors),
        "mlp_ratio": ratio if int(hidden * ratio) == perceptron else math.nextafter(ratio, math.inf),
        "num_classes": len(tensors["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": outputs == 2 * channels,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
    }


def _of_variant(variant: str | None) -> SiT:
    """The network of a variant, with fresh weights."""
    if variant is None:
        raise ConfigError("a plan reads no checkpoint: give sit_teacher.variant")
    size, patch, repa, pixels = _parts(variant)
    arguments: dict[str, Any] = {"input_size": int(pixels) // 8, "patch_size": int(patch), **SIZES[size]}
    return SiT(**arguments, num_classes=1000, learn_sigma=not repa, noise_time=1 if repa else 0)


def _parts(variant: str) -> tuple[str, str, str | None, str]:
    match = re.fullmatch(r"sit-(\w+)/(\d)-(repa-)?(\d+)", variant)
    if match is None or variant not in VARIANTS:
        raise unknown_name("variant", variant, VARIANTS)
    return match[1], match[2], match[3], match[4]


def _check_variant(path: Path, variant: str, arguments: Mapping[str, Any], has_projectors: bool) -> None:
    size, patch, repa, pixels = _parts(variant)
    expected = {"patch_size": int(patch), "input_size": int(pixels) // 8, **SIZES[size]}
    del expected["num_heads"]
    wrong = [f"{name} {arguments[name]} in place of {v}" for name, v in expected.items() if arguments[name] != v]
    if repa and arguments["learn_sigma"]:
        wrong.append("a doubled output, which REPA never has")
    if not repa and has_projectors:
        wrong.append("the projectors of REPA")
    if wrong:
        raise CheckpointError(f"{path} is not {variant}: it has {', '.join(wrong)}")
