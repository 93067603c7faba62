"""What FreeFlow at scale would cost on many GPUs, by ``flowdistill.plan``: computed, and nothing is trained.

    python benchmarks/parallel_plans.py

writes benchmarks/results/parallel_plans.json and parallel_plans.md.
"""

from pathlib import Path
from typing import Any

import flowdistill
from flowdistill.bench.imagenet import TABLES
from flowdistill.bench.tables import markdown_table
from flowdistill.plumbing.files import write_json, write_text
from flowdistill.plumbing.machine import code
from flowdistill.plumbing.progress import progress
from flowdistill.training.gpus import GPUS, MACHINE, NETWORK

RESULTS = Path(__file__).parent / "results"
GPU = "h100-80"
SYSTEMS = {
    "SiT-XL/2, 256 pixels": ("imagenet256", "FreeFlow from SiT-XL/2 + REPA"),
    "SiT-XL/2, 512 pixels": ("imagenet512", "FreeFlow from SiT-XL/2 + REPA"),
    "EDM2-XXL, 512 pixels": ("imagenet512", "FreeFlow from EDM2-XXL, autoguided"),
}
SHARED = {8: (8,), 64: (64, 8), 512: (512, 8)}
"""The GPUs, and how many of them share one copy of the networks."""


def wanted() -> list[dict[str, Any]]:
    """What each row is of."""
    rows = []
    for title, (table, name) in SYSTEMS.items():
        (system,) = (system for system in TABLES[table].systems if system.name == name)
        for gpus, shards in SHARED.items():
            for shard in shards:
                row = {"title": title, "recipe": system.recipe, "bindings": list(system.bindings)}
                rows.append({**row, "gpus": gpus, "shard": shard})
    return rows


STATES = 256
"""The states of a step as published."""
LEAST = 4
"""The states of a GPU, of which FreeFlow's correction takes a quarter; where these are more, the batch is larger."""


def planned(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row."""

    def plan(batch_size: int, accumulation: int) -> flowdistill.Plan:
        sizes = [f"train.batch_size = {batch_size}", f"train.accumulation = {accumulation}"]
        shared = ["parallel.precision = 'bf16'", f"parallel.shard = {row['shard']}"]
        bindings = [*row["bindings"], *sizes, *shared]
        return flowdistill.plan(row["recipe"], gin_bindings=bindings, gpu=GPU, processes=row["gpus"])

    found = plan(max(STATES // row["gpus"], LEAST), row["gpus"])
    if sum(found.memory.values()) > GPUS[GPU].memory:
        found = plan(*found.fitting(GPUS[GPU].memory))
    assert found.traffic is not None
    assert found.exchanging is not None
    return {
        **row,
        "states": found.batch_size,
        "states_at_a_time": found.batch_size // found.accumulation,
        "gib": sum(found.memory.values()) / 2**30,
        "gib_received": found.traffic.gathered / 2**30,
        "gib_sent": (found.traffic.reduced + found.traffic.averaged) / 2**30,
        "gib_least": found.traffic.least / 2**30,
        "seconds_of_computing": found.computing,
        "seconds_of_traffic": found.exchanging,
        "steps": found.steps,
        "hours": found.hours,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures of all rows."""
    head = ["", "GPUs", "to a copy", "states a step", "a GPU", "at a time", "GiB", "GiB received", "GiB sent"]
    body = [[*head, "least", "s computing", "s traffic", "s a step", "hours"]]
    for row in rows:
        whole = [row[name] for name in ("gpus", "shard", "states")]
        whole += [row["states"] // row["gpus"], row["states_at_a_time"]]
        seconds = row["seconds_of_computing"], row["seconds_of_traffic"]
        sizes = [f"{row[name]:.3g}" for name in ("gib", "gib_received", "gib_sent", "gib_least")]
        times = [f"{value:.3g}" for value in (*seconds, max(seconds))]
        body.append([row["title"], *map(str, whole), *sizes, *times, f"{row['hours']:,.0f}"])
    return markdown_table(body)


def main() -> None:
    """Plan all rows and write the table."""
    rows, found = wanted(), []
    with progress("planning", len(rows)) as phase:
        for row in rows:
            found.append(planned(row))
            phase.advance(1)
    note = (
        f"All of it is computed for {GPU.upper()}, of which none has run a step. Memory, traffic and times are those "
        "of one GPU; least is the arithmetic minimum of its traffic in GiB. Weights travel in bfloat16, by "
        "`parallel.precision`. Computing is at the speed that an H200 reached with 32 states. Traffic takes "
        f"{GPUS[GPU].link / 1e9:g} GB/s inside a machine of {MACHINE} GPUs, and {NETWORK / 1e9:g} GB/s a GPU between "
        f"machines, which is assumed. A step takes the longer of the two. 512 GPUs take {LEAST} states each, eight "
        "times the published batch, for as many steps. "
    )
    write_json(RESULTS / "parallel_plans.json", found)
    write_text(RESULTS / "parallel_plans.md", f"{table(found)}\n\n{note}{code().capitalize()}.\n")


if __name__ == "__main__":
    main()
