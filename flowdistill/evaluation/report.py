"""The page at the end of a run: samples beside the teacher's, figures with their noise floor, and loss curves."""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import attrs
import gin
import torch
from attrs.validators import ge, in_, min_len
from torch import Tensor

from flowdistill.evaluation.features import FeatureExtractor
from flowdistill.evaluation.measure import measure
from flowdistill.evaluation.plots import image_grid, loss_curves, scatter_side_by_side, side_by_side
from flowdistill.evaluation.references import NOTHING_TO_COMPARE, reference_set
from flowdistill.evaluation.samples import SampleSet, sample_set
from flowdistill.evaluation.trajectories import ErrorAt, checked_deltas, trajectory_error
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import Condition, ExactTeacher, FlowMap, Jumps, Teacher
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.randomness import step_generator
from flowdistill.plumbing.registry import FEATURES, METRICS
from flowdistill.runs.records import read_records
from flowdistill.solvers import Euler
from flowdistill.wrapped_teachers import FlowMapTeacher


class Sampler(Protocol):
    """Noise and its condition to samples; the generator draws what further noise it needs."""

    def __call__(self, noise: Tensor, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the shape of the noise."""


@gin.register("evaluation", module="evaluation")
@attrs.frozen(kw_only=True)
class Evaluation:
    """What is measured at the end of a run.

    Attributes:
        metrics: names of registered metrics.
        features: a feature extractor or its name; None compares samples with an exact teacher's own distribution.
        reference: a folder of images, an ``.npz`` file, or the name of a data set; None is the features of real data
            that come with the extractor.
        num_samples: samples of each model.
        teacher_steps: Euler steps at which the teacher is measured beside the student; the last is its best.
        student_steps: jumps at which the student is measured; one that knows a single jump is measured at that alone.
        deltas: durations at which the student's distance from the teacher's trajectories is measured, see
            `flowdistill.evaluation.trajectory_error`; for a map to data only (1.0,).
        guidance: guidance scale of teacher and student; None is their own.
        precision: "bf16" draws the samples under autocast, several times faster.
        seed: of the noise.
    """

    metrics: Sequence[str] = ("fid", "recall", "accuracy")
    features: str | FeatureExtractor | None = None
    reference: str | None = None
    num_samples: int = attrs.field(default=2000, validator=ge(1))
    teacher_steps: Sequence[int] = attrs.field(default=(1, 4, 64), validator=min_len(1))
    student_steps: Sequence[int] = attrs.field(default=(1,), validator=min_len(1))
    deltas: Sequence[float] = ()
    guidance: float | None = None
    precision: Literal["float32", "bf16"] = attrs.field(default="float32", validator=in_(("float32", "bf16")))
    seed: int = 0

    def check(self, teacher: Teacher | None) -> None:
        """ConfigError for what is not registered, for impossible durations, or if there is nothing to compare with."""
        for name in self.metrics:
            METRICS.get(name)
        if self.deltas:
            checked_deltas(self.deltas)
        if isinstance(self.features, str):
            FEATURES.get(self.features)
        if self.features is None and not isinstance(teacher, ExactTeacher):
            raise ConfigError(NOTHING_TO_COMPARE)


def compare(
    student: FlowMap | None, teacher: Teacher | None, evaluation: Evaluation, best: SampleSet | None = None
) -> dict[str, dict[str, float]]:
    """The figures of teacher and student, a row each, by the row's name.

    Columns are the network evaluations spent on a sample, as counted, the metrics against the reference and, for
    ``fid`` and ``w2``, the same distance to the teacher's samples at its most steps, drawn from other noise. The row
    ``noise floor`` is a second such set of teacher samples, the best that a student can look.

    Args:
        student: None measures the teacher alone.
        teacher: None measures the student alone.
        evaluation: what is measured.
        best: `teacher_samples` of this teacher and evaluation; with them the student's rows alone are measured.
    """
    model = student if student is not None else teacher
    assert model is not None
    reference = reference_set(
        evaluation.features,
        teacher,
        evaluation.num_samples,
        evaluation.seed,
        evaluation.reference,
        model.decoder,
        _device(model),
    )
    samplers: dict[str, tuple[Sampler, str]] = {}
    most = ""
    if teacher is not None and best is None:
        for steps in evaluation.teacher_steps:
            most = f"teacher, {_number(steps, 'step')}"
            samplers[most] = _euler(teacher, steps), "evaluation"
        samplers["noise floor"] = samplers[most][0], "evaluation, again"
    if student is not None:
        for steps in (1,) if not student.has_velocity else evaluation.student_steps:
            samplers[f"student, {_number(steps, 'step')}"] = _jumps(student, steps), "evaluation, student"
    distances = [metric for metric in ("fid", "w2") if metric in evaluation.metrics]
    rows: dict[str, dict[str, float]] = {}
    for name, (sampler, stream) in samplers.items():
        before = _evaluations(student, teacher)
        generated = _drawn(sampler, stream, model, evaluation)
        evaluations = (_evaluations(student, teacher) - before) / evaluation.num_samples
        rows[name] = {"evaluations": evaluations, **measure(evaluation.metrics, generated, reference)}
        if best is not None:
            to_teacher = measure(distances, generated, best)
            rows[name] |= {f"{metric}_to_teacher": value for metric, value in to_teacher.items()}
        if name == most:
            best = generated
    return rows


def teacher_samples(teacher: Teacher, evaluation: Evaluation) -> SampleSet:
    """The teacher's samples at its most steps, which students are measured against."""
    return _drawn(_euler(teacher, evaluation.teacher_steps[-1]), "evaluation", teacher, evaluation)


def _drawn(sampler: Sampler, stream: str, model: FlowMap | Teacher, evaluation: Evaluation) -> SampleSet:
    n, device = evaluation.num_samples, _device(model)
    size = 100 if device.type == "cpu" else 500  # what fits a processor's caches is faster there
    generator = step_generator(evaluation.seed, 0, stream)
    noise = torch.randn((n, *model.sample_shape), generator=generator).to(device)
    condition = Condition.in_turn(model.num_classes, n, evaluation.guidance).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=evaluation.precision == "bf16"):
        parts = [slice(i, i + size) for i in range(0, n, size)]
        samples = torch.cat([sampler(noise[part], condition[part], generator) for part in parts])
    return sample_set(samples, condition.labels, evaluation.features, model.decoder)


