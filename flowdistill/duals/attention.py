"""Attention: the value by the kernel that the network chose, the tangent in a memory linear in the tokens.

The tangent is computed by rows, and for many tokens on a GPU by a Triton kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowdistill.duals.engine import RULES, dual, follow, no_graph, parts

_ROWS = 256  # of the queries at a time
_FEWEST_KEYS = 512  # for one kernel
_TRITON = torch.version.hip is None and importlib.util.find_spec("triton") is not None
_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_MATH = functools.partial(sdpa_kernel, SDPBackend.MATH)  # fused kernels have no forward derivative


def _attention(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
    if given.get("dropout_p"):  # fused kernels do not tell their masks
        with _MATH():
            return follow(func, args, kwargs)
    numbers = [parts(given.get(name)) for name in _NAMES[:4]]
    given |= {name: value for name, (value, _) in zip(_NAMES, numbers, strict=False)}
    result = func(**given)
    if all(tangent is None for _, tangent in numbers):
        return dual(result, None)
    with no_graph():
        values: list[Any] = [value for value, _ in numbers]
        tangents: list[Any] = [tangent for _, tangent in numbers]
        for i in range(3):  # autocast
            values[i] = values[i].to(result.dtype)
            tangents[i] = None if tangents[i] is None else tangents[i].to(result.dtype)
        if given.get("enable_gqa"):
            for i in (1, 2):
                shared = values[0].shape[-3] // values[i].shape[-3]
                values[i] = values[i].repeat_interleave(shared, -3)
                tangents[i] = None if tangents[i] is None else tangents[i].repeat_interleave(shared, -3)
        scale = given.get("scale")
        scale = values[0].shape[-1] ** -0.5 if scale is None else scale
        causal = bool(given.get("is_causal"))
        q, k, v, mask = values
        if not takes_kernel(q, k, v, mask):
            return dual(result, _tangent(values, tangents, scale, causal))
        from flowdistill.duals.triton_attention import attention_tangent

        return dual(result, attention_tangent(q, k, v, result, tangents[:3], scale, causal))


def takes_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the Triton kernel computes the tangent: on NVIDIA's GPUs since Ampere, of many tokens without a mask."""
    return (
        _TRITON
        and q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and mask is None
        and k.shape[-2] >= _FEWEST_KEYS
        and v.shape[-1] == q.shape[-1] <= 512 // q.element_size()  # for which there are registers
        and torch.cuda.get_device_properties(q.device).major >= 8
    )


def _tangent(values: Sequence[Any], tangents: Sequence[Any], scale: float, causal: bool) -> Tensor:
    """The tangent of P v with P = softmax(S) and S = scale q k^T + mask.

    It is P dv + dP v with dP = P * dS - P rowsum(P * dS), which is what the backward pass of a softmax computes too.
    """
    q, k, v, mask = values
    dq, dk, dv, dmask = tangents
    if causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    rows = []
    for start in range(0, q.shape[-2], _ROWS):
        queries = q[..., start : start + _ROWS, :] * scale
        scores = queries @ k.mT
        visible = _rows(mask, start)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf) if visible.dtype == torch.bool else scores + visible
        weights = scores.softmax(-1).to(v.dtype)
        if visible is not None:
            weights = weights.nan_to_num(0.0)  # of a query that sees nothing
        moved = [] if dq is None else [dq[..., start : start + _ROWS, :] * scale @ k.mT]
        moved += [] if dk is None else [queries @ dk.mT]
        moved += [] if dmask is None else [_rows(dmask, start)]
        total = [] if dv is None else [weights @ dv]
        if moved:
            change = sum(moved[1:], moved[0]).to(v.dtype).expand(weights.shape)
            total.append(torch.ops.aten._softmax_backward_data(change, weights, -1, v.dtype) @ v)
        rows.append(sum(total[1:], total[0]))
    return rows[0] if len(rows) == 1 else torch.cat(rows, -2)


def _rows(mask: Any, start: int) -> Any:
    whole = mask is None or mask.shape[-2] == 1
    return mask if whole else mask[..., start : start + _ROWS, :]


def _multi_head_attention(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = inspect.signature(func).bind(*args, **kwargs)
    given.apply_defaults()
    if given.arguments["training"] and given.arguments["dropout_p"]:
        with _MATH():
            return follow(func, args, kwargs)
    return follow(func, args, kwargs, around=_MATH)


RULES[F.scaled_dot_product_attention] = _attention
RULES[F.multi_head_attention_forward] = _multi_head_attention
