"""Every method on two distributions in the plane, with one network, one optimiser and one number of steps.

    python benchmarks/methods.py [--jobs 2] [--only NAME ...] [--steps N]

A row is a recipe ``*plane.gin``: a student from scratch, distilled from the exact velocity or trained on samples.
The figures are the exact 2-Wasserstein distance of 2000 samples, drawn in one and in two jumps, to 2000 true
samples (methods that train at t = 1 alone have no second jump), and the fraction of those drawn in one that lie
within two standard deviations of a component of the distribution; the noise floor is a second set of true samples.
Evaluations are those of a step for each sample of its batch, counted. Finished trainings are not repeated. The recipes were tuned on seed 0, which is not among the seeds.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from trainings import RESULTS, SEEDS, Variant, cell, train

import flowdistill
from flowdistill import config
from flowdistill.evaluation import mode_coverage, wasserstein2
from flowdistill.evaluation.report import machine
from flowdistill.training.run_log import read_records

DISTRIBUTIONS = ("ring", "checkerboard")
SAMPLES = 2000
BATCH = 256  # of settings/plane.gin
Figures = dict[str, float]


def variants(distribution: str, only: list[str]) -> list[Variant]:
    """The recipes of the plane on a distribution, by the names of their files."""
    names = [name for name in config.recipes() if name.endswith("plane.gin") and not name.startswith("settings/")]
    chosen = [name for name in names if not only or any(part in name for part in only)]
    return [
        Variant(title(name), name, (f"distribution = @{distribution}()", "evaluation.num_samples = 100"))
        for name in chosen
    ]


def title(recipe: str) -> str:
    """``meanflow/plane.gin`` is meanflow, ``secant/sdei_plane.gin`` is secant/sdei."""
    return recipe.removesuffix("plane.gin").rstrip("_/")


def measured(samples: Tensor, distribution: str, seed: int, jumps: int) -> Figures:
    """The figures of samples: their distance to true ones, and the fraction within 2 deviations of a component."""
    truth: Any = flowdistill.load_teacher(distribution)
    reference = truth.sample_data(SAMPLES, torch.Generator().manual_seed(seed + 10_000))
    figures = {f"{distribution}, {jumps} jump{'s' * (jumps > 1)}": wasserstein2(samples, reference)}
    if jumps == 1:
        radius = 2 * float(truth.variances.max()) ** 0.5
        figures[f"{distribution}, near"] = mode_coverage(samples, truth.means, radius)[1]
    return figures


def floor(distribution: str, seed: int) -> Figures:
    """The figures of a second set of true samples."""
    truth: Any = flowdistill.load_teacher(distribution)
    samples = truth.sample_data(SAMPLES, torch.Generator().manual_seed(seed + 20_000))
    return measured(samples, distribution, seed, 1) | measured(samples, distribution, seed, 2)


def noise(distribution: str, seed: int) -> Figures:
    """The figures of the prior itself, from which an untrained student does not move."""
    samples = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(seed))
    return measured(samples, distribution, seed, 1) | measured(samples, distribution, seed, 2)


def run(variant: Variant, distribution: str, seed: int, threads: int, steps: int | None) -> Figures:
    """Train with one seed; the figures of the run."""
    workdir = train(variant, seed, threads, steps)
    last = read_records(workdir)[-1]
    batch = last["step"] * BATCH
    counts = {name.removesuffix("_evaluations"): v / batch for name, v in last.items() if name.endswith("_evaluations")}
    student, teacher = counts.pop("student"), counts.pop("teacher")
    figures = {"student": student, "teacher": teacher, "others": sum(counts.values())}
    for jumps in (1,) if flowdistill.load_flow_map(workdir).anchored else (1, 2):
        samples = flowdistill.sample(workdir, SAMPLES, steps=jumps, seed=seed)
        figures |= measured(samples, distribution, seed, jumps)
    return figures


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", nargs="+", default=[], help="parts of recipe names: a look at some, not written")
    parser.add_argument("--steps", type=int, help="training steps in place of the recipes': a quick look, not written")
    options = parser.parse_args()
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = {
            (variant.name, distribution): [
                pool.submit(run, variant, distribution, seed, threads, options.steps) for seed in SEEDS
            ]
            for distribution in DISTRIBUTIONS
            for variant in variants(distribution, options.only)
        }
        done = {key: [job.result() for job in seeds] for key, seeds in jobs.items()}
    rows = {
        name: [{k: v for d in DISTRIBUTIONS for k, v in done[name, d][i].items()} for i in range(len(SEEDS))]
        for name in dict.fromkeys(name for name, _ in done)
    }
    for name, baseline in (("noise floor", floor), ("noise", noise)):
        rows = {name: [{k: v for d in DISTRIBUTIONS for k, v in baseline(d, seed).items()} for seed in SEEDS]} | rows
    columns = list(dict.fromkeys(column for seeds in rows.values() for column in seeds[0]))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, seeds in rows.items():
        cells = [cell([figures[c] for figures in seeds]) if c in seeds[0] else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", f"Seeds {', '.join(map(str, SEEDS))}; {SAMPLES} samples a figure. {machine()}."]
    print("\n".join(lines))
    if options.steps is None and not options.only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "methods.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
