"""Networks whose evaluations are compiled, those of dual numbers included."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.duals import dual, parts
from flowdistill.networks.forced_weight import ForcedWeight
from flowdistill.plumbing.errors import ConfigError

_GRAPHS = 64  # of all networks and batch sizes, with and without gradients and derivatives; PyTorch's own limit is 8


class Compilable:
    """A network whose evaluations `compile_networks` compiles."""

    _backend: str | None = None


def compilable(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a method ``(self, *tensors)`` run compiled where its network asks for it.

    A compiler sees tensors alone, and the method makes the dual numbers of them.
    Where a compiler or `torch.func` follows the method already, it runs as it stands.
    """

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self._backend is None or torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack():
            return method(self, *args, **kwargs)
        if self.training:
            for module in self.modules():
                if isinstance(module, ForcedWeight):
                    module.replace_weight()
        numbers = [parts(argument) for argument in (*args, *kwargs.values())]
        values, tangents = [value for value, _ in numbers], [tangent for _, tangent in numbers]
        value, tangent = _compiled(self._backend)(method, self, tuple(kwargs), values, tangents)
        return value if all(t is None for t in tangents) else dual(value, tangent)

    return run


@functools.cache
def _compiled(backend: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    # A graph for each batch size, so that a run that continues has the same ones. Dropout draws as without a compiler.
    options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None
    return torch.compile(_evaluation, backend=backend, dynamic=False, options=options)


def _evaluation(
    method: Callable[..., Tensor], network: Any, names: Sequence[str], values: Sequence[Any], tangents: Sequence[Any]
) -> tuple[Tensor, Tensor | None]:
    """The value of a method and its tangent; ``names`` are those of its last arguments."""
    numbers = [v if t is None else dual(v, t) for v, t in zip(values, tangents, strict=True)]
    first = len(numbers) - len(names)
    return parts(method(network, *numbers[:first], **dict(zip(names, numbers[first:], strict=True))))


def check_backend(backend: str) -> None:
    """ConfigError unless `torch.compile` has the backend."""
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ConfigError(f"train.compile is a backend of torch.compile, such as {known}, not {backend!r}")


def compile_networks(module: nn.Module, backend: str | None) -> None:
    """Compile the evaluations of all networks in a module, and in copies that are made of it afterwards.

    Each batch size, with or without gradients and derivatives, becomes one graph at its first evaluation.
    The evaluations are those of `VelocityNetwork.velocity`, within `differentiation.jvp` too.

    Args:
        module: the module.
        backend: of `torch.compile`, such as "inductor"; None ends it.
    """
    if backend is not None:
        settings = torch._dynamo.config
        name = "recompile_limit" if hasattr(settings, "recompile_limit") else "cache_size_limit"
        setattr(settings, name, max(_GRAPHS, getattr(settings, name)))
    for part in module.modules():
        if isinstance(part, Compilable):
            part._backend = backend
        if isinstance(part, ForcedWeight):
            part.replaced_before = backend is not None
