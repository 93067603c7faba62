"""Building models without their files and without memory, as for a plan.

Inside `without_files` networks are made of fake tensors, which have shapes but no values, and neither weights nor data
are read.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

_MODE: ContextVar[FakeTensorMode | None] = ContextVar("mode", default=None)
_M = TypeVar("_M", bound=nn.Module)


def files_unread() -> bool:
    """Whether models are to be built without their weights, and data sets without their data."""
    return _MODE.get() is not None


@contextlib.contextmanager
def without_files() -> Iterator[None]:
    """Inside, no weights and no data are read; what the models are given may have values, what they give has none."""
    token = _MODE.set(FakeTensorMode(allow_non_fake_inputs=True))
    try:
        yield
    finally:
        _MODE.reset(token)


def weights() -> contextlib.AbstractContextManager[Any]:
    """Where networks make their weights: of fake tensors while files are unread."""
    return _MODE.get() or contextlib.nullcontext()


def placed(module: _M, device: torch.device) -> _M:
    """The module on a device; untouched where it lies there, since fake weights cannot be moved."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return module if all(v.device == device for v in tensors) else module.to(device)
