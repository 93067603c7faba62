"""Reading gin files: where they are found, what they say, what is wrong with them, and whether all of it was used.

`statements` gives a configuration as data, and is the only way to read one without building it. `parsed` gives it to
gin, which builds the parts.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import io
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import gin
from gin.config_parser import BindingStatement, ConfigParser, ImportStatement, IncludeStatement, ParserDelegate

from flowdistill.plumbing.errors import ConfigError, in_one_line
from flowdistill.plumbing.fields import short
from flowdistill.plumbing.gin_errors import errors_located, located
from flowdistill.plumbing.hints import hints_of, in_words, matches, takes_words_alone, too_large
from flowdistill.plumbing.randomness import ONE_AT_A_TIME
from flowdistill.plumbing.registry import PLUGIN_GROUP, load_all, load_plugins, unknown_name
from flowdistill.plumbing.statements import BOUND, Reference, Statement, last_name, parts_of, readable, references_in

_RECIPE_PACKAGES = ("flowdistill.algorithms", "flowdistill.teachers")


def recipe_roots() -> list[Path]:
    """The folders that hold packaged recipes: ``freeflow/digits.gin`` lies in one of them.

    The packages of installed plug-ins come last, so that none of them hides what the library has.
    """
    packages = [Path(importlib.import_module(name).__path__[0]) for name in _RECIPE_PACKAGES]
    return [*packages, Path(__file__).parents[1] / "configs", *_plugin_roots()]


@functools.cache
def _plugin_roots() -> list[Path]:
    """The folders of the packages that installed plug-ins name; none of them is imported."""
    packages = sorted({plugin.module.partition(".")[0] for plugin in entry_points(group=PLUGIN_GROUP)})
    specs = filter(None, map(find_spec, packages))
    return [Path(place) for spec in specs for place in spec.submodule_search_locations or ()]


def _names_bound(path: Path) -> set[str]:
    """What a packaged gin file binds; nothing, with a warning, where it is of a plug-in and cannot be read."""
    try:
        return {statement.name for statement in statements(path)}
    except ConfigError as error:
        if not any(path.is_relative_to(root) for root in _plugin_roots()):
            raise
        warnings.warn(f"a gin file of a plug-in is left out: {in_one_line(error)}", RuntimeWarning, stacklevel=2)
        return set()


def recipes() -> list[str]:
    """The names of all packaged recipes: the gin files that bind an objective and its steps, or include one that does.

    The others hold settings that recipes share.
    """
    return [name for name in gin_files() if {"train.objective", "train.steps"} <= _names_bound(find_gin_file(name))]


def gin_files() -> list[str]:
    """The names of all packaged gin files."""
    found = [path.relative_to(root).as_posix() for root in recipe_roots() for path in root.rglob("*.gin")]
    return sorted(found)


@functools.cache
def methods() -> dict[str, Path]:
    """The packaged methods by name: the gin files that bind an objective and leave the rest to a setting."""
    found: dict[str, Path] = {}
    for path in (path for root in recipe_roots() for path in root.rglob("*.gin")):
        bound = _names_bound(path)
        if "train.objective" in bound and "train.steps" not in bound:
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


@functools.cache
def settings() -> dict[str, Path]:
    """The packaged settings by name: a teacher, a student, an optimiser, a budget, data and an evaluation."""
    found: dict[str, Path] = {}
    for path in (path for root in recipe_roots() for path in (root / "settings").glob("*.gin")):
        if "train.steps" in _names_bound(path):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def composed(method: str | Path, setting: str | Path) -> list[Path]:
    """The gin files of a method on a setting: the setting, the method, and what the method changes there.

    A method keeps what it changes on a setting in a file beside its own, such as ``ayf_emd_plane.gin`` for ``ayf_emd``,
    or in ``plane.gin`` for all methods of the folder that have no such file.

    Args:
        method: a name that ``flowdistill list methods`` shows, or a gin file.
        setting: a name that ``flowdistill list settings`` shows, or a gin file.

    Raises:
        ConfigError: there is no such method or setting; the message lists the nearest.
    """
    found = [_named(setting, "setting", settings()), _named(method, "method", methods())]
    where, name = found[1], found[0].stem
    changes = [where.with_name(f"{where.stem}_{name}.gin"), where.with_name(f"{name}.gin")]
    return [*found, *[path for path in changes if path not in found and _only_changes(path)][:1]]


def _only_changes(path: Path) -> bool:
    """Whether a gin file is there and neither a method nor a whole recipe, which have an objective."""
    return path.is_file() and all(statement.name != "train.objective" for statement in statements(path))


def chosen(
    recipe: str | Path | None = None,
    on: str | Path | None = None,
    gin_file: str | Path | None = None,
    gin_files: Sequence[str | Path] = (),
) -> list[str | Path]:
    """The gin files that a user names: a method on a setting, or a whole recipe, and then further files.

    Raises:
        ConfigError: a method without a setting, or a setting without a method.
    """
    files: list[str | Path] = []
    if on is not None:
        if recipe is None:
            raise ConfigError(f"{on} is a setting: name a method to train on it, such as freeflow")
        files += composed(recipe, on)
    elif recipe is not None:
        if Path(recipe).suffix != ".gin":
            _named(recipe, "method", methods())
            raise ConfigError(f"{recipe} is a method: name a setting to train it on, such as on='digits' (--on digits)")
        files.append(recipe)
    return [*files, *([] if gin_file is None else [gin_file]), *gin_files]


def _named(name: str | Path, kind: str, known: Mapping[str, Path]) -> Path:
    if str(name) in known:
        return known[str(name)]
    if Path(name).suffix == ".gin":
        return find_gin_file(name)
    raise unknown_name(kind, str(name), list(known))


def packaged_name(path: Path) -> str:
    """The name under which a packaged gin file is found; the absolute path of any other."""
    for root in recipe_roots():
        if path.is_relative_to(root):
            return path.relative_to(root).as_posix()
    return str(path.absolute())


def find_gin_file(name: str | Path) -> Path:
    """A gin file in the working directory (or at an absolute path), else among the packaged recipes.

    Raises:
        ConfigError: there is none; the message lists the nearest recipes.
    """
    for root in (Path(), *recipe_roots()):
        if (root / name).is_file():
            return root / name
    if Path(name).is_dir():
        raise ConfigError(f"{name} is a folder, and no gin file")
    raise unknown_name("gin file", str(name), gin_files())


class _AsData(ParserDelegate):  # type: ignore[misc]
    """Parses values without building anything."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        return Reference(scoped_configurable_name, evaluate)

    def macro(self, macro_name: str) -> Reference:
        return Reference(macro_name, macro=True)


