"""The precision of float32 products on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let products and convolutions of float32 numbers on a GPU round their factors to TF32, or forbid it.

    TF32 has the 10 bits of a float16's fraction. Whoever has set PyTorch's newer ``fp32_precision`` keeps that.
    """
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    try:
        before = [backend.allow_tf32 for backend in backends]
    except RuntimeError:  # the newer setting is in use
        yield
        return
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value
