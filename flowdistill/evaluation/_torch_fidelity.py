"""The one door to torch-fidelity, which imports torchvision, which cannot be imported beside some builds of torch."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch

_LIBRARY: list[torch.library.Library] = []  # a schema lives as long as its library


def torch_fidelity(module: str) -> ModuleType:
    """A module of torch-fidelity, such as ``"metric_fid"``.

    Where torch is a CPU build and torchvision is not, torchvision's compiled operators fail to load, and its import
    dies because it attaches Python rules to operators that do not exist. Declaring their schemas first is enough:
    nothing here calls them.
    """
    if not _LIBRARY:
        try:
            importlib.import_module("torchvision")
        except (RuntimeError, OSError):
            library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _LIBRARY.append(library)
    return importlib.import_module(f"torch_fidelity.{module}")
