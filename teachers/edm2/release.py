"""EDM2's released files, read without running anything in them.

A released file is a pickle: a program for a small stack machine, some of whose instructions import and call functions.
Here a stack machine follows it that knows only the instructions such files use and neither imports nor calls: it makes
records of the names and arguments, and from these the tensors are put together. (`pickle.Unpickler` is not safe even
where it may import nothing: a deeply nested tuple as a key of a dictionary overflows its stack and kills the process.)
"""

from __future__ import annotations

import math
import mmap
import pickletools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill.plumbing.errors import CheckpointError

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

_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": frozenset}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_SINCE_MARK = {"TUPLE", "APPENDS", "SETITEMS"}
_TAKES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}
_TAKES |= {"STACK_GLOBAL": 2, "REDUCE": 2, "NEWOBJ": 2, "BUILD": 1, "BINPERSID": 1}
_ALL = {*_CONSTANTS, *_EMPTY, *_VALUES, *_SINCE_MARK, *_TAKES, "PROTO", "MARK", "BINGET", "STOP"}
_INSTRUCTIONS = (_ALL | {"FRAME", "MEMOIZE", "LONG_BINGET", "SHORT_BINBYTES", "BINBYTES"}) - {"LONG1", "BINPERSID"}
_INNER_INSTRUCTIONS = (_ALL | {"BINPUT", "GLOBAL"}) - {"STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"}
_MAX_INSTRUCTIONS, _MAX_MARKS, _MAX_LEVELS = 500_000, 100, 8


@dataclass(frozen=True)
class _Function:
    """Something the file wants to import."""

    name: str


@dataclass(eq=False)
class _Object:
    """What the file wants to make by calling ``name``."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


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
            release = _follow(data, _INSTRUCTIONS, _NAMES)
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


def _follow(data: Any, instructions: set[str], names: set[str]) -> Any:
    """What the pickle at the current position of the file describes; bytes are ranges of positions in the file."""
    stack: list[Any] = []
    outer_stacks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    argument: Any
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
        code, items = opcode.name, []
        if code not in instructions:
            raise ValueError(f"it uses the pickle instruction {code}, at byte {position}, as no such file does")
        if count == _MAX_INSTRUCTIONS or len(outer_stacks) > _MAX_MARKS:
            raise ValueError("it has too many instructions, or nests them too deeply")
        if code in _SINCE_MARK:
            items, stack = stack, outer_stacks.pop()
        elif code in _TAKES:
            if len(stack) < _TAKES[code]:
                raise ValueError(f"it is damaged: the instruction at byte {position} lacks its arguments")
            items = stack[-_TAKES[code] :]
            del stack[-_TAKES[code] :]
        if code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code in _EMPTY:
            stack.append(_EMPTY[code]())
        elif code in _VALUES:
            stack.append(argument)
        elif code.endswith("BINBYTES"):
            stack.append(range(data.tell() - len(argument), data.tell()))
        elif code == "MARK":
            outer_stacks.append(stack)
            stack = []
        elif code.startswith("TUPLE"):
            stack.append(tuple(items))
        elif code.startswith("APPEND"):
            _checked(stack[-1], list).extend(items)
        elif code.startswith("SETITEM"):
            keys = [_checked(key, str) for key in items[::2]]
            _checked(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
        elif code in ("MEMOIZE", "BINPUT"):
            memo[len(memo) if code == "MEMOIZE" else argument] = stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code in ("GLOBAL", "STACK_GLOBAL"):
            name = argument.replace(" ", ".") if code == "GLOBAL" else ".".join(items)
            if name not in names:
                raise ValueError(f"it wants to import {name}")
            stack.append(_Function(name))
        elif code in ("REDUCE", "NEWOBJ"):
            stack.append(_make(_checked(items[0], _Function).name, _checked(items[1], tuple)))
        elif code == "BUILD":
            _checked(stack[-1], _Object).state = items[0]
        elif code == "BINPERSID":
            stack.append(items[0])
        elif code == "FRAME" and argument > len(data) - data.tell():
            raise ValueError("it is truncated")
    if len(stack) != 1 or outer_stacks:
        raise ValueError("it is damaged: its instructions do not add up to one value")
    return stack[0]


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        wrong, right = (t.__name__.strip("_").lower() for t in (type(value), kind))
        raise ValueError(f"it has a value of type {wrong} where such a file has one of type {right}")
    return value


def _make(name: str, arguments: tuple[Any, ...]) -> _Object | dict[str, Any]:
    """A dictionary, empty as yet, or the record of anything else."""
    if name == "numpy.dtype" and arguments[:1] not in (("f4",), ("f8",)):
        raise ValueError("it has an array that is not of floats")
    return {} if name in _DICTS and not arguments else _Object(name, arguments)


def _state(module: Any, class_name: str | None = None) -> dict[str, Any]:
    """The attributes of a module, which must be of the named class."""
    match module:
        case _Object("torch.nn.modules.container.ModuleDict", state=dict(state)) if class_name is None:
            return state
        case _Object(
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
    arguments: dict[str, Any] = _checked(state.get("_init_kwargs"), dict)
    for name, value in arguments.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None and not isinstance(item, (bool, int, float, str)):
                raise ValueError(f"its constructor argument {name} is neither a number, a string, nor a list of them")
    return arguments


def _tensors(data: Any, state: dict[str, Any], prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """The names and tensors of a module and of those in it, of which none may occur twice."""
    names: set[str] = set()
    for kind in ("_parameters", "_buffers", "_modules"):
        group = _checked(state.get(kind), dict)
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
    if isinstance(value, _Object) and value.name in _PARAMETERS and value.arguments:
        value = value.arguments[0]
    match value:
        case _Object(
            "torch._utils._rebuild_tensor_v2",
            (_Object("torch.storage._load_from_bytes", (range() as file,)), int(first), tuple(size), tuple(stride), *_),
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
    pickles = [_follow(data, _INNER_INSTRUCTIONS, set(_DTYPES)) for _ in range(5)]
    count, start = int.from_bytes(data.read(8), "little"), data.tell()
    match pickles:
        case [
            0x1950A86A20F9469CFC6C,
            1001,
            {"little_endian": True},
            ("storage", _Function(kind), str(key), str(), int(numel), None),
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
