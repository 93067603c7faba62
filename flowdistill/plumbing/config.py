"""Reading gin files: where they are found, what is wrong with them, and whether everything in them was used."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import logging
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
from gin.config_parser import BindingStatement, ConfigParser, IncludeStatement, ParserDelegate

from flowdistill.plumbing.errors import ConfigError, FlowDistillError
from flowdistill.plumbing.registry import load_plugins, unknown_name

_RECIPE_PACKAGES = ("flowdistill.algorithms", "flowdistill.teachers")
_PLACES: dict[tuple[str, str], str] = {}  # where each parameter (configurable, name) was bound


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
                part.update(before)


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
    """Parses values without building anything."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        pass

    def macro(self, macro_name: str) -> None:
        pass


def _note_places(text: str, source: str) -> None:
    """Remember the line of every binding, which gin 0.5 does not."""
    for statement in ConfigParser(text, _Syntax()):
        if isinstance(statement, IncludeStatement):
            path = find_gin_file(statement.filename)
            _note_places(path.read_text(), str(path))
        elif isinstance(statement, BindingStatement):
            name = statement.selector.rpartition(".")[2] or statement.scope
            line = "" if source.startswith("binding") else f", line {statement.location.line_num}"
            _PLACES[name, statement.arg_name or ""] = f"{source}{line}"


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
    places = {parameter: place for (owner, parameter), place in _PLACES.items() if owner == name}
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


def _within(macros: Iterable[str]) -> set[str]:
    """The selectors of the parts that macros refer to, directly or through other parts."""
    found: set[str] = set()
    waiting = list(macros)
    while waiting:
        owner = waiting.pop()
        for (scope, selector), parameters in gin.config._CONFIG.items():
            if owner != (scope if selector == "gin.macro" else selector):
                continue
            named = {name for value in parameters.values() for name in _references(value)} - found
            found |= named
            waiting += named
    return found


def _references(value: Any) -> Iterator[str]:
    """The selectors of the parts, and the names of the macros, that a bound value refers to."""
    if isinstance(value, gin.config.ConfigurableReference):
        scope, selector = value.config_key
        yield scope if selector == "gin.macro" else selector
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _references(part)


def check_all_used(without: Sequence[str] = ()) -> None:
    """Fail if a binding was not consumed by anything that has been built so far.

    A file may define macros for whoever needs them, such as the data of a setting: those, and the parts that only they
    refer to, need not be used.

    Args:
        without: gin modules whose bindings may be without use, such as ``evaluation``.

    Raises:
        ConfigError: names every such binding, which does nothing: the part it sets is not in this configuration.
    """
    used = gin.config._OPERATIVE_CONFIG
    unused: dict[tuple[str, str], list[str]] = {}
    for (scope, selector), parameters in gin.config._CONFIG.items():
        consumers = [
            set(names)
            for (used_scope, used_selector), names in used.items()
            if used_selector == selector and (not scope or f"{used_scope}/".startswith(f"{scope}/"))
        ]
        unused[scope, selector] = [name for name in parameters if not any(name in names for names in consumers)]
    offered = {
        scope
        for (scope, selector), names in unused.items()
        if selector == "gin.macro" and names and not _PLACES.get((scope, ""), "").startswith("binding")
    }
    spared, named = offered | _within(offered), []
    for (scope, selector), names in unused.items():
        module, _, name = selector.rpartition(".")
        if selector == "gin.macro":
            named += [scope] if names and scope not in spared else []
        elif module not in without and selector not in spared:
            named += [f"{scope}/{name}.{parameter}".lstrip("/") for parameter in names]
    if named:
        raise ConfigError(
            f"nothing uses {', '.join(sorted(named))}: the part that it sets is not in this configuration"
        )
