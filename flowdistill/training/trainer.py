"""``train``: a configuration made into a run directory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Literal

import attrs
import gin
import torch

from flowdistill.ema import Averaging, Ema
from flowdistill.evaluation.comparison import Evaluation
from flowdistill.evaluation.pictures import save_samples
from flowdistill.evaluation.report import write_report
from flowdistill.interfaces import FlowMap, Objective, StateSource, Teacher
from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import barrier, find_device, process_group, rank_and_world
from flowdistill.plumbing.dry import placed
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.progress import progress
from flowdistill.runs.checkpoints import checkpoint_paths, read_meta
from flowdistill.states import Prior
from flowdistill.training.loop import Loop, LoopSettings, OptimizerBuilder
from flowdistill.training.optimization import Schedule
from flowdistill.training.run_log import RunLog


@attrs.frozen(eq=False)
class TrainResult:
    """What a run leaves.

    Attributes:
        flow_map: the trained student, with averaged weights where an average was kept, in evaluation mode.
        workdir: the run directory.
        metrics: the last record of metrics.jsonl, and the figures of the evaluation if there was one.
        checkpoint: the last checkpoint.
        steps: training steps done.
    """

    flow_map: FlowMap
    workdir: Path
    metrics: dict[str, float]
    checkpoint: Path
    steps: int


def train(
    gin_file: str | Path | None = None,
    *,
    gin_files: Sequence[str | Path] = (),
    gin_bindings: Sequence[str] = (),
    workdir: str | Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    device: str | torch.device | None = None,
    report: bool = True,
) -> TrainResult:
    """Train as a gin configuration says, and leave a run directory.

    The directory holds ``config.gin`` (everything that was in force; training from it repeats the run),
    ``metrics.jsonl``, ``tensorboard/``, ``samples/``, ``checkpoints/`` and ``report.md``.

    Args:
        gin_file: a gin file in the working directory, or a packaged recipe such as ``freeflow/digits.gin``.
        gin_files: further gin files, read after ``gin_file``.
        gin_bindings: bindings such as ``"train.steps = 10"``, read after all files.
        workdir: the run directory; by default ``runs/`` and the name of the last gin file.
        resume: "auto" continues a run of the same configuration in ``workdir``, whose steps and evaluation alone may
            differ: one that was interrupted, or further, or only to measure it again; "never" wants an empty one.
        device: where to train; by default the first GPU (of each rank its own), else the CPU.
        report: whether to end with ``report.md``, its pictures and figures; without, nothing is measured.

    Raises:
        ConfigError: the configuration cannot work, or ``workdir`` holds a run of another one.
        CheckpointError: the checkpoint to resume from is damaged; nothing of it is overwritten.
        NonFiniteError: a loss became NaN or infinite.

    Examples:
        >>> result = train(
        ...     gin_file="freeflow/ring.gin",
        ...     gin_bindings=["train.steps = 2", "evaluation.num_samples = 20"],
        ...     workdir="runs/ring",
        ... )
        >>> result.flow_map.sample(torch.randn(4, 2)).shape
        torch.Size([4, 2])
    """
    files = [*([] if gin_file is None else [gin_file]), *gin_files]
    if workdir is None:
        workdir = Path("runs") / ("-".join(Path(files[-1]).with_suffix("").parts[-2:]) if files else "train")
    place = find_device(device)
    with torch.random.fork_rng(), config.parsed(files, gin_bindings), process_group(place):
        with config.errors_located():
            seed = config.value("train.seed", 0)
            _check("seed", seed, int)
            torch.manual_seed(seed)  # networks are built as gin calls build
            run = build(workdir=Path(workdir), device=place)
            config.check_all_used(without=("evaluation", "features") if run.evaluation is None else ())
        _claim(run.loop, resume, gin.operative_config_str())
        return _run(run, report)


@attrs.frozen(kw_only=True)
class _Run:
    """A loop, and what happens around it."""

    loop: Loop
    log_every: int
    sample_every: int
    checkpoint_every: int
    keep_checkpoints: int
    evaluation: Evaluation | None


def _check(name: str, value: object, kind: type | tuple[type, ...]) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
        raise ConfigError(f"train.{name} must be of type {wanted}, not {_short(value)}")


def _short(value: object) -> str:
    """A value as a message shows it: modules in full would fill the screen."""
    text = repr(value)
    return text if len(text) < 80 and "\n" not in text else f"a {type(value).__name__}"


@gin.configurable("train", denylist=["workdir", "device"])  # type: ignore[untyped-decorator]
def build(
    *,
    workdir: Path,
    device: torch.device,
    objective: Objective = gin.REQUIRED,
    flow_map: FlowMap | Callable[[Teacher | None], FlowMap] = gin.REQUIRED,
    teacher: Teacher | None = None,
    states: StateSource | None = None,
    steps: int = gin.REQUIRED,
    batch_size: int = gin.REQUIRED,
    accumulation: int = 1,
    optimizer: OptimizerBuilder = torch.optim.AdamW,
    auxiliary_optimizer: OptimizerBuilder | None = None,
    schedule: Schedule | None = None,
    gradient_clip: float | None = 1.0,
    precision: Literal["float32", "bf16"] = "float32",
    ema: Averaging | None = Ema(),  # noqa: B008, frozen
    seed: int = 0,
    log_every: int = 10,
    sample_every: int = 1000,
    checkpoint_every: int = 1000,
    keep_checkpoints: int = 2,
    evaluation: Evaluation | None = None,
) -> _Run:
    """The configurable behind `train`, as ``train`` in gin files.

    Args:
        workdir: see `train`.
        device: see `train`.
        objective: what the student minimises.
        flow_map: the student, or what builds it from the teacher (``@from_teacher``, without parentheses).
        teacher: the teacher; None where the objective needs none.
        states: the state source; by default the prior, where the objective needs no data.
        steps: training steps in all.
        batch_size: states of one backward pass.
        accumulation: backward passes of one step, which processes share out.
        optimizer: builds the student's optimiser from its parameters: any torch optimiser, such as ``@AdamW``.
        auxiliary_optimizer: the same for auxiliary networks; None is ``optimizer``.
        schedule: of the learning rates; None is constant.
        gradient_clip: largest norm of a gradient; None is no limit.
        precision: "bf16" evaluates losses under autocast, with weights and times in float32.
        ema: the average of the student's weights that the run results in; None keeps none.
        seed: of all random numbers.
        log_every: steps between records.
        sample_every: steps between pictures of samples; 0 is none.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: newest checkpoints that are kept.
        evaluation: what is measured at the end; None measures nothing, whatever is bound to ``evaluation``.
    """
    for name, number in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("accumulation", accumulation),
        ("log_every", log_every),
        ("checkpoint_every", checkpoint_every),
        ("keep_checkpoints", keep_checkpoints),
    ):
        _check(name, number, int)
        if number <= 0:
            raise ConfigError(f"train.{name} must be positive, not {number}")
    world = rank_and_world()[1]
    if accumulation % world:
        raise ConfigError(
            f"train.accumulation = {accumulation} backward passes cannot be shared out evenly over {world} processes: "
            f"set it to a multiple of {world}"
        )
    _check("sample_every", sample_every, int)
    _check("objective", objective, Objective)
    _check("teacher", teacher, (Teacher, NoneType))
    _check("states", states, (StateSource, NoneType))
    _check("gradient_clip", gradient_clip, (int, float, NoneType))
    if gradient_clip is not None and not gradient_clip > 0:
        raise ConfigError(f"train.gradient_clip must be positive, or None for no limit, not {gradient_clip}")
    for name, builder in (("optimizer", optimizer), ("auxiliary_optimizer", auxiliary_optimizer or optimizer)):
        if not callable(builder):
            raise ConfigError(f"train.{name} must build an optimiser, as @AdamW does, not {_short(builder)}")
    _check("schedule", schedule, (Schedule, NoneType))
    _check("ema", ema, (Averaging, NoneType))
    _check("evaluation", evaluation, (Evaluation, NoneType))
    if evaluation is not None:
        evaluation.check(teacher)
    if precision not in ("float32", "bf16"):
        raise ConfigError(f"train.precision must be 'float32' or 'bf16', not {precision!r}")
    if objective.needs_teacher and teacher is None:
        raise ConfigError(f"{type(objective).__name__} needs a teacher: set train.teacher")
    if objective.needs_data and (states is None or not states.needs_data):
        raise ConfigError(f"{type(objective).__name__} needs data: set train.states = @noised_data() and its dataset")
    if teacher is not None:
        teacher = placed(teacher, device).eval().requires_grad_(False)
    student = placed(build_flow_map(flow_map, teacher), device)
    states = Prior() if states is None else states
    states.setup(student, teacher)
    objective.setup(student, teacher)
    loop = Loop(
        student=student,
        teacher=teacher,
        objective=objective,
        source=states,
        optimizer=optimizer,
        auxiliary_optimizer=optimizer if auxiliary_optimizer is None else auxiliary_optimizer,
        schedule=Schedule() if schedule is None else schedule,
        averaging=ema,
        settings=LoopSettings(
            steps=steps,
            batch_size=batch_size,
            accumulation=accumulation,
            gradient_clip=gradient_clip,
            precision=precision,
            seed=seed,
        ),
        workdir=workdir,
    )
    return _Run(
        loop=loop,
        log_every=log_every,
        sample_every=sample_every,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        evaluation=evaluation,
    )


def build_flow_map(flow_map: FlowMap | Callable[[Teacher | None], FlowMap], teacher: Teacher | None) -> FlowMap:
    """The student that ``train.flow_map`` describes; ConfigError if it does not fit the teacher."""
    if not isinstance(flow_map, FlowMap) and not callable(flow_map):
        raise ConfigError(f"train.flow_map must be a flow map or build one, not {_short(flow_map)}")
    student = flow_map if isinstance(flow_map, FlowMap) else flow_map(teacher)
    if not isinstance(student, FlowMap):
        raise ConfigError(f"train.flow_map must build a flow map, not {_short(student)}")
    for name in ("sample_shape", "num_classes"):
        ours = getattr(student, name)
        if teacher is not None and ours != getattr(teacher, name):
            raise ConfigError(f"{name} of the student is {ours}, of the teacher {getattr(teacher, name)}")
    return student


def _run(run: _Run, report: bool) -> TrainResult:
    loop, workdir, steps = run.loop, run.loop.workdir, run.loop.settings.steps
    saved = checkpoint_paths(workdir)
    if saved:
        loop.load(saved[-1])
    record: dict[str, float] = {}
    first = rank_and_world()[0] == 0
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(RunLog(workdir, loop.step, steps)) if first else None
        if saved and log is not None:
            log.say(f"resumed {saved[-1]}")
        while loop.step < steps:
            loop.train_step()
            last = loop.step == steps
            if last or loop.step % run.log_every == 0:
                record = loop.record()
                if log is not None:
                    log.write(loop.step, record)
            if log is not None:
                log.advance(loop.step)
            if last or loop.step % run.checkpoint_every == 0:
                with progress("saving a checkpoint", None):
                    loop.save(run.keep_checkpoints)
            if first and run.sample_every and (last or loop.step % run.sample_every == 0):
                picture = workdir / "samples" / f"step_{loop.step:08d}.png"
                save_samples(loop.result, picture, loop.settings.seed)
        result = loop.result.requires_grad_(False)
        barrier()  # until the last checkpoint is there
        figures: dict[str, float] = {}
        if report and log is not None:
            if run.evaluation is not None:
                log.say(f"measuring {run.evaluation.num_samples} samples of each model")
            figures = write_report(workdir, result, loop.teacher, run.evaluation)
    return TrainResult(
        flow_map=result,
        workdir=workdir,
        metrics={**record, **figures},
        checkpoint=checkpoint_paths(workdir)[-1],
        steps=loop.step,
    )


def _claim(loop: Loop, resume: str, operative: str) -> None:
    """Make the run directory ours, or make sure that it holds an interrupted run of the same configuration."""
    workdir, steps = loop.workdir, loop.settings.steps
    path = workdir / "config.gin"
    if path.is_file():
        if resume == "never":
            raise ConfigError(f"{workdir} already holds a run: choose another workdir")
        theirs, ours = (_what_trains(text) for text in (path.read_text(), operative))
        differing = [line for line in ours if line not in theirs] + [line for line in theirs if line not in ours]
        if differing:
            raise ConfigError(
                f"{workdir} holds a run of another configuration (one has {differing[0].strip()!r}): "
                "choose another workdir"
            )
        saved = checkpoint_paths(workdir)
        if saved and (done := read_meta(saved[-1])["step"]) > steps:
            raise ConfigError(f"{workdir} holds a run of {done} steps: train.steps = {steps} is less")
    barrier()  # until all have looked
    if rank_and_world()[0] != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(operative)
    partial.replace(path)


def _what_trains(configuration: str) -> list[str]:
    """The bindings of a configuration that a run must keep.

    Not the number of steps, the evaluation, or the decoder of latents: a run may be continued beyond its end, be
    measured again, and be given what draws its images.
    """
    bindings = re.findall(r"^\w.* = .*(?:\n .*)*", configuration, re.MULTILINE)
    free = r"train\.(steps|evaluation) |(evaluation|\w+_features)\.|\w+\.vae "
    return [binding for binding in bindings if not re.match(free, binding)]
