"""Puts the pictures that benchmarks have left into the site, as ``results/SUITE/NAME.png``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs."""
    for path in sorted(_RESULTS.glob("*/*.png")):
        uri = f"results/{path.parent.name}/{path.name}"
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files
