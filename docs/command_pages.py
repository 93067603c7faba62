"""Makes a page for each command of the command line from its parser."""

from __future__ import annotations

import argparse
from typing import Any

from mkdocs.structure.files import File, Files

from flowdistill.cli import parser


def _commands() -> dict[str, tuple[argparse.ArgumentParser, str]]:
    """The parser and the one line of help of each command, by its name."""
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    lines = {choice.dest: choice.help or "" for choice in action._choices_actions}
    return {name: (command, lines[name]) for name, command in action.choices.items()}


def on_config(config: Any) -> Any:
    """Called by mkdocs: puts the pages into the navigation."""
    for section in config["nav"]:
        if "Commands" in section:
            section["Commands"] += [{name: f"commands/{name}.md"} for name in _commands()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs: adds the pages."""
    for name, (command, line) in _commands().items():
        files.append(File.generated(config, f"commands/{name}.md", content=_page(name, command, line)))
    return files


def _page(name: str, command: argparse.ArgumentParser, line: str) -> str:
    text = [f"# flowdistill {name}", "", f"{line[:1].upper()}{line[1:]}.", ""]
    for group in command._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        if not actions:
            continue
        title = {"positional arguments": "Arguments", "options": "Options"}.get(str(group.title), "")
        text += [f"## {title}" if title else f"## Options {group.title}", "", "| | |", "|---|---|"]
        text += [f"| {_names(action)} | {_help(command, action)} |" for action in actions]
        text += [""]
    if command.epilog:
        text += [f"{command.epilog[:1].upper()}{command.epilog[1:]}.", ""]
    return "\n".join(text)


def _names(action: argparse.Action) -> str:
    metavar = action.metavar or action.dest
    if not action.option_strings:
        return f"`{metavar}`"
    values = action.choices or (
        [] if action.nargs == 0 else [metavar if isinstance(metavar, tuple) else metavar.upper()]
    )
    takes = "" if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction) else _words(values)
    return ", ".join(f"`{' '.join(filter(None, (name, takes)))}`" for name in action.option_strings)


def _words(values: Any) -> str:
    return " ".join(values) if isinstance(values, tuple) else "|".join(map(str, values))


def _help(command: argparse.ArgumentParser, action: argparse.Action) -> str:
    needed = "**Needed.** " if action.option_strings and action.required else ""
    return needed + command._get_formatter()._expand_help(action).replace("|", "\\|") if action.help else ""
