"""Makes the page of each algorithm from its card, and the table of all objectives from the registry."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from flowdistill import OBJECTIVES, TEACHERS
from flowdistill.cli.listing import needs
from flowdistill.plumbing.registry import Preset

_ROOT = Path(__file__).parents[1]
_TABLE = "<!-- the table of objectives -->"


def _folders() -> dict[str, str]:
    """The algorithms by the names of their folders, with the titles of their cards."""
    cards = sorted((_ROOT / "algorithms").glob("*/card.md"))
    titles = {card.parent.name: card.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for card in cards}
    return dict(sorted(titles.items(), key=lambda item: item[1].lower()))


def on_config(config: Any) -> Any:
    """Called by mkdocs: puts a page for each algorithm into the navigation."""
    for section in config["nav"]:
        if "Algorithms" in section:
            section["Algorithms"] += [{title: f"{name}.md"} for name, title in _folders().items()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs: adds a page of card and code for each algorithm that has no page of its own."""
    for name in _folders():
        if not (Path(config["docs_dir"]) / f"{name}.md").is_file():
            files.append(File.generated(config, f"{name}.md", content=_page(name)))
    return files


def _page(name: str) -> str:
    members = getattr(importlib.import_module(f"flowdistill.algorithms.{name}"), "__all__", [])
    return "\n".join(
        [
            (_ROOT / "algorithms" / name / "card.md").read_text(encoding="utf-8"),
            "## Code",
            "",
            f"::: flowdistill.algorithms.{name}",
            "    options:",
            "      show_root_heading: false",
            "      show_root_toc_entry: false",
            f"      members: {list(members)}",
            "",
        ]
    )


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs with the text of every page: puts in the table of objectives, and the papers behind code."""
    papers = _citations(Path(page.file.src_uri).stem)
    if papers:
        markdown = markdown.replace("\n## Code\n", f"\n## Citation\n\n```bibtex\n{papers}\n```\n\n## Code\n", 1)
    return markdown.replace(_TABLE, _table()) if _TABLE in markdown else markdown


def _citations(folder: str) -> str:
    """The BibTeX of all objectives or teachers of a folder, each paper once."""
    found: dict[str, None] = {}
    for registry in (OBJECTIVES, TEACHERS):
        for entry in map(registry.get, registry.names()):
            if _home(entry) == folder:
                found |= dict.fromkeys(re.findall(r"^@.*?^\}", _citation(entry), re.MULTILINE | re.DOTALL))
    return "\n\n".join(found)


def _home(entry: Any) -> str:
    """The folder of an objective or a teacher; "" for one that is not in a folder."""
    parts = entry.__module__.split(".")
    return parts[2] if len(parts) > 3 else ""


def _citation(entry: Any) -> str:
    """The BibTeX of an entry; "" for one without, and for one whose papers are those of its parts."""
    citation = getattr(entry.entry if isinstance(entry, Preset) else entry, "citation", "")
    return citation if isinstance(citation, str) else ""


def _summary(entry: Any) -> str:
    if isinstance(entry, Preset):
        fields = " and ".join(f"`{field}`" for field in entry.defaults)
        return f"Preset of `{OBJECTIVES.name_of(entry.entry)}` with another {fields}."
    return (inspect.getdoc(entry) or "").splitlines()[0].replace("|", "\\|")


def _table() -> str:
    lines = ["| objective | needs | | source |", "|---|---|---|---|"]
    for name in OBJECTIVES.names():
        entry: Any = OBJECTIVES.get(name)
        folder = _home(entry)
        cell = f"[`{name}`]({folder}.md)" if folder else f"`{name}`"
        found = re.search(r"arXiv:(\d{4}\.\d{5})", _citation(entry)) or re.search(r"(\d{4}\.\d{5})", _card(folder))
        source = f"[{found[1]}](https://arxiv.org/abs/{found[1]})" if found else ""
        lines.append(f"| {cell} | {needs(entry)} | {_summary(entry)} | {source} |")
    return "\n".join(lines)


def _card(folder: str) -> str:
    path = _ROOT / "algorithms" / folder / "card.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""
