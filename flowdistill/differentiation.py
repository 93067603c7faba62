"""The seam through which objectives reach a student and its time derivatives.

A derivative is taken along a direction (dx, dt, ds) of the arguments of F(x, t, s), where dt and ds are the same
numbers for the whole batch:

- dX/ds of the Lagrangian identity needs the direction (0, 0, 1);
- the total derivative along a trajectory at fixed s, D_t F = (d_x F) u + d_t F, of the Eulerian identity needs
  (u, 1, 0).

Both functions return F with a graph and, unless asked otherwise, the derivative without: almost no published loss lets
gradients flow through it.
Whatever wraps a student (data parallelism, compilation, a fused kernel) is to be dealt with here and nowhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from flowdistill.interfaces import FlowMap, Jump
from flowdistill.networks import ForcedWeight
from flowdistill.networks.attention import plain_attention
from flowdistill.paths import expand_time


def evaluate(student: FlowMap, jump: Jump) -> Tensor:
    """F(x, t, s) with a graph."""
    return student.average_velocity(*jump)


def jvp(
    student: FlowMap,
    jump: Jump,
    *,
    dx: Tensor | None = None,
    dt: float = 0.0,
    ds: float = 0.0,
    graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """F with a graph, and its exact derivative by forward-mode differentiation.

    Two passes: a plain evaluation with a graph, whose memory is that of an ordinary training step, then a
    Jacobian-vector product without one. The plain pass is first because networks in training mode may replace their
    weights on the way, which a product cannot. Attention runs in its plain form within the product, since fused kernels
    have no forward-mode derivative. With ``graph`` the derivative has one as well, from a single pass that keeps about
    2.5 times the memory; each `ForcedWeight` replaces its own before, and attention
    and layer normalisation are written out. Dropout has the same masks in both passes.
    """
    x, t, s, condition = jump
    masks = _Masks(student, x.device)
    tangents = (
        torch.zeros_like(x) if dx is None else dx,
        torch.full_like(t, dt),
        torch.full_like(s, ds),
    )
    plain = None
    if graph:
        for module in student.modules():
            if isinstance(module, ForcedWeight):
                module.replace_weight()
    else:
        plain = evaluate(student, jump)
        masks.again()
    written_out = _WrittenOut() if graph else contextlib.nullcontext()
    with torch.set_grad_enabled(graph), sdpa_kernel(SDPBackend.MATH), written_out:
        average, slope = torch.func.jvp(  # type: ignore[misc]
            lambda x, t, s: student.average_velocity(x, t, s, condition), (x, t, s), tangents
        )
    return (average if plain is None else plain), slope


class _Masks:
    """Lets the next evaluation draw the dropout masks of the first, in training mode."""

    def __init__(self, student: FlowMap, device: torch.device) -> None:
        self._device, self._states = device, []
        if student.training:
            self._states = [torch.get_rng_state()]
            if device.type == "cuda":
                self._states.append(torch.cuda.get_rng_state(device))

    def again(self) -> None:
        if self._states:
            torch.set_rng_state(self._states[0])
        if len(self._states) > 1:
            torch.cuda.set_rng_state(self._states[1], self._device)


class _WrittenOut(TorchFunctionMode):
    """Layer normalisation and attention from elementary operations, for the gradients of their derivatives.

    In PyTorch 2.13 the derivative of the fused layer normalisation has the right values and wrong gradients: they leave
    out what comes through the mean and the deviation that it keeps. That of attention's plain kernel has none at all in
    2.11 on a GPU under autocast, where types do not match in the backward pass of its softmax.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.layer_norm:
            func = _layer_norm
        elif func is F.scaled_dot_product_attention and len(args) == 3 and not kwargs:
            func = plain_attention
        return func(*args, **(kwargs or {}))


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = list(range(-len(normalized_shape), 0))
    centred = wide - wide.mean(dims, keepdim=True)
    result = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    return result.to(x.dtype)


def finite_difference(
    student: FlowMap,
    jump: Jump,
    *,
    dx: Tensor | None = None,
    dt: float = 0.0,
    ds: float = 0.0,
    h: float = 0.1,
    scheme: Literal["backward", "central"] = "backward",
) -> tuple[Tensor, Tensor]:
    """F with a graph, and its derivative by a difference of step ``h`` in the duration t - s.

    ``backward`` steps to shorter durations only, which the student has learnt earlier, and reuses F: one more
    evaluation, an error of O(h). ``central`` steps both ways: two more evaluations, an error of O(h^2), or O(h) where
    a step is cut. Steps are cut where they would leave 0 <= s <= t <= 1; at t = s, where every identity multiplies the
    derivative by t - s = 0, it is 0. The direction must change the duration (dt != ds). Evaluations are in full
    precision even under autocast, because a difference divides rounding errors by h, and share their dropout masks.
    """
    x, t, s, condition = jump
    rate = dt - ds  # change of the duration per unit along the direction

    def move(amount: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moved = x if dx is None else x + expand_time(amount, x) * dx
        return moved, t + dt * amount, s + ds * amount

    with torch.autocast(x.device.type, enabled=False):
        masks = _Masks(student, x.device)
        average = evaluate(student, jump)
        masks.again()
        with torch.no_grad():
            shorter = -torch.clamp(t - s, max=h) / rate
            low = student.average_velocity(*move(shorter), condition)
            if scheme == "central":
                room = torch.full_like(t, h)
                if dt:
                    room = torch.minimum(room, (1 - t) * abs(rate / dt))
                if ds:
                    room = torch.minimum(room, s * abs(rate / ds))
                longer = room / rate
                masks.again()
                high = student.average_velocity(*move(longer), condition)
            else:
                longer, high = torch.zeros_like(t), average.detach()
            gap = longer - shorter
            slope = (high - low) / expand_time(torch.where(gap == 0, torch.ones_like(gap), gap), x)
            slope = slope * expand_time((t != s).to(slope.dtype), x)
    return average, slope
