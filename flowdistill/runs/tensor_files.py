"""The tensors of networks in safetensors files: of one process whole, of several in a file for each.

``student.safetensors`` holds whole tensors, and ``student.00002-of-00004.safetensors`` what the second of four
processes wrote. Its header, under ``parts``, gives the place of each tensor that is a part: so a file explains
itself, its hash covers the places too, and ``meta.json`` does not grow with processes times tensors.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from flowdistill.plumbing.errors import CheckpointError
from flowdistill.plumbing.files import (
    file_fingerprint,
    load_tensors,
    opened_tensors,
    stored_form,
    stream_tensors,
)

_PLACES = "parts"  # the key in a header


@attrs.frozen(eq=False)
class Part:
    """What one process holds of a tensor, which may be all of it."""

    tensor: Tensor
    """The values."""
    offsets: tuple[int, ...]
    """Where they begin in the whole tensor."""
    shape: tuple[int, ...]
    """The shape of the whole tensor."""

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor."""
        return tuple(self.tensor.shape) == self.shape


@attrs.frozen
class Stored:
    """A tensor in files."""

    dtype: torch.dtype
    """Its type."""
    shape: tuple[int, ...]
    """Its whole shape."""
    parts: dict[tuple[int, ...], tuple[Path, tuple[int, ...]]]
    """The file and the shape of each part, by its offsets."""


def file_name(name: str, rank: int, world: int) -> str:
    """The file of a network that one of several processes writes.

    Examples:
        >>> file_name("student", 0, 1), file_name("student", 1, 4)
        ('student.safetensors', 'student.00002-of-00004.safetensors')
    """
    return f"{name}.safetensors" if world == 1 else f"{name}.{rank + 1:05d}-of-{world:05d}.safetensors"


def files_of(name: str, files: Iterable[str]) -> list[str]:
    """Those files that hold a network.

    Examples:
        >>> files_of("ema", ["ema.00001-of-00002.safetensors", "ema_2.safetensors", "ema.json"])
        ['ema.00001-of-00002.safetensors']
    """
    pattern = re.compile(rf"{re.escape(name)}(\.\d{{5,}}-of-\d{{5,}})?\.safetensors")
    return [file for file in files if pattern.fullmatch(file)]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which a process may hold a part."""
    return hasattr(tensor, "__create_chunk_list__")


def staged(states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Part]]:
    """A copy in the memory of the host of what this process holds of each network's tensors.

    Tensors that are one memory, such as tied weights, are copied once.

    Raises:
        TypeError: a safetensors file cannot hold one of them.
    """
    copies: dict[Any, Tensor] = {}

    def copied(tensor: Tensor) -> Part:
        offsets, own = (0,) * tensor.dim(), tensor.detach()
        if is_sharded(tensor):
            dtensor: Any = own
            (chunk,) = dtensor.__create_chunk_list__()
            offsets, own = tuple(chunk.offsets), dtensor.to_local()
        stored_form(own)
        key = (own.data_ptr(), own.device, own.dtype, own.shape, own.stride(), own.is_conj(), own.is_neg())
        if key not in copies:
            copies[key] = torch.empty(own.shape, dtype=own.dtype).copy_(own)
        return Part(copies[key], offsets, tuple(tensor.shape))

    return {network: {name: copied(value) for name, value in state.items()} for network, state in states.items()}


def write_files(folder: Path, parts: Mapping[str, Mapping[str, Part]], rank: int, world: int) -> dict[str, str]:
    """Write a file of each network, on disk, and read it back; returns their hashes.

    Args:
        folder: where to write.
        parts: what this process is to write of each network.
        rank: this process.
        world: how many processes write.

    Raises:
        CheckpointError: a file is not what was written.
        OSError: the disk refused.
    """
    hashes = {}
    for network, own in parts.items():
        path = folder / file_name(network, rank, world)
        places = {name: {"offsets": p.offsets, "shape": p.shape} for name, p in own.items() if not p.whole}
        if places and world == 1:
            raise TypeError(
                f"this process holds a part of {min(places)} of {network}: all of them must save, with a group"
            )
        metadata = {_PLACES: json.dumps(places)} if places else None
        written = stream_tensors(path, {name: part.tensor for name, part in own.items()}, metadata)
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        if file_fingerprint(path) != written:
            raise CheckpointError(f"{path} is truncated or altered: its SHA-256 is not that of what was written")
        hashes[path.name] = written
    return hashes


def stored_tensors(paths: Sequence[Path]) -> dict[str, Stored]:
    """What the files of a network hold, by their headers alone.

    Raises:
        CheckpointError: a file is missing or damaged, or the parts do not make up their tensors.
    """
    found: dict[str, Stored] = {}
    for path in paths:
        with opened_tensors(path) as file:
            places = _places(path, file.metadata() or {})
            for name in file.keys():  # noqa: SIM118, no mapping
                mapped = file.get_tensor(name)
                dtype, sizes = mapped.dtype, tuple(mapped.shape)
                offsets, shape = places.get(name, ((0,) * len(sizes), sizes))
                tensor = found.setdefault(name, Stored(dtype, shape, {}))
                fits = len(offsets) == len(sizes) == len(shape) and all(
                    0 <= offset <= whole - size for offset, size, whole in zip(offsets, sizes, shape, strict=True)
                )
                if not fits or offsets in tensor.parts or (tensor.dtype, tensor.shape) != (dtype, shape):
                    raise CheckpointError(f"{path} is damaged: its part of {name} does not fit the others")
                tensor.parts[offsets] = path, sizes
    for name, tensor in found.items():
        if sum(math.prod(sizes) for _, sizes in tensor.parts.values()) != math.prod(tensor.shape):
            raise CheckpointError(f"{paths[0].parent} is damaged: it does not hold all parts of {name}")
    return found


def _places(path: Path, metadata: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The offsets and whole shapes of the tensors of a file that are parts."""
    try:
        places = json.loads(metadata.get(_PLACES, "{}"))
        return {
            name: (tuple(map(int, place["offsets"])), tuple(map(int, place["shape"]))) for name, place in places.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: its header does not say where its parts belong") from None


@torch.no_grad()
def fill_whole(stored: Mapping[str, Stored], targets: Mapping[str, Tensor]) -> None:
    """Put stored tensors, which may be in parts, into plain tensors of their whole shapes."""
    in_files: dict[Path, list[tuple[str, tuple[int, ...], tuple[int, ...]]]] = {}
    for name in targets:
        for offsets, (path, sizes) in stored[name].parts.items():
            in_files.setdefault(path, []).append((name, offsets, sizes))
    for path, parts in in_files.items():
        with opened_tensors(path) as file:
            for name, offsets, sizes in parts:
                place = tuple(slice(i, i + n) for i, n in zip(offsets, sizes, strict=True))
                targets[name][place].copy_(file.get_tensor(name))


def whole_tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of a network, each whole, from its files.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if len(paths) == 1:
        return load_tensors(paths[0])
    stored = stored_tensors(paths)
    tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in stored.items()}
    fill_whole(stored, tensors)
    return tensors
