"""A student beside its teacher: what is measured, how samples are drawn, and the record of the metrics."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import gin
import torch
from attrs.validators import deep_iterable, ge, in_, min_len, optional
from torch import Tensor

from flowdistill.decoders import ROUNDINGS, Rounding
from flowdistill.evaluation.features import FeatureExtractor
from flowdistill.evaluation.metrics import measure
from flowdistill.evaluation.references import NOTHING_TO_COMPARE, reference_set
from flowdistill.evaluation.samples import SampleSet, sample_set
from flowdistill.evaluation.trajectories import ErrorAt, checked_deltas, trajectory_error
from flowdistill.interfaces import Condition, ExactTeacher, FlowMap, Jumps, Teacher
from flowdistill.plumbing.distributed import rank_and_world_together, shared_out
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.files import write_json
from flowdistill.plumbing.flops import Flops
from flowdistill.plumbing.machine import machine
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.randomness import step_generator
from flowdistill.plumbing.registry import FEATURES, METRICS, PROTOCOLS
from flowdistill.runs.sampling import LABELS, default_batch_size, make_condition
from flowdistill.solvers import Euler, RungeKutta4


def _ruled(name: str, default: Any) -> Any:
    """What a field is where nothing is bound: as the protocol says, where one is named, and else the default."""

    def value(evaluation: Evaluation) -> Any:
        rules = None if evaluation.protocol is None else PROTOCOLS.build(evaluation.protocol)
        return default if rules is None else getattr(rules, name)

    return attrs.Factory(value, takes_self=True)


_STEPS: Any = deep_iterable(ge(1), iterable_validator=min_len(1))


@gin.register("evaluation", module="evaluation")
@attrs.frozen(kw_only=True)
class Evaluation:
    """What is measured at the end of a run."""

    protocol: str | None = None
    """The name of a `flowdistill.evaluation.Protocol`, which says whatever is not bound of metrics, features,
    reference, number of samples, labels and rounding. The autoencoder and the grid of several steps stay the model's.
    """
    metrics: Sequence[str] = attrs.field(default=_ruled("metrics", ("fid", "precision", "recall", "accuracy")))
    """The names of registered metrics."""
    features: str | FeatureExtractor | None = attrs.field(default=_ruled("features", None))
    """A feature extractor or its name; None compares samples with an exact teacher's own distribution."""
    reference: str | None = attrs.field(default=_ruled("reference", None))
    """A folder or a file of images, published statistics, or the name of a data set, see
    `flowdistill.evaluation.load_images`; None is the features of real data that come with the extractor."""
    num_samples: int = attrs.field(default=_ruled("num_samples", 2000), validator=ge(2))
    """The samples of each model."""
    labels: str = attrs.field(default=_ruled("labels", "in_turn"), validator=in_(LABELS))
    """The choice of classes: "in_turn", "balanced" or "random", see `flowdistill.sample`."""
    rounding: Rounding | None = attrs.field(default=_ruled("rounding", None), validator=optional(in_(ROUNDINGS)))
    """The rounding of images to bytes, see `flowdistill.decoders.quantize`; None is the model's own."""
    teacher_steps: Sequence[int] = attrs.field(default=(1, 4, 64), validator=_STEPS)
    """The Euler steps at which the teacher is measured beside the student; the last is its best."""
    student_steps: Sequence[int] = attrs.field(default=(1,), validator=_STEPS)
    """The jumps at which the student is measured; one that knows a single jump is measured at that alone."""
    deltas: Sequence[float] = ()
    """The durations at which the student's distance from the teacher's trajectories is measured, see
    `flowdistill.evaluation.trajectory_error`; for a map to data only (1.0,)."""
    guidance: float | None = None
    """The guidance scale of teacher and student; None is their own."""
    precision: Literal["float32", "bf16"] = attrs.field(default="float32", validator=in_(("float32", "bf16")))
    """"bf16" draws the samples under autocast, several times faster."""
    seed: int = 0
    """The seed of the noise."""

    def as_record(self) -> dict[str, Any]:
        """The protocol and what is other than it says; autoencoder and grid of several steps are the model's."""
        rules = PROTOCOLS.build(str(self.protocol))
        features = self.features if self.features is None or isinstance(self.features, str) else "one of its own"
        settings = {
            "features": features or "none",
            "reference": self.reference or "none",
            "num_samples": self.num_samples,
            "labels": self.labels,
            "rounding": self.rounding,
            "autoencoder": "the model's",
            "shift": "the model's" if max(self.student_steps) > 1 else None,
        }
        return {"protocol": self.protocol, "otherwise": rules.otherwise(settings)}

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

    def rehearse(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Read the reference and look at two samples of zeros, so that a mistake shows before days of training.

        Raises:
            ConfigError: there is no such reference, or none at all.
            DataError: the reference cannot be read, or samples are not what the features are of.
        """
        reference_set(self.features, teacher, 2, self.seed, self.reference, student.decoder, device_of(student))
        samples = torch.zeros((2, *student.sample_shape), device=device_of(student))
        sample_set(samples, None, self.features, student.decoder)


@attrs.frozen
class Sampler:
    """A model that makes samples in some steps: of Euler's method for a teacher, jumps for a student."""

    model: FlowMap | Teacher
    """The teacher or the student."""
    steps: int
    """The number of steps."""

    @torch.no_grad()
    def __call__(self, noise: Tensor, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        """Samples of the shape of the noise; the generator draws what further noise a map to data needs."""
        if isinstance(self.model, Teacher):
            return Euler(steps=self.steps).solve(self.model, noise, condition)
        return self.model.sample(noise, self.steps, condition, renoise=self.renoise(noise, generator))

    @property
    def renoises(self) -> bool:
        """Whether samples need further noise between their jumps, as those of a map to data do."""
        return isinstance(self.model, FlowMap) and self.model.jumps is Jumps.TO_DATA and self.steps > 1

    def renoise(self, noise: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """The further noise that samples from ``noise`` need; None where they need none."""
        if not self.renoises:
            return None
        return torch.randn((self.steps - 1, *noise.shape), generator=generator).to(noise)

    def cost(self, guidance: float | None = None) -> tuple[int, int]:
        """Evaluations and floating-point operations that one sample takes, as one step of it counts them."""
        like = next(itertools.chain(self.model.parameters(), self.model.buffers()), torch.zeros(()))
        noise = torch.zeros((1, *self.model.sample_shape), dtype=like.dtype, device=like.device)
        before = self.model.evaluations
        with Flops() as flops:  # type: ignore[no-untyped-call]
            Sampler(self.model, 1)(noise, Condition.in_turn(self.model.num_classes, 1, guidance).to(like.device))
        return self.steps * (self.model.evaluations - before), self.steps * flops.total


def compare(
    student: FlowMap | None, teacher: Teacher | None, evaluation: Evaluation, best: SampleSet | None = None
) -> dict[str, dict[str, float]]:
    """The metrics of teacher and student, a row each, by the row's name.

    Several processes, which call this at once, share out the samples; the first one has the rows, the others none.

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
    first = rank_and_world_together()[0] == 0
    reference = (
        None
        if not first
        else reference_set(
            evaluation.features,
            teacher,
            evaluation.num_samples,
            evaluation.seed,
            evaluation.reference,
            model.decoder,
            device_of(model),
        )
    )
    samplers: dict[str, tuple[Sampler, str]] = {}
    most = ""
    if teacher is not None and best is None:
        for steps in evaluation.teacher_steps:
            most = f"teacher, {in_words(steps)}"
            samplers[most] = Sampler(teacher, steps), "evaluation"
        samplers["noise floor"] = samplers[most][0], "evaluation, again"
    if student is not None:
        for steps in evaluation.student_steps if student.has_velocity else (1,):
            samplers[f"student, {in_words(steps)}"] = Sampler(student, steps), "evaluation, student"
    distances = [metric for metric in ("fid", "w2") if metric in evaluation.metrics]
    rows: dict[str, dict[str, float]] = {}
    for name, (sampler, stream) in samplers.items():
        generated, evaluations = _drawn(name, sampler, stream, model, evaluation)
        if reference is None:
            continue
        rows[name] = {"evaluations": evaluations, **measure(evaluation.metrics, generated, reference)}
        if best is not None:
            to_teacher = measure(distances, generated, best)
            rows[name] |= {f"{metric}_to_teacher": value for metric, value in to_teacher.items()}
        if name == most:
            best = generated
    return rows


def teacher_samples(teacher: Teacher, evaluation: Evaluation) -> SampleSet:
    """The teacher's samples at its most steps, which students are measured against."""
    steps = evaluation.teacher_steps[-1]
    return _drawn(f"teacher, {in_words(steps)}", Sampler(teacher, steps), "evaluation", teacher, evaluation)[0]


def trajectory_errors(student: FlowMap | None, teacher: Teacher | None, evaluation: Evaluation) -> list[ErrorAt]:
    """The student's distances from the teacher's trajectories at the durations of an evaluation, if any."""
    if student is None or teacher is None or not evaluation.deltas:
        return []
    n, solver = 256, RungeKutta4()
    total = n * len(evaluation.deltas) * 4 * solver.steps * Sampler(teacher, 1).cost(evaluation.guidance)[0]
    before = teacher.evaluations
    with progress("following the teacher's trajectories", total, lambda: teacher.evaluations - before):
        return trajectory_error(
            student, teacher, evaluation.deltas, n, guidance=evaluation.guidance, solver=solver, seed=evaluation.seed
        )


def write_metrics(
    path: Path,
    rows: dict[str, dict[str, float]],
    evaluation: Evaluation,
    errors: Sequence[ErrorAt] = (),
    step: int | None = None,
) -> None:
    """Write the rows of `compare` and what they rest on, such as the step of the training, as a JSON file."""
    record: dict[str, Any] = {} if step is None else {"step": step}
    record |= {} if evaluation.protocol is None else evaluation.as_record()
    record |= {"num_samples": evaluation.num_samples, "seed": evaluation.seed, "machine": machine(), "rows": rows}
    record |= {"trajectory_errors": [attrs.asdict(error) for error in errors]} if errors else {}
    write_json(path, record)


def _drawn(
    name: str, sampler: Sampler, stream: str, model: FlowMap | Teacher, evaluation: Evaluation
) -> tuple[SampleSet, float]:
    """Samples as metrics see them, and the evaluations that one of them has taken."""
    n, device = evaluation.num_samples, device_of(model)
    rank, world = rank_and_world_together()
    size = default_batch_size(device)
    size = size if sampler.renoises else min(size, -(-n // world))  # which noise follows depends on the parts
    generator = step_generator(evaluation.seed, 0, stream)
    noise = torch.randn((n, *model.sample_shape), generator=generator).to(device)
    labels = None if model.num_classes is None else evaluation.labels
    condition = make_condition(model.num_classes, n, labels, evaluation.guidance, evaluation.seed).to(device)
    parts = [slice(i, min(i + size, n)) for i in range(0, n, size)]
    turns = iter(parts)

    def draw(part: slice) -> SampleSet:
        for other in itertools.takewhile(lambda other: other != part, turns):  # of other processes
            sampler.renoise(noise[other], generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=evaluation.precision == "bf16"):
            samples = sampler(noise[part], condition[part], generator)
        told = condition[part].labels
        return sample_set(samples, told, evaluation.features, model.decoder, evaluation.rounding)

    ours = sum(part.stop - part.start for part in parts[rank::world])
    total = ours * sampler.cost(evaluation.guidance)[0]
    before = sampler.model.evaluations
    with progress(f"drawing samples ({name})", total, lambda: sampler.model.evaluations - before):
        drawn = SampleSet.join(shared_out(parts, draw))
    return drawn, (sampler.model.evaluations - before) / max(ours, 1)


def device_of(*models: FlowMap | Teacher | None) -> torch.device:
    """Where the first of the models is; exact teachers have buffers and no parameters."""
    for model in filter(None, models):
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            return tensor.device
    return torch.device("cpu")


def in_words(steps: int) -> str:
    """A number of steps, as titles name it."""
    return "1 step" if steps == 1 else f"{steps} steps"
