"""``train``: a configuration made into a run directory."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import attrs
import torch

from flowdistill.evaluation.pictures import save_samples
from flowdistill.evaluation.report import write_report
from flowdistill.interfaces import FlowMap, Teacher
from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import (
    alone,
    by_each,
    by_first,
    find_device,
    gathered,
    in_turn,
    process_group,
    rank_and_world,
)
from flowdistill.plumbing.dry import without_files
from flowdistill.plumbing.errors import ConfigError, NonFiniteError, TrainingInterrupted
from flowdistill.plumbing.files import locked, write_text
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.randomness import random_state_kept
from flowdistill.runs.checkpoints import checkpoint_paths, newest_whole, read_meta, remove_left
from flowdistill.runs.run import Run, on_device
from flowdistill.training.callbacks import Callback, Callbacks
from flowdistill.training.loop import Loop, configured_loop
from flowdistill.training.parallel import blueprint, forget
from flowdistill.training.run_log import RunLog
from flowdistill.training.stopping import StopSignals


@attrs.frozen(eq=False)
class TrainResult:
    """The results of a run."""

    flow_map: FlowMap
    """The trained student, with averaged weights if an average was kept, in evaluation mode."""
    workdir: Path
    """The run directory."""
    metrics: dict[str, float]
    """The last record of metrics.jsonl, and the metrics of the evaluation if there was one."""
    checkpoint: Path
    """The last checkpoint."""
    steps: int
    """Training steps done."""


def train(
    recipe: str | Path | None = None,
    *,
    on: str | Path | None = None,
    gin_file: str | Path | None = None,
    gin_files: Sequence[str | Path] = (),
    gin_bindings: Sequence[str] = (),
    workdir: str | Path | None = None,
    resume: Literal["auto", "never"] = "auto",
    device: str | torch.device | None = None,
    report: bool = True,
    timeout: float = 600.0,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Train a method on a setting, or as gin files say, and leave a run directory.

    The directory holds ``config.gin`` (everything that was in force; training from it repeats the run),
    ``metrics.jsonl``, ``tensorboard/``, ``samples/``, ``checkpoints/`` and ``report.md``.

    Args:
        recipe: the name of a method, as ``flowdistill list methods`` shows it, or a whole recipe as ``gin_file``.
        on: the name of a setting, as ``flowdistill list settings`` shows it, or a gin file of one.
        gin_file: a gin file in the working directory, or a packaged recipe such as ``freeflow/digits.gin``.
        gin_files: further gin files, read after the others.
        gin_bindings: bindings such as ``"train.steps = 10"``, read after all files.
        workdir: the run directory; by default ``runs/`` and the names of the method and the setting, or that of the
            last gin file.
        resume: "auto" continues a run of the same configuration in ``workdir``, whose steps and evaluation alone may
            differ: one that was interrupted, or further, or only to measure it again; "never" wants an empty one.
        device: where to train; by default the first GPU (of each rank its own), else the CPU.
        report: whether to end with ``report.md``, its pictures and figures; without, nothing is measured.
        timeout: the seconds that several processes wait for one of them that gives no sign of life.
        callbacks: hooks into the training, beside those of ``train.callbacks``.

    Raises:
        ConfigError: the configuration cannot work, or ``workdir`` holds a run of another one or is in use.
        CheckpointError: all checkpoints to resume from are damaged; nothing of them is overwritten.
        DistributedError: another of several processes has ended, or gave no sign of life; says which.
        NonFiniteError: a loss, a weight or a sample became NaN or infinite; says how to go on.
        TrainingInterrupted: SIGTERM, SIGINT, SIGHUP or SIGUSR1 came, and the last step is saved; the same call
            continues. It is a `KeyboardInterrupt`. The caller's signal handlers are back.

    Examples:
        >>> short = ["train.steps = 2", "evaluation.num_samples = 20"]
        >>> result = train("meanflow", on="plane", gin_bindings=short, workdir="runs/plane")
        >>> result.flow_map.sample(torch.randn(4, 2)).shape
        torch.Size([4, 2])
    """
    files = config.chosen(recipe, on, gin_file, gin_files)
    if workdir is None:
        workdir = Path("runs") / _name(recipe, on, files)
    if not timeout > 0:
        raise ConfigError(f"timeout must be positive, not {timeout}")
    place = find_device(device)
    folder = Path(workdir)
    with random_state_kept(), contextlib.ExitStack() as owned:

        def own() -> bool:
            owned.enter_context(locked(folder))
            return True

        def configured(whole: bool) -> tuple[Loop, str]:
            # which other threads wait for, so nothing is trained inside
            with config.parsed(files, gin_bindings), progress("building the models", None):
                with contextlib.nullcontext() if whole else without_files(data=True):
                    loop = configured_loop(folder, place)
                return loop, config.operative()

        with process_group(place, timeout):
            ours = by_first(lambda: folder.is_dir() and own())
            loop, operative = _built(configured)
            evaluation = loop.training.evaluation
            if report and evaluation is not None:
                by_first(lambda: evaluation.rehearse(loop.student, loop.teacher))
            if not ours:  # a mistake in the configuration makes no directory
                by_first(own)
            saved = by_first(lambda: _claim(loop, resume, operative))
            if rank_and_world()[1] > 1:
                with config.parsed(files, gin_bindings), progress("sharing out the networks", None):
                    loop.share_out()
            first = rank_and_world()[0] == 0
            told = Callbacks([*loop.training.callbacks, *callbacks] if first else [])
            owned.callback(told.close)
            checkpoint, metrics = _run(loop, saved, operative, report, told)
            student, teacher = _models(loop, checkpoint, report)
            figures = _report(loop, student, teacher) if report else {}
            by_first(lambda: told.tell("on_end", loop, figures))
        metrics |= figures
    return TrainResult(
        flow_map=student,
        workdir=folder,
        metrics=metrics,
        checkpoint=checkpoint,
        steps=loop.step,
    )


