"""The commands: each takes the parsed options, and calls the function of the library that has its name."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from flowdistill.plumbing.errors import ConfigError

if TYPE_CHECKING:
    from flowdistill.runs.run import Run


def train_command(options: argparse.Namespace) -> None:
    """Train, and print what was measured and where the report is; or the plan, of a dry run."""
    from flowdistill.plumbing.distributed import rank_and_world
    from flowdistill.training.trainer import train

    if options.dry_run:
        plan_command(options)
        return
    result = train(
        **_recipe(options),
        workdir=options.workdir,
        resume=options.resume,
        device=options.device,
        timeout=options.timeout,
    )
    if rank_and_world()[0] == 0:
        with contextlib.suppress(OSError):  # nobody reads it, and the training has ended well
            _print_evaluation(result.workdir, result.steps)
            print(result.workdir / "report.md", flush=True)
    abandon(sys.stdout)


def _print_evaluation(workdir: Path, step: int) -> None:
    """Print what was measured at the last step, if anything was, as a table on standard error."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from flowdistill.runs.records import read_evaluation

    measured = read_evaluation(workdir, step)
    if measured is None:
        return
    columns = list(dict.fromkeys(name for row in measured["rows"].values() for name in row))
    table = Table("", *(name.replace("_", " ") for name in columns), box=SIMPLE)
    for name, row in measured["rows"].items():
        table.add_row(name, *(f"{row[column]:.3g}" if column in row else "" for column in columns))
    width = None if sys.stderr is not None and sys.stderr.isatty() else _WIDE
    Console(stderr=True, width=width).print(f"{measured['num_samples']:,} samples each", table, highlight=False)


_WIDE = 200  # letters of a line where no terminal says how many there are


def plan_command(options: argparse.Namespace) -> None:
    """Print what a training would cost."""
    from flowdistill.training.planning import plan

    planned = plan(**_recipe(options), gpu=options.gpu, flops_per_second=options.flops, processes=options.processes)
    print(planned)
    if options.memory is not None:
        batch_size, accumulation = planned.fitting(options.memory * 2**30)
        print(
            f"{options.memory:g} GiB hold {batch_size} states at a time: "
            f"--gin.train.batch_size={batch_size} --gin.train.accumulation={accumulation}"
        )


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    """The configuration that the options name, as arguments of `flowdistill.train`."""
    if options.recipe is None and not options.gin_file:
        raise ConfigError("name a method and a setting, such as meanflow --on digits, or a gin file")
    return {
        "recipe": options.recipe,
        "on": options.on,
        "gin_files": options.gin_file,
        "gin_bindings": options.bindings,
    }


OPEN = ("num_classes", "num_heads", "early_blocks")
"""What a released student's file may leave open, as options of whole numbers."""


def _run(options: argparse.Namespace, vae: str | None = None) -> Run:
    """The run that the options name, or what stands for it where they name the file or folder of a student.

    Args:
        options: of the command line.
        vae: the autoencoder of a student's file where the options name none.
    """
    from flowdistill.runs.loading import is_released, load_flow_map
    from flowdistill.runs.run import Run
    from flowdistill.runs.student_folders import is_student

    names = ("vae", "statistics", *OPEN)
    told = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    released = options.student or (is_released(options.run) and not is_student(Path(options.run)))
    if released and vae is not None:
        told = {"vae": vae, **told}
    alone = told or released or is_student(Path(options.run))
    if options.ema is not None and alone:
        raise ConfigError("--ema chooses an average of a run, and a student alone has none")
    if options.student is not None:
        return Run.of(load_flow_map(options.student, checkpoint=options.run, **told))
    if is_student(Path(options.run)) and not told:
        return Run.of(options.run)
    if alone:
        return Run.of(load_flow_map(options.run, **told))
    return Run(options.run, allow_imports=options.allow_imports, ema=options.ema)


