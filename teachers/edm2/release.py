"""EDM2's released files, read without running anything in them.

A released file is a pickle. `PickleReader` follows it, confined to the instructions and names that such files use, and
makes records of the names and arguments; from these `flowdistill.plumbing.persistence` puts the tensors together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Set
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowdistill.plumbing.persistence import COMMON, PARAMETERS, RECONSTRUCT, attributes, only_pickle, opened, tensors
from flowdistill.plumbing.pickles import Function, Object, PickleReader, checked

_DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
_DTYPES = {
    "torch.HalfStorage": torch.float16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
}
_CONTAINER = "torch.nn.modules.container.ModuleDict"
_PLAIN = re.compile(re.escape(_CONTAINER))
_NAMES = {
    *_DICTS,
    *PARAMETERS,
    RECONSTRUCT,
    _CONTAINER,
    "torch._utils._rebuild_tensor_v2",
    "torch.storage._load_from_bytes",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
}
_OBJECTS = {"STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD"}


class _ReleaseReader(PickleReader):
    """Reads the pickle of a released file."""

    instructions = COMMON | _OBJECTS | {"FRAME", "MEMOIZE", "LONG_BINGET", "SHORT_BINBYTES", "BINBYTES"}
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
    with opened(Path(path), "a released EDM2 network") as data:
        release = only_pickle(_ReleaseReader(), data)
        if type(release) is not dict or "ema" not in release:
            raise ValueError("it has no network under the key 'ema'")
        state = attributes(release["ema"], _PLAIN, "Precond")
        return _constructor_arguments(state), _float32(dict(tensors(data, state, _PLAIN, _DTYPES)))


def _constructor_arguments(state: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = checked(state.get("_init_kwargs"), dict)
    for name, value in arguments.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None and not isinstance(item, (bool, int, float, str)):
                raise ValueError(f"its constructor argument {name} is neither a number, a string, nor a list of them")
    return arguments


def _float32(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with their gains in float32, those of float16 after a division by sqrt(fan_in) in float16."""
    for name, gain in found.items():
        of_block = name.endswith(".emb_gain")
        if gain.dtype == torch.float16 and (of_block or name == "unet.out_gain"):
            weight = f"{name.removesuffix('emb_gain')}emb_linear.weight" if of_block else "unet.out_conv.weight"
            if weight not in found:
                raise ValueError(f"{name} has no {weight} to go with")
            root = math.sqrt(found[weight][0].numel())
            gain = (gain / root).float() * root
        found[name] = gain.float()
    return found
