"""The one door to torch-fidelity, which imports torchvision, which cannot be imported beside some builds of torch."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch.library import define


def torch_fidelity(module: str) -> ModuleType:
    """A module of torch-fidelity, such as ``"metric_fid"``.

    Where torch is a CPU build and torchvision is not, torchvision's compiled operators fail to load, and its import
    dies because it attaches Python rules to operators that do not exist. Declaring their schemas first is enough:
    nothing here calls them.
    """
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, OSError):
        for name in ("torchvision::nms", "torchvision::qnms"):
            define(name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(f"torch_fidelity.{module}")
