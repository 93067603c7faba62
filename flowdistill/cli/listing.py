"""The commands that tell what there is: ``flowdistill list``, ``show`` and ``cite``."""

from __future__ import annotations

import argparse
import inspect
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flowdistill.plumbing import config
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import Preset
from flowdistill.plumbing.statements import parts_of


def list_command(options: argparse.Namespace) -> None:
    """Print the packaged gin files and what is registered: a row each, under a heading for each kind."""
    from flowdistill.plumbing.registry import REGISTRIES

    width, kind = shutil.get_terminal_size().columns, options.kind
    if kind is not None:
        for name, row in _rows(kind, width).items():
            print(row)
            for line in _wrapped(REGISTRIES[kind].variants(name) if kind in REGISTRIES else [], width):
                print(line)
        return
    for kind in (*_GIN_FILES, *REGISTRIES):
        how = " (flowdistill train METHOD --on SETTING)" if kind == "methods" else ""
        print(f"{kind}{how}", *(f"  {row}" for row in _rows(kind, width - 2).values()), "", sep="\n")


_GIN_FILES: dict[str, Callable[[], dict[str, Path]]] = {
    "methods": config.methods,
    "settings": config.settings,
    "recipes": lambda: {name: config.find_gin_file(name) for name in config.recipes()},
}


def _rows(kind: str, width: int) -> dict[str, str]:
    """Each name of a kind, with what it needs, if it is an objective, and its description; all in one line."""
    from flowdistill.plumbing.registry import REGISTRIES, unknown_name

    if kind in _GIN_FILES:
        described = {name: _first_comment(path) for name, path in _GIN_FILES[kind]().items()}
    elif kind in REGISTRIES:
        entries = {name: REGISTRIES[kind].get(name) for name in REGISTRIES[kind].names()}
        described = {name: _description(entry) for name, entry in entries.items()}
    else:
        raise unknown_name("kind", kind, [*_GIN_FILES, *REGISTRIES])
    first = max(map(len, described), default=0) + 2
    starts = {
        name: f"{name:{first}}{needs(entries[name]):15}" if kind == "objectives" else f"{name:{first}}"
        for name in described
    }
    return {name: start + _cut(described[name], width - len(start)) for name, start in starts.items()}


def _description(entry: Callable[..., Any]) -> str:
    """The first line of what is said of an entry; of a preset the words and numbers that it sets."""
    if isinstance(entry, Preset):
        plain = {name: value for name, value in entry.defaults.items() if isinstance(value, (str, int, float))}
        if plain:
            return ", ".join(f"{name} {value}" for name, value in plain.items())
    return (inspect.getdoc(entry) or "").partition("\n")[0]


def _cut(text: str, width: int) -> str:
    """The words of a text that fit into a width, with an ellipsis for those that do not.

    Examples:
        >>> _cut("The words that fit.", 19), _cut("The words that fit.", 18)
        ('The words that fit.', 'The words that …')
    """
    return textwrap.shorten(text, max(width, 2), placeholder=" …")


def _first_comment(path: Path) -> str:
    """The comment that opens a gin file."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
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
    """Print the documentation of something registered with its fields, or a packaged gin file."""
    from flowdistill.plumbing.fields import field_docs
    from flowdistill.plumbing.registry import REGISTRIES, unknown_name

    kind, name = options.kind, options.name
    if kind in _GIN_FILES:
        known = _GIN_FILES[kind]()
        if name not in known:
            raise unknown_name(kind.removesuffix("s"), name, list(known))
        print(known[name].read_text(encoding="utf-8"), end="")
        return
    if kind not in REGISTRIES:
        raise unknown_name("kind", kind, [*_GIN_FILES, *REGISTRIES])
    entry: Any = REGISTRIES[kind].get(name)
    parameters = inspect.signature(entry).parameters.values()
    print(f"{name}({', '.join(map(_default, parameters))})\n")
    print(inspect.getdoc(entry))
    described = entry.entry if isinstance(entry, Preset) else entry
    for field, text in (field_docs(described) if isinstance(described, type) else {}).items():
        print(f"\n{field}\n{textwrap.indent(text, '    ')}")
    if isinstance(citation := getattr(described, "citation", None), str):
        print(f"\n{citation}")
    used = [file for file in config.gin_files() if name in parts_of(*config.statements(file))]
    if used:
        print(textwrap.fill(f"Gin files: {', '.join(used)}", 100, initial_indent="\n", break_on_hyphens=False))


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    simple = isinstance(value, (bool, int, float, str, tuple, type(None)))
    return parameter.name if value is parameter.empty or not simple else f"{parameter.name}={value!r}"


def cite_command(options: argparse.Namespace) -> None:
    """Print the BibTeX of the objective of a run or a gin file."""
    from flowdistill.plumbing.config import Configuration
    from flowdistill.runs.run import Run

    source = Path(options.source)
    if source.is_dir():
        objective: Any = Run(source, allow_imports=options.allow_imports).objective
    else:
        objective = Configuration(source, importing=True).build("train.objective")
    if objective is None:
        raise ConfigError(f"{source} sets no train.objective")
    print(objective.citation)
