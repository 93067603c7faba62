"""The rules of what networks are made of.

Normalisations, softmax and activations have symmetric derivatives, so PyTorch's backward kernels are their tangents.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from flowdistill.duals.engine import (
    COMPILED,
    RULES,
    Dual,
    Function,
    Opaque,
    Refused,
    constant,
    dual,
    follow,
    in_place,
    in_place_or_not,
    linear,
    linear_by,
    no_graph,
    parts,
    register_rule,
)
from flowdistill.plumbing.errors import ConfigError

aten = torch.ops.aten
T = torch.Tensor
Tangents = Sequence[Any]


def _named(names: str) -> list[Any]:
    """The functions and methods of these names."""
    places = (torch, F, torch.linalg, torch.special, torch.fft)
    found = [
        getattr(place, name, None)
        for name in names.split()
        for place in (T, *(() if name.startswith("__") else places))
    ]
    return [func for func in dict.fromkeys(found) if callable(func)]


# ---- what does not move


for _name in dir(T):
    if inspect.isgetsetdescriptor(getattr(T, _name)):
        RULES[getattr(T, _name).__get__] = constant
for _func in _named(
    "full_like zeros_like ones_like rand_like randn_like randint_like empty_like new_full new_zeros new_ones new_empty "
    "new_tensor dim ndimension size stride numel nelement storage_offset element_size __len__ get_device "
    "is_contiguous is_floating_point is_complex is_inference is_same_size is_conj is_neg is_set_to _is_view "
    "result_type eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ equal allclose "
    "isclose isfinite isnan isinf isneginf isposinf any all logical_not logical_and logical_or argmax argmin argsort "
    "sign signbit floor ceil round trunc fix floor_divide __floordiv__ int long short byte bool char __bool__ __int__ "
    "__index__ __repr__ __format__ __str__ __hash__ __contains__ register_hook retain_grad "
    "register_post_accumulate_grad_hook backward"
):
    RULES[_func] = constant
if _saving := getattr(torch.utils.checkpoint, "_NoopSaveInputs", None):  # of PyTorch before 2.13
    RULES[_saving] = constant


def _detach(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Remains a dual, so that its numbers are missed where they leave PyTorch."""
    return dual(constant(func, args, kwargs), None)


