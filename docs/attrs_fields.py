"""Shows the fields of attrs classes on the site as their users see them: inherited ones too, with their defaults."""

from __future__ import annotations

from typing import Any

import griffe


class AttrsFields(griffe.Extension):
    """An extension of griffe, which reads the sources for mkdocstrings."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called when a package has been read."""
        classes = [found for found in _classes(pkg) if any("attrs." in str(d.value) for d in found.decorators)]
        fields = {found.path: {n: m for n, m in found.members.items() if _is_field(m)} for found in classes}
        for own in fields.values():
            for field in own.values():
                _show_default(field)
        for found in classes:
            bases = [fields[base.path] for base in found.mro() if base.path in fields]
            for name in dict.fromkeys(name for base in bases[::-1] for name in base) | fields[found.path]:
                known = [members[name] for members in (fields[found.path], *bases) if name in members]
                documented = next((field for field in known if field.has_docstring), None)
                if documented is None:
                    continue
                if name in fields[found.path]:
                    known[0].docstring = documented.docstring
                else:
                    found.members[name] = griffe.Alias(name, known[0], parent=found)


def _classes(parent: griffe.Module | griffe.Class) -> list[griffe.Class]:
    """The classes of a module and of all that it holds."""
    members = [member for member in parent.members.values() if not member.is_alias]
    found = [member for member in members if isinstance(member, griffe.Class)]
    for member in members:
        if isinstance(member, (griffe.Module, griffe.Class)):
            found += _classes(member)
    return found


def _is_field(member: Any) -> bool:
    if not isinstance(member, griffe.Attribute) or member.annotation is None or "property" in member.labels:
        return False
    return "ClassVar" not in str(member.annotation)


def _show_default(field: griffe.Attribute) -> None:
    """Put the default of ``attrs.field(...)`` in its place; a factory is shown as its call."""
    field.labels = set()
    if not isinstance(field.value, griffe.ExprCall) or str(field.value.function) != "attrs.field":
        return
    given = {a.name: a.value for a in field.value.arguments if isinstance(a, griffe.ExprKeyword)}
    field.value = given.get("default")
    if factory := given.get("factory"):
        field.value = factory.body if isinstance(factory, griffe.ExprLambda) else griffe.ExprCall(factory, [])
