"""Building models without their files, as for a plan.

Inside `without_files` neither weights nor data are read, and networks are made of fake tensors, which have shapes but
neither values nor memory, or keep the fresh weights that they are made with.
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
_M = TypeVar("_M", bound=nn.Module)


def files_unread() -> bool:
    """Whether models are to be built without their weights, and data sets without their data."""
    return _MODE.get() is not None


@contextlib.contextmanager
def without_files(values: bool = False) -> Iterator[None]:
    """Inside, no weights and no data are read; what the models are given may have values, what they give has none.

    Args:
        values: whether the networks keep their fresh weights, so that what they give has values too.
    """
    token = _MODE.set(contextlib.nullcontext() if values else FakeTensorMode(allow_non_fake_inputs=True))
    try:
        with contextlib.nullcontext() if values else _Cloned():
            yield
    finally:
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
