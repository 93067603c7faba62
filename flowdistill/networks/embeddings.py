"""Embeddings of scalars, labels and positions, as SiT and DiT have them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flowdistill.interfaces import NULL_LABEL
from flowdistill.networks.linear import Linear
from flowdistill.plumbing.dry import weights_unread
from flowdistill.plumbing.errors import ConfigError


def sinusoids(value: Tensor, size: int) -> Tensor:
    """[cos(v f_k), sin(v f_k)] with f_k = 10000^(-2k/size) for k < size/2: (B,) to (B, size)."""
    half = size // 2
    steps = torch.arange(half, device=value.device, dtype=value.dtype)
    angles = value[:, None] * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


class ScalarEmbedding(nn.Module):
    """Sinusoids of a scalar (a time, a duration, a guidance scale) through a two-layer perceptron.

    The scalar is used as it is: times lie in [0, 1] and are not multiplied by 1000, which would multiply the network's
    time derivative as well.

    Args:
        size: of the embedding.
        zero_init: start with an output of exactly zero.
    """

    num_sinusoids = 256

    def __init__(self, size: int, zero_init: bool = False) -> None:
        super().__init__()
        first, last = Linear(self.num_sinusoids, size), Linear(size, size)
        for layer in (first, last):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if zero_init:
            nn.init.zeros_(last.weight)
        self.mlp = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, value: Tensor) -> Tensor:
        """Embed scalars (B,) as (B, size)."""
        dtype = next(self.mlp.parameters()).dtype
        features = sinusoids(value.to(torch.promote_types(dtype, torch.float32)), self.num_sinusoids)
        embedded: Tensor = self.mlp(features.to(dtype))
        return embedded


class LabelEmbedding(nn.Module):
    """A table of class embeddings with one more row for the null label.

    Args:
        num_classes: number of classes.
        size: of the embedding.
        null_label: whether there is that row.
    """

    def __init__(self, num_classes: int, size: int, null_label: bool = True) -> None:
        super().__init__()
        self.num_classes, self.null_label = num_classes, null_label
        self.embedding_table = nn.Embedding(num_classes + null_label, size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        """Embed labels (B,) as (B, size); NULL_LABEL and ``num_classes`` both mean no class.

        Raises:
            ConfigError: no class is asked for, and there is no null label.
        """
        all_fit = self.null_label or torch.compiler.is_compiling() or weights_unread()  # or have no values yet
        if not all_fit and bool(((labels < 0) | (labels >= self.num_classes)).any()):
            raise ConfigError(
                "each sample needs a class: the network was trained without dropping labels and has no null label"
            )
        rows = labels.masked_fill(labels == NULL_LABEL, self.num_classes)
        embedded: Tensor = self.embedding_table(rows)
        return embedded


def position_table(grid: int, size: int) -> Tensor:
    """The fixed sine-cosine table of a square grid of patches, (1, grid^2, size).

    The first half of the channels encodes the column and the second the row; each half is [sin(i w_k), cos(i w_k)] with
    w_k = 10000^(-k / (size/4)).
    """
    steps = torch.arange(size // 4, dtype=torch.float64)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * 10000.0 ** (-steps / (size / 4))
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = line.repeat(grid, 1)
    rows = line.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1)[None].float()
