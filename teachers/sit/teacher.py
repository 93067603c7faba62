"""The SiT teacher and the reading of its checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import json
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
from flowdistill.plumbing.files import check_tensors, fill_module, unwrapped
from flowdistill.plumbing.pickles import as_dictionary
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_teacher, unknown_name
from flowdistill.plumbing.torch_files import TorchFile, is_tensor
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
        if files_unread():
            super().__init__(_of_variant(variant, num_classes or 1000))
            return
        if variant is not None:
            _parts(variant)
        path = locate(checkpoint)
        tensors, said, wrappers = _read(path)
        source = f"{path}{wrappers}"
        useful = {name: v for name, v in tensors.items() if not name.startswith("projectors.")}
        arguments = _arguments(tensors)
        if arguments["hidden_size"] % 4:
            raise CheckpointError(f"{path} is {arguments['hidden_size']} wide, and a SiT's width is divisible by 4")
        heads = num_heads or said.get("num_heads") or _heads(tensors) or _HEADS.get(arguments["hidden_size"])
        check_tensors(_built(path, **arguments, num_heads=heads or 1), useful, f"{source}, read as a SiT,")
        _check_training(path, said, arguments)
        _check_square(path, tensors["pos_embed"][0])
        arguments |= _classes(path, arguments["num_classes"] + 1, num_classes, said)
        of_repa = len(useful) < len(tensors) or bool(_OF_REPA & said.keys())
        if variant is not None:
            _check_variant(path, variant, arguments, of_repa)
            noise_time = (1 if "repa" in variant else 0) if noise_time is None else noise_time
        elif noise_time is None and (arguments["learn_sigma"] or of_repa):
            noise_time = 1 if of_repa else 0
        if noise_time is None:
            raise ConfigError(f"{path} may be of SiT (noise_time=0) or of REPA (noise_time=1): say which")
        if heads is None:
            raise ConfigError(f"{path} is {arguments['hidden_size']} wide, which no published SiT is: give num_heads")
        network = _built(path, **arguments, num_heads=heads, noise_time=noise_time)
        fill_module(network, useful, source, assign=True)
        super().__init__(network, StableDiffusionVae(vae=vae, rounding="down" if noise_time else "nearest"))


def _built(path: Path, **arguments: Any) -> SiT:
    """A SiT whose weights have neither values nor memory."""
    try:
        with torch.device("meta"):
            return SiT(**arguments)
    except RuntimeError as error:
        raise CheckpointError(f"{path} describes no SiT: {error}") from None


def _heads(tensors: Mapping[str, Tensor]) -> int | None:
    """The number of heads, which the shapes tell where queries and keys are normalised."""
    norm, bias = (tensors.get(f"blocks.0.attn.{name}", torch.zeros(0)) for name in ("q_norm.weight", "proj.bias"))
    return bias.numel() // norm.numel() if norm.numel() else None


_HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}


_NEEDED = {
    "pos_embed",
    "x_embedder.proj.weight",
    "y_embedder.embedding_table.weight",
    "blocks.0.mlp.fc1.weight",
    "final_layer.linear.weight",
}
_WEIGHTS = ("ema", "ema_model", "model_ema", "model", "state_dict", "module")
_OPTIONS = ("args", "hyper_parameters", "config", "cfg")
_SECTIONS = (*_OPTIONS, "model", "network", "transport")
_TRAINED = {"path_type": ("linear",), "prediction": ("velocity", "v")}
_MAX_DEPTH = 200
_OF_REPA = {"encoder_depth", "proj_coeff"}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """The state dictionary of a file, of the averaged weights where it has them, with the names of today.

    Also the options that the file says it was trained with, and what `unwrapped` says of wrappers.
    """
    try:
        if path.suffix == ".safetensors":
            mapped = safetensors.torch.load_file(path).items()  # copied, lest the teacher change, or die, with its file
            tensors, said = {name: v.clone() for name, v in mapped}, _metadata(path)
        else:
            file = TorchFile(path)
            stored, said = _weights(file.content)
            if not stored:
                holds = ", ".join(str(key)[:40] for key in as_dictionary(file.content))
                holds = holds or getattr(file.content, "name", type(file.content).__name__)
                raise ValueError(f"it holds no state dictionary, as network.state_dict() gives it, but {holds}")
            tensors = file.tensors(stored)
        tensors, wrappers = unwrapped(tensors, _NEEDED)
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        reason = " ".join(str(error).split()) or type(error).__name__
        printable = reason[:300].encode("unicode_escape").decode()
        raise CheckpointError(f"{path} cannot be read as a checkpoint of SiT: {printable}") from None
    early = _depth(tensors)  # REPA once named its later blocks decoder_blocks, counted from 0
    named = {
        re.sub(r"^decoder_blocks\.(\d{1,4})\.", lambda m: f"blocks.{int(m[1]) + early}.", name): v.float()
        for name, v in tensors.items()
    }
    return named, said, wrappers


def _metadata(path: Path) -> dict[str, Any]:
    """The options in the metadata of a safetensors file, which are texts or JSON."""
    with safetensors.safe_open(path, framework="pt") as file:
        texts: dict[str, Any] = file.metadata() or {}
    for key, value in texts.items():
        with contextlib.suppress(ValueError):
            texts[key] = json.loads(value)
    return _options(texts)


def _weights(content: Any, levels: int = 4) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The dictionary that holds tensors, in others or not, and the options that lie beside it or around it."""
    named = as_dictionary(content)
    options: dict[str, Any] = {}
    for key in filter(named.__contains__, _OPTIONS):
        options |= _options(named[key])
    for key in filter(named.__contains__, _WEIGHTS if levels else ()):
        stored, said = _weights(named[key], levels - 1)
        if stored:
            return stored, options | said
    return (named if any(map(is_tensor, named.values())) else {}), options


