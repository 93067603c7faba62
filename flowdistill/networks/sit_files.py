"""SiTs in files of other people: the state dictionary, and what it and the options beside it tell of the network.

Files are read as data, see `flowdistill.plumbing.torch_files`.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flowdistill.networks.sit import SIZES, SiT
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import unwrapped
from flowdistill.plumbing.pickles import as_dictionary
from flowdistill.plumbing.torch_files import TorchFile, is_tensor


def built(path: Path, **arguments: Any) -> SiT:
    """A SiT whose weights have neither values nor memory."""
    try:
        with torch.device("meta"):
            return SiT(**arguments)
    except RuntimeError as error:
        raise CheckpointError(f"{path} describes no SiT: {error}") from None


def heads_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The number of heads, which the shapes tell where queries and keys are normalised."""
    names = ("q_norm.weight", "q_norm.scale", "proj.bias")
    layer, rms, bias = (tensors.get(f"blocks.0.attn.{name}", torch.zeros(0)).numel() for name in names)
    return bias // (layer or rms) if layer or rms else None


HEADS = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}


NEEDED = {
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
OF_REPA = {"encoder_depth", "proj_coeff"}


@attrs.frozen(eq=False)
class SiTFile:
    """What a file holds that is, or contains, a SiT."""

    path: Path
    """The file."""
    tensors: Mapping[str, Tensor]
    """The state dictionary in float32, with the names of today, of the averaged weights where there are such."""
    options: Mapping[str, Any]
    """The numbers that the file says it was trained with."""
    source: str
    """The file and what `unwrapped` says of wrappers, for messages."""
    stored: Mapping[str, Tensor]
    """All tensors that lie together with the network's, as they are stored."""


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a state dictionary in a file, as they are stored, and the options that the file says.

    Of averaged weights and others it is the averaged ones.

    Raises:
        Exception: the file is damaged, hostile or something else, or holds no state dictionary.
    """
    if path.suffix == ".safetensors":
        mapped = safetensors.torch.load_file(path).items()  # copied, lest the network change, or die, with its file
        return {name: v.clone() for name, v in mapped}, _metadata(path)
    file = TorchFile(path)
    found, said = _weights(file.content)
    if not found:
        holds = ", ".join(str(key)[:40] for key in as_dictionary(file.content))
        holds = holds or getattr(file.content, "name", type(file.content).__name__)
        raise ValueError(f"it holds no state dictionary, as network.state_dict() gives it, but {holds}")
    return file.tensors(found), said


def names_in(path: Path) -> list[str]:
    """The names of the tensors that `read_state` would read; none of a file that it cannot read."""
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                return list(file.keys())
        return [str(name) for name in _weights(TorchFile(path).content)[0]]
    except Exception:  # which `read_state` tells
        return []


def unreadable(path: Path, what: str, error: Exception) -> CheckpointError:
    """The error for whatever a damaged or hostile file makes the readers raise."""
    reason = " ".join(str(error).split()) or type(error).__name__
    printable = reason[:300].encode("unicode_escape").decode()
    return CheckpointError(f"{path} cannot be read as {what}: {printable}")


def read_sit(path: Path, names: Mapping[str, str] | None = None) -> SiTFile:
    """Read a file of ``torch.save`` or a safetensors file, as data.

    Args:
        path: the file.
        names: what stands in the names of tensors, up to a dot or the end, and what is to stand there instead.

    Raises:
        CheckpointError: it is damaged, hostile or something else, or holds no state dictionary.
    """
    try:
        stored, said = read_state(path)
        tensors, wrappers = unwrapped({_renamed(name, names or {}): v for name, v in stored.items()}, NEEDED)
    except Exception as error:
        raise unreadable(path, "a checkpoint of SiT", error) from None
    early = _depth(tensors)  # REPA once named its later blocks decoder_blocks, counted from 0
    named = {
        re.sub(r"^decoder_blocks\.(\d{1,4})\.", lambda m: f"blocks.{int(m[1]) + early}.", name): v.float()
        for name, v in tensors.items()
    }
    return SiTFile(path, named, said, f"{path}{wrappers}", stored)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """The name with each part replaced that ``names`` has, where it begins and ends with a dot or the name itself."""
    for theirs, ours in names.items():
        parts = f".{name}.".split(f".{theirs}.")
        name = f".{ours}.".join(parts).strip(".")
    return name


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

    Others than numbers are left out, but for those that `check_training` must know.
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


def arguments_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
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
        "qk_norm": "rms" if "blocks.0.attn.q_norm.scale" in tensors else "blocks.0.attn.q_norm.weight" in tensors,
    }


def check_training(path: Path, said: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Refuse networks of other paths and predictions than the published ones, and what no shape tells."""
    qk_norm, learn_sigma = bool(arguments["qk_norm"]), arguments["learn_sigma"]
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


def check_square(path: Path, positions: Tensor) -> None:
    """Refuse the table of another grid than a square, whose rows tell its width by their half of the channels."""
    rows = positions[:, positions.shape[1] // 2 :]
    width = int((rows == rows[0]).all(1).int().cumprod(0).sum())
    if 1 < width < len(rows) != width**2:
        raise CheckpointError(f"{path} is of samples that are not square: {len(rows)} patches in rows of {width}")


def classes_of(path: Path, rows: int, num_classes: int | None, said: Mapping[str, Any]) -> dict[str, Any]:
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
