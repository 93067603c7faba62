"""The torture suite: kills, damage, hostile files and odd environments, counted.

``python tests/torture`` tries everything. It writes each kind of trial into ``benchmarks/results/torture.json`` as soon
as it is done, and a table of all kinds beside it. ``--only`` tries some kinds. ``--share 0.02`` tries the fiftieth part
and writes nothing. It ends with 1 if anything was lost, executed, hung or crashed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path += [str(HERE.parent), str(HERE.parents[1] / "benchmarks")]

import torch  # noqa: E402
from corpus import Corpus  # noqa: E402
from environments import environment  # noqa: E402
from input_trials import configuration, file, hostile, meta, value  # noqa: E402
from reports import RESULTS  # noqa: E402
from run_trials import damage, full_disk, kill, kill_at_a_change, stop, stray, two_writers  # noqa: E402

from flowdistill.bench.tables import markdown_table  # noqa: E402
from flowdistill.plumbing.files import write_json, write_text  # noqa: E402
from flowdistill.plumbing.machine import machine  # noqa: E402

Trial = Callable[[random.Random, Path, Corpus], str]
TRIALS: dict[str, tuple[int, Trial]] = {
    "kills at random moments": (100, kill),
    "kills before a change of files": (100, kill_at_a_change),
    "full disks": (50, full_disk),
    "signals": (30, stop),
    "second writers": (15, two_writers),
    "damaged files of runs": (500, damage),
    "stray files among checkpoints": (50, stray),
    "mutated configurations": (1500, configuration),
    "values of other types and ranges": (5500, value),
    "mutated logs, configurations and JSON of runs": (1500, meta),
    "mutated weights, images and runs": (1000, file),
    "hostile files": (150, hostile),
    "environments and names of directories": (25, environment),
}
FAULTS = ("lost", "executed", "hung", "crashed")
WELL = ("worked", "continued", "refused")


def work(name: str, numbers: range, seed: int, folder: Path, corpus: Corpus) -> Counter[str]:
    """Do some trials of a kind, and keep what those with faults leave."""
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for number in numbers:
        place = folder / f"{name} {number}".replace(" ", "_")
        place.mkdir()
        outcome = TRIALS[name][1](random.Random(f"{seed} {name} {number}"), place, corpus)
        counts[outcome] += 1
        if outcome in FAULTS:
            printed = place / ".printed"
            tail = printed.read_text(errors="replace").splitlines()[-1:] if printed.is_file() else []
            print(f"{name} {number} (seed {seed}): {outcome}: {place} {' '.join(tail)}", flush=True)
        else:
            shutil.rmtree(place, ignore_errors=True)
    return counts


def keep(name: str, row: dict[str, object]) -> None:
    """Write the counts of a kind of trial, beside those of the others, whatever commit they are of."""
    file = RESULTS / "torture.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    stored = {kind: {**stored, name: row}[kind] for kind in TRIALS if kind in {**stored, name: row}}
    write_json(file, stored)
    write_text(RESULTS / "torture.md", table(stored))


def table(stored: dict[str, dict[str, object]]) -> str:
    """The table of all kinds that were tried in full, each with its commit, and the machines below it."""
    machines = [str(row["machine"]).rpartition(", ") for row in stored.values()]
    rows = cells(stored)
    rows[0].append("of")
    for row, (_, _, commit) in zip(rows[1:], machines, strict=True):
        row.append(commit)
    seeds = dict.fromkeys(f"Seed {row['seed']}" for row in stored.values())
    return f"{markdown_table(rows)}\n\n{', '.join(seeds)}. {'; '.join(dict.fromkeys(m for m, _, _ in machines))}.\n"


def cells(rows: dict[str, dict[str, object]]) -> list[list[str]]:
    """The table of some kinds of trials."""
    columns = ["tried", "went on", "refused", *FAULTS]
    return [["trial", *columns], *([name, *(str(row[column]) for column in columns)] for name, row in rows.items())]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python tests/torture", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the trials")
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of kinds")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="torture"))
    torch.set_num_threads(1)
    corpus = Corpus.make(folder, options.jobs)
    rows: dict[str, dict[str, object]] = {}
    faults = 0
    for name, (count, _) in TRIALS.items():
        if options.only and not any(part in name for part in options.only):
            continue
        tried = max(options.jobs, round(count * options.share))
        shares = [(name, range(job, tried, options.jobs), options.seed, folder, corpus) for job in range(options.jobs)]
        with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
            counts = sum(pool.starmap(work, shares), Counter())
        went_on, refused = counts["worked"] + counts["continued"], counts["refused"]
        rows[name] = {
            "tried": tried,
            "went on": went_on,
            "refused": refused,
            **{fault: counts[fault] for fault in FAULTS},
        }
        faults += sum(counts[fault] for fault in FAULTS)
        print(f"{name}: {rows[name]}, {time.monotonic() - began:.0f} s so far", flush=True)
        if options.share == 1:
            keep(name, {**rows[name], "seed": options.seed, "machine": machine()})
    print(markdown_table(cells(rows)))
    if not faults:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