def sample_command(options: argparse.Namespace) -> None:
    """Draw samples into a picture, a file or a folder."""
    from flowdistill.evaluation.pictures import images_of, save_picture
    from flowdistill.plumbing.distributed import rank_and_world
    from flowdistill.runs.sampling import make_condition, sample
    from flowdistill.runs.writing import write_samples

    out = Path(options.out)
    picture = out.suffix == ".png" and not options.out.endswith(("/", os.sep))
    if out.suffix not in ("", ".png", ".npz") and not (out.is_dir() or options.out.endswith(("/", os.sep))):
        raise ConfigError(f"--out must end in .png or .npz, or name a folder by a / at its end, not {options.out!r}")
    if picture and options.raw:
        raise ConfigError("--raw writes numbers, and a .png file is a picture: write them to a .npz file")
    if picture and options.shards:
        raise ConfigError("--shards writes many pictures, and a .png file is one: name a folder by a / at its end")
    first = rank_and_world()[0] == 0
    if picture and not first:  # one process draws one picture
        return
    labels = _labels(options)
    num_samples = options.num_samples
    if num_samples is None:
        num_samples = len(labels) if isinstance(labels, list) else 64
    run = _run(options)
    settings: dict[str, Any] = {
        "steps": options.times or options.steps,
        "labels": labels,
        "guidance": options.guidance,
        "seed": options.seed,
        "batch_size": options.batch_size,
        "renoise": options.renoise,
        "device": options.device,
    }
    if picture:
        samples = sample(run, num_samples, **settings)
        shown = make_condition(run.student.num_classes, num_samples, labels, options.guidance, options.seed).labels
        if not save_picture(images_of(samples, run.student), out, shown):
            raise ConfigError(f"samples of shape {tuple(samples.shape[1:])} are no picture: write them to a .npz file")
    else:
        write_samples(run, out, num_samples, raw=options.raw, shards=options.shards, **settings)
    if first:
        print(out)


def evaluate_command(options: argparse.Namespace) -> None:
    """Print the figures of a student."""
    from flowdistill.evaluation.protocols import vae_of
    from flowdistill.plumbing.registry import FEATURES, PROTOCOLS
    from flowdistill.runs.evaluating import evaluate

    rules = PROTOCOLS.build(options.protocol)
    features = options.features or rules.features
    if options.weights is not None:
        if features is None:
            raise ConfigError("--weights are of a network: name it by --features")
        features = FEATURES.build(features, weights=options.weights)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        metrics = evaluate(
            _run(options, vae_of(rules.autoencoder)),
            protocol=options.protocol,
            metrics=options.metrics,
            num_samples=options.num_samples,
            steps=options.times or options.steps,
            labels=_labels(options),
            guidance=options.guidance,
            seed=options.seed,
            features=features,
            reference=options.reference,
            renoise=options.renoise,
            batch_size=options.batch_size,
            device=options.device,
            bootstrap=options.bootstrap,
            out=options.out,
        )
    for warning in caught:
        print(f"flowdistill: {warning.message}", file=sys.stderr)
    for name, value in metrics.items():
        print(f"{name}: {value:.4g}")


def search_command(options: argparse.Namespace) -> None:
    """Search for noises, and print what it gave."""
    import gin

    from flowdistill.plumbing import config
    from flowdistill.plumbing.gin_errors import errors_located
    from flowdistill.plumbing.registry import SEARCH_STRATEGIES, VERIFIERS
    from flowdistill.searching import search

    with config.parsed([], options.bindings), errors_located():
        verifier = gin.get_configurable(VERIFIERS.get(options.verifier))()
        strategy = gin.get_configurable(SEARCH_STRATEGIES.get(options.strategy))()
        config.check_all_used()
    result = search(
        _run(options),
        options.budget,
        teacher=options.teacher,
        verifier=verifier,
        strategy=strategy,
        proposer=options.proposer,
        num_samples=options.num_samples,
        labels=_labels(options),
        teacher_steps=options.teacher_steps,
        guidance=options.guidance,
        seed=options.seed,
        batch_size=options.batch_size,
        device=options.device,
        out=options.out,
    )
    if result is not None:
        for name, value in result.figures.items():
            print(f"{name}: {value:.4g}")
        print(result.folder)


