"""The page at the end of a run: samples beside the teacher's, metrics with their noise floor, and loss curves."""

from __future__ import annotations

from pathlib import Path

from flowdistill.evaluation.comparison import Evaluation, compare, trajectory_errors, write_metrics
from flowdistill.evaluation.pictures import save_comparison
from flowdistill.evaluation.plots import loss_curves
from flowdistill.flow_maps import FlowMapTeacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import FlowMap, Teacher
from flowdistill.plumbing.machine import machine
from flowdistill.training.run_log import read_records


def write_report(
    workdir: Path, student: FlowMap, teacher: Teacher | None, evaluation: Evaluation | None
) -> dict[str, float]:
    """Write ``report.md``, its pictures, and its table as ``evaluation.json``; returns the student's metrics.

    A run without a teacher may have trained one: a plain velocity field is measured as such, in several steps.
    """
    plots = workdir / "plots"
    plots.mkdir(exist_ok=True)
    records = read_records(workdir)
    loss_curves(records, plots / "curves.png")
    distilled: FlowMap | None = student
    if teacher is None and getattr(student, "instantaneous", False):
        distilled, teacher = None, FlowMapTeacher(student)
        if evaluation is not None and evaluation.guidance is not None:
            teacher = GuidedTeacher(teacher, evaluation.guidance)
    lines = [f"# {workdir.name}", ""]
    guidance = None if evaluation is None else evaluation.guidance
    seed = 0 if evaluation is None else evaluation.seed
    if save_comparison(distilled, teacher, guidance, seed, plots / "samples.png"):
        lines += ["The same noise and labels for all:", "", "![samples](plots/samples.png)", ""]
    metrics: dict[str, float] = {}
    if evaluation is not None:
        rows = compare(distilled, teacher, evaluation)
        ours = [name for name in rows if name.startswith("student")] or list(rows)[-1:]
        metrics = rows[ours[0]]
        lines += [*table(rows), ""]
        lines += [
            f"{evaluation.num_samples} samples a row. Evaluations are those of a network for one sample: two a step "
            "under classifier-free guidance."
            + ("" if teacher is None else " The noise floor is a second set of samples of the teacher."),
            "",
        ]
        errors = trajectory_errors(distilled, teacher, evaluation)
        if errors:
            lines += [
                "Distance from the teacher's trajectories, relative to their length, by the duration of a jump:",
                "",
            ]
            lines += [*table({"student": {f"{error.delta:g}": error.mean for error in errors}}), ""]
        write_metrics(workdir / "evaluation.json", rows, evaluation, errors)
    lines += ["![curves](plots/curves.png)", ""]
    if records:
        last = records[-1]
        lines.append(
            f"{last['step']} steps. Networks evaluated in training, each time on one sample: the student "
            f"{last['student_evaluations']:.0f} times, the teacher {last['teacher_evaluations']:.0f} times."
        )
    lines += [f"{machine()}. Configuration: [config.gin](config.gin).", ""]
    (workdir / "report.md").write_text("\n".join(lines))
    return metrics


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Rows of metrics as the lines of a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    titles = [name.replace("_", " ") for name in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.3g}" if c in row else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
