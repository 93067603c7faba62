"""What goes wrong with gin files, with the file and the line, and what to write instead."""

from __future__ import annotations

import contextlib
import inspect
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import gin

from flowdistill.plumbing.errors import ConfigError, FlowDistillError
from flowdistill.plumbing.registry import unknown_name
from flowdistill.plumbing.statements import BOUND, Statement, parts_of


@contextlib.contextmanager
def located(place: str | Path) -> Iterator[None]:
    """Turn what goes wrong while gin reads a text into `ConfigError`, with its place."""
    try:
        yield
    except (RecursionError, MemoryError):
        raise ConfigError(f"{place}: a value is nested too deeply") from None
    except tokenize.TokenError as error:
        message, (line, _) = error.args
        raise ConfigError(f"{place}, line {line}: {message}") from None
    except SyntaxError as error:
        reason, text = _reason(str(error.msg)), str(error.text or "").strip()
        raise ConfigError(f"{place}, line {error.lineno}: {reason}: {text}") from None
    except ModuleNotFoundError as error:
        reason, _, where = str(error).partition("\n")
        raise ConfigError(f"{reason}: add the folder that holds it to PYTHONPATH\n{where}") from None
    except (ValueError, TypeError, LookupError, NameError, ImportError, OSError, RuntimeError) as error:
        raise _config_error(_text(error)) from None


def _reason(message: str) -> str:
    """Why a value cannot be read, and what to write instead, for a message of gin or Python."""
    if match := re.search(r"Failed to parse token '(.*?)'", message):
        word = match[1]
        meant = {"none": "None", "null": "None", "true": "True", "false": "False"}.get(word.lower())
        instead = meant or f"'{word}' in quotes, or @{word} for a part, or %{word} for a macro"
        return f"{word} is no value: write {instead}"
    return "a value is missing" if message == "Unable to parse value." else message


@contextlib.contextmanager
def errors_located() -> Iterator[None]:
    """Turn what goes wrong while gin builds objects into `ConfigError`, with the bindings of the part that failed."""
    try:
        yield
    except RecursionError:
        raise ConfigError(_circle()) from None
    except FlowDistillError as error:
        # gin raises a proxy, a class of its own that overrides __str__, of the class that was raised
        kind = next(cls for cls in type(error).__mro__ if "__str__" not in vars(cls))
        raise kind(_with_bindings(str(error))) from error.__cause__
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError, ArithmeticError) as error:
        raise _config_error(_text(error)) from error


def _circle() -> str:
    """Which bindings refer to each other in a circle."""

    def follow(chain: list[Statement]) -> list[Statement]:
        parts = parts_of(chain[-1])
        for binding in (b for b in last.values() if b.part in parts):
            if binding in chain:
                return chain[chain.index(binding) :]
            if found := follow([*chain, binding]):
                return found
        seen.add(chain[-1].name)
        return []

    last, seen = {binding.name: binding for binding in BOUND}, set[str]()
    circle = next((found for b in last.values() if b.name not in seen and (found := follow([b]))), [])
    lines = "".join(f"\n  {binding}: {binding.place}" for binding in circle)
    return f"the configuration refers to itself in a circle:{lines}" if lines else "the configuration is too deep"


def _text(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return re.sub(r"^\(\d+, '(.*?)'\)", r"\1", text)  # of Python's own functions


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
    places = {binding.parameter: binding.place for binding in BOUND if binding.part == name}
    named = [parameter for parameter in places if re.search(rf"\b{parameter}\b", reason)]
    lines = [f"\n  {name}.{parameter}: {places[parameter]}" for parameter in named or places]
    return ("" if reason.startswith(f"{name}.") else f"{name}: ") + reason + "".join(lines)
