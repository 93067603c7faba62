"""The statements of gin files as data, and those of the present configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import attrs


@attrs.frozen
class Reference:
    """A part that a value refers to: ``@scope/name``, or ``@scope/name()`` where it is called; ``%name`` is a macro."""

    name: str
    called: bool = False
    macro: bool = False

    def __repr__(self) -> str:
        """As a gin file writes it."""
        return f"{'%' if self.macro else '@'}{self.name}{'()' if self.called else ''}"

    @property
    def part(self) -> str:
        """The name without scopes and modules; of a macro with the sign %."""
        return f"%{self.name}" if self.macro else last_name(self.name)


@attrs.frozen
class Statement:
    """A binding of a gin file as data: ``scope/selector.parameter = value``, or ``name = value`` of a macro."""

    scope: str
    """The scope; "" if there is none."""
    selector: str
    """The name of the part that has the parameter, perhaps with modules before it; "" if the statement sets a macro."""
    parameter: str
    """The name of the parameter, or of the macro."""
    value: Any
    """Numbers, strings, containers, and a `Reference` for each reference to a part."""
    place: str = attrs.field(eq=False)
    """The file and the line, for messages."""

    @property
    def name(self) -> str:
        """What is bound: ``scope/selector.parameter``."""
        return "/".join(filter(None, (self.scope, ".".join(filter(None, (self.selector, self.parameter))))))

    @property
    def part(self) -> str:
        """What the binding sets up, as `Reference.part` names it."""
        return last_name(self.selector) if self.selector else f"%{self.name}"

    @property
    def references(self) -> list[Reference]:
        """All references in the value."""
        return list(references_in(self.value))

    def __str__(self) -> str:
        """A line of a gin file; it does not depend on how the value was written."""
        return f"{self.name} = {self.value!r}"


def last_name(selector: str) -> str:
    """The name without scopes and modules."""
    return re.split(r"[./]", selector)[-1]


def references_in(value: Any) -> Iterator[Reference]:
    """All references in a value and in what it contains."""
    if isinstance(value, Reference):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from references_in(part)
    elif isinstance(value, dict):
        yield from references_in([*value.keys(), *value.values()])


class _Infinite(float):
    """An infinite number, which gin and Python read again as they write it."""

    def __repr__(self) -> str:
        return "1e999" if self > 0 else "-1e999"


def readable(value: Any) -> Any:
    """A value with its infinite numbers written so that gin reads them."""
    if isinstance(value, float) and math.isinf(value):
        return _Infinite(value)
    if type(value) in (list, tuple):
        return type(value)(map(readable, value))
    if type(value) is dict:
        return {readable(key): readable(part) for key, part in value.items()}
    return value


def parts_of(*bindings: Statement) -> set[str]:
    """The parts that the values of bindings refer to; a macro's with the sign %."""
    return {reference.part for binding in bindings for reference in binding.references}


BOUND: list[Statement] = []
"""The bindings of the present configuration, in their order, with their places, which gin 0.5 does not keep."""