def _out_of_sight(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if func is T.untyped_storage and not isinstance(args[0], Opaque):  # a compiler asks
        return constant(func, args, kwargs)
    raise Refused(f"{func.__name__} goes past the derivative")


def _number(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Where a number of Python is taken out of a tensor; two passes would not see that either."""
    hidden = func.__name__ == "__get__"
    if not hidden and parts(args[0])[1] is None:
        return constant(func, args, kwargs)
    if hidden and func.__self__.__name__ == "_base":
        return None
    raise ConfigError(
        f"no derivative goes through Tensor.{func.__self__.__name__ if hidden else func.__name__}: if a network takes "
        "constants by it, let it take them of x.detach(); else bind the objective's estimator = @finite_difference()"
    )


for _func in _named("detach"):
    RULES[_func] = _detach
for _func in _named("numpy __array__ data_ptr untyped_storage storage __dlpack__ as_strided"):
    RULES[_func] = _out_of_sight
RULES[torch.autograd.grad] = RULES[torch.autograd.backward] = _out_of_sight
for _func in _named("item __float__ __complex__ tolist"):
    RULES[_func] = _number
for _name in ("data", "_base"):
    RULES[getattr(T, _name).__get__] = _number


# ---- structure, sums, pooling


for _func in _named(
    "reshape flatten transpose permute movedim moveaxis swapaxes swapdims t adjoint squeeze unsqueeze expand "
    "broadcast_to chunk split tensor_split unbind split_with_sizes contiguous clone cpu float double half bfloat16 "
    "neg negative __neg__ positive sum mean cumsum roll flip rot90 repeat repeat_interleave tile narrow select "
    "diagonal diag_embed trace tril triu unfold fold __getitem__ index_select gather take_along_dim interpolate "
    "upsample pixel_shuffle pixel_unshuffle channel_shuffle avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_avg_pool3d real imag conj view_as_real fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 "
    "fftn ifftn rfftn irfftn fftshift ifftshift"
):
    RULES[_func] = linear
for _name in ("T", "mT", "H", "mH", "real", "imag"):
    RULES[getattr(T, _name).__get__] = linear


def _like(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What takes of its further arguments the shape or the dtype alone."""
    if not args or not isinstance(args[0], Dual):
        return constant(func, args, kwargs)
    if func is T.view and (kwargs or isinstance(args[1], torch.dtype)):
        return follow(func, args, kwargs)
    return linear_by(_REARRANGED.get(func, func), func, [args[0], *(parts(v)[0] for v in args[1:])], kwargs)


def _dense(func: Function, tangent: Tensor, *args: Any, **kwargs: Any) -> Any:
    return func(tangent.contiguous(), *args, **kwargs)


# A tangent may lie in memory such that a view of its value's kind does not exist.
_REARRANGED: dict[Any, Function] = {
    T.view: T.reshape,
    T.view_as: T.reshape_as,
    **{func: functools.partial(_dense, func) for func in _named("unflatten view_as_complex")},
}
for _func in _named("view unflatten view_as_complex view_as reshape_as expand_as type_as to"):
    RULES[_func] = _like


def _together(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if not args or not isinstance(args[0], (tuple, list)):
        return follow(func, args, kwargs)
    values, tangents = zip(*map(parts, args[0]), strict=True)
    result = func(values, *args[1:], **kwargs)
    if all(tangent is None for tangent in tangents):
        return dual(result, None)
    with no_graph():
        moving = [torch.zeros_like(v) if d is None else d for v, d in zip(values, tangents, strict=True)]
        return dual(result, func(moving, *args[1:], **kwargs))


for _func in _named("cat concat concatenate stack hstack vstack dstack"):
    RULES[_func] = _together


# ---- sums and products


@register_rule(*_named("add __add__ __radd__"))
def _add(y: Tensor, tangents: Tangents, a: Any, b: Any, alpha: float = 1) -> Any:
    da, db = tangents
    if db is None:
        return da
    if da is None:
        return db if alpha == 1 else db * alpha
    return torch.add(da, db, alpha=alpha)


@register_rule(*_named("sub subtract __sub__"))
def _sub(y: Tensor, tangents: Tangents, a: Any, b: Any, alpha: float = 1) -> Any:
    da, db = tangents
    return da if db is None else db * -alpha if da is None else torch.sub(da, db, alpha=alpha)


@register_rule(*_named("rsub __rsub__"))
def _rsub(y: Tensor, tangents: Tangents, b: Any, a: Any, alpha: float = 1) -> Any:
    return _sub(y, tangents[::-1], a, b, alpha)


@register_rule(*_named("mul multiply __mul__ __rmul__"))
def _mul(y: Tensor, tangents: Tangents, a: Any, b: Any) -> Any:
    da, db = tangents
    if db is None:
        return da * b
    if da is None:
        return a * db
    if a.dtype == b.dtype:
        return torch.addcmul(da * b, a, db)
    return da * b + a * db


@register_rule(*_named("div divide true_divide __truediv__"))
def _div(y: Tensor, tangents: Tangents, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    da, db = tangents
    if rounding_mode is not None:
        return None
    if db is None:
        return da / b
    return y * db / -b if da is None else (da - y * db) / b


@register_rule(*_named("__rdiv__ __rtruediv__"))
def _rdiv(y: Tensor, tangents: Tangents, b: Any, a: Any) -> Any:
    return _div(y, tangents[::-1], a, b)


@register_rule(torch.where)
def _where(y: Tensor, tangents: Tangents, condition: Tensor, a: Any, b: Any) -> Any:
    _, da, db = tangents
    return torch.where(condition, 0.0 if da is None else da, 0.0 if db is None else db)


def _multilinear(func: Function, y: Tensor, tangents: Tangents, *args: Any, **kwargs: Any) -> Any:
    total = None
    for i, tangent in enumerate(tangents):
        if tangent is not None:
            part = func(*args[:i], tangent, *args[i + 1 :], **kwargs)
            total = part if total is None else total + part
    return total


def _affine(func: Function, y: Tensor, tangents: Tangents, x: Any, weight: Any, *rest: Any, **kwargs: Any) -> Any:
    """Linear in x and in the weight, with a bias after them."""
    if any(tangent is not None for tangent in tangents[2:]):
        return NotImplemented
    kwargs = {**kwargs, "bias": None} if "bias" in kwargs else kwargs
    return _multilinear(func, y, tangents[:2], x, weight, *(None, *rest[1:])[: len(rest)], **kwargs)


for _func in _named("matmul __matmul__ __rmatmul__ bmm mm mv dot outer ger einsum"):
    register_rule(_func)(functools.partial(_multilinear, _func))
for _func in _named(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
):
    register_rule(_func)(functools.partial(_affine, _func))


# ---- functions of one tensor


def _unary(*functions: Any) -> Callable[[Function], Function]:
    """Register a tangent (y, d, x, ...) of y = f(x, ...), of which the other arguments do not move."""

    def register(tangent: Function) -> Function:
        @register_rule(*functions)
        def rule(y: Any, tangents: Tangents, *args: Any, **kwargs: Any) -> Any:
            moving = tangents[0]
            if moving is None or any(d is not None for d in tangents[1:]):
                return NotImplemented
            return tangent(y, moving, *args, **kwargs)

        return tangent

    return register


_unary(*_named("exp"))(lambda y, d, x: y * d)
_unary(*_named("log"))(lambda y, d, x: d / x)
_unary(*_named("log1p"))(lambda y, d, x: d / (1 + x))
_unary(*_named("sin"))(lambda y, d, x: x.cos() * d)
_unary(*_named("cos"))(lambda y, d, x: x.sin() * -d)
_unary(*_named("sqrt"))(lambda y, d, x: d / (2 * y))
_unary(*_named("rsqrt"))(lambda y, d, x: y * y * y * d * -0.5)
_unary(*_named("square"))(lambda y, d, x: x * d * 2)
_unary(*_named("reciprocal"))(lambda y, d, x: y * y * -d)
_unary(*_named("tanh"))(lambda y, d, x: aten.tanh_backward(d, y))
_unary(*_named("sigmoid"))(lambda y, d, x: aten.sigmoid_backward(d, y))
_unary(F.relu, torch.relu, T.relu)(lambda y, d, x, inplace=False: aten.threshold_backward(d, x, 0))
_unary(F.silu)(lambda y, d, x, inplace=False: aten.silu_backward(d, x))
_unary(F.mish)(lambda y, d, x, inplace=False: aten.mish_backward(d, x))
_unary(F.gelu)(lambda y, d, x, approximate="none": aten.gelu_backward(d, x, approximate=approximate))
_unary(F.softplus)(lambda y, d, x, beta=1, threshold=20: aten.softplus_backward(d, x, beta, threshold))


@_unary(*_named("abs absolute __abs__"))
def _abs(y: Tensor, d: Tensor, x: Tensor) -> Any:
    return NotImplemented if x.is_complex() else x.sign() * d


@register_rule(T.__rpow__)
def _rpow(y: Tensor, tangents: Tangents, exponent: Tensor, base: Any) -> Any:
    return NotImplemented if isinstance(base, Tensor) or base <= 0 else y * tangents[0] * math.log(base)


@_unary(*_named("pow __pow__"))
def _pow(y: Tensor, d: Tensor, x: Tensor, exponent: Any) -> Any:
    if isinstance(exponent, Tensor):
        return NotImplemented
    if exponent == 2:
        return x * d * 2
    return None if exponent == 0 else x ** (exponent - 1) * d * exponent


@_unary(*_named("clamp clip"))
def _clamp(y: Tensor, d: Tensor, x: Tensor, min: Any = None, max: Any = None) -> Any:  # noqa: A002
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return NotImplemented
    low, high = -math.inf if min is None else min, math.inf if max is None else max
    return d.masked_fill((x < low) | (x > high), 0)


@_unary(*_named("masked_fill"))
def _masked_fill(y: Tensor, d: Tensor, x: Tensor, mask: Tensor, value: Any) -> Any:
    return d.masked_fill(mask, 0)


@_unary(F.pad)
def _pad(y: Tensor, d: Tensor, x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Any:
    return F.pad(d, pad, mode)


@_unary(torch.softmax, T.softmax, F.softmax)
def _softmax(y: Tensor, d: Tensor, x: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Any:
    return NotImplemented if dim is None else aten._softmax_backward_data(d.to(y.dtype), y, dim, y.dtype)


@_unary(torch.linalg.vector_norm)
def _vector_norm(
    y: Tensor,
    d: Tensor,
    x: Tensor,
    ord: float = 2,  # noqa: A002
    dim: Any = None,
    keepdim: bool = False,
    **kwargs: Any,
) -> Any:
    if ord != 2 or x.is_complex():
        return NotImplemented
    along = (x * d).sum(list(range(x.ndim)) if dim is None else dim, keepdim, dtype=y.dtype)
    return along / y.masked_fill(y == 0, 1)


# ---- normalisations


def _normalized(d: Tensor, x: Tensor, dims: list[int], eps: float, centred: bool = True) -> Any:
    """The tangent of x over its deviation along some dimensions, or over its root mean square."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, d = x.to(dtype), d.to(dtype)
    if centred:
        x, d = x - x.mean(dims, keepdim=True), d - d.mean(dims, keepdim=True)
    scale = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    unit = x * scale
    return (d - unit * (unit * d).mean(dims, keepdim=True)) * scale


def _channels(value: Tensor | None, x: Tensor) -> Any:
    return 1 if value is None else value.reshape(-1, *[1] * (x.ndim - 2))


@_unary(F.batch_norm)
def _batch_norm(
    y: Tensor,
    d: Tensor,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_var is None:
        return _normalized(d, x, [0, *range(2, x.ndim)], eps) * _channels(weight, x)
    return d * (_channels((running_var + eps).rsqrt(), x) * _channels(weight, x))


@_unary(torch.batch_norm)
def _torch_batch_norm(
    y: Tensor,
    d: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    return _batch_norm(y, d, x, running_mean, running_var, weight, bias, training, momentum, eps)


@_unary(F.instance_norm)
def _instance_norm(
    y: Tensor,
    d: Tensor,
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if use_input_stats:
        return _normalized(d, x, list(range(2, x.ndim)), eps) * _channels(weight, x)
    assert running_var is not None
    return d * (_channels((running_var + eps).rsqrt(), x) * _channels(weight, x))


@_unary(torch.instance_norm)
def _torch_instance_norm(
    y: Tensor,
    d: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Any:
    return _instance_norm(y, d, x, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


@_unary(F.group_norm)
def _group_norm(
    y: Tensor,
    d: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    last = x.ndim == 4 and not x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    x, d = (v.to(y.dtype).contiguous(memory_format=layout) for v in (x, d))
    sizes = (*x.shape[:2], math.prod(x.shape[2:]), num_groups)
    _, mean, scale = aten.native_group_norm(x, None, None, *sizes, eps)
    d = aten.native_group_norm_backward(d, x, mean, scale, None, *sizes, [True, False, False])[0]
    return d if weight is None else d * _channels(weight, x)


@_unary(F.rms_norm, torch.rms_norm)
def _rms_norm(
    y: Tensor, d: Tensor, x: Tensor, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Any:
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
    tangent = _normalized(d, x, list(range(-len(normalized_shape), 0)), eps, centred=False)
    return tangent if weight is None else tangent * weight


def _layer_norm(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """By the two numbers that the backward pass keeps."""
    given = {"weight": None, "bias": None, "eps": 1e-5, **dict(zip(_LAYER_NORM, args, strict=False)), **kwargs}
    x, shape, weight, bias, eps = (given[name] for name in _LAYER_NORM)
    if not isinstance(x, Dual) or isinstance(weight, Dual) or isinstance(bias, Dual):
        return follow(func, args, kwargs)
    value, tangent = parts(x)
    result, mean, scale = torch.native_layer_norm(value, shape, weight, bias, eps)
    if tangent is None:
        return dual(result, None)
    with no_graph():
        d, x = tangent.to(mean.dtype), value.to(mean.dtype)
        d = aten.native_layer_norm_backward(d, x, shape, mean, scale, None, None, [True, False, False])[0]
        return dual(result, d if weight is None else d * weight)


_LAYER_NORM = ("input", "normalized_shape", "weight", "bias", "eps")
RULES[F.layer_norm] = RULES[torch.layer_norm] = _layer_norm


def _dropout(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    given = {"p": 0.5, "training": True, **dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
    x, p, training = given["input"], given["p"], given["training"]
    value, tangent = parts(x)
    if not training or not 0 < p < 1:
        result = F.dropout(value, p, training)
        return dual(result, None if tangent is None or (training and p == 1) else tangent)
    # As PyTorch itself does it on either kind of device, so that what is computed again is the same.
    if value.is_cuda:
        result, mask = torch.native_dropout(value, p, True)
        with no_graph():
            return dual(result, None if tangent is None else tangent * mask / (1 - p))
    with no_graph():
        mask = F.dropout(torch.ones_like(value), p, True)
        tangent = None if tangent is None else tangent * mask
    return dual(value * mask, tangent)


RULES[F.dropout] = in_place_or_not(F.dropout, _dropout)


# ---- changes in place


def _set_item(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return in_place(_with_item, func, args, kwargs)


def _with_item(x: Dual, index: Any, new: Any) -> Dual:
    value, tangent = parts(x)
    _, moved = parts(new)
    result = torch.zeros_like(value) if tangent is None else tangent.clone()
    result[index] = 0 if moved is None else moved
    return dual(value, result)


RULES[T.__setitem__] = _set_item
for _name in ("add", "sub", "mul", "div", "clamp", "relu", "exp", "neg", "sqrt", "rsqrt", "sigmoid", "tanh", "square"):
    RULES[getattr(T, f"{_name}_")] = functools.partial(in_place, getattr(T, _name))
RULES[T.masked_fill_] = functools.partial(in_place, T.masked_fill)
for _name in ("add", "sub", "mul", "truediv"):
    RULES[getattr(T, f"__i{_name}__")] = functools.partial(in_place, getattr(operator, _name))

COMPILED.update({name: RULES[getattr(T, name)] for name in ("__rsub__", "__rdiv__", "__rpow__", "pow")})
