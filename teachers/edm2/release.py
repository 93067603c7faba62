"""EDM2's released files, read without running anything in them.

A released file is a pickle. `PickleReader` follows it, confined to the instructions and names that such files use, and
makes records of the names and arguments; from these the tensors are put together.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowdistill.plumbing.errors import CheckpointError
from flowdistill.plumbing.pickles import Function, Object, PickleReader, checked

_DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_DTYPES = {
    "torch.HalfStorage": torch.float16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
}
_NAMES = {
    *_DICTS,
    *_PARAMETERS,
    "torch_utils.persistence._reconstruct_persistent_obj",
    "torch.nn.modules.container.ModuleDict",
    "torch._utils._rebuild_tensor_v2",
    "torch.storage._load_from_bytes",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
}

_CONSTANTS = {"NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"}
_VALUES = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_CONTAINERS = {"MARK", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"}
_COMMON = _CONSTANTS | _VALUES | _CONTAINERS | {"PROTO", "BINGET", "STOP"}
_OBJECTS = {"STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"}
_MAX_LEVELS = 8


class _ReleaseReader(PickleReader):
    """Reads the pickle of a released file."""

    instructions = _COMMON | _OBJECTS | {"FRAME", "MEMOIZE", "LONG_BINGET", "SHORT_BINBYTES", "BINBYTES"}
    names: ClassVar[Set[str]] = _NAMES

    def imported(self, name: str) -> Function:
        if name not in self.names:
            raise ValueError(f"it wants to import {name}")
        return super().imported(name)

    def called(self, function: Any, arguments: tuple[Any, ...]) -> Object | dict[str, Any]:
        """A dictionary, empty as yet, or the record of anything else."""
        name = checked(function, Function).name
        if name == "numpy.dtype" and arguments[:1] not in (("f4",), ("f8",)):
            raise ValueError("it has an array that is not of floats")
        return {} if name in _DICTS and not arguments else Object(name, arguments)


class _StorageReader(_ReleaseReader):
    """Reads the pickles of a storage in a released file."""

    instructions = _COMMON | {"LONG1", "BINPUT", "GLOBAL", "BINPERSID"}
    names = _DTYPES.keys()


def read_release(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The constructor arguments and the tensors of a network in EDM2's released format, with nothing of it executed.

    The tensors are the parameters and buffers under their dotted names, in float32. Where gains are stored in float16,
    EDM2 divides them by sqrt(fan_in) in that precision; they are returned as half(gain / sqrt(fan_in)) sqrt(fan_in), so
    that the network in float32 computes the same.

    Args:
        path: a file of one pickle with the network under the key ``ema``, and nothing behind it.

    Raises:
        CheckpointError: the file is missing, damaged or something else, or wants to do what such a file never does.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"there is no file {path}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            release = _ReleaseReader().read(data)
            if data.tell() != len(data):
                raise ValueError(f"{len(data) - data.tell()} bytes follow its end")
            if type(release) is not dict or "ema" not in release:
                raise ValueError("it has no network under the key 'ema'")
            state = _state(release["ema"], "Precond")
            return _constructor_arguments(state), _float32(dict(_tensors(data, state, "", set())))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except CheckpointError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, ValueError) else f"reading it ended in {type(error).__name__}: {error}"
        printable = reason[:200].encode("unicode_escape").decode()
        raise CheckpointError(f"{path} is not a released EDM2 network: {printable}") from None


def _state(module: Any, class_name: str | None = None) -> dict[str, Any]:
    """The attributes of a module, which must be of the named class."""
    match module:
        case Object("torch.nn.modules.container.ModuleDict", state=dict(state)) if class_name is None:
            return state
        case Object(
            "torch_utils.persistence._reconstruct_persistent_obj",
            ({"version": version, "class_name": str(name), "state": dict(state)},),
            None,
        ):
            if version != 6:
                raise ValueError("it is of another version than 6 of the format")
            if class_name not in (None, name):
                raise ValueError(f"its network is a {name}, not a {class_name}")
            return state
    raise ValueError(f"it has something else where it should have a {class_name or 'module'}")


def _constructor_arguments(state: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = checked(state.get("_init_kwargs"), dict)
    for name, value in arguments.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None and not isinstance(item, (bool, int, float, str)):
                raise ValueError(f"its constructor argument {name} is neither a number, a string, nor a list of them")
    return arguments


def _tensors(data: Any, state: dict[str, Any], prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a module and of those in it, of which none may occur twice."""
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
                yield from _tensors(data, _state(value), f"{name}.", seen)
            elif value is not None:
                yield name, _tensor(data, value, name, seen)


def _tensor(data: Any, value: Any, name: str, seen: set[int]) -> Tensor:
    """A copy of a tensor or parameter: gains as they are stored, all others in float32."""
    if isinstance(value, Object) and value.name in _PARAMETERS and value.arguments:
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
    dtype, start, stored = _storage(data, file, name)
    if first + math.prod(size) > stored:
        raise ValueError(f"{name} has more elements than are stored")
    start += first * dtype.itemsize
    numbers = bytearray(data[start : start + math.prod(size) * dtype.itemsize])
    tensor = torch.frombuffer(numbers, dtype=dtype).reshape(size)
    return tensor if name.endswith("_gain") else tensor.float()


def _storage(data: Any, file: range, name: str) -> tuple[torch.dtype, int, int]:
    """The dtype, the position and the number of the elements that a file in PyTorch's format before 1.6 holds.

    It is five pickles (magic number, format, machine, reference to the storage, key), the number, the elements.
    """
    data.seek(file.start)
    pickles = [_StorageReader().read(data) for _ in range(5)]
    count, start = int.from_bytes(data.read(8), "little"), data.tell()
    match pickles:
        case [
            0x1950A86A20F9469CFC6C,
            1001,
            {"little_endian": True},
            ("storage", Function(kind), str(key), str(), int(numel), None),
            [str(only_key)],
        ] if key == only_key and numel == count and start + count * _DTYPES[kind].itemsize == file.stop:
            return _DTYPES[kind], start, count
    raise ValueError(f"{name} is truncated, or not stored as PyTorch does")


def _float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with their gains in float32, those of float16 after a division by sqrt(fan_in) in float16."""
    for name, gain in tensors.items():
        of_block = name.endswith(".emb_gain")
        if gain.dtype == torch.float16 and (of_block or name == "unet.out_gain"):
            weight = f"{name.removesuffix('emb_gain')}emb_linear.weight" if of_block else "unet.out_conv.weight"
            if weight not in tensors:
                raise ValueError(f"{name} has no {weight} to go with")
            root = math.sqrt(tensors[weight][0].numel())
            gain = (gain / root).float() * root
        tensors[name] = gain.float()
    return tensors
