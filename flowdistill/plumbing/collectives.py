"""What processes exchange, counted where PyTorch calls for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "broadcast_": "broadcast",
    "scatter_": "scatter",
}


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, inside a with statement, the collectives of this process and the bytes of the whole tensors in them.

    Of an all-gather these are the bytes of its result, and of a reduce-scatter those of what it adds up. In a ring of N
    processes each sends (N - 1)/N of them, and twice as much of what is all-reduced.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = _KINDS.get(func._schema.name.removeprefix("c10d::")) if func.namespace == "c10d" else None
        if kind is not None:
            self.counts[kind] += 1
            self.bytes[kind] += max(v.nbytes for v in tree_leaves(args) if isinstance(v, Tensor))
        return result