def _labels(options: argparse.Namespace) -> int | str | list[int] | None:
    """The classes that the options name: one, one for each sample, how they are chosen, or those in a file."""
    from flowdistill.runs.sampling import LABELS, read_labels

    if not options.labels:
        return None
    try:
        classes = [int(label) for label in options.labels]
    except ValueError:
        (name, *others) = options.labels
        if others:
            raise ConfigError(f"labels are integers, not {' '.join(options.labels)!r}") from None
        return name if name in LABELS else read_labels(Path(name))
    return classes if len(classes) > 1 else classes[0]


def bench_command(options: argparse.Namespace) -> None:
    """Train a suite, measure released systems, or what steps cost; print the table or its place."""
    from flowdistill.bench import bench, bench_systems, speed
    from flowdistill.bench.imagenet import TABLES
    from flowdistill.plumbing.distributed import rank_and_world

    if options.suite in TABLES or options.suite.endswith(".py"):
        if options.files is None:
            raise ConfigError(f"{options.suite} measures released files: name their folder by --files")
        names = ("reference", "protocol", "num_samples", "only", "weights", "batch_size", "device")
        out = Path(options.out or Path(options.runs) / Path(options.suite).stem)
        try:
            bench_systems(options.suite, options.files, out=out, **{name: getattr(options, name) for name in names})
        finally:
            if rank_and_world()[0] == 0 and (out / "table.md").is_file():
                print((out / "table.md").read_text(encoding="utf-8"))
        return
    if options.suite == "speed":
        rounds = {"rounds": 3} if options.quick else {}
        out = options.out or Path(options.runs) / "speed"
        peers, only = [tuple(peer) for peer in options.peer], options.only
        found = speed(out=out, bindings=options.bindings, only=only, peers=peers, device=options.device, **rounds)
        print((found / "table.md").read_text(encoding="utf-8"))
        return
    results = bench(
        options.suite,
        out=options.out,
        runs=options.runs,
        bindings=options.bindings,
        only=options.only,
        quick=options.quick,
        jobs=options.jobs,
        device=options.device,
    )
    print(results / "table.md")


def export_command(options: argparse.Namespace) -> None:
    """Write a student as a folder."""
    from flowdistill.runs.exporting import export

    how = {"dtype": options.dtype, "programs": options.programs, "private": options.private}
    print(export(_run(options), options.folder, **how))


def encode_command(options: argparse.Namespace) -> None:
    """Write the latents of images."""
    from flowdistill.data.encoding import encode
    from flowdistill.decoders import EDM2_LATENTS, StableDiffusionVae
    from flowdistill.plumbing.distributed import rank_and_world
    from flowdistill.runs.sampling import check_counts

    check_counts(batch_size=options.batch_size)
    decoder = StableDiffusionVae(vae=options.vae, **(EDM2_LATENTS if options.scale == "edm2" else {}))
    names = ("size", "flips", "draw", "seed", "dtype", "batch_size", "device")
    encode(options.images, options.folder, decoder, **{name: getattr(options, name) for name in names})
    if rank_and_world()[0] == 0:
        print(options.folder)


def convert_command(options: argparse.Namespace) -> None:
    """Write a checkpoint of others as a model folder."""
    from flowdistill.runs.loading import convert
    from flowdistill.runs.run import Run

    source = Run(options.source, allow_imports=True) if options.allow_imports else options.source
    told = {name: getattr(options, name) for name in ("num_classes", "num_heads", "noise_time")}
    told = {name: value for name, value in told.items() if value is not None}
    print(convert(source, options.folder, teacher=options.teacher, dtype=options.dtype, **told))


def abandon(stream: TextIO | None) -> None:
    """Let a stream that cannot be written lose what it holds, for the flush at exit."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
