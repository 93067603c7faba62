"""Quality against evaluations: the teacher alone, search by the teacher, search by students of three trainings.

    python benchmarks/search.py digits|mnist [--jobs 2] [--num_samples N] [--steps N]

Students are trained by FreeFlow's prediction alone, by its correction alone and by both, with three seeds and at equal
steps; a search goes by `feature_distance` and is judged also by what it did not look at: a logistic regression on
pixels that has been fitted to samples of the teacher (log-probability of the class that was asked for), fid and recall.
`flowdistill bench` trains in runs/bench/, and searches lie in their runs; finished ones are not repeated. Tables and
figures, mean ± standard deviation over the seeds, are written to benchmarks/results/ and docs/assets/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import torch
from reports import RESULTS, SEEDS, report
from sklearn.linear_model import LogisticRegression

import flowdistill
from flowdistill import Condition, Teacher
from flowdistill.bench import bench
from flowdistill.bench.tables import Cells, cell
from flowdistill.evaluation import measure, reference_set, sample_set
from flowdistill.evaluation.plots import curves
from flowdistill.plumbing import config
from flowdistill.plumbing.machine import machine
from flowdistill.plumbing.randomness import step_generator
from flowdistill.searching import FeatureDistance
from flowdistill.solvers import Euler

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
RUNS = Path("runs/bench")
PREDICTION_ALONE = "train.objective = @freeflow_prediction()"
MOMENTUM = "AdamW.betas = (0.9, 0.99)"
CORRECTION_ALONE = (  # VSD without momentum, with which it collapses (docs/claims/synergy.md), as FreeFlow corrects
    "vsd.weighting = 'none'",
    "vsd.times = @logit_normal()",
    "logit_normal.mean = 0.8",
    "logit_normal.std = 1.6",
    "train.states = @prior()",
)
STUDENTS = {
    "digits": {
        "prediction alone": ("freeflow/digits.gin", PREDICTION_ALONE, MOMENTUM),
        "correction alone": (
            "vsd",
            "digits",
            *CORRECTION_ALONE,
            "prior.guidance = (1.0, 1.5)",
            "told_guidance = 1.1",
            "evaluation.guidance = 1.1",
            "AdamW.lr = 2e-3",
        ),
        "both": ("freeflow/digits.gin",),
    },
    "mnist": {
        "prediction alone": ("freeflow", "mnist_sit", PREDICTION_ALONE, MOMENTUM),
        "correction alone": ("vsd", "mnist_sit", *CORRECTION_ALONE),
        "both": (  # with the correction that FreeFlow had on mnist_sit when the committed searches were made
            "freeflow",
            "mnist_sit",
            "freeflow.alpha = 1.0",
            "freeflow.correction_start = 0.775",
            "freeflow_correction.guidance_interval = None",
            MOMENTUM,
        ),
    },
}
STEPS = 16  # of the teacher at the end of a search
ALONE = (16, 32, 64)  # steps of the teacher without search
BUDGETS = (64, 80, 128)
TEACHER_BUDGETS = (64, 128)
NOISES = 100  # of each class, for rank correlations
COLUMNS = ("cost", "score", "second", "fid", "recall")


def trained(suite: str, jobs: int, steps: int | None) -> dict[tuple[str, int], Path]:
    """The runs of the students, by how they are named in the table and their seed."""
    bindings = [f"bench.rows = {STUDENTS[suite]}", f"bench.seeds = {SEEDS}"]
    if steps is not None:
        bindings += [f"bench.seeds = {SEEDS[:1]}", f"train.steps = {steps}"]
    results = bench("freeflow", bindings=bindings, runs=RUNS, out=RUNS / f"search_{suite}", jobs=jobs)
    records = json.loads((results / "results.json").read_text(encoding="utf-8"))["records"]
    return {(r["name"], r["seed"]): RUNS / r["run"] for r in records if r["name"] != "teacher"}


@attrs.frozen
class Judge:
    """What searches are measured by, beside their own score."""

    features: str
    classifier: Any

    def __call__(self, samples: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """The figures of samples in [-1, 1]."""
        found = sample_set(samples, labels, self.features)
        figures = measure(["fid", "recall"], found, reference_set(self.features, None, len(samples), 0))
        probabilities = self.classifier.predict_log_proba(samples.flatten(1).numpy())
        return {"second": float(probabilities[np.arange(len(labels)), labels.numpy()].mean()), **figures}


def teacher_of(run: Path) -> Teacher:
    """The guided teacher of a run."""
    with config.parsed([run.absolute() / "config.gin"], []):
        teacher: Teacher = config.value("train.teacher")
    return teacher.eval().requires_grad_(False)


def samples_of(teacher: Teacher, n: int, stream: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Noises of all classes in turn, and the teacher's samples of them."""
    noise = torch.randn((n, *teacher.sample_shape), generator=step_generator(0, 0, stream))
    condition = Condition.in_turn(teacher.num_classes, n)
    with torch.no_grad():
        parts = [slice(i, i + 100) for i in range(0, n, 100)]
        made = torch.cat([Euler(steps=STEPS).solve(teacher, noise[part], condition[part]) for part in parts])
    return noise, made


