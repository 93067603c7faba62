"""Reading gin files: where they are found, what is wrong with them, and whether everything in them was used."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import logging
import re
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import gin
from gin.config_parser import BindingStatement, ConfigParser, IncludeStatement, ParserDelegate

from flowdistill.plumbing.errors import ConfigError, FlowDistillError
from flowdistill.plumbing.registry import load_plugins, unknown_name

_RECIPE_PACKAGES = ("flowdistill.algorithms", "flowdistill.teachers")
_PLACES: list[_Bound] = []  # the bindings of the present configuration, in their order


def recipe_roots() -> list[Path]:
    """The folders that hold packaged recipes: ``freeflow/digits.gin`` lies in one of them."""
    packages = [Path(importlib.import_module(name).__path__[0]) for name in _RECIPE_PACKAGES]
    return [*packages, Path(__file__).parents[1] / "configs"]


def recipes() -> list[str]:
    """The names of all packaged recipes: the gin files that name an objective and its steps, or include one that does.

    The others hold settings that recipes share.
    """
    whole = re.compile(r"(?=.*^train\.objective =)(?=.*^train\.steps =)", re.MULTILINE | re.DOTALL)
    return [name for name in gin_files() if whole.search(expanded(name))]


def gin_files() -> list[str]:
    """The names of all packaged gin files."""
    found = [path.relative_to(root).as_posix() for root in recipe_roots() for path in root.rglob("*.gin")]
    return sorted(found)


def expanded(name: str | Path) -> str:
    """The text of a gin file with those that it includes in their places."""
    text = find_gin_file(name).read_text()
    return re.sub(r"^include\s+(['\"])(.*)\1\n?", lambda match: expanded(match[2]), text, flags=re.MULTILINE)


_METHOD = re.compile(r"^train\.objective =", re.MULTILINE)
_LENGTH = re.compile(r"^train\.steps =", re.MULTILINE)


def methods() -> dict[str, Path]:
    """The packaged methods by name: the gin files that name an objective and leave the rest to a setting."""
    found = {}
    for path in (path for root in recipe_roots() for path in root.rglob("*.gin")):
        text = expanded(path)
        if _METHOD.search(text) and not _LENGTH.search(text):
            found[path.stem] = path
    return dict(sorted(found.items()))


def settings() -> dict[str, Path]:
    """The packaged settings by name: a teacher, a student, an optimiser, a budget, data and an evaluation."""
    folder = Path(__file__).parents[1] / "configs" / "settings"
    return {path.stem: path for path in sorted(folder.glob("*.gin")) if _LENGTH.search(expanded(path))}


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
    return [*found, *[path for path in changes if path.is_file() and path != where][:1]]


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
    raise unknown_name("gin file", str(name), gin_files())


@contextlib.contextmanager
def parsed(files: Sequence[str | Path], bindings: Sequence[str]) -> Iterator[None]:
    """The configuration of gin files and then of bindings, inside a with statement.

    Without files and bindings, what the caller has parsed with gin holds; with them it is set aside until the statement
    ends, so that a part which is being built may read the configuration of another run. Gin's own errors become
    `ConfigError`, with the file and the line.
    """
    load_plugins()
    own = bool(files or bindings)
    saved: list[Any] = []
    if own:
        saved = [part.copy() for part in _gin_state()]
        gin.clear_config()
        _PLACES.clear()
    for root in recipe_roots():
        gin.add_config_file_search_path(str(root))
    try:
        for file in files:
            path = find_gin_file(file)
            with _located(path), _files_alone():
                gin.parse_config_file(str(path))
                _note_places(path.read_text(), str(path))
        for binding in bindings:
            with _located(f"binding {binding!r}"):
                gin.parse_config(binding)
                _note_places(binding, f"binding {binding!r}")
        yield
    finally:
        if own:
            gin.clear_config()
            _PLACES.clear()
            for part, before in zip(_gin_state(), saved, strict=True):
                part.extend(before) if isinstance(part, list) else part.update(before)


@contextlib.contextmanager
def _files_alone() -> Iterator[None]:
    """Included files are looked for as files.

    Not in Python packages, where gin would fail at any folder that has the name of a recipe's, nor with a log of every
    folder in which they are not.
    """
    before, readers = logging.root.manager.disable, gin.config._FILE_READERS
    logging.disable(logging.ERROR)
    gin.config._FILE_READERS = readers[:1]
    try:
        yield
    finally:
        gin.config._FILE_READERS = readers
        logging.disable(before)


def _gin_state() -> tuple[Any, ...]:
    """What gin.clear_config clears, and the places of the bindings."""
    return gin.config._CONFIG, gin.config._OPERATIVE_CONFIG, gin.config._SINGLETONS, gin.config._IMPORTS, _PLACES


class _Syntax(ParserDelegate):  # type: ignore[misc]
    """Parses values without building anything; it collects the names of what they refer to."""

    def __init__(self) -> None:
        self.references: set[str] = set()

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        self.references.add(re.split(r"[./]", scoped_configurable_name)[-1])

    def macro(self, macro_name: str) -> None:
        self.references.add(macro_name)


@attrs.frozen
class _Bound:
    """A binding as it was read: whose, of which parameter, in which scope, where, and what its value refers to."""

    owner: str
    parameter: str
    scope: str
    place: str
    references: frozenset[str]


def _note_places(text: str, source: str) -> None:
    """Remember every binding with its place, which gin 0.5 does not."""
    syntax = _Syntax()
    for statement in ConfigParser(text, syntax):
        references, syntax.references = frozenset(syntax.references), set()
        if isinstance(statement, IncludeStatement):
            path = find_gin_file(statement.filename)
            _note_places(path.read_text(), str(path))
        elif isinstance(statement, BindingStatement):
            owner, parameter = statement.selector.rpartition(".")[2], statement.arg_name or ""
            line = "" if source.startswith("binding") else f", line {statement.location.line_num}"
            _PLACES.append(_Bound(owner, parameter, statement.scope, f"{source}{line}", references))


def _places() -> dict[tuple[str, str], str]:
    """Where each parameter (owner, name) was last bound."""
    return {(bound.owner, bound.parameter): bound.place for bound in _PLACES}


def _spared() -> set[str]:
    """What need not be used: macros that files define, what they refer to, and what replaced bindings referred to.

    A file may define macros for whoever needs them, such as the data of a setting.
    And whoever replaces a part, such as a law of times, leaves its settings behind.
    """
    last = {(bound.owner, bound.parameter, bound.scope): bound for bound in _PLACES}
    replaced = [bound for bound in _PLACES if last[bound.owner, bound.parameter, bound.scope] is not bound]
    macros = {bound.owner for bound in _PLACES if not bound.parameter and not bound.place.startswith("binding")}
    waiting = [*macros, *(name for bound in replaced for name in bound.references)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [other for bound in _PLACES if bound.owner == name for other in bound.references]
    return found


@contextlib.contextmanager
def _located(place: str | Path) -> Iterator[None]:
    try:
        yield
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise ConfigError(f"{place}, line {line}: {message}") from None
    except SyntaxError as error:
        raise ConfigError(f"{place}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}") from None
    except (ValueError, TypeError, LookupError, NameError, ImportError, OSError, RuntimeError) as error:
        raise _config_error(_text(error)) from None


@contextlib.contextmanager
def errors_located() -> Iterator[None]:
    """Turn what goes wrong while gin builds objects into `ConfigError`, with the bindings of the part that failed."""
    try:
        yield
    except FlowDistillError as error:
        # gin raises a proxy, a class of its own that overrides __str__, of the class that was raised
        kind = next(cls for cls in type(error).__mro__ if "__str__" not in vars(cls))
        raise kind(_with_bindings(str(error))) from error.__cause__
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
        raise _config_error(_text(error)) from error


def _text(error: Exception) -> str:
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


def _config_error(message: str) -> ConfigError:
    """Gin's message as an error, with the nearest matches of an unknown name."""
    place = message.partition("\n")[2]
    if match := re.search(r"No configurable matching (?:reference '@)?'?([\w./]+)", message):
        known = [selector.rpartition(".")[2] for selector, _ in gin.config._REGISTRY.items()]
        name = re.split(r"[./]", match[1])[-1]
        return ConfigError(f"{unknown_name('name', name, known)}\n{place}")
    if match := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message):
        known = list(inspect.signature(gin.config._REGISTRY.get_match(match[1]).wrapped).parameters)
        return ConfigError(f"{unknown_name(f'parameter of {match[1]}', match[2], known)}\n{place}")
    return ConfigError(_with_bindings(message))


