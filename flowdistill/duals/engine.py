"""Dual numbers, and how they follow an operation: by a rule of the table, or by PyTorch's own forward derivative."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionMeta, _SingleLevelFunction
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from flowdistill.plumbing.errors import ConfigError

Function: TypeAlias = Callable[..., Any]
Rule: TypeAlias = Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]
_F = TypeVar("_F", bound=Function)

RULES: dict[Any, Rule] = {}
"""How duals follow a function, given the function, its arguments, and its keyword arguments."""

COMPILED: dict[str, Rule] = {}
"""Of methods that a compiler does not find in the table, since other functions are wrapped around them."""

_STRUCTURES = tuple(v for v in vars(torch.return_types).values() if isinstance(v, type))


class Refused(Exception):  # noqa: N818, nothing is wrong: another way is taken
    """The derivative cannot follow here."""


class Dual(Tensor):
    """A number y + e dy with e^2 = 0: a value, which may have a graph, and its derivative, which has none.

    Whatever PyTorch does to it is done to its value, and the derivative follows. `dual` makes one.
    """

    value: Tensor
    tangent: Tensor | None
    """Of the value's shape and dtype; None is a derivative of zero."""
    version: int
    """Of the value when the tangent was made, which tells of later changes in place; -1 in a compiled function."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        rule = _compiled(func, args) if torch.compiler.is_compiling() else RULES.get(func) or _found(func)
        if kwargs is None:
            return rule(func, args, {})
        if kwargs.get("out") is not None:
            raise Refused(f"{_name(func)} writes into another tensor (out=)")
        return rule(func, args, kwargs)


class Opaque(Dual):
    """A dual without a memory of its own, where foreign kernels, which would pass the rules by, find no numbers."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise Refused(f"{func} passes the rules by")


def dual(value: Tensor, tangent: Tensor | None) -> Dual:
    """The number value + e tangent; the tangent is expanded to the value's shape, and has its dtype.

    Examples:
        >>> x = dual(torch.tensor([1.0, 2.0]), torch.tensor(1.0))
        >>> parts(x**2 + 1)
        (tensor([2., 5.]), tensor([2., 4.]))
    """
    if tangent is not None:
        if tangent.dtype is not value.dtype:
            tangent = tangent.to(value.dtype)
        if tangent.shape != value.shape:
            tangent = tangent.expand(value.shape)
    result: Dual
    if torch.compiler.is_compiling():  # a compiler sees through these alone
        result = value.as_subclass(Dual)
        result.version = -1
    else:
        result = Tensor._make_wrapper_subclass(
            Opaque, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        result.version = value._version
        if not _FOLLOWED:
            _follow_functions()
    result.value, result.tangent = value, tangent
    return result


def parts(number: Any) -> tuple[Any, Tensor | None]:
    """The value and the tangent of a dual; of anything else itself and None.

    Raises:
        Refused: the value was changed in place since.
    """
    if not isinstance(number, Dual):
        return number, None
    value, version = number.value, number.version
    if version >= 0 and value._version != version:
        raise Refused("a tensor is changed in place and used by another name")
    return value, number.tangent


class no_graph:  # noqa: N801, a faster torch.no_grad
    """Inside, no graph is recorded."""

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self._before)


def joined(value: Any, tangent: Any) -> Any:
    """Duals of values and their tangents, which may be tuples; what is no floating-point number stays as it is."""
    if isinstance(value, Tensor):
        return dual(value, tangent) if _is_real(value) else value
    if isinstance(value, (tuple, list)):
        tangents = [None] * len(value) if tangent is None else tangent
        results = [joined(v, t) for v, t in zip(value, tangents, strict=True)]
        return type(value)(results) if isinstance(value, (list, *_STRUCTURES)) else tuple(results)
    return value


def has_duals(numbers: Iterable[Any]) -> bool:
    """Whether there are duals among some arguments, or in lists of them."""
    for number in numbers:  # noqa: SIM110, three times as fast as any()
        if isinstance(number, Dual) or (type(number) in (list, tuple) and has_duals(number)):
            return True
    return False


def _is_real(value: Any) -> bool:
    """Whether something can have a derivative."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _moves(numbers: Any) -> bool:
    return any(parts(number)[1] is not None for number in tree_leaves(numbers))


def _values(numbers: Any) -> Any:
    """The values of duals, which may be nested."""
    if isinstance(numbers, Dual):
        return parts(numbers)[0]
    if isinstance(numbers, (tuple, list, dict)):
        return tree_map(lambda number: parts(number)[0], numbers)
    return numbers


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


# ---- rules of whole kinds


def constant(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What does not move with its arguments, such as a shape or a comparison."""
    args = [_values(number) for number in args]
    return func(*args, **_values(kwargs)) if kwargs else func(*args)


