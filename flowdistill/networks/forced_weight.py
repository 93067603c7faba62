"""Layers that replace their own weights."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn


class ForcedWeight(nn.Module, ABC):
    """A layer that in training mode replaces its weights by others, before it uses them.

    A Jacobian-vector product cannot replace weights on the way, so `flowdistill.differentiation` asks for it before.
    """

    replaced_before: bool = False
    """Whether whoever evaluates the network replaces the weights before, since a compiled function cannot."""

    @abstractmethod
    def replace_weight(self) -> None:
        """Replace the weights where that is due; a second call changes nothing."""

    def freeze(self) -> None:
        """Take it that the weights do not change any more; copies are as before. The default does nothing."""
