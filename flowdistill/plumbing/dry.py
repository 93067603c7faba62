"""Building models without their files, as for a plan, or in processes that get their weights from the first.

Inside `without_files` no weights are read, and networks are made of fake tensors, which have shapes but neither values
nor memory, or keep the fresh weights that they are made with. Data are read only where that is asked for.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

_MODE: ContextVar[contextlib.AbstractContextManager[Any] | None] = ContextVar("mode", default=None)
_DATA_READ: ContextVar[bool] = ContextVar("data_read", default=True)
_M = TypeVar("_M", bound=nn.Module)


def weights_unread() -> bool:
    """Whether models are to be built without their weights."""
    return _MODE.get() is not None


def data_unread() -> bool:
    """Whether data sets are to be built without their data."""
    return weights_unread() and not _DATA_READ.get()


@contextlib.contextmanager
def without_files(values: bool = False, data: bool = False) -> Iterator[None]:
    """Inside, no weights are read; what the models are given may have values, what they give has none.

    Args:
        values: whether the networks keep their fresh weights, so that what they give has values too.
        data: whether data are read.
    """
    token = _MODE.set(contextlib.nullcontext() if values else FakeTensorMode(allow_non_fake_inputs=True))
    data_token = _DATA_READ.set(data)
    try:
        with contextlib.nullcontext() if values else _Cloned():
            yield
    finally:
        _DATA_READ.reset(data_token)
        _MODE.reset(token)


class _Cloned(TorchFunctionMode):
    """Clones tensors where they are to be copied deeply: PyTorch would copy a fake tensor's mode and caches as well."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            clone = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            memo[id(tensor)] = nn.Parameter(clone, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else clone
        return memo[id(tensor)]


def weights() -> contextlib.AbstractContextManager[Any]:
    """Where networks make their weights: of fake tensors while files are unread."""
    return _MODE.get() or contextlib.nullcontext()


def placed(module: _M, device: torch.device) -> _M:
    """The module on a device; untouched where it lies there, since fake weights cannot be moved."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    return module if all(v.device == device for v in tensors) else module.to(device)
