"""The reference tensors in tests/golden, computed with the authors' code; the README there names tolerances."""

import functools
import json
from pathlib import Path

import torch
from safetensors import safe_open

FOLDER = Path(__file__).parent / "golden"


class Golden:
    """The tensors of a file and its metadata."""

    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            self.metadata = {k: _value(v) for k, v in (file.metadata() or {}).items()}
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, not a dictionary

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin with ``prefix/``, by the rest of the name."""
        return {key.removeprefix(f"{prefix}/"): self[key] for key in self.tensors if key.startswith(f"{prefix}/")}


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@functools.cache
def golden(name: str) -> Golden:
    return Golden(name)


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference."""
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).abs().max())


def outputs(name: str) -> list[str]:
    """What the authors' code computed: everything but weights, inputs and noise."""
    given = ("state_dict/", "inputs/", "noise/", "gnet")
    return [key for key in golden(name).tensors if not key.startswith(given)]


def recorded(network: torch.nn.Module, names: list[str], call) -> dict[str, torch.Tensor]:
    """The outputs of some submodules during a call."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: found.setdefault(name, out))
        for name in names
    ]
    call()
    for handle in handles:
        handle.remove()
    return found
