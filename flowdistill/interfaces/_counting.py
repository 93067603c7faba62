"""Counting of network evaluations, shared by teachers, flow maps and the models of objectives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Counted:
    """A model that counts its evaluations; the log and the budgets of searches read the count."""

    _evaluations: int = 0

    @property
    def evaluations(self) -> int:
        """Evaluations of the network (or closed form) so far, counted per sample."""
        return self._evaluations


def count(model: Any, x: Tensor) -> None:
    """Count one evaluation of each sample; not within a compiled function, which each new count would compile again."""
    if not torch.compiler.is_compiling():
        model._evaluations += len(x)


def counted(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a method ``(self, x, ...)`` add its batch size to ``self._evaluations``.

    Only the method of the object's own class counts, so that an override that calls its parent's
    method is one evaluation, not two.
    """

    @functools.wraps(method)
    def counting(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = method(self, x, *args, **kwargs)
        if getattr(type(self), method.__name__) is counting:
            count(self, x)  # afterwards, since a bar shows what has been done
        return result

    return counting
