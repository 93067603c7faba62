"""Teachers in files: this library's own format, checkpoints of others, and where they are found.

A model folder holds ``model.safetensors`` and ``config.json``, which names a registered network with its arguments and
a decoder. `load_model` needs nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import attrs
import torch
from torch import nn

from flowdistill.interfaces import Decoder, Teacher
from flowdistill.networks import VelocityNetwork
from flowdistill.plumbing.dry import weights_unread
from flowdistill.plumbing.errors import CheckpointError, CheckpointWriteError, ConfigError
from flowdistill.plumbing.fields import short
from flowdistill.plumbing.files import (
    check_tensors,
    fill_module,
    load_tensors,
    replaced_folder,
    unwrapped,
    write_json,
    write_tensors,
)
from flowdistill.plumbing.registry import DECODERS, NETWORKS, TEACHERS, Registry
from flowdistill.wrapped_teachers import NetworkTeacher

FORMAT = 1
"""Of the folders that this version writes and reads."""

_M = TypeVar("_M", bound=nn.Module)


def save_model(teacher: Teacher, folder: str | Path, dtype: Literal["float32", "float16"] = "float32") -> Path:
    """Write a teacher's network as a model folder.

    Args:
        teacher: a teacher that is a network: from a checkpoint, or the run of an objective such as ``flow_matching``.
        folder: where to; it must not exist, or be empty.
        dtype: in which weights are stored; they are always loaded as float32.

    Raises:
        ConfigError: the teacher is not a network alone, or the folder is taken.
        CheckpointWriteError: the disk refused; nothing half-written is left.
    """
    network, folder = _network_of(teacher), Path(folder)
    check_free(folder)
    decoder = teacher.decoder
    config = {
        "format": FORMAT,
        "network": NETWORKS.name_of(type(network)),
        "arguments": network.arguments,
        "decoder": None if decoder is None else DECODERS.name_of(type(decoder)),
        "decoder_arguments": {} if decoder is None else attrs.asdict(decoder),  # type: ignore[arg-type]
        "null_label": teacher.null_label,
    }
    try:
        with replaced_folder(folder) as partial:
            write_weights(network, partial, dtype)
            write_json(partial / "config.json", config)
    except OSError as error:
        raise CheckpointWriteError(f"cannot write {folder}: {error}; nothing was left there") from error
    return folder


def check_free(folder: Path) -> None:
    """ConfigError unless a model folder can be written there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is taken: choose another place")


def write_weights(module: nn.Module, folder: Path, dtype: Literal["float32", "float16"]) -> None:
    """Write a module's state as ``model.safetensors`` of a folder."""
    stored, state = getattr(torch, dtype), module.state_dict().items()
    tensors = {name: v.to(stored if v.is_floating_point() else v.dtype).cpu() for name, v in state}
    write_tensors(folder / "model.safetensors", tensors)


def _network_of(teacher: Teacher) -> VelocityNetwork:
    network = teacher.backbone
    if teacher.takes_guidance or not isinstance(network, VelocityNetwork):
        raise ConfigError(
            f"{type(teacher).__name__} is not a velocity network alone: only such teachers become model folders"
        )
    return network


def load_model(folder: str | Path, **decoder_arguments: Any) -> NetworkTeacher:
    """The teacher of a model folder.

    Args:
        folder: the folder.
        **decoder_arguments: in place of those that are stored, such as ``vae`` of latents.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights are of another architecture.
        ConfigError: arguments that its decoder does not have.
    """
    folder = Path(folder)
    with described(folder, "model") as config:
        if "flow_map" in config:
            raise CheckpointError(f"{folder} holds a student: load it by load_flow_map")
        parts = {key: config[key] for key in ("network", "arguments", "decoder", "decoder_arguments", "null_label")}
        with torch.device("meta"):  # whose weights cost neither time nor memory
            network: Any = NETWORKS.build(parts["network"], **parts["arguments"])
        unknown = decoder_arguments.keys() - parts["decoder_arguments"].keys()
        decoder: Decoder | None = None
        if parts["decoder"] is not None and not unknown:
            decoder = DECODERS.build(parts["decoder"], **parts["decoder_arguments"] | decoder_arguments)
    if unknown:
        raise ConfigError(f"the decoder of {folder} takes no {', '.join(sorted(unknown))}")
    network = with_weights(network, lambda: NETWORKS.build(parts["network"], **parts["arguments"]), folder)
    return NetworkTeacher(network, decoder, parts["null_label"])


