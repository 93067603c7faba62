"""Dual numbers, and how they follow an operation: by a rule of the table, or by PyTorch's own forward derivative."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from flowdistill.plumbing.errors import ConfigError

Function: TypeAlias = Callable[..., Any]
Rule: TypeAlias = Callable[[Function, Sequence[Any], Mapping[str, Any]], Any]
_F = TypeVar("_F", bound=Function)

RULES: dict[Any, Rule] = {}
"""How duals follow a function, given (the function, its arguments, its keyword arguments)."""

COMPILED: dict[str, Rule] = {}
"""Of functions that a compiler does not find in the table, since other functions are wrapped around them."""


class Refused(Exception):  # noqa: N818, nothing is wrong: another way is taken
    """A single pass might be wrong here."""


class Dual(Tensor):
    """A number y + e dy with e^2 = 0: a value, which may have a graph, and its derivative, which has none.

    Whatever PyTorch does to it is done to its value, and the derivative follows. Made by `dual`.
    """

    value: Tensor
    tangent: Tensor | None
    """Of the value's shape and dtype; None is a derivative of zero."""
    version: int
    """Of the value when the tangent was computed: a later one tells of a change in place, by way of a view.

    -1 where a compiler follows, which refuses such changes."""

    @classmethod
    def __torch_function__(
        cls, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if torch.compiler.is_compiling() and func.__name__ in COMPILED:
            rule = COMPILED[func.__name__]
        else:
            rule = RULES.get(func) or _found(func)
        if kwargs is None:
            return rule(func, args, {})
        if kwargs.get("out") is not None:
            raise Refused(f"{_name(func)} writes into another tensor (out=)")
        return rule(func, args, kwargs)


class _Opaque(Dual):
    """A dual without a memory of its own: what would pass the rules by, such as a foreign kernel, finds no numbers."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Function, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise Refused(f"{func} passes the rules by")


def dual(value: Tensor, tangent: Tensor | None) -> Dual:
    """Value + e tangent; the tangent is expanded to the value's shape, and has its dtype."""
    if tangent is not None:
        if tangent.dtype is not value.dtype:
            tangent = tangent.to(value.dtype)
        if tangent.shape != value.shape:
            tangent = tangent.expand(value.shape)
    if torch.compiler.is_compiling():  # a compiler follows these alone
        result = value.as_subclass(Dual)
        result.version = -1
    else:
        result = Tensor._make_wrapper_subclass(
            _Opaque, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        result.version = value._version
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
    """Duals of values and their tangents, which may be tuples; what is no floating-point number has no tangent."""
    if isinstance(value, Tensor):
        return dual(value, tangent) if _has_derivative(value) else value
    if isinstance(value, (tuple, list)):
        tangents = [None] * len(value) if tangent is None else tangent
        results = [joined(v, t) for v, t in zip(value, tangents, strict=True)]
        return type(value)(results) if type(value) in (tuple, list) or isinstance(value, _STRUCTURES) else results
    return value


_STRUCTURES = tuple({v for v in vars(torch.return_types).values() if isinstance(v, type)})


def _has_derivative(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def has_duals(numbers: Iterable[Any]) -> bool:
    """Whether there are duals among some arguments, or in lists of them."""
    for number in numbers:
        if isinstance(number, Dual) or (type(number) in (list, tuple) and has_duals(number)):
            return True
    return False


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func))


def _values(numbers: Any) -> Any:
    """The values of duals, which may be nested."""
    if isinstance(numbers, Dual):
        return parts(numbers)[0]
    if isinstance(numbers, (tuple, list, dict)):
        return tree_map(lambda number: parts(number)[0], numbers)
    return numbers


# ---- rules of whole kinds


def constant(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What does not move with its arguments, such as a shape or a comparison."""
    args = [_values(number) for number in args]
    return func(*args, **_values(kwargs)) if kwargs else func(*args)


def linear(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What is linear in its first argument, of which the others are no duals: shapes, sums, pooling."""
    return linear_by(func, func, args, kwargs)


def linear_by(apply: Function, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The same where another function, ``apply``, does it to a tangent, of which the memory has another layout."""
    rest = args[1:]
    if not args or not isinstance(args[0], Dual) or has_duals(rest) or has_duals(kwargs.values()):
        return follow(func, args, kwargs)
    value, tangent = parts(args[0])
    result = func(value, *rest, **kwargs)
    if tangent is None:
        return joined(result, None)
    with no_graph():
        return joined(result, apply(tangent, *rest, **kwargs))


def register_rule(*functions: Any) -> Callable[[_F], _F]:
    """Say how the derivative follows some functions, which would else take PyTorch's forward derivative, or none.

    A rule is called without a graph as ``rule(result, tangents, *args, **kwargs)``: with what the function gave for
    ``args``, and the tangent of each of them, None for what does not move. It returns the tangent of the result, or a
    tuple of them for a tuple of results; None is zero, and NotImplemented leaves it to PyTorch.

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
                RULES[name] = _in_place_or_not(name, functools.partial(_by_rule, rule))
        return rule

    return register


def _names_of(function: Any) -> list[Any]:
    """All by which PyTorch may call a function: a custom operator and its overloads."""
    function = getattr(function, "_opoverload", function)
    operator = getattr(function, "overloadpacket", function)
    if not isinstance(operator, torch._ops.OpOverloadPacket):
        return [function]
    return [operator, *(getattr(operator, name) for name in operator.overloads())]


def _by_rule(rule: Function, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    values, tangents, moves = [], [], False
    for number in args:
        if isinstance(number, Dual):
            value, tangent = parts(number)
            moves = moves or tangent is not None
        else:
            value, tangent = number, None
        values.append(value)
        tangents.append(tangent)
    if has_duals(values) or (kwargs and has_duals(kwargs.values())):
        return follow(func, args, kwargs)
    result = func(*values, **kwargs)
    if not moves:
        return joined(result, None)
    with no_graph():
        tangent = rule(result, tangents, *values, **kwargs)
        if tangent is NotImplemented:
            leaves, structure = tree_flatten((values, kwargs))
            spread = [t for v, t in zip(values, tangents, strict=True) for _ in tree_leaves(v)]
            spread += [None] * (len(leaves) - len(spread))
            tangent = _by_pytorch(func, leaves, structure, spread)
        return joined(result, tangent)


def follow(
    func: Function,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Any:
    """A function without a rule: its value, then its derivative by PyTorch on detached arguments, in a context."""
    numbers, structure = tree_flatten((args, kwargs))
    values, tangents = zip(*map(parts, numbers), strict=True) if numbers else ((), ())
    before = [v._version for v in values if isinstance(v, Tensor)]
    drawn = _Draws(values)
    plain_args, plain_kwargs = tree_unflatten(values, structure)
    result = func(*plain_args, **plain_kwargs)
    if [v._version for v in values if isinstance(v, Tensor)] != before:
        raise Refused(f"{_name(func)} changes its arguments in place")
    if all(tangent is None for tangent in tangents) or not any(map(_has_derivative, tree_leaves(result))):
        return joined(result, None)
    with no_graph(), around(), drawn.again():
        return joined(result, _by_pytorch(func, values, structure, tangents))


def _by_pytorch(func: Function, values: Sequence[Any], structure: Any, tangents: Sequence[Tensor | None]) -> Any:
    """The tangent of a function by PyTorch's forward mode, which computes the value again."""
    with forward_ad.dual_level():
        moving = [
            v if not isinstance(v, Tensor) else v.detach() if t is None else forward_ad.make_dual(v.detach(), t)
            for v, t in zip(values, tangents, strict=True)
        ]
        args, kwargs = tree_unflatten(moving, structure)
        result = func(*args, **kwargs)
        tangent = tree_map(lambda v: forward_ad.unpack_dual(v).tangent if _has_derivative(v) else None, result)
    # Most operations that PyTorch cannot differentiate raise an error; others just have no tangent.
    still = all(t is None for t in tree_leaves(tangent)) and any(
        v.numel() for v in tree_leaves(result) if _has_derivative(v)
    )
    if still and not isinstance(getattr(func, "__self__", None), torch.autograd.function.FunctionMeta):
        raise ConfigError(
            f"PyTorch has no forward derivative of {_name(func)}: give it one by flowdistill.duals.register_rule, or "
            "bind the objective's estimator = @finite_difference()"
        )
    return tangent


class _Draws:
    """Lets an operation draw the random numbers that it drew before, if it drew any."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._devices = {v.device for v in values if isinstance(v, Tensor) and v.is_cuda}
        self._before = self._states()

    def _states(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        after = self._states()
        if not all(map(torch.equal, after, self._before)):
            self._set(self._before)
        yield

    def _set(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)


# ---- changes in place


def in_place(counterpart: Function, func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What changes its first argument in place, by the function that gives the same as a new tensor.

    Views of the argument keep tangents that have become wrong; their versions tell.
    """
    x = args[0]
    if not isinstance(x, Dual) or torch.compiler.is_compiling():
        raise Refused(f"{_name(func)} writes a moving tensor into another")
    value, tangent = parts(x)
    drawn = _Draws([value])
    with no_graph():
        moved = parts(counterpart(dual(value.detach(), tangent), *args[1:], **kwargs))[1]
    with drawn.again():
        result = func(value, *map(_values, args[1:]), **_values(kwargs))
    x.tangent, x.version = (None if moved is None else dual(value, moved).tangent), value._version
    return x if result is value else result


def _in_place_or_not(func: Any, rule: Rule) -> Rule:
    """The rule of a function that may have an argument ``inplace``."""
    if not (inspect.isfunction(func) and getattr(func, "__module__", "") == F.__name__):
        return rule
    names = list(inspect.signature(func).parameters)
    if "inplace" not in names:
        return rule
    place = names.index("inplace")

    def either(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not (kwargs.get("inplace") or len(args) > place and args[place]):
            return rule(func, args, kwargs)
        rest = {name: value for name, value in kwargs.items() if name != "inplace"}
        return in_place(func, functools.partial(func, inplace=True), args[:place], rest)

    return either


@functools.cache
def _found(func: Any) -> Rule:
    """The rule of a function that is not in the table."""
    name = _name(func)
    if name == "__set__" or (name.endswith("_") and not name.endswith("__")):
        return _refuse
    return _in_place_or_not(func, follow)


def _refuse(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    raise Refused(f"{_name(func)} changes a tensor in place")


def hidden(func: Function, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What takes a tensor's numbers out of reach, and so a derivative too."""
    attribute = _name(func) == "__get__"
    if not attribute and parts(args[0])[1] is None:
        return constant(func, args, kwargs)
    raise ConfigError(
        f"no derivative goes through Tensor.{_name(func.__self__ if attribute else func)}, by which a network takes numbers "
        "out of PyTorch's sight: take them of x.detach() if they are constants, or bind the objective's estimator = "
        "@finite_difference()"
    )


# ---- functions with a backward pass of their own


def _applied(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """`torch.autograd.Function.apply`, which PyTorch lets no tensor override: it would lose the graph of a dual."""
    apply = super(torch.autograd.function._SingleLevelFunction, cls).apply
    if any(isinstance(v, Dual) for v in tree_leaves((args, kwargs))):
        return RULES.get(cls, follow)(apply, args, kwargs)
    result = apply(*args, **kwargs)
    if any(isinstance(v, Dual) for v in (result if isinstance(result, tuple) else (result,))):
        raise Refused(f"{cls.__name__} takes tensors past its arguments")
    return result


torch.autograd.function._SingleLevelFunction.apply = cast("Any", classmethod(_applied))
