"""The tangent of attention by one Triton kernel, which stores no scores; only who runs it imports this module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@triton.jit
def _load(pointer, rows, columns, stride, height, width):
    """Some rows of a matrix, with zeros outside of it."""
    inside = (rows[:, None] < height) & (columns[None, :] < width)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _kernel(
    query,
    key,
    value,
    query_tangent,
    key_tangent,
    value_tangent,
    output,
    output_tangent,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    output_batch,
    output_head,
    output_row,
    tangent_batch,
    tangent_head,
    tangent_row,
    heads,
    queries,
    keys,
    scale,
    unit: tl.constexpr,
    width: tl.constexpr,
    precision: tl.constexpr,
    query_moves: tl.constexpr,
    key_moves: tl.constexpr,
    value_moves: tl.constexpr,
    causal: tl.constexpr,
    block_queries: tl.constexpr,
    block_keys: tl.constexpr,
    block_width: tl.constexpr,
):
    """A block of queries of one head, over all blocks of keys, by the online softmax of FlashAttention.

    With p_j = exp(s_j - m), where m is a query's largest score so far, it sums up

        total = sum p_j,   moved = sum p_j ds_j,   result = sum p_j (dv_j + ds_j v_j)

    and rescales the sums where m grows. The tangent is result / total - (moved / total) o.

    Strides are in units of ``unit`` elements: a constant factor tells the compiler that loads are aligned.
    A tangent of an argument is read by the argument's strides.
    """
    # The matrices of this head.
    blocks = tl.cdiv(queries, block_queries)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    query_start = (batch * query_batch + head * query_head) * unit
    key_start = (batch * key_batch + head * key_head) * unit
    value_start = (batch * value_batch + head * value_head) * unit
    output_start = (batch * output_batch + head * output_head) * unit
    tangent_start = (batch * tangent_batch + head * tangent_head) * unit

    # The queries of this block, which stay.
    rows = block * block_queries + tl.arange(0, block_queries)
    columns = tl.arange(0, block_width)
    q = _load(query + query_start, rows, columns, query_row * unit, queries, width)
    if query_moves:
        dq = _load(query_tangent + query_start, rows, columns, query_row * unit, queries, width)

    # The sums over the keys.
    largest = tl.full([block_queries], float("-inf"), tl.float32)
    total = tl.zeros([block_queries], tl.float32)
    moved = tl.zeros([block_queries], tl.float32)
    result = tl.zeros([block_queries, block_width], tl.float32)
    stop = keys
    if causal:
        stop = tl.minimum(keys, (block + 1) * block_queries)
    for start in range(0, stop, block_keys):
        others = start + tl.arange(0, block_keys)
        k = _load(key + key_start, others, columns, key_row * unit, keys, width)
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * (scale * 1.4426950408889634)  # log2(e), for exp2
        visible = others[None, :] < keys
        if causal:
            visible = visible & (others[None, :] <= rows[:, None])
        scores = tl.where(visible, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp2(largest - larger)
        p = tl.exp2(scores - larger[:, None])
        largest = larger
        total = total * shrink + tl.sum(p, 1)
        result = result * shrink[:, None]
        if value_moves:
            dv = _load(value_tangent + value_start, others, columns, value_row * unit, keys, width)
            result = tl.dot(p.to(dv.dtype), dv, result, input_precision=precision)
        if query_moves or key_moves:
            ds = tl.zeros([block_queries, block_keys], tl.float32)
            if query_moves:
                ds = tl.dot(dq, tl.trans(k), ds, input_precision=precision)
            if key_moves:
                dk = _load(key_tangent + key_start, others, columns, key_row * unit, keys, width)
                ds = tl.dot(q, tl.trans(dk), ds, input_precision=precision)
            pds = p * (ds * scale)
            moved = moved * shrink + tl.sum(pds, 1)
            v = _load(value + value_start, others, columns, value_row * unit, keys, width)
            result = tl.dot(pds.to(v.dtype), v, result, input_precision=precision)

    # The tangent.
    result = result / total[:, None]
    if query_moves or key_moves:
        o = _load(output + output_start, rows, columns, output_row * unit, queries, width)
        result = result - (moved / total)[:, None] * o.to(tl.float32)
    inside = (rows[:, None] < queries) & (columns[None, :] < width)
    at = output_tangent + tangent_start + rows[:, None] * (tangent_row * unit) + columns[None, :]
    tl.store(at, result.to(output_tangent.dtype.element_ty), mask=inside)


def attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    tangents: Sequence[Tensor | None],
    scale: float,
    causal: bool = False,
) -> Tensor:
    """The tangent of output = softmax(scale query key^T) value, of the output's shape.

    Args:
        query: (..., N, width), in float16, bfloat16 or float32.
        key: (..., M, width), in the dtype of the query.
        value: (..., M, width), in the dtype of the query.
        output: (..., N, width), in the dtype of the query.
        tangents: of query, key and value, in their shapes; None is zero, and costs nothing.
        scale: of the scores.
        causal: whether query i sees only the keys j <= i.
    """
    lead = output.shape[:-2]
    pairs = [_laid_out(*pair, lead) for pair in zip((query, key, value), tangents, strict=True)]
    output = _heads(output, lead)
    (query, dq), (key, dk), (value, dv) = pairs
    result: Tensor = _attention_tangent(query, key, value, output, dq, dk, dv, scale, causal)
    return result.reshape(*lead, *result.shape[-2:])


def _heads(x: Tensor, lead: Sequence[int]) -> Tensor:
    """As (batch, heads, tokens, width) with neighbouring columns; a copy only where there is no such view."""
    x = x.expand(*lead, *x.shape[-2:])
    x = x.reshape(math.prod(lead[:-1]), lead[-1] if lead else 1, *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _laid_out(value: Tensor, tangent: Tensor | None, lead: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """The two with the same strides."""
    value = _heads(value, lead)
    if tangent is None:
        return value, None
    tangent = _heads(tangent, lead)
    return (value, tangent) if value.stride() == tangent.stride() else (value.contiguous(), tangent.contiguous())


@torch.library.custom_op(  # which compilers do not look into, and whose operations are counted
    "flowdistill::attention_tangent",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor output, Tensor? query_tangent, Tensor? key_tangent, "
    "Tensor? value_tangent, float scale, bool causal) -> Tensor",
)
def _attention_tangent(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    query_tangent: Tensor | None,
    key_tangent: Tensor | None,
    value_tangent: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    batch, heads, queries, width = query.shape
    result = torch.empty_like(output)
    strides = [step for x in (query, key, value, output, result) for step in _strides(x)]
    unit = math.gcd(16, *strides)
    blocks = _blocks(width, query.element_size())
    with torch.cuda.device_of(query):  # type: ignore[no-untyped-call]
        _kernel[(batch * heads * triton.cdiv(queries, blocks["block_queries"]),)](
            query,
            key,
            value,
            query if query_tangent is None else query_tangent,  # is not read then
            key if key_tangent is None else key_tangent,
            value if value_tangent is None else value_tangent,
            output,
            result,
            *(step // unit for step in strides),
            heads,
            queries,
            key.shape[-2],
            scale,
            unit=unit,
            width=width,
            precision="tf32x3",  # float32 on tensor cores, by three products each
            query_moves=query_tangent is not None,
            key_moves=key_tangent is not None,
            value_moves=value_tangent is not None,
            causal=causal,
            **blocks,
        )
    return result


@_attention_tangent.register_fake
def _fake(query: Tensor, key: Tensor, value: Tensor, output: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(output)


@register_flop_formula(torch.ops.flowdistill.attention_tangent)
def _operations(query: Any, key: Any, value: Any, output: Any, dq: Any, dk: Any, dv: Any, *rest: Any, **_: Any) -> int:
    moves = [tangent is not None for tangent in (dq, dk, dv)]
    products = 1 + sum(moves) + (moves[0] or moves[1])
    operations: int = 2 * products * math.prod(query) * key[-2]
    return operations


def _strides(x: Tensor) -> list[int]:
    """But for the columns; those of single entries, which can be any number, are 0."""
    return [step if length > 1 else 0 for length, step in zip(x.shape[:-1], x.stride(), strict=False)]


def _blocks(width: int, bytes_of_one: int) -> dict[str, int]:
    """Sizes of blocks, whose buffers fit into 99 KiB of shared memory, and which the registers hold (almost) all."""
    block_width = max(16, triton.next_power_of_2(width))
    if bytes_of_one == 4:
        queries, keys, warps = (32, 16, 4) if block_width <= 64 else (16, 16, 4)
    elif block_width <= 64:
        queries, keys, warps = 64, 64, 4
    else:
        queries, keys, warps = (64 if block_width == 128 else 32), 32, 8
    sizes = {"block_queries": queries, "block_keys": keys, "block_width": block_width}
    return sizes | {"num_warps": warps, "num_stages": 2}