@contextlib.contextmanager
def described(folder: Path, kind: str) -> Iterator[Any]:
    """What a folder's ``config.json`` says; inside, whatever is wrong with it is a CheckpointError."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {short(config['format'])}, this version reads {FORMAT}")
        yield config
    except OSError as error:
        raise CheckpointError(f"{folder} is not a {kind} folder: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, ConfigError) as error:
        raise CheckpointError(f"{folder}/config.json does not describe a {kind}: {error}") from None


def with_weights(module: _M, build: Callable[[], _M], folder: Path) -> _M:
    """A module with the weights of a folder's ``model.safetensors``, or with fresh ones where no file is read.

    Args:
        module: one that was built on the meta device.
        build: builds another one.
        folder: the folder.

    Raises:
        CheckpointError: the file is missing or damaged, or of another architecture.
    """
    if weights_unread():
        return build()
    path = folder / "model.safetensors"
    try:
        mapped, wrappers = unwrapped(load_tensors(path), module.state_dict().keys())
    except ValueError as error:
        raise CheckpointError(f"{path} does not hold a model: {error}") from None
    # copied, lest the model change, or die, with its file
    tensors = {name: v.to(torch.float32 if v.is_floating_point() else v.dtype, copy=True) for name, v in mapped.items()}
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    whole = {name for name, _ in named} == module.state_dict().keys()
    if not whole:  # weights are shared, or buffers are stored nowhere: the module makes them itself
        check_tensors(module, tensors, f"{path}{wrappers}")
        module = build()
    fill_module(module, tensors, f"{path}{wrappers}", assign=whole)
    return module


def is_model(path: Path) -> bool:
    """Whether a path is a model folder."""
    return (path / "config.json").is_file() and (path / "model.safetensors").is_file()


def locate(checkpoint: str | Path) -> Path:
    """The local path of a checkpoint, which may lie in a HuggingFace repository.

    Args:
        checkpoint: a path; or ``owner/repository``, ``hf://owner/repository`` for a model folder, or
            ``hf://owner/repository/file`` for a file.

    Raises:
        CheckpointError: there is no such path, or it cannot be fetched.
        ConfigError: huggingface_hub is not installed.
    """
    path, text = Path(checkpoint), str(checkpoint)
    if path.exists():
        return path
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:/(.+))?", text) or re.fullmatch(r"([\w-]+/[\w-]+)()", text)
    if match is None:
        raise CheckpointError(f"there is no file {checkpoint}")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise ConfigError(f"fetching {checkpoint} needs huggingface_hub: pip install 'flowdistill[hub]'") from None
    try:
        if match[2]:
            return Path(hf_hub_download(match[1], match[2]))
        hf_hub_download(match[1], "config.json")
        return Path(hf_hub_download(match[1], "model.safetensors")).parent
    except Exception as error:  # of a repository, a name, or any of the libraries that speak HTTP for the hub's
        reason = " ".join(str(error).split())
        raise CheckpointError(f"there is no file {checkpoint}, and the hub does not give it: {reason}") from None


def load_file(path: str | Path, registry: Registry = TEACHERS, **kwargs: Any) -> Any:
    """The model of somebody else's checkpoint file, by the registered class that reads files with such a suffix.

    Raises:
        ConfigError: no registered class reads such files.
    """
    suffix, readers = Path(path).suffix, readers_of(registry)
    found = [name for name, read in readers.items() if suffix in read]
    for name in found:
        recognises = getattr(registry.get(name), "recognises", None)
        if len(found) == 1 or recognises is None or recognises(Path(path)):
            return registry.build(name, checkpoint=path, **kwargs)
    known = sorted({suffix for read in readers.values() for suffix in read if suffix})
    raise ConfigError(f"{path} has no suffix of a known checkpoint ({', '.join(known)})")


def readers_of(registry: Registry) -> dict[str, tuple[str, ...]]:
    """The names of the registered classes that read files of others, with the suffixes of these."""
    suffixes = {name: getattr(registry.get(name), "suffixes", ()) for name in registry.names()}
    return {name: read for name, read in suffixes.items() if read}
