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

from trainings import RESULTS, SEEDS, Variant, cell, figures_of, train

import flowdistill
from flowdistill.evaluation import modes_found

PREDICTION_ALONE = ("train.objective = @freeflow_prediction()",)
CORRECTION = ("freeflow", "freeflow_correction")
MORE_STEPS = ("evaluation.teacher_steps = (1, 4, 16)",)
MOMENTUM = "AdamW.betas = (0.9, 0.99)"
CENTRAL = "finite_difference.scheme = 'central'"
JVP = "freeflow_prediction.estimator = @jvp()"

SUITES = {
    "mnist": [
        Variant("FreeFlow, 1 step", "freeflow/mnist.gin", MORE_STEPS),
        Variant(
            "prediction alone, 1 step", "freeflow/mnist.gin", (*PREDICTION_ALONE, MOMENTUM, *MORE_STEPS), CORRECTION
        ),
    ],
    "digits": [
        Variant("FreeFlow, 1 step", "freeflow/digits.gin"),
        Variant("prediction alone, 1 step", "freeflow/digits.gin", PREDICTION_ALONE, CORRECTION),
    ],
    "ring": [Variant("FreeFlow prediction, 1 step", "freeflow/ring.gin")],
    "digits_choices": [
        Variant("backward difference, k = 0.5", "freeflow/digits.gin", PREDICTION_ALONE, CORRECTION),
        Variant("central difference, k = 0.5", "freeflow/digits.gin", (*PREDICTION_ALONE, CENTRAL), CORRECTION),
        Variant("JVP, k = 0.5", "freeflow/digits.gin", (*PREDICTION_ALONE, JVP), (*CORRECTION, "finite_difference")),
        *(
            Variant(
                f"backward difference, k = {k}",
                "freeflow/digits.gin",
                (*PREDICTION_ALONE, f"freeflow_prediction.power = {k}"),
                CORRECTION,
            )
            for k in (0.0, 1.0)
        ),
    ],
    "ring_choices": [
        Variant("backward difference, k = 0", "freeflow/ring.gin"),
        Variant("central difference, k = 0", "freeflow/ring.gin", (CENTRAL,)),
        Variant("JVP, k = 0", "freeflow/ring.gin", (JVP,), ("finite_difference",)),
        *(
            Variant(f"backward difference, k = {k}", "freeflow/ring.gin", (f"freeflow_prediction.power = {k}",))
            for k in (0.5, 1.0)
        ),
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


def table(results: dict[str, list[Figures]]) -> list[str]:
    """The rows of the teacher, then one for each variant; mean ± standard deviation over the seeds."""
    first = next(iter(results.values()))
    rows = {name: [figures[name] for figures in first] for name in first[0] if name != "student, 1 step"}
    rows |= {name: [figures["student, 1 step"] for figures in seeds] for name, seeds in results.items()}
    columns = list(dict.fromkeys(column for seeds in rows.values() for column in seeds[0]))
    titles = [column.replace("_", " ") for column in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        cells = [cell([figures[c] for figures in seeds]) if c in seeds[0] else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


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
    one = next(iter(done.values()))[0]
    lines = table({name: [figures["rows"] for figures in seeds] for name, seeds in done.items()})
    lines += ["", f"Seeds {', '.join(map(str, SEEDS))}; {one['num_samples']} samples a row. {one['machine']}."]
    print("\n".join(lines))
    if options.steps is None:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"freeflow_{options.suite}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
