"""Attention by the fastest kernel for a device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.plumbing.dry import weights_unread

_MOST_PLAIN_TOKENS = 1024


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q k^T/sqrt(d)) v, (..., tokens, d), of queries, keys and values of that shape.

    PyTorch's fused kernels, except on a CPU for up to 1024 tokens: in bfloat16 the backward pass of the fused kernel
    there is ten times slower than that of the products written out, whose weights (tokens, tokens) are small enough.
    """
    # A plan counts what a GPU would do; a compiler cannot look for one.
    planned = not torch.compiler.is_compiling() and weights_unread()
    if q.device.type != "cpu" or q.shape[-2] > _MOST_PLAIN_TOKENS or planned:
        return F.scaled_dot_product_attention(q, k, v)
    return plain_attention(q, k, v)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by products written out."""
    result: Tensor = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1) @ v
    return result
