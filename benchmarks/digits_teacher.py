"""The digits teacher against real digits, by guidance scale and number of Euler steps.

    python benchmarks/digits_teacher.py

Prints a Markdown table, mean ± standard deviation over seeds, and writes it to benchmarks/results/digits_teacher.md.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import flowdistill
from flowdistill.evaluation.report import Evaluation, compare, machine
from flowdistill.guidance import GuidedTeacher

SEEDS = (1, 2, 3)
SCALES = (1.0, 1.1, 1.25, 1.5)
STEPS = (1, 4, 16, 64)
METRICS = ("fid", "precision", "recall", "accuracy")
OUT = Path(__file__).parent / "results" / "digits_teacher.md"


def main() -> None:
    """Measure every scale and write the table."""
    teacher = flowdistill.load_teacher("digits_teacher")
    lines = [f"| guidance | Euler steps | {' | '.join(METRICS)} |", "|---" * (2 + len(METRICS)) + "|"]
    evaluations = [Evaluation(features="digits", metrics=METRICS, teacher_steps=STEPS, seed=seed) for seed in SEEDS]
    for scale in SCALES:
        guided = GuidedTeacher(teacher, scale)
        seeds = [list(compare(None, guided, evaluation).values()) for evaluation in evaluations]
        for i, steps in enumerate(STEPS):
            cells = []
            for metric in METRICS:
                values = [rows[i][metric] for rows in seeds]
                cells.append(f"{statistics.mean(values):.3g} ± {statistics.stdev(values):.2g}")
            lines.append(f"| {scale} | {steps} | {' | '.join(cells)} |")
    lines += ["", f"Seeds {', '.join(map(str, SEEDS))}; {evaluations[0].num_samples} samples a row. {machine()}."]
    print("\n".join(lines))
    OUT.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
