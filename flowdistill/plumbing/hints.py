"""Type hints: whether a literal of a gin file can be what a parameter asks for."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union

import attrs

_WORDS = {float: "a number", int: "a whole number", bool: "True or False", str: "a string", NoneType: "None"}
_LARGEST = 10**9
_LISTS = (list, tuple, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)
_DICTIONARIES = (dict, collections.abc.Mapping, collections.abc.MutableMapping)


@functools.cache
def hints_of(entry: Callable[..., Any]) -> Mapping[str, Any]:
    """The type hints of a class's or a function's parameters; none of those that convert what they are given."""
    if isinstance(entry, type) and attrs.has(entry):
        try:
            attrs.resolve_types(entry)
        except NameError:
            return {}
        return {field.alias: field.type for field in attrs.fields(entry) if field.init and field.converter is None}
    function = inspect.unwrap(vars(entry).get("__init__", entry.__init__) if isinstance(entry, type) else entry)  # type: ignore[misc]
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # a name that is there for type checkers alone
        return {}


def matches(value: Any, hint: Any) -> bool:
    """Whether a number, a string, None, or a container of such has a type; hints of other kinds take anything.

    An integer is a number; a bool is none. Lists stand for tuples.

    Examples:
        >>> matches((0.0, 1), tuple[float, float] | None), matches(True, float), matches("0.5", float)
        (True, False, False)
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (Union, UnionType):
        return any(matches(value, one) for one in inner)
    if kind is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if kind is tuple or hint is tuple:
        if not isinstance(value, (list, tuple)):
            return False
        if not inner or inner[-1] is Ellipsis:
            return all(matches(part, one) for part in value for one in inner[:1])
        return len(value) == len(inner) and all(map(matches, value, inner))
    if kind in _LISTS or hint in _LISTS:
        return isinstance(value, (list, tuple)) and all(matches(part, one) for part in value for one in inner[:1])
    if kind in _DICTIONARIES or hint in _DICTIONARIES:
        return isinstance(value, dict) and all(
            matches(key, inner[0]) and matches(part, inner[1]) for key, part in value.items() if inner
        )
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint in _WORDS:
        return type(value) is hint
    return kind is None and not isinstance(hint, type)


def takes_words_alone(hint: Any) -> bool:
    """Whether a type is of numbers, strings, None, or tuples and lists of them: nothing that can be called.

    Examples:
        >>> takes_words_alone(tuple[float, float] | None), takes_words_alone(type | None)
        (True, False)
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (Union, UnionType, tuple) or kind in _LISTS:
        return all(takes_words_alone(one) for one in inner if one is not Ellipsis)
    return kind is Literal or hint is float or hint in _WORDS


def too_large(value: Any) -> bool:
    """Whether a value holds a whole number that nobody can mean: the largest is a thousand million."""
    if isinstance(value, (list, tuple)):
        return any(map(too_large, value))
    return isinstance(value, int) and abs(value) > _LARGEST


def in_words(hint: Any) -> str:
    """A type hint as a message says it.

    Examples:
        >>> in_words(tuple[float, float] | None)
        '(a number, a number) or None'
    """
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(in_words, inner))
    if kind is Literal:
        return " or ".join(map(repr, inner))
    if kind is tuple:
        return f"({', '.join('...' if part is Ellipsis else in_words(part) for part in inner)})"
    if kind in _LISTS:
        return f"a list of {in_words(inner[0])}" if inner else "a list"
    if kind in _DICTIONARIES:
        return "a dictionary"
    if kind is collections.abc.Callable:
        return "a reference, such as @NAME"
    name = str(getattr(hint, "__name__", hint))
    return _WORDS.get(hint) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}, by a reference such as @NAME()"
