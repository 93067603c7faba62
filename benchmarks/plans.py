"""What every recipe for ImageNet would cost, by ``flowdistill.plan``: nothing is read and nothing is trained.

    python benchmarks/plans.py

writes benchmarks/results/plans.json and plans.md.
"""

from pathlib import Path
from typing import Any

import flowdistill
from flowdistill.bench.imagenet import TABLES
from flowdistill.bench.tables import markdown_table
from flowdistill.plumbing import config
from flowdistill.plumbing.files import write_json, write_text
from flowdistill.plumbing.machine import code
from flowdistill.plumbing.progress import progress

RESULTS = Path(__file__).parent / "results"


def wanted() -> dict[str, tuple[str, tuple[str, ...], float | None]]:
    """A recipe, its bindings and the published number of parameters, in millions, of each row by its title.

    They are the packaged recipes as they are, and those of the tables of systems that take further bindings.
    """
    packaged = [name for name in config.recipes() if "imagenet" in name]
    systems = [(name, system) for name, table in TABLES.items() for system in table.systems]
    published = {system.recipe: system.parameters for _, system in systems if not system.bindings}
    rows: dict[str, tuple[str, tuple[str, ...], float | None]] = {
        f"`{name}`": (name, (), published.get(name)) for name in packaged
    }
    for table, system in systems:
        if system.recipe is not None and system.bindings:
            rows[f"{system.name} ({table})"] = (system.recipe, tuple(system.bindings), system.parameters)
    return rows


def planned(recipe: str, bindings: tuple[str, ...]) -> dict[str, Any]:
    """The figures of a row."""
    found = flowdistill.plan(recipe, gin_bindings=bindings)
    return {
        "recipe": recipe,
        "bindings": list(bindings),
        "parameters": found.parameters["student"],
        "evaluations": dict(found.evaluations),
        "steps": found.steps,
        "batch_size": found.batch_size,
        "tflop_a_state": found.flops / found.batch_size / 1e12,
        "gib": sum(found.memory.values()) / 2**30,
        "gib_of_a_state": found.memory["activations"] * found.accumulation / found.batch_size / 2**30,
        "hours": found.hours,
    }


def main() -> None:
    """Plan all rows and write the table."""
    rows, found = wanted(), {}
    with progress("planning", len(rows)) as phase:
        for title, (recipe, bindings, published) in rows.items():
            found[title] = {**planned(recipe, bindings), "published_millions": published}
            phase.advance(1)
    head = [
        "",
        "parameters",
        "published",
        "student",
        "teacher",
        "others",
        "TFLOP",
        "steps",
        "batch",
        "GiB",
        "a state",
        "hours",
    ]
    body = [head]
    for title, row in found.items():
        spent = dict(row["evaluations"])
        student, teacher = spent.pop("student", 0), spent.pop("teacher", 0)
        body.append(
            [
                title,
                f"{row['parameters'] / 1e6:.1f}M",
                f"{row['published_millions']:g}M" if row["published_millions"] else "",
                *(f"{count:.3g}" for count in (student, teacher, sum(spent.values()))),
                f"{row['tflop_a_state']:.3g}",
                f"{row['steps']:,}",
                f"{row['batch_size']:,}",
                f"{row['gib']:.0f}",
                f"{row['gib_of_a_state']:.2g}",
                f"{row['hours']:.0f}",
            ]
        )
    note = (
        "Student, teacher and others are evaluations of networks for a state of a late step. TFLOP are those of a "
        "state, GiB those of the batch as the recipe has it, and of each state of it. Hours are those of one H200 at "
        "the speed measured there. Nothing was trained; the counts do not depend on the machine. "
    )
    write_json(RESULTS / "plans.json", found)
    write_text(RESULTS / "plans.md", f"{markdown_table(body)}\n\n{note}{code().capitalize()}.\n")


if __name__ == "__main__":
    main()