def judge_of(suite: str, run: Path) -> Judge:
    """The classifier on pixels, fitted to samples of the teacher of a run, and the features of the metrics."""
    teacher = teacher_of(run)
    n = 100 * (teacher.num_classes or 1)
    _, samples = samples_of(teacher, n, "classifier")
    classifier = LogisticRegression(C=0.1, max_iter=1000)
    classifier.fit(samples.flatten(1).numpy(), np.arange(n) % (n // 100))
    return Judge(suite, classifier)


def searches(runs: dict[tuple[str, int], Path]) -> Iterator[tuple[str, Path, float, dict[str, Any]]]:
    """Row, run, budget and settings of every search, of runs by student and seed."""
    for (student, seed), run in runs.items():
        if student == "both":
            for steps in ALONE:
                settings = {"seed": seed, "proposer": "teacher", "teacher_steps": steps}
                yield f"teacher alone, {steps} steps", run, 2 * steps, settings
            for budget in TEACHER_BUDGETS:
                yield f"search by the teacher, {budget}", run, budget, {"seed": seed, "proposer": "teacher"}
    for (student, seed), run in runs.items():
        for budget in BUDGETS:
            yield f"student, {student}, {budget}", run, budget, {"seed": seed}
    for strategy in ("zero_order", "successive_halving"):
        for (student, seed), run in runs.items():
            if student == "prediction alone":
                yield f"{strategy}, {student}, 80", run, 80, {"seed": seed, "strategy": strategy}


def searched(run: Path, judge: Judge, budget: float, **settings: Any) -> dict[str, float]:
    """The figures of a search."""
    result = flowdistill.search(run, budget, device="cpu", **settings)
    assert result is not None
    assert result.labels is not None
    return {**result.figures, **judge(result.samples, result.labels)}


def correlation(run: Path, features: str, seed: int) -> float:
    """Spearman's rank correlation of the scores of student and teacher over noises of a class; mean of the classes."""
    student, teacher = flowdistill.load_flow_map(run), teacher_of(run)
    verifier = FeatureDistance(features=features)
    verifier.setup(None)
    classes = teacher.num_classes or 1
    noise, ours = samples_of(teacher, NOISES * classes, f"correlation {seed}")
    condition = Condition.in_turn(teacher.num_classes, len(noise))
    parts = [slice(i, i + 100) for i in range(0, len(noise), 100)]
    theirs = torch.cat([student.sample(noise[part], 1, condition[part]) for part in parts])
    scores = [verifier.scores(samples, condition).reshape(NOISES, classes).T for samples in (ours, theirs)]
    ranks = [part.argsort(1).argsort(1).double() for part in scores]
    return statistics.mean(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True))


def table(rows: dict[str, list[dict[str, float]]]) -> Cells:
    """The searches; mean ± standard deviation over the seeds."""
    head = ["", "evaluations", "score", "second verifier", "fid", "recall"]
    return [head, *([name, *(cell([f[c] for f in seeds]) for c in COLUMNS)] for name, seeds in rows.items())]


def verdict(rows: dict[str, list[dict[str, float]]]) -> str:
    """Whether search by a student at 80 evaluations beats the teacher alone at 128, seed by seed."""
    alone = rows[f"teacher alone, {ALONE[-1]} steps"]
    found = rows["student, prediction alone, 80"]
    better = sum(a["score"] > b["score"] for a, b in zip(found, alone, strict=True))
    return (
        f"Search by the student (prediction alone) at 80 evaluations scores higher than the teacher alone at 128 with "
        f"{better} of {len(alone)} seeds."
    )


def main() -> None:
    """Train, search, measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=("digits", "mnist"))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--num_samples", type=int, default=500, help="of each search")
    parser.add_argument("--steps", type=int, help="training steps of one seed: a quick look, not written")
    options = parser.parse_args()
    students, threads = STUDENTS[options.suite], max(1, (os.cpu_count() or 1) // options.jobs)
    torch.set_num_threads(threads)
    seeds, n = SEEDS if options.steps is None else SEEDS[:1], options.num_samples
    runs = trained(options.suite, options.jobs, options.steps)
    rows: dict[str, list[dict[str, float]]] = {}
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as processes:
        judge = processes.submit(judge_of, options.suite, runs["both", seeds[0]]).result()
        found = [
            (name, processes.submit(searched, run, judge, budget, num_samples=n, **settings))
            for name, run, budget, settings in searches(runs)
        ]
        correlations = {
            name: [processes.submit(correlation, runs[name, seed], options.suite, seed) for seed in seeds]
            for name in students
        }
        for name, future in found:
            rows.setdefault(name, []).append(future.result())
            print(name, rows[name][-1], flush=True)
        ranks = {name: [future.result() for future in futures] for name, futures in correlations.items()}
    correlated = [["student trained by", "rank correlation with the teacher"]]
    correlated += [[name, cell(values)] for name, values in ranks.items()]
    note = f"{verdict(rows)}\nSeeds {', '.join(map(str, seeds))}; {n} samples a row."
    report(f"search_{options.suite}", [table(rows), correlated], note, write=options.steps is None)
    if options.steps is None:
        record = {"seeds": seeds, "num_samples": n, "machine": machine(), "rows": rows, "rank_correlations": ranks}
        (RESULTS / f"search_{options.suite}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        plot(rows, students, ASSETS / f"search_{options.suite}.png")


def plot(rows: dict[str, list[dict[str, float]]], students: Iterable[str], path: Path) -> None:
    """The distance to the class means, which is minus the score, against the evaluations."""

    def line(names: list[str]) -> list[tuple[float, list[float]]]:
        return [
            (statistics.mean(f["cost"] for f in rows[name]), [-figures["score"] for figures in rows[name]])
            for name in names
        ]

    lines = {"teacher alone": line([f"teacher alone, {steps} steps" for steps in ALONE])}
    lines["search by the teacher"] = line([f"search by the teacher, {budget}" for budget in TEACHER_BUDGETS])
    lines |= {name: line([f"student, {name}, {budget}" for budget in BUDGETS]) for name in students}
    curves({"distance to the class mean": lines}, "evaluations of the teacher's network for a sample", path)


if __name__ == "__main__":
    main()