def _with_bindings(message: str) -> str:
    """The message of a configurable's failure, with the places of the bindings to look at."""
    match = re.search(r"\n +In call to configurable '(\w+)'.*", message)
    if match is None:
        return message
    reason, name = message[: match.start()], match[1]
    reason = re.sub(r"^\(\"(.*?)\", Attribute\(.*\)$", r"\1", reason)  # some attrs validators raise a tuple
    places = {parameter: place for (owner, parameter), place in _places().items() if owner == name}
    named = [parameter for parameter in places if re.search(rf"\b{parameter}\b", reason)]
    lines = [f"\n  {name}.{parameter}: {places[parameter]}" for parameter in named or places]
    return ("" if reason.startswith(f"{name}.") else f"{name}: ") + reason + "".join(lines)


def value(parameter: str, default: Any = None) -> Any:
    """The value bound to a parameter such as ``train.teacher``, with its references built; or the default."""
    try:
        bound = gin.query_parameter(parameter)
    except ValueError:
        return default
    return copy.deepcopy(bound)  # gin evaluates references when they are copied


def macro(name: str) -> Any:
    """The value of a macro, with its references built; None if nothing defines it."""
    return value(f"{name}/macro.value")


def check_all_used(without: Sequence[str] = ()) -> None:
    """Fail if a binding was not consumed by anything that has been built so far.

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
        if module in without or (scope if macro else name) in spared:
            continue
        for parameter in parameters:
            if not any(parameter in names for names in consumers):
                unused.append(scope if macro else f"{scope}/{name}.{parameter}".lstrip("/"))
    if unused:
        raise ConfigError(
            f"nothing uses {', '.join(sorted(unused))}: the part that it sets is not in this configuration"
        )