def statements(gin_file: str | Path) -> list[Statement]:
    """The bindings of a gin file in their order, with those of the files that it includes in their places.

    Nothing is imported and nothing is built, so the names need not be known.

    Raises:
        ConfigError: there is no such file, or it cannot be parsed; with the file and the line.

    Examples:
        >>> print(statements("freeflow/ring.gin")[0])
        distribution = @ring()
    """
    return [statement for piece in _pieces_of_file(find_gin_file(gin_file)) for statement in piece.statements]


def text_of(path: Path) -> str:
    """The text of a gin file; ConfigError if it cannot be read, or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no gin file: it is not UTF-8 ({error})") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def statements_of(text: str, source: str) -> list[Statement]:
    """The bindings of the text of a gin file; see `statements`.

    Args:
        text: what a gin file may hold.
        source: where it comes from, for messages.

    Examples:
        >>> [binding] = statements_of("decoder/mlp.depth = 3", "an example")
        >>> binding.scope, binding.part, binding.parameter, binding.value, binding.place
        ('decoder', 'mlp', 'depth', 3, 'an example, line 1')
    """
    return [statement for piece in _pieces(text, source, None) for statement in piece.statements]


@attrs.frozen
class _Piece:
    """The lines of a gin file between two includes, with empty lines in the places of the others."""

    lines: list[str]
    source: str
    folder: Path | None
    statements: list[Statement] = attrs.field(factory=list)
    imports: dict[int, str] = attrs.field(factory=dict)
    """The modules that it imports, by the number of the line."""

    def parse(self, importing: bool, skip_unknown: bool = False) -> None:
        """Let gin read it; without ``importing`` only what has been imported already is imported."""
        kept = self.lines.copy()
        for number, module in self.imports.items():
            if not importing and module not in sys.modules:
                kept[number - 1] = "\n"
        file = io.StringIO("".join(kept))
        file.name = self.source  # for gin's messages
        with located(self.source), _on_path(self.imports.values(), self.folder):
            gin.parse_config(file, skip_unknown=skip_unknown)


def _pieces_of_file(path: Path, within: tuple[Path, ...] = ()) -> Iterator[_Piece]:
    yield from _pieces(text_of(path), str(path), path.absolute().parent, (*within, path.resolve()))


def _pieces(text: str, source: str, folder: Path | None, within: tuple[Path, ...] = ()) -> Iterator[_Piece]:
    """The pieces of a text and of all that it includes, in the order in which gin is to read them.

    Args:
        text: what a gin file may hold.
        source: where it comes from, for messages.
        folder: where included files are looked for first; None for a text that is in no file.
        within: the files that include this one, and itself.
    """
    lines = text.splitlines(keepends=True)
    found, first = _Piece(lines, source, folder), 0
    with located(source):
        for parsed in ConfigParser(text, _AsData()):
            if isinstance(parsed, IncludeStatement):
                line = parsed.location.line_num
                yield attrs.evolve(found, lines=["\n"] * first + lines[first : line - 1])
                included = _included(parsed.filename, folder)
                if included.resolve() in within:
                    chain = " includes ".join(map(str, (*within[within.index(included.resolve()) :], included)))
                    raise ConfigError(f"{source}, line {line}: {chain}, in a circle")
                yield from _pieces_of_file(included, within)
                found, first = _Piece(lines, source, folder), line
            elif isinstance(parsed, ImportStatement):
                found.imports[parsed.location.line_num] = parsed.module
            elif isinstance(parsed, BindingStatement):
                scope, selector, parameter, value, location = parsed
                if not parameter:  # a macro
                    selector, parameter = "", selector
                place = f"{source}, line {location.line_num}"
                found.statements.append(Statement(scope, selector, parameter, readable(value), place))
    yield attrs.evolve(found, lines=["\n"] * first + lines[first:])


def _included(name: str, folder: Path | None) -> Path:
    """An included file: beside the file that includes it, else where `find_gin_file` looks."""
    if folder is not None and (folder / name).is_file():
        return folder / name
    return find_gin_file(name)


def quoted(binding: str) -> str:
    """A binding as people type it: with quotes around a value that is a bare word or a path.

    Examples:
        >>> quoted("train.precision=bf16"), quoted("train.steps=10"), quoted("train.objective=@meanflow()")
        ("train.precision='bf16'", 'train.steps=10', 'train.objective=@meanflow()')
    """
    name, _, value = binding.partition("=")
    text = value.strip()
    if not _BARE.fullmatch(text) or text.lower() in _CONSTANTS:
        return binding
    try:
        list(_pieces(binding, "", None))
    except ConfigError:
        return f"{name}={text!r}"
    return binding


_BARE = re.compile(r"[^\s'\"()\[\]{},@%#\\=][^'\"()\[\]{},@%#\\=]*")
_CONSTANTS = {"none", "null", "true", "false"}  # which people write in many ways, and mean as such


@contextlib.contextmanager
def _on_path(modules: Iterable[str], folder: Path | None) -> Iterator[None]:
    """Inside, modules are also found where Python does not look: in the working directory, and beside the gin file."""
    before = sys.path.copy()
    if modules:
        sys.path += map(str, (Path.cwd(), *([] if folder is None else (folder, folder.parent))))
    try:
        yield
    finally:
        sys.path[:] = before


def operative() -> str:
    """All parameters of the parts that gin has built so far, as a gin file that builds them again."""
    state = gin.config._OPERATIVE_CONFIG
    before = {part: dict(parameters) for part, parameters in state.items()}
    try:
        for parameters in state.values():
            parameters.update({name: readable(value) for name, value in parameters.items()})
        text: str = gin.operative_config_str()
        return text
    finally:
        state.update(before)


@contextlib.contextmanager
def parsed(files: Sequence[str | Path], bindings: Sequence[str]) -> Iterator[None]:
    """The configuration of gin files and then of bindings, inside a with statement.

    Without files and bindings, what the caller has parsed with gin holds; with them it is set aside until the statement
    ends, so that a part which is being built may read the configuration of another run. Gin's own errors become
    `ConfigError`, with the file and the line.
    """
    load_all()
    with ONE_AT_A_TIME, _empty() if files or bindings else contextlib.nullcontext():
        for file in files:
            for piece in _pieces_of_file(find_gin_file(file)):
                piece.parse(importing=True)
                _note_places(piece.statements)
        for binding in bindings:
            place = f"binding {binding!r}"
            for piece in _pieces(binding, place, None):
                piece.parse(importing=True)
                _note_places(attrs.evolve(s, place=place) for s in piece.statements)
        _check_values()
        yield


class Configuration:
    """The configuration of a gin file, from which parts are built one by one.

    A part is built as in training. But only what the part is made of is imported: a student is built without the
    trainer, and without the modules of an objective.

    Args:
        gin_file: see `find_gin_file`.
        importing: whether the modules that the file imports are imported; without, only those that already are.

    Attributes:
        statements: the bindings as data.

    Examples:
        >>> Configuration("freeflow/ring.gin").build("train.teacher").sample_shape
        (2,)
    """

    def __init__(self, gin_file: str | Path, importing: bool = False) -> None:
        self._path, self._importing = find_gin_file(gin_file), importing
        self._pieces = list(_pieces_of_file(self._path))
        self.statements = [statement for piece in self._pieces for statement in piece.statements]
        self._state: list[Any] | None = None  # what gin has read, and the names that it did not know then
        self._unknown: set[str] = set()

    def build(self, parameter: str) -> Any:
        """What is bound to a parameter, such as ``train.teacher``, with the parts that it refers to built.

        Returns:
            None where nothing is bound to it.

        Raises:
            ConfigError: a part is not known, or cannot be built; with the file and the line.
        """
        bound = [statement.value for statement in self.statements if statement.name == parameter]
        if not bound:
            return None
        with self.in_force(parameter):
            return copy.deepcopy(gin.config.parse_value(repr(bound[-1])))  # gin evaluates references in copies

    @contextlib.contextmanager
    def in_force(self, parameter: str) -> Iterator[None]:
        """Inside the with statement gin has the bindings, at least those of the parts that a parameter needs."""
        needed = self._needed(parameter)
        with ONE_AT_A_TIME, _empty():
            if self._state is None or needed & self._unknown:
                self._parse(needed)
            else:
                _install(self._state)
            try:
                with errors_located():
                    yield
            finally:
                self._state = _copied()

    def _parse(self, needed: set[str]) -> None:
        """Let gin read the file, and skip what it does not know, unless it is needed."""
        for load in (load_plugins, load_all):
            load()
            _install([])
            for piece in self._pieces:
                piece.parse(self._importing, skip_unknown=True)
            _note_places(self.statements)
            _check_values()
            self._state = _copied()
            self._unknown = {name for name in _names(self.statements) if not _known(name)}
            if not needed & self._unknown:
                return
        modules = sorted({name for piece in self._pieces for name in piece.imports.values() if name not in sys.modules})
        if modules and not self._importing:
            raise ConfigError(
                f"{self._path} imports {', '.join(modules)}, and nothing that comes with a run is executed unasked: if "
                "you trust it, give --allow_imports (in Python, Run(..., allow_imports=True)), or import it before"
            )
        for piece in self._pieces:
            piece.parse(self._importing)  # which says what is not known, and where

    def _needed(self, parameter: str) -> set[str]:
        """The names of all parts that a parameter refers to, directly or through their own bindings."""
        parts = parts_of(*(statement for statement in self.statements if statement.name == parameter))
        while more := parts_of(*(statement for statement in self.statements if statement.part in parts)) - parts:
            parts |= more
        return {name for name in _names(self.statements) if last_name(name) in parts}


def _names(bindings: Iterable[Statement]) -> set[str]:
    """The names of parts that bindings set up or refer to, as they are written, without scopes; no macros."""
    names = {binding.selector for binding in bindings if binding.selector}
    return names | {r.name.rpartition("/")[2] for b in bindings for r in b.references if not r.macro}


def _known(name: str) -> bool:
    return bool(gin.config._REGISTRY.matching_selectors(name))


def _note_places(bindings: Iterable[Statement]) -> None:
    """Remember every binding with its place, which gin 0.5 does not."""
    BOUND.extend(bindings)


def _check_values() -> None:
    """Fail at the first literal that cannot be what its parameter asks for, before anything is built."""
    last = {binding.name: binding for binding in BOUND}
    for binding in last.values():
        value = binding.value
        for _ in last:  # a macro may stand for another one
            if isinstance(value, Reference) and value.macro and value.name in last:
                value = last[value.name].value
        thing = isinstance(value, Reference) and _is_thing(value)
        if not _known(binding.selector) or (list(references_in(value)) and not thing):
            continue
        part = gin.config._REGISTRY.get_match(binding.selector).wrapped
        hint = hints_of(getattr(part, "entry", part)).get(binding.parameter)
        if thing and not takes_words_alone(hint):
            continue
        if hint is not None and not matches(value, hint):
            reason = f"must be {in_words(hint)}, not {short(value)}"
        elif too_large(value) and binding.parameter != "seed":
            reason = f"is too large: {short(value)}"
        else:
            continue
        name = f"{last_name(binding.selector)}.{binding.parameter}"
        raise ConfigError(f"{name} {reason}\n  {binding.name}: {binding.place}")


def _is_thing(reference: Reference) -> bool:
    """Whether a reference is to a class or a function, or to an object of a class: to what is no number or word."""
    if reference.macro or not _known(reference.name):
        return False
    part = gin.config._REGISTRY.get_match(reference.name).wrapped
    return not reference.called or isinstance(getattr(part, "entry", part), type)


def _spared() -> set[str]:
    """The parts whose bindings need not be used.

    A file may define macros for whoever needs them, such as the data of a setting.
    And whoever replaces a part, such as a law of times, leaves its settings behind.
    """
    last = {binding.name: binding for binding in BOUND}
    replaced = [binding for binding in BOUND if last[binding.name] is not binding]
    offered = {b.part for b in BOUND if not b.selector and not b.place.startswith("binding")}
    found: set[str] = set()
    waiting = [*offered, *parts_of(*replaced)]
    while waiting:
        part = waiting.pop()
        if part not in found:
            found.add(part)
            waiting += parts_of(*(binding for binding in BOUND if binding.part == part))
    return found


def _gin_state() -> tuple[Any, ...]:
    """What gin.clear_config clears, and the places of the bindings."""
    return gin.config._CONFIG, gin.config._OPERATIVE_CONFIG, gin.config._SINGLETONS, gin.config._IMPORTS, BOUND


def _copied() -> list[Any]:
    return [part.copy() for part in _gin_state()]


def _install(state: Sequence[Any]) -> None:
    """Put a copied state in the place of what gin has; an empty sequence clears it."""
    gin.clear_config()
    BOUND.clear()
    for part, content in zip(_gin_state(), state, strict=bool(state)):
        part.extend(content) if part is BOUND else part.update(content)


@contextlib.contextmanager
def _empty() -> Iterator[None]:
    """Inside, gin has no bindings but those that are parsed there; afterwards it has those of the caller again."""
    saved = _copied()
    _install([])
    try:
        yield
    finally:
        _install(saved)


def value(parameter: str, default: Any = None) -> Any:
    """The value bound to a parameter such as ``train.teacher``, with its references built; or the default."""
    try:
        bound = gin.query_parameter(parameter)
    except ValueError:
        return default
    return copy.deepcopy(bound)  # gin evaluates references when they are copied


def macro(name: str) -> Any:
    """The value of a macro, with its references built; None if nothing defines it.

    It is part of the operative configuration, as where a file refers to it.
    """
    try:
        gin.query_parameter(f"{name}/macro.value")
    except ValueError:
        return None
    return gin.get_configurable(f"{name}/macro")()


def check_all_used(without: Sequence[str] = ()) -> None:
    """Fail if a binding was not consumed by anything that has been built so far.

    Macros that files define need not be used, nor what only they, or bindings that others replaced, refer to.

    Args:
        without: gin modules whose bindings may be without use, such as ``evaluation``.

    Raises:
        ConfigError: names every such binding, which does nothing: the part it sets is not in this configuration.
    """
    used, spared = gin.config._OPERATIVE_CONFIG, _spared()
    unused = []
    for (scope, selector), parameters in gin.config._CONFIG.items():
        consumers = [
            set(names)
            for (used_scope, used_selector), names in used.items()
            if used_selector == selector and (not scope or f"{used_scope}/".startswith(f"{scope}/"))
        ]
        module, _, name = selector.rpartition(".")
        macro = selector == "gin.macro"
        if module in without or (f"%{scope}" if macro else name) in spared:
            continue
        for parameter in parameters:
            if not any(parameter in names for names in consumers):
                unused.append(scope if macro else f"{scope}/{name}.{parameter}".lstrip("/"))
    if unused:
        raise ConfigError(
            f"nothing uses {', '.join(sorted(unused))}: the part that it sets is not in this configuration"
        )
