"""Makes a notebook of each script of the gallery, whose cells begin at lines ``# %%``."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_SCRIPTS = Path(__file__).parent / "gallery"


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs: adds the notebooks."""
    for path in sorted(_SCRIPTS.glob("*.py")):
        files.append(File.generated(config, f"gallery/{path.stem}.ipynb", content=notebook(path)))
    return files


def notebook(path: Path) -> str:
    """The notebook of a script: its docstring, its cells, and the picture that it writes."""
    head, *cells = path.read_text(encoding="utf-8").split("# %%\n")
    shown = f'from IPython.display import Image\n\nImage("{path.stem}.png")'
    made = [{"cell_type": "markdown", "metadata": {}, "source": ast.get_docstring(ast.parse(head))}]
    for source in (*cells, shown):
        cell = {"cell_type": "code", "metadata": {}, "source": source.strip(), "execution_count": None, "outputs": []}
        made.append(cell)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps(
        {
            "nbformat": 4,
            "nbformat_minor": 5,
            "metadata": {"kernelspec": kernel},
            "cells": [{"id": str(number), **cell} for number, cell in enumerate(made)],
        },
        indent=1,
    )
