"""Networks that others have pickled with the source code of their classes, read as data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowdistill.networks.sit_files import NEEDED, SiTFile
from flowdistill.plumbing.files import unwrapped
from flowdistill.plumbing.persistence import RECONSTRUCT, attributes, only_pickle, opened, tensors
from flowdistill.plumbing.pickles import INSTRUCTIONS, Object, OpenReader, as_dictionary, checked

_DTYPES = {
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
}
_ANY = re.compile(r"\w+(\.\w+)+")  # by name alone, as of PyTorch's layers and of timm's
_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_NETWORKS = ("ema", "net")


class _Reader(OpenReader):
    instructions = INSTRUCTIONS - {"BINPERSID"}


def read_pickled_sit(path: Path) -> tuple[SiTFile, str]:
    """The SiT in a pickle, with the number of heads among its options, and the class of what is around it.

    Args:
        path: a file of one pickle of a dictionary, with the network under the key ``ema`` or ``net``.

    Raises:
        CheckpointError: the file is missing, damaged or something else, or wants to run a command.
    """
    with opened(path, "a released student") as data:
        content = as_dictionary(only_pickle(_Reader(), data))
        networks = [content[key] for key in _NETWORKS if key in content]
        if not networks:
            raise ValueError(f"it has no network under the key {' or '.join(map(repr, _NETWORKS))}")
        network = networks[0]
        if isinstance(network, Object) and network.name == _COMPILED:  # which keeps it in a place that has changed
            inside = checked(network.state, dict)["_modules"] if network.state else {}
            network = [*network.arguments, inside.get("_orig_mod")][0]
        match network:
            case Object(maker, ({"class_name": str(class_name)},)) if maker == RECONSTRUCT:
                state = attributes(network, _ANY, class_name)
            case _:
                raise ValueError("its network is of a class that the pickle does not carry")
        found = {name: v.float() for name, v in tensors(data, state, _ANY, _DTYPES)}
        options = {"num_heads": _heads(state), "do_scale_param": state.get("do_scale_param")}
        said = {name: value for name, value in options.items() if isinstance(value, int)}
        inner, wrappers = unwrapped(found, NEEDED)
        return SiTFile(path, inner, said, f"{path}{wrappers}", found), class_name


def _heads(state: Mapping[str, Any]) -> int | None:
    """The number of heads that the first block's attention says it has."""
    for name in ("model", "blocks", "0", "attn"):
        module = checked(state["_modules"], dict).get(name)
        if module is None:
            return None
        state = attributes(module, _ANY)
    heads = state.get("num_heads")
    return heads if type(heads) is int and heads > 0 else None
