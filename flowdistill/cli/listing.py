"""The commands that tell what there is: ``flowdistill list``, ``show`` and ``cite``."""

from __future__ import annotations

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowdistill.plumbing.errors import ConfigError


def list_command(options: argparse.Namespace) -> None:
    """Print what is registered, and the packaged recipes: a row each, under a heading for each kind."""
    from flowdistill.plumbing.config import recipes
    from flowdistill.plumbing.registry import REGISTRIES, unknown_name

    kinds = {kind: registry.names() for kind, registry in REGISTRIES.items()} | {"recipes": recipes()}
    if options.kind is not None and options.kind not in kinds:
        raise unknown_name("kind", options.kind, list(kinds))
    width = shutil.get_terminal_size().columns
    if options.kind is None:
        for kind, names in kinds.items():
            rows = (_row(kind, name, names, width, indent="  ") for name in names)
            print(kind, *rows, "", sep="\n")
        return
    for name in kinds[options.kind]:
        print(_row(options.kind, name, kinds[options.kind], width))
        for line in _wrapped(REGISTRIES[options.kind].variants(name) if options.kind in REGISTRIES else [], width):
            print(line)


def _row(kind: str, name: str, names: Sequence[str], width: int, indent: str = "") -> str:
    """A name among others, with what it needs, if it is an objective, and its description; all in one line."""
    from flowdistill.plumbing.registry import REGISTRIES

    start = f"{indent}{name:{max(map(len, names)) + 2}}"
    if kind == "recipes":
        return start + _cut(_first_comment(name), width - len(start))
    entry = REGISTRIES[kind].get(name)
    if kind == "objectives":
        start += f"{needs(entry):15}"
    return start + _cut((inspect.getdoc(entry) or "").partition("\n")[0], width - len(start))


def _cut(text: str, width: int) -> str:
    """The words of a text that fit into a width, with an ellipsis for those that do not.

    Examples:
        >>> _cut("The words that fit.", 19), _cut("The words that fit.", 18)
        ('The words that fit.', 'The words that …')
    """
    return textwrap.shorten(text, max(width, 2), placeholder=" …")


def _first_comment(recipe: str) -> str:
    """The comment that opens a recipe."""
    from flowdistill.plumbing.config import find_gin_file

    first = find_gin_file(recipe).read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _wrapped(names: Sequence[str], width: int) -> list[str]:
    """Names in indented lines of a width."""
    indent = "    "
    return textwrap.wrap(
        ", ".join(names), width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def needs(objective: Any) -> str:
    """What an objective needs as it stands by default."""
    try:
        built = objective()
    except TypeError:  # it has parts without a default
        return "of its parts"
    return ", ".join(word for word in ("data", "teacher") if getattr(built, f"needs_{word}")) or "nothing"


def show_command(options: argparse.Namespace) -> None:
    """Print the documentation of something registered, or a recipe."""
    from flowdistill.plumbing.config import find_gin_file, parts_of, recipes, statements
    from flowdistill.plumbing.registry import REGISTRIES, unknown_name

    if options.kind == "recipes":
        print(find_gin_file(options.name).read_text(), end="")
        return
    if options.kind not in REGISTRIES:
        raise unknown_name("kind", options.kind, [*REGISTRIES, "recipes"])
    entry: Any = REGISTRIES[options.kind].get(options.name)
    parameters = inspect.signature(entry).parameters.values()
    print(f"{options.name}({', '.join(map(_default, parameters))})\n")
    print(inspect.getdoc(entry))
    if isinstance(citation := getattr(entry, "citation", None), str):
        print(f"\n{citation}")
    used = [recipe for recipe in recipes() if options.name in parts_of(*statements(recipe))]
    if used:
        print(textwrap.fill(f"Recipes: {', '.join(used)}", 100, initial_indent="\n", break_on_hyphens=False))


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    simple = isinstance(value, (bool, int, float, str, tuple, type(None)))
    return parameter.name if value is parameter.empty or not simple else f"{parameter.name}={value!r}"


def cite_command(options: argparse.Namespace) -> None:
    """Print the BibTeX of the objective of a run or a gin file."""
    from flowdistill.plumbing.config import Configuration
    from flowdistill.runs.run import Run

    source = Path(options.source)
    objective: Any = Run(source).objective if source.is_dir() else Configuration(source).build("train.objective")
    if objective is None:
        raise ConfigError(f"{source} sets no train.objective")
    print(objective.citation)
