"""FreeFlow on MNIST, the digits and the ring, over seeds, beside the teacher and the noise floor.

    python benchmarks/freeflow.py mnist|digits|ring|digits_choices|ring_choices [--jobs 2] [--steps N]

Every run is a process of its own with cores / jobs threads, in runs/benchmarks/ under the hash of its configuration;
finished ones are not repeated, so an interrupted benchmark goes on where it stopped. The table, mean ± standard
deviation over the seeds, is printed and written to benchmarks/results/. The recipes were tuned on other seeds.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trainings import SEEDS, Variant, figures_of, report, train

import flowdistill
from flowdistill.bench.tables import Cells, cell
from flowdistill.evaluation import modes_found

PREDICTION_ALONE = "train.objective = @freeflow_prediction()"
METRICS = "evaluation.metrics = ('fid', 'precision', 'recall', 'accuracy')"
MORE_STEPS = "evaluation.teacher_steps = (1, 4, 16)"
MOMENTUM = "AdamW.betas = (0.9, 0.99)"
CENTRAL = "finite_difference.scheme = 'central'"
JVP = "freeflow_prediction.estimator = @jvp()"


def _mnist(name: str, *changes: str) -> Variant:
    return Variant(name, "freeflow/mnist.gin", (*changes, METRICS, MORE_STEPS))


def _digits(name: str, *changes: str) -> Variant:
    return Variant(name, "freeflow/digits.gin", (*changes, METRICS))


def _ring(name: str, *changes: str) -> Variant:
    return Variant(name, "freeflow/ring.gin", changes)


SUITES = {
    "mnist": [
        _mnist("FreeFlow, 1 step"),
        _mnist("prediction alone, 1 step", PREDICTION_ALONE, MOMENTUM),
    ],
    "digits": [
        _digits("FreeFlow, 1 step"),
        _digits("prediction alone, 1 step", PREDICTION_ALONE),
    ],
    "ring": [_ring("FreeFlow prediction, 1 step")],
    "digits_choices": [
        _digits("backward difference, k = 0.5", PREDICTION_ALONE),
        _digits("central difference, k = 0.5", PREDICTION_ALONE, CENTRAL),
        _digits("JVP, k = 0.5", PREDICTION_ALONE, JVP),
        _digits("backward difference, k = 0.0", PREDICTION_ALONE, "freeflow_prediction.power = 0.0"),
        _digits("backward difference, k = 1.0", PREDICTION_ALONE, "freeflow_prediction.power = 1.0"),
    ],
    "ring_choices": [
        _ring("backward difference, k = 0"),
        _ring("central difference, k = 0", CENTRAL),
        _ring("JVP, k = 0", JVP),
        _ring("backward difference, k = 0.5", "freeflow_prediction.power = 0.5"),
        _ring("backward difference, k = 1.0", "freeflow_prediction.power = 1.0"),
    ],
}
Figures = dict[str, dict[str, float]]


def run(variant: Variant, seed: int, threads: int, steps: int | None) -> dict[str, Any]:
    """Train one variant with one seed; its figures."""
    workdir = train(variant, seed, threads, steps)
    figures = figures_of(workdir)
    if variant.recipe == "freeflow/ring.gin":
        figures["rows"]["student, 1 step"] |= ring_modes(workdir, seed)
    return figures


def ring_modes(workdir: Path, seed: int) -> dict[str, float]:
    """Modes that the student finds, of 8, and the fraction of its samples within three deviations of a mode."""
    ring: Any = flowdistill.load_teacher("ring")
    samples = flowdistill.sample(workdir, 2000, seed=seed)
    found, near = modes_found(samples, ring.means, radius=3 * 0.08)
    return {"modes": 8 * found, "near_a_mode": near}


def table(results: dict[str, list[Figures]]) -> Cells:
    """The rows of the teacher, then one for each variant; mean ± standard deviation over the seeds."""
    first = next(iter(results.values()))
    rows = {name: [figures[name] for figures in first] for name in first[0] if name != "student, 1 step"}
    rows |= {name: [figures["student, 1 step"] for figures in seeds] for name, seeds in results.items()}
    columns = list(dict.fromkeys(column for seeds in rows.values() for column in seeds[0]))
    head = ["", *(column.replace("_", " ") for column in columns)]
    return [head, *([name, *(cell([f[c] for f in s if c in f]) for c in columns)] for name, s in rows.items())]


def main() -> None:
    """Run a suite and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--steps", type=int, help="training steps in place of the recipes': a quick look, not written")
    options = parser.parse_args()
    variants, threads = SUITES[options.suite], max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {v.name: [pool.submit(run, v, seed, threads, options.steps) for seed in SEEDS] for v in variants}
        done = {name: [job.result() for job in seeds] for name, seeds in jobs.items()}
    rows = table({name: [figures["rows"] for figures in seeds] for name, seeds in done.items()})
    samples = next(iter(done.values()))[0]["num_samples"]
    note = f"Seeds {', '.join(map(str, SEEDS))}; {samples} samples a row."
    report(f"freeflow_{options.suite}", [rows], note, write=options.steps is None)


if __name__ == "__main__":
    main()
