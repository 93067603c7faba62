"""No import leads to a layer below, and none in a circle; the layers are those of CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Reads model folders, which teachers are loaded from.
EXCEPTION = "flowdistill.runs.pretrained"


def sources() -> dict[str, Path]:
    """The files of the package by the names of their modules."""
    found = {}
    links = [ROOT / "flowdistill" / "algorithms", ROOT / "flowdistill" / "teachers"]
    for folder, prefix in (("flowdistill", ""), ("algorithms", "flowdistill."), ("teachers", "flowdistill.")):
        for path in (path for path in (ROOT / folder).rglob("*.py") if not any(link in path.parents for link in links)):
            name = prefix + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(path: Path, at_once: bool = False) -> set[str]:
    """The modules of the package that a file imports; ``at_once`` leaves out what functions and type checkers do."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if at_once and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in SOURCES else node.module for name in names}
        waiting += ast.iter_child_nodes(node)
    return {name for name in found if name in SOURCES}


def layers() -> list[list[str]]:
    """The modules of each row of the table in CONTRIBUTING.md, from the lowest layer to the highest."""
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Layers")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`" in line]
    found = [re.findall(r"`([\w/]+?)(?:/|\.py)`", row.split("|")[2]) for row in rows]
    return [row for row in found if row]


def layer(module: str) -> int | None:
    """The layer of a module; None of the package's own file and of what stands beside the layers."""
    part = module.split(".")[1] if "." in module else ""
    return next((number for number, parts in enumerate(layers()) if part in parts), None)


def test_every_module_has_its_layer():
    beside = {name for name in SOURCES if layer(name) is None}
    assert beside == {"flowdistill", "flowdistill.__main__", "flowdistill.testing"}


def test_no_import_leads_to_a_higher_layer():
    wrong = []
    for name, path in SOURCES.items():
        ours = layer(name)
        for other in imports(path) if ours is not None else ():
            theirs = layer(other)
            if theirs is not None and theirs > ours and other != EXCEPTION:
                wrong.append(f"{name} imports {other}")
    assert wrong == []


def test_no_imports_go_in_a_circle():
    graph = {name: imports(path, at_once=True) - {name} for name, path in SOURCES.items()}
    while leaves := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}