def _evaluations(*models: FlowMap | Teacher | None) -> int:
    return sum(model.evaluations for model in models if model is not None)


def _euler(teacher: Teacher, steps: int) -> Sampler:
    def sampler(noise: Tensor, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        with torch.no_grad():
            return Euler(steps=steps).solve(teacher, noise, condition)

    return sampler


def _jumps(student: FlowMap, steps: int) -> Sampler:
    def sampler(noise: Tensor, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        fresh = (
            torch.randn((steps - 1, *noise.shape), generator=generator).to(noise)
            if student.jumps is Jumps.TO_DATA
            else None
        )
        return student.sample(noise, steps, condition, renoise=fresh)

    return sampler


def _device(*models: FlowMap | Teacher | None) -> torch.device:
    """Where the first of the models is; exact teachers have buffers and no parameters."""
    for model in filter(None, models):
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            return tensor.device
    return torch.device("cpu")


def save_picture(samples: Tensor, path: Path) -> bool:
    """A picture of images (a grid) or of points in the plane (a scatter plot); False for anything else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_picture(samples):
        image_grid(samples, path)
    elif samples.ndim == 2 and samples.shape[1] == 2:
        scatter_side_by_side({"samples": samples}, path)
    else:
        return False
    return True


@torch.no_grad()
def save_samples(student: FlowMap, path: Path, seed: int) -> None:
    """A picture of what the student makes of the same noises and labels every time."""
    n = 1000 if len(student.sample_shape) == 1 else 60
    device = _device(student)
    noise = torch.randn((n, *student.sample_shape), generator=step_generator(seed, 0, "pictures")).to(device)
    steps = 64 if student.jumps is Jumps.NONE else 1
    samples = student.sample(noise, steps, Condition.in_turn(student.num_classes, n).to(device))
    save_picture(images_of(samples, student).cpu(), path)


def write_report(
    workdir: Path, student: FlowMap, teacher: Teacher | None, evaluation: Evaluation | None
) -> dict[str, float]:
    """Write ``report.md``, its pictures, and its table as ``figures.json``; returns the student's figures.

    A run without a teacher may have trained one: a plain velocity field is measured as such, in several steps.
    """
    plots = workdir / "plots"
    plots.mkdir(exist_ok=True)
    records = read_records(workdir)
    loss_curves(records, plots / "curves.png")
    distilled: FlowMap | None = student
    if teacher is None and student.jumps is Jumps.NONE:
        distilled, teacher = None, FlowMapTeacher(student)
        if evaluation is not None and evaluation.guidance is not None:
            teacher = GuidedTeacher(teacher, evaluation.guidance)
    lines = [f"# {workdir.name}", ""]
    guidance = None if evaluation is None else evaluation.guidance
    seed = 0 if evaluation is None else evaluation.seed
    if _compare_pictures(distilled, teacher, guidance, seed, plots / "samples.png"):
        lines += ["The same noise and labels for all:", "", "![samples](plots/samples.png)", ""]
    figures: dict[str, float] = {}
    if evaluation is not None:
        rows = compare(distilled, teacher, evaluation)
        ours = [name for name in rows if name.startswith("student")] or list(rows)[-1:]
        figures = rows[ours[0]]
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
        write_figures(workdir / "figures.json", rows, evaluation, errors)
    lines += ["![curves](plots/curves.png)", ""]
    if records:
        last = records[-1]
        lines.append(
            f"{last['step']} steps. Networks evaluated in training, each time on one sample: the student "
            f"{last['student_evaluations']:.0f} times, the teacher {last['teacher_evaluations']:.0f} times."
        )
    lines += [f"{machine()}. Configuration: [config.gin](config.gin).", ""]
    (workdir / "report.md").write_text("\n".join(lines))
    return figures


def trajectory_errors(student: FlowMap | None, teacher: Teacher | None, evaluation: Evaluation) -> list[ErrorAt]:
    """The student's distances from the teacher's trajectories at the durations of an evaluation, if any."""
    if student is None or teacher is None or not evaluation.deltas:
        return []
    return trajectory_error(student, teacher, evaluation.deltas, guidance=evaluation.guidance, seed=evaluation.seed)


def write_figures(
    path: Path, rows: dict[str, dict[str, float]], evaluation: Evaluation, errors: Sequence[ErrorAt] = ()
) -> None:
    """Write a JSON file of figures, all at once."""
    record = {"num_samples": evaluation.num_samples, "seed": evaluation.seed, "machine": machine(), "rows": rows}
    record |= {"trajectory_errors": [attrs.asdict(error) for error in errors]} if errors else {}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def _compare_pictures(
    student: FlowMap | None, teacher: Teacher | None, guidance: float | None, seed: int, path: Path
) -> bool:
    model = student if teacher is None else teacher
    assert model is not None
    points = len(model.sample_shape) == 1
    n = 2000 if points else 40
    noise = torch.randn((n, *model.sample_shape), generator=step_generator(seed, 0, "pictures"))
    device = _device(student, teacher)
    noise, condition = noise.to(device), Condition.in_turn(model.num_classes, n, guidance).to(device)
    panels: dict[str, Tensor] = {}
    if teacher is not None:
        panels = {f"teacher, {_number(k, 'step')}": _euler(teacher, k)(noise, condition) for k in (64, 1)}
    if student is not None:
        panels["student, 1 step"] = student.sample(noise, 1, condition)
    panels = {title: images_of(samples, model).cpu() for title, samples in panels.items()}
    if points and model.sample_shape == (2,):
        scatter_side_by_side(panels, path)
    elif all(is_picture(samples) for samples in panels.values()):
        side_by_side(panels, path)
    else:
        return False
    return True


def images_of(samples: Tensor, model: FlowMap | Teacher) -> Tensor:
    """The images of a model's samples, or the samples themselves where nothing decodes them."""
    return samples if model.decoder is None or not model.decoder.ready else model.decoder.decode(samples)


def is_picture(samples: Tensor) -> bool:
    """Whether samples are images of one or three channels."""
    return samples.ndim == 4 and samples.shape[1] in (1, 3)


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Rows of figures as the lines of a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    titles = [name.replace("_", " ") for name in columns]
    lines = [f"| | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = [f"{row[c]:.3g}" if c in row else "" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def machine() -> str:
    """The machine and the versions behind a figure, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return (
        f"{device}, {_number(os.cpu_count() or 1, 'core')}, {_number(torch.get_num_threads(), 'thread')}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _number(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
