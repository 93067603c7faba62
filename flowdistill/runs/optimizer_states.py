"""The states of optimisers as tensors and JSON, and put back into an optimiser that they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.plumbing.distributed import local
from flowdistill.plumbing.errors import CheckpointError
from flowdistill.plumbing.fields import short
from flowdistill.runs.tensor_files import is_sharded

_OF_THE_DEVICE = {"foreach", "fused"}  # how an optimiser computes, and not what


def pack(value: Any, tensors: MutableMapping[str, Tensor]) -> Any:
    """What JSON can say of a value; its tensors are added to ``tensors``, under the names that stand in their places.

    A value is a tensor, a number, a bool, None, a string, or a list, tuple or dictionary of values. Keys of
    dictionaries are strings or whole numbers.

    Raises:
        TypeError: it is anything else.

    Examples:
        >>> tensors = {}
        >>> pack({0: (0.9, None), "step": torch.ones(())}, tensors)
        {'dict': [[0, {'tuple': [0.9, None]}], ['step', {'tensor': '0'}]]}
        >>> unpack(_, tensors)
        {0: (0.9, None), 'step': tensor(1.)}
    """
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach()
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [pack(part, tensors) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [pack(part, tensors) for part in value]}
    if isinstance(value, dict) and all(type(key) in (int, str) for key in value):
        return {"dict": [[key, pack(part, tensors)] for key, part in value.items()]}
    raise TypeError(f"an optimiser holds a {type(value).__name__}, which is neither a tensor nor plain data")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value of what `pack` gave; ValueError, KeyError or TypeError if it gave something else."""
    if isinstance(packed, list):
        return [unpack(part, tensors) for part in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(unpack(part, tensors) for part in content)
    if kind == "dict":
        return {key: unpack(part, tensors) for key, part in content}
    raise ValueError(f"unknown kind {kind!r}")


def tensors_in(packed: Any) -> Iterator[str]:
    """The names of the tensors in what `pack` gave.

    Examples:
        >>> list(tensors_in({"dict": [[0, {"tensor": "7"}], ["rate", {"tuple": [0.1, {"tensor": "8"}]}]]}))
        ['7', '8']
    """
    if isinstance(packed, dict) and isinstance(packed.get("tensor"), str):
        yield packed["tensor"]
    elif isinstance(packed, (dict, list)):
        for part in packed.values() if isinstance(packed, dict) else packed:
            yield from tensors_in(part)


def restore(
    optimizer: torch.optim.Optimizer,
    saved: Any,
    builder: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    source: Path,
) -> None:
    """Put a saved state into an optimiser, bit for bit.

    Args:
        optimizer: the optimiser, as it was built.
        saved: what its `state_dict` was.
        builder: builds another of its kind, which shows what it holds after a step.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: the state is not of this optimiser or of these parameters; says where they differ.
    """
    own = optimizer.state_dict()
    parameters = dict(
        zip(
            (number for group in own["param_groups"] for number in group["params"]),
            (parameter for group in optimizer.param_groups for parameter in group["params"]),
            strict=True,
        )
    )
    try:
        saved = _shared(saved, parameters, builder)
        _check_saved(saved, own, parameters, builder)
    except ValueError as error:
        raise CheckpointError(f"{source} holds another optimiser than that of the training: {error}") from None
    groups = [
        {**ours, **theirs, **{key: ours[key] for key in _OF_THE_DEVICE & ours.keys()}}
        for ours, theirs in zip(own["param_groups"], saved["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    for number, state in saved["state"].items():
        if number in parameters:
            loaded = optimizer.state[parameters[number]]
            loaded.update(_exact(state, loaded, parameters[number].device))


def _shared(
    saved: Any,
    parameters: Mapping[int, nn.Parameter],
    builder: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> Any:
    """A saved state with vectors of one element in place of the scalars that processes share as such."""
    vectors = {number: p for number, p in parameters.items() if is_sharded(p) and p.shape == (1,)}
    if not vectors or not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return saved
    states = dict(saved["state"])
    for number in vectors.keys() & states.keys():
        for key, like in _state(_probe(builder, vectors[number])).items():
            value = states[number].get(key)
            if isinstance(like, Tensor) and is_sharded(like) and isinstance(value, Tensor) and value.ndim == 0:
                states[number] = {**states[number], key: torch.empty_like(like, dtype=value.dtype)}
                local(states[number][key]).fill_(value)
    return {**saved, "state": states}


def _check_saved(
    saved: Any,
    own: Mapping[str, Any],
    parameters: Mapping[int, nn.Parameter],
    builder: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    """ValueError unless a saved state has an optimiser's own groups, and of each parameter what a step leaves."""
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        raise ValueError("it has no state")
    probes: dict[Any, torch.optim.Optimizer | None] = {}
    for number, state in saved["state"].items():
        if isinstance(number, int) and number not in parameters:
            raise ValueError(f"there is no parameter {number}")
        if number in parameters:
            if not isinstance(state, dict):
                raise ValueError(f"the state of parameter {number} is a {type(state).__name__}")
            parameter = parameters[number]
            kind = (parameter.shape, parameter.dtype)
            if kind not in probes:
                probes[kind] = _probe(builder, parameter)
            _check(state, _state(probes[kind]), f"the state of parameter {number}")
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise ValueError("it has no groups of parameters")
    if len(groups) != len(own["param_groups"]):
        raise ValueError(f"it has {len(groups)} groups of parameters, not {len(own['param_groups'])}")
    later = {key for probe in probes.values() if probe is not None for group in probe.param_groups for key in group}
    for number, (theirs, ours) in enumerate(zip(groups, own["param_groups"], strict=True)):
        if theirs.get("params") != ours["params"]:
            raise ValueError(f"group {number} has other parameters")
        if unknown := theirs.keys() - ours.keys() - later:
            raise ValueError(f"group {number} has {short(sorted(map(str, unknown)))}")
        for key in theirs.keys() & ours.keys() - {"params"}:
            _check(theirs[key], ours[key], f"{key} of group {number}")


def _probe(
    builder: Callable[[list[nn.Parameter]], torch.optim.Optimizer], parameter: nn.Parameter
) -> torch.optim.Optimizer | None:
    """An optimiser of one parameter like this one, after a step with a gradient of zeros; None if that fails."""
    probe = nn.Parameter(torch.zeros_like(parameter))
    probe.grad = torch.zeros_like(probe)
    try:
        optimizer = builder([probe])
        optimizer.step()
    except Exception:  # of a builder of the user's own, which sorts the parameters that it knows
        return None
    return optimizer


def _state(probe: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What a probe holds of its parameter."""
    return {} if probe is None else next((dict(v) for key, v in probe.state.items() if isinstance(key, Tensor)), {})


def _check(value: Any, expected: Any, place: str) -> None:
    """ValueError unless a value can stand where another one stands: of the same kind, shape and type.

    None fits everywhere but in the place of a tensor, and anything fits in the place of None.
    """
    if expected is None or (value is None and not isinstance(expected, Tensor)):
        return
    if isinstance(expected, Tensor) or isinstance(value, Tensor):
        found, wanted = _described(value), _described(expected)
        if found != wanted:
            raise ValueError(f"{place} is {found}, not {wanted}")
    elif _kind(value) is not _kind(expected):
        raise ValueError(f"{place} is {_described(value)}, not {_described(expected)}")
    elif isinstance(expected, dict):
        if missing := expected.keys() - value.keys():
            raise ValueError(f"{place} lacks {', '.join(sorted(map(str, missing)))}")
        for key, part in expected.items():
            _check(value[key], part, f"{key} in {place}")
    elif isinstance(expected, tuple):
        if len(value) != len(expected):
            raise ValueError(f"{place} has {len(value)} entries, not {len(expected)}")
        for part, other in zip(value, expected, strict=True):
            _check(part, other, place)


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _kind(value: Any) -> type:
    return float if isinstance(value, (bool, int, float)) else type(value)


def _exact(value: Any, loaded: Any, device: torch.device) -> Any:
    """A saved value where `Optimizer.load_state_dict` has put it, which casts tensors and loses strings."""
    if isinstance(value, Tensor):
        return value.to(loaded.device if isinstance(loaded, Tensor) else device)
    if isinstance(value, dict):
        inner = loaded if isinstance(loaded, dict) else {}
        return {key: _exact(part, inner.get(key), device) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_exact(part, None, device) for part in value)
    return value
