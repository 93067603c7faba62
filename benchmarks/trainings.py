"""What the benchmarks share: trainings over seeds, each a process of its own and never repeated, and written tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from flowdistill.bench.tables import Cells, markdown_table
from flowdistill.plumbing import config
from flowdistill.plumbing.files import fingerprint, write_text
from flowdistill.plumbing.machine import machine

SEEDS = (1, 2, 3)
RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/benchmarks")


@attrs.frozen
class Variant:
    """A row of a table: a recipe with some bindings changed."""

    name: str
    """The title of the row."""
    recipe: str
    """A gin file, or a method."""
    changes: tuple[str, ...] = ()
    """The bindings that are read after the recipe."""
    on: str | None = None
    """The setting of a method."""

    def configuration(self, *bindings: str) -> str:
        """The text of a gin file: the recipe, the changes, and then further bindings."""
        recipe = [str(line) for file in config.chosen(self.recipe, self.on) for line in config.statements(file)]
        return "\n".join([*recipe, *self.changes, *bindings]) + "\n"


def train(variant: Variant, seed: int, threads: int, steps: int | None) -> Path:
    """Train one variant with one seed, unless that has been done; its run directory."""
    length = [] if steps is None else [f"train.steps = {steps}"]
    configuration = variant.configuration(f"train.seed = {seed}", f"evaluation.seed = {seed}", *length)
    workdir = RUNS / fingerprint(configuration)[:16]
    if not (workdir / "evaluation.json").is_file():
        workdir.parent.mkdir(parents=True, exist_ok=True)
        gin_file = workdir.with_suffix(".gin")
        gin_file.write_text(configuration)
        command = ["train", "--gin_file", str(gin_file), "--workdir", str(workdir)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run([sys.executable, "-m", "flowdistill", *command], env=environment, check=True)
    return workdir


def figures_of(workdir: Path) -> dict[str, Any]:
    """The evaluation.json of a run."""
    record: dict[str, Any] = json.loads((workdir / "evaluation.json").read_text())
    return record


def report(name: str, tables: Sequence[Cells], note: str, write: bool = True) -> None:
    """Print tables, what they rest on and the machine, and write them to results/NAME.md."""
    text = "\n\n".join([*map(markdown_table, tables), f"{note} {machine()}."])
    print(text)
    if write:
        write_text(RESULTS / f"{name}.md", f"{text}\n")
