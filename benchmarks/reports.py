"""What the benchmarks share: their seeds, and the tables that they print and write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flowdistill.bench.tables import Cells, markdown_table
from flowdistill.plumbing.files import write_text
from flowdistill.plumbing.machine import machine

SEEDS = (1, 2, 3)
RESULTS = Path(__file__).parent / "results"


def report(name: str, tables: Sequence[Cells], note: str, write: bool = True) -> None:
    """Print tables, what they rest on and the machine, and write them to results/NAME.md."""
    text = "\n\n".join([*map(markdown_table, tables), f"{note} {machine()}."])
    print(text)
    if write:
        write_text(RESULTS / f"{name}.md", f"{text}\n")
