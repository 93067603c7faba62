"""The seam through which objectives reach a student and its time derivatives.

A derivative is taken along a direction (dx, dt, ds) of the arguments of F(x, t, s), where dt and ds are the same
numbers for the whole batch:

- dX/ds of the Lagrangian identity needs the direction (0, 0, 1);
- the total derivative along a trajectory at fixed s, D_t F = (d_x F) u + d_t F, of the Eulerian identity needs
  (u, 1, 0).

Both functions return F with a graph and, unless asked otherwise, the derivative without: almost no published loss lets
gradients flow through it.
Whatever wraps a student, such as data parallelism or a fused kernel, is to be dealt with here and nowhere else.
"""

from __future__ import annotations

import contextlib
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointError

from flowdistill.duals import Dual, dual, is_foreign, parts
from flowdistill.interfaces import Counted, FlowMap, Jump
from flowdistill.interfaces._counting import count
from flowdistill.networks import ForcedWeight
from flowdistill.networks.attention import plain_attention
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError, FlowDistillError
from flowdistill.plumbing.precision import tf32

_ADVICE = "bind the objective's estimator = @finite_difference() in place of the exact derivative"
_NO_GRADIENT = re.compile("derivative for .* is not implemented")
_LONGEST = 200


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

    One pass: the derivative follows the student's own operations (`flowdistill.duals`), whose values and graph are
    those of a plain evaluation. So it needs the memory of an ordinary training step, dropout has one mask, and whatever
    does not move costs nothing.

    A student with an operation that cannot be followed takes two passes from then on, and a warning says why: a plain
    evaluation with a graph, then a Jacobian-vector product without one.

    With ``graph`` the derivative has one as well, from a Jacobian-vector product that keeps about 2.5 times the memory;
    each `ForcedWeight` replaces its own before, and attention and normalisations are written out.

    Raises:
        ConfigError: PyTorch has no forward derivative of a module of the student; names it.
    """
    direction = dx, dt, ds
    if graph:
        for module in student.modules():
            if isinstance(module, ForcedWeight):
                module.replace_weight()
        return _product(student, jump, *direction, graph=True)
    if torch.compiler.is_compiling():
        return _one_pass(student, jump, *direction)
    # Inference tensors, which have no versions, cannot be followed; that says nothing of the student.
    if torch.is_inference_mode_enabled() or _KEPT.get(student, ()) is None:
        return _two_passes(student, jump, *direction)

    undecided = student not in _KEPT
    masks = _Masks(student, jump.x.device)
    buffers = [(buffer, buffer.clone()) for buffer in student.buffers()] if undecided else []
    try:
        result = _one_pass(student, jump, *direction)
        if undecided:
            _KEPT[student] = _places_of_duals(student)
        for place, name in _KEPT[student] or ():
            place[name] = parts(place[name])[0]
        return result
    except (FlowDistillError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = _first_line(error)

    # What the first try has drawn and changed must not be seen in the second.
    masks.again()
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    result = _two_passes(student, jump, *direction)
    _KEPT[student] = None
    warnings.warn(
        f"values and derivatives of {type(student).__name__} take two passes, which cost more: {reason}",
        RuntimeWarning,
        stacklevel=2,
    )
    return result


# Where students keep tensors of a pass, such as statistics; None for students that need two passes.
_KEPT: WeakKeyDictionary[FlowMap, list[tuple[dict[str, Any], str]] | None] = WeakKeyDictionary()


def _places_of_duals(student: FlowMap) -> list[tuple[dict[str, Any], str]]:
    places = [place for module in student.modules() for place in (vars(module), module._buffers)]
    return [(place, name) for place in places for name, value in place.items() if isinstance(value, Dual)]


def _one_pass(student: FlowMap, jump: Jump, dx: Tensor | None, dt: float, ds: float) -> tuple[Tensor, Tensor]:
    x, t, s, condition = jump
    result = student.average_velocity(
        x if dx is None else dual(x, dx),
        dual(t, torch.full_like(t, dt)) if dt else t,
        dual(s, torch.full_like(s, ds)) if ds else s,
        condition,
    )
    if isinstance(student, Counted):
        count(student, x)  # a derivative counts as an evaluation
    average, slope = parts(result)
    return average, torch.zeros_like(average) if slope is None else slope


def _two_passes(student: FlowMap, jump: Jump, dx: Tensor | None, dt: float, ds: float) -> tuple[Tensor, Tensor]:
    masks = _Masks(student, jump.x.device)
    average = evaluate(student, jump)
    masks.again()
    _, slope = _product(student, jump, dx, dt, ds, graph=False)
    return average, slope


def _product(
    student: FlowMap, jump: Jump, dx: Tensor | None, dt: float, ds: float, graph: bool
) -> tuple[Tensor, Tensor]:
    """F and its derivative by `torch.func.jvp`."""
    x, t, s, condition = jump
    tangents = torch.zeros_like(x) if dx is None else dx, torch.full_like(t, dt), torch.full_like(s, ds)
    try:
        with torch.set_grad_enabled(graph), sdpa_kernel(SDPBackend.MATH), _Rules(graph):
            average, slope = torch.func.jvp(  # type: ignore[misc]
                lambda x, t, s: student.average_velocity(x, t, s, condition), (x, t, s), tangents
            )
    except (FlowDistillError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if graph:
            with torch.no_grad():
                evaluate(student, jump)  # raises the error if it is one of the student's own
        raise ConfigError(_refusal(student, error)) from error
    return average, slope


def backward(loss: Tensor) -> None:
    """The backward pass.

    Raises:
        ConfigError: PyTorch has no gradient of what the loss was made of, such as a derivative.
    """
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        if not isinstance(error, CheckpointError) and not _NO_GRADIENT.search(str(error)):
            raise
        raise ConfigError(
            f"PyTorch has no gradient of this loss: {_ADVICE}, if the gradient goes through it ({_first_line(error)})"
        ) from error


def _refusal(student: FlowMap, error: Exception) -> str:
    """What to do where PyTorch cannot differentiate forwards; names the innermost module in which it failed."""
    names = {id(module): name for name, module in student.named_modules()}
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = [value for value in frames if id(value) in names][-1:] or [student]
    where = f"{names[id(module[0])] or 'the student'} ({type(module[0]).__name__})"
    return f"PyTorch cannot differentiate {where} forwards: {_ADVICE} ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..."


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


class _Rules(TorchFunctionMode):
    """Other forms of operations for which PyTorch's own forward rules are too narrow, or wrong beyond the derivative.

    Group normalisation has a rule for contiguous inputs alone. With ``graph``, for the gradients of derivatives, other
    operations are written out: in PyTorch 2.13 the derivative of a fused normalisation by the input's own mean and
    deviation has the right values and wrong gradients, which leave out what comes through these two; a gated linear
    unit has none; attention's plain kernel has none in 2.11 on a GPU under autocast, where types do not match in the
    backward pass of its softmax.
    """

    def __init__(self, graph: bool) -> None:
        super().__init__()
        self._graph = graph

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if is_foreign(func) and any(map(_is_wrapped, tree_leaves((args, kwargs)))):
            raise NotImplementedError(f"{func} has no forward derivative")  # PyTorch would take it to be 0
        if func is F.group_norm:
            func = _group_norm
        elif func is F.dropout and not self._graph:
            func = _dropout
        elif self._graph and func is F.scaled_dot_product_attention:
            func = plain_attention if len(args) == 3 and not kwargs else func
        elif self._graph and func in _FUSED:
            raise NotImplementedError(f"torch.{func.__name__} has wrong gradients here, torch.nn.functional's has not")
        elif self._graph:
            func = _WRITTEN_OUT.get(func, func)
        return func(*args, **kwargs)


def _is_wrapped(value: Any) -> bool:
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """With the masks of a plain pass, which are drawn in the order of the memory."""
    order = sorted(range(x.ndim), key=x.stride, reverse=True)
    noise = F.dropout(torch.ones([x.shape[i] for i in order], dtype=x.dtype, device=x.device), p, training)
    noise = noise.permute([order.index(i) for i in range(x.ndim)])
    return x.mul_(noise) if inplace else x * noise


def _group_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.group_norm(x.contiguous(), *args, **kwargs)


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


def _layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _normalized(x, list(range(-len(normalized_shape), 0)), weight, bias, eps)


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _normalized_channels(x, list(range(2, x.ndim)), running_mean, weight, bias, eps)


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    return _normalized_channels(x, [0, *range(2, x.ndim)], running_mean, weight, bias, eps)


def _normalized_channels(
    x: Tensor, dims: list[int], running_mean: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if running_mean is not None:
        raise NotImplementedError("running statistics cannot be kept within a Jacobian-vector product")
    weight, bias = (None if p is None else p.reshape(-1, *[1] * (x.ndim - 2)) for p in (weight, bias))
    return _normalized(x, dims, weight, bias, eps)


def _normalized(x: Tensor, dims: list[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    result = centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    result = result if weight is None else result * weight
    result = result if bias is None else result + bias
    return result.to(x.dtype)


_WRITTEN_OUT: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    F.glu: _glu,
}
_FUSED = (torch.layer_norm, torch.instance_norm, torch.batch_norm, torch.native_layer_norm, torch.native_batch_norm)


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
    derivative by t - s = 0, it is 0. The direction must change the duration (dt != ds). Evaluations share their dropout
    masks. They are in float32 even under autocast, because a difference divides rounding errors by h, and on a GPU
    without TF32 for h < 0.03, where its rounding would exceed the difference's own bias.
    """
    x, t, s, condition = jump
    rate = dt - ds  # change of the duration per unit along the direction

    def move(amount: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        moved = x if dx is None else x + expand_time(amount, x) * dx
        return moved, t + dt * amount, s + ds * amount

    with torch.autocast(x.device.type, enabled=False), tf32(False) if h < 0.03 else contextlib.nullcontext():
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