def _name(recipe: str | Path | None, on: str | Path | None, files: Sequence[str | Path]) -> str:
    """The name of a run directory."""
    if recipe is not None and on is not None:
        return f"{Path(recipe).stem}-{Path(on).stem}"
    return "-".join(Path(files[-1]).with_suffix("").parts[-2:]) if files else "train"


def _built(configured: Callable[[bool], tuple[Loop, str]]) -> tuple[Loop, str]:
    """The loop and the configuration in force; the networks have their values in the first of several processes alone.

    The others build networks without their files. Where these decide what the networks are, they read them in turn.

    Args:
        configured: builds both, given whether with the weights.

    Raises:
        ConfigError: the processes have different configurations, or build different networks.
    """
    rank = rank_and_world()[0]

    def built() -> tuple[Loop, str] | None:
        try:
            return configured(rank == 0)
        except Exception:
            if rank == 0:
                raise
            return None  # it may need the files, or else will tell the error again

    ours = by_each(built)
    if differing := _differing(ours):
        again = in_turn(functools.partial(_without_values, configured) if rank in differing else lambda: None)
        ours = again or ours
    assert ours is not None
    _check_agreement(ours[1])
    if differing := _differing(ours):
        raise _told_once(f"process {differing[0]} has built other networks than process 0: give all the same files")
    return ours


def _without_values(configured: Callable[[bool], tuple[Loop, str]]) -> tuple[Loop, str]:
    """What is built with the weights, which are forgotten."""
    loop, operative = configured(True)
    for module in loop.networks().values():
        forget(module)
    return loop, operative


def _differing(built: tuple[Loop, str] | None) -> list[int]:
    """The processes whose networks are other ones than those of the first, but for their values."""
    first, *others = gathered(None if built is None else blueprint(built[0].networks()))
    return [rank for rank, other in enumerate(others, start=1) if other != first]


def _told_once(message: str) -> ConfigError:
    """An error that all processes raise, and the first one tells."""
    error = ConfigError(message)
    error.told = rank_and_world()[0] > 0
    return error


def _check_agreement(operative: str) -> None:
    """ConfigError, in all processes, unless all have the same configuration."""
    first, *others = (set(text.splitlines()) for text in gathered(operative))
    for rank, lines in enumerate(others, start=1):
        if differing := lines ^ first:
            raise _told_once(
                f"process {rank} has another configuration than process 0 (one has {min(differing)!r}): give all the "
                "same files"
            )


def _run(
    loop: Loop, saved: Path | None, operative: str, report: bool, told: Callbacks
) -> tuple[Path, dict[str, float]]:
    """Train from a checkpoint, or from the start, to the end: the last checkpoint and record.

    Raises:
        TrainingInterrupted: a signal stopped it.
    """
    run, workdir, steps = loop.training, loop.workdir, loop.training.steps
    if saved is not None:
        by_each(functools.partial(loop.load, saved))
    by_first(lambda: told.start(loop, operative))

    def on_saved(path: Path) -> None:
        with alone():
            told.tell("on_checkpoint", loop, path)

    loop.on_saved = on_saved
    begun = loop.step
    record: dict[str, float] = {}
    first, stopped = rank_and_world()[0] == 0, False
    stepping = by_first(lambda: told.stepping)
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        log = stack.enter_context(RunLog(workdir, loop.step, steps)) if first else None
        if log is not None and (saved is not None or loop.origin):
            log.say(f"resumed {saved}" if saved is not None else loop.origin)
        with StopSignals() as signals:
            while loop.step < steps and not stopped:
                with progress("taking the first step", None) if loop.step == begun else contextlib.nullcontext():
                    loop.train_step()
                if stepping:
                    by_first(functools.partial(told.step, loop))
                stopped = signals.asked()
                last = loop.step == steps
                if last or loop.step % run.log_every == 0:
                    record = loop.record()
                    if log is not None:
                        log.write(loop.step, record)
                    by_first(functools.partial(told.tell, "on_record", loop, record))
                if log is not None:
                    log.advance(loop.step)
                if last or stopped or loop.step % run.checkpoint_every == 0:
                    if first:
                        _keep_configuration(workdir, operative)
                    with progress("saving a checkpoint", None):
                        saved = loop.save(run.keep_checkpoints)
                        if last or stopped:
                            loop.finish_saving()
                if run.sample_every and (last or loop.step % run.sample_every == 0):
                    _draw_pictures(loop, log, told)
            stopped = signals.asked_at_last() or stopped
        if log is not None and report and run.evaluation is not None and not stopped:
            log.say(f"measuring {run.evaluation.num_samples} samples of each model")
    assert saved is not None
    if stopped:
        raise TrainingInterrupted(
            f"{signals.name} stopped the training after step {loop.step} of {steps}, which is saved as {saved}: "
            "run the same command again to continue"
        )
    return saved, record


