"""Files of released students, written as their authors write them, from the tensors in tests/golden/students."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from golden_files import golden
from torch import Tensor

import flowdistill

ARGUMENTS = {
    "dmf": {"num_heads": 4, "early_blocks": 3},
    "dmf512": {"early_blocks": 3},
    "meanflow": {"num_heads": 4, "num_classes": 11},
    "secant": {"num_heads": 3},
    "stee": {"num_heads": 3},
    "alphaflow": {"num_heads": 4, "num_classes": 10},
}
"""What the tiny networks need said, as the released ones do not."""


def file_of(name: str) -> str:
    """The golden file that has the weights of a student."""
    return f"students/{'secant' if name == 'stee' else name}_tiny"


def state(name: str) -> dict[str, Tensor]:
    """The state dictionary of a student, under its authors' names."""
    tensors = golden(file_of(name)).part("state_dict")
    if name == "stee":
        changed = golden(file_of(name)).part("state_dict_stee")
        tensors = {k: v for k, v in tensors.items() if not k.startswith("cfg_embedder.")} | changed
    return tensors


def written(name: str, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A file of a student as its authors write it."""
    tensors = state(name) if tensors is None else tensors
    content = {"dmf": tensors, "dmf512": tensors, "meanflow": {"ema": tensors}}
    torch.save(content.get(name, {"net": {}, "ema": tensors, "stats": {"step": 3}}), folder / f"{name}.pt")
    return folder / f"{name}.pt"


def load(name_or_path: object, **kwargs: object) -> flowdistill.FlowMap:
    """`flowdistill.load_flow_map` without its words on licences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return flowdistill.load_flow_map(name_or_path, **kwargs)