def _options(value: Any, levels: int = 4) -> dict[str, Any]:
    """The options in a namespace, a dictionary or a configuration, and in the sections of it that are of the network.

    Others than numbers are left out, but for those that `_check_training` must know.
    """
    options = _attributes(value)
    options = as_dictionary(options.get("_content")) or options  # omegaconf
    found: dict[str, Any] = {}
    for section in filter(options.__contains__, _SECTIONS if levels else ()):
        found |= _options(options[section], levels - 1)
    for key, item in options.items():
        name, item = str(key).lower().replace("-", "_"), _attributes(item).get("_val", item)
        if (isinstance(item, int) and item >= 0) or (isinstance(item, float) and name.endswith("_prob")):
            found[name] = item
        elif name in _TRAINED and item is not None:
            found[name] = item[:40] if isinstance(item, str) else f"a {getattr(item, 'name', type(item).__name__)}"
    return found


def _attributes(value: Any) -> dict[Any, Any]:
    return as_dictionary(value) or as_dictionary(getattr(value, "state", None))


def _depth(tensors: Mapping[str, Tensor]) -> int:
    """The number of blocks, up to one that a hostile file cannot make slow to build."""
    return min(len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}), _MAX_DEPTH)


def _arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell of the arguments of `SiT`; where tensors are missing or odd, those of SiT-XL/2."""

    def shape(name: str, *default: int) -> tuple[int, ...]:
        found = tuple(tensors[name].shape) if name in tensors else default
        return found if len(found) == len(default) and all(found) else default

    _, tokens, width = shape("pos_embed", 1, 256, 1152)
    hidden, channels, patch, _ = shape("x_embedder.proj.weight", width, 4, 2, 2)
    perceptron, _ = shape("blocks.0.mlp.fc1.weight", 4 * hidden, hidden)
    outputs, _ = shape("final_layer.linear.weight", patch**2 * channels, hidden)
    rows, _ = shape("y_embedder.embedding_table.weight", 1001, hidden)
    ratio = perceptron / hidden
    return {
        "input_size": math.isqrt(tokens) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": _depth(tensors),
        "mlp_ratio": ratio if int(hidden * ratio) == perceptron else math.nextafter(ratio, math.inf),
        "num_classes": rows - 1,
        "learn_sigma": outputs // patch**2 == 2 * channels,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
    }


def _check_training(path: Path, said: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse networks of other paths and predictions than the published ones, and what no shape tells."""
    qk_norm, learn_sigma = arguments["qk_norm"], arguments["learn_sigma"]
    flags = {"learn_sigma": learn_sigma, "qk_norm": qk_norm, "use_qknorm": qk_norm}
    for name, ours in {**flags, "use_rope": False, "use_rmsnorm": False}.items():
        if said.get(name, ours) != ours:
            raise CheckpointError(f"{path} was trained with {name} {said[name]}, and a SiT of its tensors has {ours}")
    for name, known in _TRAINED.items():
        if str(said.get(name, known[0])).lower() not in known:
            raise CheckpointError(
                f"{path} was trained with {name} {said[name]!r}, and only {known[0]} is read: for another one write a "
                "network of your own, as the documentation shows under 'Your own network'"
            )


def _check_square(path: Path, positions: Tensor) -> None:
    """Refuse the table of another grid than a square, whose rows tell its width by their half of the channels."""
    rows = positions[:, positions.shape[1] // 2 :]
    width = int((rows == rows[0]).all(1).int().cumprod(0).sum())
    if 1 < width < len(rows) != width**2:
        raise CheckpointError(f"{path} is of samples that are not square: {len(rows)} patches in rows of {width}")


def _classes(path: Path, rows: int, num_classes: int | None, said: Mapping[str, Any]) -> dict[str, Any]:
    """The number of classes, and whether one of the rows of the table of labels is the null label."""
    possible = [n for n in (rows, rows - 1) if n > 0]
    dropout = said.get("class_dropout_prob", said.get("cfg_prob"))
    if num_classes is not None:
        if num_classes not in possible:
            raise ConfigError(f"{path} has {rows} labels: num_classes must be {' or '.join(map(str, possible))}")
    elif dropout is not None or said.get("num_classes") is not None:
        num_classes = said.get("num_classes", rows - bool(dropout))
        if num_classes not in possible or (dropout is not None and rows - num_classes != bool(dropout)):
            raise CheckpointError(
                f"{path} contradicts itself: {num_classes} classes, label dropout {dropout} and {rows} labels: give "
                "num_classes"
            )
    elif rows in (1, 1001):
        num_classes = possible[-1]
    else:
        raise ConfigError(
            f"{path} has {rows} labels, which may be {rows} classes (num_classes={rows}), or {rows - 1} and a null "
            f"label (num_classes={rows - 1}): say which"
        )
    return {"num_classes": num_classes, "null_label": num_classes < rows}


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