def _draw_pictures(loop: Loop, log: RunLog | None, told: Callbacks) -> None:
    """Write a picture of the student's samples, where there is a log; nothing there ends a training."""
    path = loop.workdir / "samples" / f"step_{loop.step:08d}.png"
    with contextlib.nullcontext() if log is None else log.tolerating("pictures of samples"):
        save_samples(loop.result, path, loop.training.seed)
    by_first(lambda: told.tell("on_picture", loop, path) if path.is_file() else None)


def _models(loop: Loop, checkpoint: Path, report: bool) -> tuple[FlowMap, Teacher | None]:
    """The trained student, and the teacher for a report, whole in this process; of several, from the files."""
    if rank_and_world()[1] == 1:
        return loop.result.requires_grad_(False), loop.teacher
    run = Run(checkpoint)
    measured = report and (rank_and_world()[0] == 0 or loop.training.evaluation is not None)

    def models() -> tuple[FlowMap, Teacher | None]:
        teacher = run.teacher if measured else None
        return on_device(run.student, loop.device), None if teacher is None else on_device(teacher, loop.device)

    return in_turn(models)


def _report(loop: Loop, student: FlowMap, teacher: Teacher | None) -> dict[str, float]:
    """Measure the student, by all processes, and write ``report.md``, by the first one, which has the figures."""
    figures = write_report(loop.workdir, student, teacher, loop.training.evaluation)
    if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise NonFiniteError(
            f"{', '.join(bad)} of the student is NaN or infinite: train in another directory with a lower "
            "learning rate or train.gradient_clip"
        )
    return figures


def _claim(loop: Loop, resume: str, operative: str) -> Path | None:
    """Make the run directory ours, or make sure that it holds a run of this configuration; its newest checkpoint."""
    workdir, steps = loop.workdir, loop.training.steps
    path = workdir / "config.gin"
    if not path.is_file() and checkpoint_paths(workdir):
        raise ConfigError(f"{workdir} holds checkpoints and no config.gin: restore it, or choose another workdir")
    if path.is_file():
        if resume == "never":
            raise ConfigError(f"{workdir} already holds a run: choose another workdir")
        theirs, ours = _what_trains(config.text_of(path), str(path)), _what_trains(operative, "the configuration")
        differing = [line for line in ours if line not in theirs] + [line for line in theirs if line not in ours]
        if differing:
            raise ConfigError(
                f"{workdir} holds a run of another configuration (one has {differing[0]!r}): choose another workdir"
            )
    remove_left(workdir)
    saved = newest_whole(workdir)
    if saved is not None and (done := read_meta(saved).step) > steps:
        raise ConfigError(f"{workdir} holds a run of {done} steps: train.steps = {steps} is less")
    write_text(path, operative)
    return saved


def _keep_configuration(workdir: Path, operative: str) -> None:
    """Write config.gin again if somebody has removed it, since a checkpoint is of no use without."""
    if not (workdir / "config.gin").is_file():
        write_text(workdir / "config.gin", operative)


def _what_trains(configuration: str, source: str) -> list[str]:
    """The bindings of a configuration that a run must keep.

    The number of steps, the evaluation, the callbacks, the decoder of latents and how processes share networks are left
    out: a run may be continued beyond its end, be measured again, be shown elsewhere, be given what draws its images,
    and go on in other processes.
    """
    bindings = config.statements_of(configuration, source)
    callbacks = [r.part for binding in bindings if binding.name == "train.callbacks" for r in binding.references]
    return [
        str(binding)
        for binding in bindings
        if binding.name not in ("train.steps", "train.evaluation", "train.callbacks", "train.parallel")
        and binding.part not in ("evaluation", "parallel", *callbacks)
        and not binding.part.endswith("_features")
        and binding.parameter != "vae"
    ]
