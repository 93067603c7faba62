"""The page at the end of a run: samples beside the teacher's, metrics with their noise floor, and loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flowdistill.evaluation.comparison import (
    Evaluation,
    Sampler,
    compare,
    in_words,
    trajectory_errors,
    write_metrics,
)
from flowdistill.evaluation.pictures import pictured, save_comparison
from flowdistill.evaluation.plots import loss_curves
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import FlowMap, Jumps, Teacher
from flowdistill.plumbing.distributed import rank_and_world_together
from flowdistill.plumbing.files import write_text
from flowdistill.plumbing.machine import machine
from flowdistill.runs.records import read_records
from flowdistill.wrapped_teachers import FlowMapTeacher

_STEPS = 64  # of the teacher in the picture
_LIGHT = 1e12  # floating-point operations that any machine does in seconds


def write_report(
    workdir: Path, student: FlowMap, teacher: Teacher | None, evaluation: Evaluation | None
) -> dict[str, float]:
    """Write ``report.md``, its pictures, and its table as ``evaluation.json``; returns the student's metrics.

    Several processes, which call this at once, share out the samples that are measured; the first does the rest.

    A run without a teacher may have trained one: a plain velocity field is measured as such, in several steps.

    The picture shows the teacher at 64 steps and at one, beside the student. Without an evaluation nobody has asked
    for the teacher's samples, and it is drawn only where that costs little, as counted: at most 10^12 floating-point
    operations, or a tenth of the network evaluations of the training. Otherwise the page says what is left out.
    """
    # A velocity field is its own teacher.
    distilled: FlowMap | None = student
    if teacher is None and student.jumps is Jumps.NONE:
        distilled, teacher = None, FlowMapTeacher(student)
        if evaluation is not None and evaluation.guidance is not None:
            teacher = GuidedTeacher(teacher, evaluation.guidance)

    if rank_and_world_together()[0] > 0:
        if evaluation is not None:
            compare(distilled, teacher, evaluation)
        return {}
    plots = workdir / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    records = read_records(workdir)
    lines = [f"# {workdir.name}", ""]

    # The picture.
    shown, steps = teacher, _STEPS
    left_out = None if teacher is None or evaluation is not None else _costly(teacher, records)
    if left_out is not None:
        shown, steps = (teacher, 1) if distilled is None else (None, 1)
    guidance, seed = (None, 0) if evaluation is None else (evaluation.guidance, evaluation.seed)
    if save_comparison(distilled, shown, plots / "samples.png", guidance=guidance, seed=seed, most=steps):
        lines += ["The same noise and labels for all:", "", "![samples](plots/samples.png)", ""]
        lines += [] if left_out is None else [left_out, ""]

    # The table.
    metrics: dict[str, float] = {}
    if evaluation is not None:
        rows = compare(distilled, teacher, evaluation)
        ours = [name for name in rows if name.startswith("student")] or list(rows)[-1:]
        metrics = rows[ours[0]]
        floor = "" if teacher is None else " The noise floor is a second set of samples of the teacher."
        lines += [*table(rows), ""]
        lines += [
            f"{evaluation.num_samples} samples a row{_by(evaluation)}. Evaluations are those of a network for one "
            f"sample: two a step under classifier-free guidance.{floor}",
            "",
        ]
        errors = trajectory_errors(distilled, teacher, evaluation)
        if errors:
            lines += [
                "Distance from the teacher's trajectories, relative to their length, by the duration of a jump:",
                "",
            ]
            lines += [*table({"student": {f"{error.delta:g}": error.mean for error in errors}}), ""]
        write_metrics(workdir / "evaluation.json", rows, evaluation, errors, records[-1]["step"] if records else 0)

    # The training.
    if loss_curves(records, plots / "curves.png"):
        lines += ["![curves](plots/curves.png)", ""]
    if records:
        last: Mapping[str, Any] = {"student_evaluations": 0, "teacher_evaluations": 0, **records[-1]}
        lines.append(
            f"{last['step']} steps. Networks evaluated in training, each time on one sample: the student "
            f"{last['student_evaluations']:.0f} times, the teacher {last['teacher_evaluations']:.0f} times."
        )
    lines += [f"{machine()}. Configuration: [config.gin](config.gin).", ""]
    write_text(workdir / "report.md", "\n".join(lines))
    return metrics


def _costly(teacher: Teacher, records: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the teacher is left out of the picture of a run without an evaluation; None where it costs little."""
    evaluations, operations = (pictured(teacher) * amount for amount in Sampler(teacher, _STEPS).cost())
    last: Mapping[str, Any] = records[-1] if records else {}
    spent = sum(last.get(f"{name}_evaluations", 0) for name in ("student", "teacher"))
    if operations <= _LIGHT or 10 * evaluations <= spent:
        return None
    return (
        f"The picture leaves the teacher at {in_words(_STEPS)} out: it takes {evaluations:.0f} evaluations of a "
        f"network, and the training took {spent:.0f}. A recipe with `train.evaluation` draws it."
    )


def _by(evaluation: Evaluation) -> str:
    """The protocol of an evaluation, and what is other than it says, in words."""
    if evaluation.protocol is None:
        return ""
    others = ", ".join(f"{name} {value}" for name, value in evaluation.as_record()["otherwise"].items())
    return f", by the protocol {evaluation.protocol}" + (f" but for {others}" if others else "")


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Rows of metrics as the lines of a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    titles = [name.replace("_", " ") for name in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.3g}" if c in row else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
