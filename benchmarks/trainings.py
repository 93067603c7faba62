"""Trainings of recipes over seeds, each a process of its own and never repeated: what the benchmarks share."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from flowdistill.plumbing.config import statements
from flowdistill.plumbing.files import fingerprint

SEEDS = (1, 2, 3)
RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/benchmarks")


@attrs.frozen
class Variant:
    """A row of a table: a recipe with some bindings changed, without the parts that the change leaves without use."""

    name: str
    recipe: str
    changes: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def train(variant: Variant, seed: int, threads: int, steps: int | None) -> Path:
    """Train one variant with one seed, unless that has been done; its run directory."""
    changes = [*variant.changes, f"train.seed = {seed}", f"evaluation.seed = {seed}"]
    changes += [] if steps is None else [f"train.steps = {steps}"]
    kept = [str(binding) for binding in statements(variant.recipe) if binding.part not in variant.without]
    configuration = "\n".join([*kept, *changes]) + "\n"
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


def cell(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = f"{statistics.mean(values):.3g}"
    return f"{mean} ± {spread:.2g}" if spread else mean
