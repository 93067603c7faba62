"""Networks in pickles of NVIDIA's ``torch_utils.persistence``, read as data, with nothing of them executed.

Such a pickle carries the source code of its classes. A `PickleReader` follows it and makes records; here the modules
are found in these, and their tensors, whose numbers lie in the pickle as files of PyTorch before 1.6.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill.plumbing.errors import CheckpointError
from flowdistill.plumbing.pickles import Function, Object, PickleReader, checked

RECONSTRUCT = "torch_utils.persistence._reconstruct_persistent_obj"
"""The function that such pickles call for an object whose class they carry."""
PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
"""The functions that they call for a parameter."""
CONSTANTS = {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
VALUES = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
CONTAINERS = {"MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}
COMMON = CONSTANTS | VALUES | CONTAINERS | {"PROTO", "BINGET", "STOP"}
"""The instructions that such a pickle and its storages have in common."""
_MAX_LEVELS = 8


class _StorageReader(PickleReader):
    """Reads the pickles of a storage."""

    instructions = COMMON | {"LONG1", "BINPUT", "GLOBAL", "BINPERSID"}

    def __init__(self, kinds: Set[str]) -> None:
        self.kinds = kinds

    def imported(self, name: str) -> Function:
        if name not in self.kinds:
            raise ValueError(f"it wants to import {name}")
        return super().imported(name)


@contextlib.contextmanager
def opened(path: Path, what: str) -> Iterator[mmap.mmap]:
    """The bytes of a file inside a with statement, where all errors become CheckpointError: it is not ``what``."""
    try:
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"reading it ended in {type(error).__name__}: {error}"
        printable = reason[:200].encode("unicode_escape").decode()
        raise CheckpointError(f"{path} is not {what}: {printable}") from None


def only_pickle(reader: PickleReader, data: mmap.mmap) -> Any:
    """What the one pickle of a file describes; ValueError if anything follows it."""
    content = reader.read(data)
    if data.tell() != len(data):
        raise ValueError(f"{len(data) - data.tell()} bytes follow its end")
    return content


def attributes(module: Any, plain: re.Pattern[str], class_name: str | None = None) -> dict[str, Any]:
    """The attributes of a module.

    Args:
        module: the record.
        plain: the names of modules that may be of a class that the pickle does not carry.
        class_name: the class that it must have, carried by the pickle; None is any.

    Raises:
        ValueError: it is something else, or in another version of the format.
    """
    match module:
        case Object(name, state=dict(state)) if class_name is None and plain.fullmatch(name):
            return state
        case Object(maker, ({"version": version, "class_name": str(name), "state": dict(state)},), None) if (
            maker == RECONSTRUCT
        ):
            if version != 6:
                raise ValueError("it is of another version than 6 of the format")
            if class_name not in (None, name):
                raise ValueError(f"its network is a {name}, not a {class_name}")
            return state
    raise ValueError(f"it has something else where it should have a {class_name or 'module'}")


def tensors(
    data: mmap.mmap, state: dict[str, Any], plain: re.Pattern[str], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    """The dotted names and copies of the parameters and buffers of a module and of those in it, none of them twice.

    Args:
        data: the bytes of the file.
        state: the attributes of the module.
        plain: see `attributes`.
        dtypes: of the storages that such files have, by the names of their classes.

    Raises:
        ValueError: modules in a circle, names that are none, or tensors that are not all there.
    """
    yield from _tensors(data, state, "", set(), plain, dtypes)


def _tensors(
    data: mmap.mmap,
    state: dict[str, Any],
    prefix: str,
    seen: set[int],
    plain: re.Pattern[str],
    dtypes: Mapping[str, torch.dtype],
) -> Iterator[tuple[str, Tensor]]:
    names: set[str] = set()
    for kind in ("_parameters", "_buffers", "_modules"):
        group = checked(state.get(kind), dict)
        if id(group) in seen or prefix.count(".") > _MAX_LEVELS:
            raise ValueError(f"module {prefix[:-1]} occurs twice, or is too deep in others")
        seen.add(id(group))
        for key, value in group.items():
            name = f"{prefix}{key}"
            if key in names or not re.fullmatch(r"\w{1,64}", key, re.ASCII):
                raise ValueError(f"a name occurs twice, or is none: {name}")
            names.add(key)
            if kind == "_modules" and value is not None:
                yield from _tensors(data, attributes(value, plain), f"{name}.", seen, plain, dtypes)
            elif value is not None:
                yield name, _tensor(data, value, name, seen, dtypes)


def _tensor(data: mmap.mmap, value: Any, name: str, seen: set[int], dtypes: Mapping[str, torch.dtype]) -> Tensor:
    if isinstance(value, Object) and value.name in PARAMETERS and value.arguments:
        value = value.arguments[0]
    match value:
        case Object(
            "torch._utils._rebuild_tensor_v2",
            (Object("torch.storage._load_from_bytes", (range() as file,)), int(first), tuple(size), tuple(stride), *_),
            None,
        ):
            pass
        case _:
            raise ValueError(f"{name} is not a tensor")
    if first < 0 or not len(size) == len(stride) <= 8 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"{name} has an impossible shape")
    if any(n > 1 and stride[i] != math.prod(size[i + 1 :]) for i, n in enumerate(size)):
        raise ValueError(f"{name} is not contiguous")
    if id(file) in seen:
        raise ValueError(f"{name} is stored together with another tensor")
    seen.add(id(file))
    dtype, start, stored = _storage(data, file, name, dtypes)
    if first + math.prod(size) > stored:
        raise ValueError(f"{name} has more elements than are stored")
    start += first * dtype.itemsize
    numbers = bytearray(data[start : start + math.prod(size) * dtype.itemsize])
    return torch.frombuffer(numbers, dtype=dtype).reshape(size)


def _storage(
    data: mmap.mmap, file: range, name: str, dtypes: Mapping[str, torch.dtype]
) -> tuple[torch.dtype, int, int]:
    """The dtype, the position and the number of the elements that a file in PyTorch's format before 1.6 holds.

    It is five pickles (magic number, format, machine, reference to the storage, key), the number, the elements.
    """
    data.seek(file.start)
    pickles = [_StorageReader(dtypes.keys()).read(data) for _ in range(5)]
    count, start = int.from_bytes(data.read(8), "little"), data.tell()
    match pickles:
        case [
            0x1950A86A20F9469CFC6C,
            1001,
            {"little_endian": True},
            ("storage", Function(kind), str(key), str(), int(numel), None),
            [str(only_key)],
        ] if key == only_key and numel == count and start + count * dtypes[kind].itemsize == file.stop:
            return dtypes[kind], start, count
    raise ValueError(f"{name} is truncated, or not stored as PyTorch does")