def linear(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What is linear in its first argument, the only dual: shapes, sums, pooling."""
    return linear_by(func, func, args, kwargs)


def linear_by(apply: Function, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The same where another function, ``apply``, does it to a tangent, which may lie otherwise in memory."""
    rest = args[1:]
    if not args or not isinstance(args[0], Dual) or has_duals(rest) or (kwargs and has_duals(kwargs.values())):
        return follow(func, args, kwargs)
    value, tangent = parts(args[0])
    result = func(value, *rest, **kwargs)
    if tangent is None:
        return joined(result, None)
    with no_graph():
        return joined(result, apply(tangent, *rest, **kwargs))


def register_rule(*functions: Any) -> Callable[[_F], _F]:
    """Say how the derivative follows some functions, which would else take PyTorch's forward derivative, or none.

    A rule is called without a graph as ``rule(result, tangents, *args, **kwargs)``: with the function's result for
    ``args``, and the tangent of each of them, which is None where it does not move. It returns the tangent of the
    result, or a tuple of them for a tuple of results. None is zero, and NotImplemented leaves it to PyTorch.

    Args:
        functions: functions that PyTorch lets tensors override, such as `torch.nn.functional.silu` and custom
            operators, or subclasses of `torch.autograd.Function`.

    Examples:
        >>> class Cube(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         ctx.save_for_backward(x)
        ...         return x**3
        ...
        ...     @staticmethod
        ...     def backward(ctx, gradient):
        ...         return 3 * ctx.saved_tensors[0] ** 2 * gradient
        >>> @register_rule(Cube)
        ... def tangent(result, tangents, x):
        ...     return 3 * x**2 * tangents[0]
        >>> parts(Cube.apply(dual(torch.tensor(2.0), torch.tensor(1.0))))
        (tensor(8.), tensor(12.))
    """

    def register(rule: _F) -> _F:
        for function in functions:
            for name in _names_of(function):
                RULES[name] = in_place_or_not(name, functools.partial(_by_rule, rule))
        return rule

    return register


def _names_of(function: Any) -> list[Any]:
    """All by which PyTorch may call a function: a custom operator and its overloads."""
    function = getattr(function, "_opoverload", function)
    operator = getattr(function, "overloadpacket", function)
    if not isinstance(operator, torch._ops.OpOverloadPacket):
        return [function]
    return [operator, *(getattr(operator, name) for name in operator.overloads())]  # type: ignore[no-untyped-call]


def _by_rule(rule: Function, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    values: list[Any] = []
    tangents: list[Any] = []
    moves = False
    for number in args:
        if isinstance(number, Dual):
            value, tangent = parts(number)
            moves = moves or tangent is not None
        else:
            value, tangent = number, None
        values.append(value)
        tangents.append(tangent)
    if has_duals(values) or (kwargs and has_duals(kwargs.values())):  # in lists or by name
        return follow(func, args, kwargs)
    result = func(*values, **kwargs)
    if not moves:
        return joined(result, None)
    with no_graph():
        tangent = rule(result, tangents, *values, **kwargs)
        if tangent is NotImplemented:
            leaves, structure = tree_flatten((values, kwargs))
            spread = [t for v, t in zip(values, tangents, strict=True) for _ in tree_leaves(v)]
            tangent = _by_pytorch(func, leaves, structure, spread + [None] * (len(leaves) - len(spread)))
        return joined(result, tangent)


# ---- what has no rule


@functools.cache
def _found(func: Any) -> Rule:
    """The rule of a function that is not in the table."""
    name = _name(func)
    if name == "__set__" or (name.endswith("_") and not name.endswith("__")):
        return _changes
    return in_place_or_not(func, follow)


def _compiled(func: Any, args: Sequence[Any]) -> Rule:
    """The rule of a function for a compiler, to which a function with its own backward pass looks like no graph."""
    if not torch.is_grad_enabled():
        for number in args:
            if isinstance(number, Dual) and number.value.requires_grad:
                raise Refused(f"{_name(func)} records no graph, in a compiled function")
    if func.__name__ in COMPILED:
        return COMPILED[func.__name__]
    return RULES.get(func) or _found(func)


def follow(
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Any:
    """A function without a rule: its value, then its tangent by PyTorch on detached arguments, in a context."""
    numbers, structure = tree_flatten((args, kwargs))
    pairs = [parts(number) for number in numbers]
    values, tangents = [value for value, _ in pairs], [tangent for _, tangent in pairs]
    versions = [v._version for v in values if isinstance(v, Tensor)]
    draws = Draws(values)
    plain_args, plain_kwargs = tree_unflatten(values, structure)
    result = func(*plain_args, **plain_kwargs)
    if has_duals((result,)):
        raise Refused(f"{_name(func)} takes tensors past its arguments")
    if [v._version for v in values if isinstance(v, Tensor)] != versions:
        if is_foreign(func):
            raise _no_derivative(func)
        raise Refused(f"{_name(func)} changes its arguments in place")
    if all(tangent is None for tangent in tangents) or not any(map(_is_real, tree_leaves(result))):
        return joined(result, None)
    with no_graph(), around(), draws.again():
        return joined(result, _by_pytorch(func, values, structure, tangents))


def _by_pytorch(func: Any, values: Sequence[Any], structure: Any, tangents: Sequence[Tensor | None]) -> Any:
    """The tangent of a function by PyTorch's forward mode, which computes the value again."""
    with forward_ad.dual_level():
        moving = [
            v if not isinstance(v, Tensor) else v.detach() if t is None else forward_ad.make_dual(v.detach(), t)  # type: ignore[no-untyped-call]
            for v, t in zip(values, tangents, strict=True)
        ]
        args, kwargs = tree_unflatten(moving, structure)
        result = func(*args, **kwargs)
        tangent = tree_map(lambda v: forward_ad.unpack_dual(v).tangent if _is_real(v) else None, result)  # type: ignore[no-untyped-call]
    # What PyTorch cannot differentiate raises an error, or has just no tangent.
    still = all(t is None for t in tree_leaves(tangent)) and any(_is_real(v) and v.numel() for v in tree_leaves(result))
    if still and not isinstance(getattr(func, "__self__", None), FunctionMeta):
        raise _no_derivative(func)
    return tangent


def is_foreign(func: Any) -> bool:
    """Whether a function is an operator of others, to whose derivative PyTorch may be blind."""
    name = getattr(func, "_qualified_op_name", "") or getattr(func, "_name", "")
    foreign = isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket))
    return foreign and not name.startswith(("aten::", "prims::"))


def _no_derivative(func: Any) -> ConfigError:
    return ConfigError(
        f"PyTorch has no forward derivative of {_name(func)}: give it one by flowdistill.duals.register_rule, or bind "
        "the objective's estimator = @finite_difference()"
    )


class Draws:
    """Lets an operation draw the random numbers that it drew before, if it drew any."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._devices = {v.device for v in values if isinstance(v, Tensor) and v.is_cuda}
        self._before = self._states()

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Inside, the random numbers are those that were drawn since this object was made."""
        if not all(map(torch.equal, self._states(), self._before)):
            torch.set_rng_state(self._before[0])
            for device, state in zip(self._devices, self._before[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
        yield


# ---- changes in place


def in_place(counterpart: Function, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What changes its first argument in place, by the function that gives the same as a new tensor.

    Other views of the memory keep tangents that are now wrong. Their versions tell, and they are refused.
    """
    x = args[0]
    if not isinstance(x, Dual) or torch.compiler.is_compiling():
        return _changes(func, args, kwargs)
    value, tangent = parts(x)
    draws = Draws([value])
    with no_graph():
        moved = parts(counterpart(dual(value.detach(), tangent), *args[1:], **kwargs))[1]
    with draws.again():
        result = constant(func, args, kwargs)
    x.tangent, x.version = dual(value, moved).tangent, value._version
    return x if result is value else result


def in_place_or_not(func: Any, rule: Rule) -> Rule:
    """The rule of a function that may have an argument ``inplace``, as those of `torch.nn.functional`."""
    names = (
        list(inspect.signature(func).parameters) if inspect.isfunction(func) and func.__module__ == F.__name__ else []
    )
    if "inplace" not in names:
        return rule
    place = names.index("inplace")

    def either(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not (kwargs.get("inplace") or (len(args) > place and args[place])):
            return rule(func, args, kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "inplace"}
        return in_place(func, functools.partial(func, inplace=True), args[:place], rest)

    return either


def _changes(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(args[0], Dual) or _moves((args, kwargs)):
        raise Refused(f"{_name(func)} writes a moving tensor into another")
    return constant(func, args, kwargs)  # a buffer takes up what is detached


# ---- functions with a backward pass of their own


def _applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.autograd.Function.apply`, which PyTorch lets no tensor override: a dual's value would lose its graph."""
    apply = super(_SingleLevelFunction, cls).apply
    if has_duals(args) or (kwargs and has_duals(kwargs.values())):
        return RULES.get(cls, follow)(apply, args, kwargs)
    result = apply(*args, **kwargs)
    if has_duals((result,)):
        raise Refused(f"{cls.__name__} takes tensors past its arguments")
    return result


def _follow_functions() -> None:
    """From the first dual on, look at what functions with a backward pass of their own are applied to."""
    _FOLLOWED.append(True)
    _SingleLevelFunction.apply = classmethod(_applied)  # type: ignore[attr-defined]


_FOLLOWED: list[bool] = []
