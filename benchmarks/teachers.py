"""The trained teachers against real images, by guidance scale and number of Euler steps.

    python benchmarks/teachers.py digits|mnist_sit|mnist_edm2|fashion_sit

Prints a Markdown table, mean ± standard deviation over seeds, and writes it to benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Literal

import attrs
from reports import SEEDS, report

import flowdistill
from flowdistill.bench.tables import cell
from flowdistill.evaluation.comparison import Evaluation, compare
from flowdistill.guidance import GuidedTeacher

METRICS = ("fid", "precision", "recall", "accuracy")


@attrs.frozen
class Study:
    """A teacher, the features that judge it, and what is varied."""

    teacher: str
    features: str
    scales: Sequence[float]
    steps: Sequence[int]
    num_samples: int = 2000
    precision: Literal["float32", "bf16"] = "float32"


STUDIES = {
    "digits": Study("digits_teacher", "digits", (1.0, 1.1, 1.25, 1.5), (1, 4, 16, 64)),
    "mnist_sit": Study("mnist_sit", "mnist", (1.0, 1.5), (1, 4, 16), 1000, "bf16"),
    "mnist_edm2": Study("mnist_edm2", "mnist", (1.0, 1.5), (1, 4, 16), 1000, "bf16"),
    "fashion_sit": Study("fashion_sit", "fashion_mnist", (1.0, 1.5), (1, 4, 16), 1000, "bf16"),
}


def main() -> None:
    """Measure every scale and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STUDIES)
    name = parser.parse_args().name
    study = STUDIES[name]
    teacher = flowdistill.load_teacher(study.teacher)
    table = [["guidance", "Euler steps", *METRICS]]
    evaluations = [
        Evaluation(
            features=study.features,
            metrics=METRICS,
            teacher_steps=study.steps,
            num_samples=study.num_samples,
            precision=study.precision,
            seed=seed,
        )
        for seed in SEEDS
    ]
    for scale in study.scales:
        guided = GuidedTeacher(teacher, scale)
        seeds = [list(compare(None, guided, evaluation).values()) for evaluation in evaluations]
        for i, steps in enumerate(study.steps):
            figures = [cell([rows[i][metric] for rows in seeds]) for metric in METRICS]
            table.append([str(scale), str(steps), *figures])
    note = f"Seeds {', '.join(map(str, SEEDS))}; {study.num_samples} samples a row."
    report(f"{name}_teacher", [table], note)


if __name__ == "__main__":
    main()
