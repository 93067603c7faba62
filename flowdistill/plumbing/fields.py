"""Fields of attrs classes: their validators, and the strings that document them."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import attrs


def of_type(*kinds: type) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """A validator of the type, whose message does not print modules in full; a bool is no number."""

    def validate(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{field.name} must be of type {wanted}, not {short(value)}")

    return validate


def short(value: object) -> str:
    """A value as a message shows it: modules in full would fill the screen."""
    text = repr(value)
    return text if len(text) < 80 and "\n" not in text else f"a {type(value).__name__}"


def at_least(low: int) -> Callable[[Any, attrs.Attribute[Any], Any], None]:
    """A validator of whole numbers."""

    def validate(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
        of_type(int)(instance, field, value)
        if value < low:
            bound = "positive" if low == 1 else f"at least {low}"
            raise ValueError(f"{field.name} must be {bound}, not {value}")

    return validate


def interval(instance: Any, field: attrs.Attribute[Any], value: tuple[float, float]) -> None:
    """Validate two parts (first, last) of a training, 0 <= first <= last <= 1."""
    first, last = value
    if not 0.0 <= first <= last <= 1.0:
        raise ValueError(
            f"{field.name} must be two parts of the training, (first, last) with 0 <= first <= last <= 1, not {value!r}"
        )


def part_done(interval: tuple[float, float], progress: float) -> float:
    """How far a change between two parts of the training has come at ``progress``: from 0 at first to 1 at last.

    Examples:
        >>> part_done((0.25, 0.75), 0.5)
        0.5
    """
    first, last = interval
    if progress <= first:
        return 0.0
    return 1.0 if progress >= last else (progress - first) / (last - first)


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class, by name; a field without one inherits that of a base class.

    Examples:
        >>> from flowdistill.pairs import Diagonal
        >>> field_docs(Diagonal)
        {'times': 'The law of t.'}
    """
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):
            continue
        tree = ast.parse(source).body[0]
        if not isinstance(tree, ast.ClassDef):
            continue
        for statement, following in zip(tree.body, tree.body[1:], strict=False):
            described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and described:
                text = following.value.value  # type: ignore[attr-defined]
                if isinstance(text, str):
                    found[statement.target.id] = inspect.cleandoc(text)
    fields = [field.name for field in attrs.fields(cls)] if attrs.has(cls) else list(found)
    return {name: found[name] for name in fields if name in found and not name.startswith("_")}
