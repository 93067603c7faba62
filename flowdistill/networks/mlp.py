"""A residual perceptron for vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.networks.base import VelocityNetwork, check_sizes, widened
from flowdistill.networks.embeddings import LabelEmbedding, ScalarEmbedding
from flowdistill.networks.linear import Linear
from flowdistill.plumbing.registry import register_network


class _Block(nn.Module):
    """A residual two-layer perceptron whose input is scaled and shifted by the conditioning vector."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.modulation = Linear(size, 2 * size)
        self.first, self.last = Linear(size, size), Linear(size, size)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).chunk(2, dim=1)
        hidden: Tensor = self.last(F.silu(self.first(F.silu(x * (1 + scale) + shift))))
        return x + hidden


@register_network("mlp")
class MLP(VelocityNetwork):
    """A residual perceptron on vectors, conditioned on time, label and the embedding given to it; 0 when fresh.

    Args:
        dim: size of a sample.
        hidden_size: width.
        depth: residual blocks.
        num_classes: number of classes; None for an unconditional network.

    Examples:
        >>> MLP(dim=2, hidden_size=32).velocity(torch.randn(5, 2), torch.rand(5)).shape
        torch.Size([5, 2])
    """

    def __init__(self, dim: int = 2, hidden_size: int = 128, depth: int = 3, num_classes: int | None = None) -> None:
        super().__init__()
        check_sizes(dim=dim, hidden_size=hidden_size, depth=depth, num_classes=num_classes)
        self.sample_shape, self.num_classes, self.embedding_size = (dim,), num_classes, hidden_size
        self.early_blocks = round(depth * 2 / 3)
        self.input = Linear(dim, hidden_size)
        self.time_embedding = ScalarEmbedding(hidden_size)
        self.label_embedding = None if num_classes is None else LabelEmbedding(num_classes, hidden_size)
        self.blocks = nn.ModuleList(_Block(hidden_size) for _ in range(depth))
        self.output = Linear(hidden_size, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @property
    def layer_modules(self) -> list[nn.Module]:
        """The residual blocks."""
        return list(self.blocks)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        embedding: Tensor | None = None,
        late_time: Tensor | None = None,
    ) -> Tensor:
        """The output at (x, t)."""
        early = late = self._condition(t, labels, embedding)
        if late_time is not None:
            late = self._condition(late_time, labels, embedding)
        hidden = self.input(x)
        for i, block in enumerate(self.blocks):
            hidden = block(hidden, early if i < self.early_blocks else late)
        result: Tensor = self.output(F.silu(hidden))
        return result

    def widen_output(self, velocities: int, extra: int = 0) -> None:
        """See `VelocityNetwork.widen_output`."""
        (dim,) = self.sample_shape
        self.output = widened(self.output, dim, dim, velocities, extra)

    def _condition(self, t: Tensor, labels: Tensor | None, embedding: Tensor | None) -> Tensor:
        c: Tensor = self.time_embedding(t)
        if self.label_embedding is not None:
            if labels is None:
                labels = torch.full((t.shape[0],), self.label_embedding.num_classes, device=t.device)
            c = c + self.label_embedding(labels)
        return F.silu(c if embedding is None else c + embedding)
