"""The command line: ``flowdistill train | plan | sample | evaluate | search | bench | export | list | ...``."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from flowdistill.cli.doctor import doctor_command
from flowdistill.cli.listing import cite_command, list_command, show_command
from flowdistill.plumbing.errors import ConfigError, FlowDistillError, TrainingInterrupted

if TYPE_CHECKING:
    from flowdistill.runs.run import Run


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 if all went well, 2 for a user's mistake, 1 for a failure."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # letters that the terminal's encoding does not have
    given = list(sys.argv[1:] if arguments is None else arguments)
    bindings = [a.removeprefix("--gin.") for a in given if a.startswith("--gin.")]
    commands = parser()
    if malformed := [b for b in bindings if "=" not in b]:
        name = f"--gin.{malformed[0]}"
        following = given[given.index(name) + 1 :][:1]
        value = "VALUE" if not following or following[0].startswith("-") else following[0]
        commands.error(f"{name} lacks its value: write {name}={value}")
    options = commands.parse_args([a for a in given if not a.startswith("--gin.")])
    if bindings and options.command not in (_train, _plan, _search, _bench):
        commands.error("--gin.NAME=VALUE belongs to train, plan, search and bench")
    if bindings:
        from flowdistill.plumbing.config import quoted

        bindings = [quoted(binding) for binding in bindings]
    options.bindings = bindings
    if options.command in (_train, _plan, _search, _bench):
        sys.path.append(os.getcwd())  # a gin file may import the user's own modules
    warnings.formatwarning = _warning  # type: ignore[assignment]
    try:
        options.command(options)
        if sys.stdout is not None:  # as it is where it was closed
            sys.stdout.flush()
    except TrainingInterrupted as stop:
        from flowdistill.plumbing.distributed import rank_and_world

        code = 0 if options.command is _train else 130
        sys.exit(code if rank_and_world()[0] else _say(stop, code))
    except FlowDistillError as error:
        sys.exit(error.exit_code if error.told else _fail(error, error.exit_code))
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "of the machine"
        advice = (
            "a smaller train.batch_size with more train.accumulation needs less, and flowdistill plan tells how much"
        )
        sys.exit(_fail(f"the memory does not suffice ({reason}): {advice}", 1))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        _abandon(sys.stdout)
        sys.exit(1)
    except OSError as error:
        _abandon(sys.stdout)
        sys.exit(_fail(error, 1))
    except KeyboardInterrupt:
        whence = "from the last checkpoint" if options.command is _train else "with what is kept of it"
        sys.exit(_fail(f"interrupted; run the same command again to continue {whence}", 130))
    sys.exit(0)


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether an error is Python's or PyTorch's, which has a class of its own on GPUs alone, for a lack of memory."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "can't allocate memory" in str(error)


def _fail(error: object, code: int) -> int:
    return _say(f"error: {error}", code)


def _say(message: object, code: int) -> int:
    """Tell the user, where standard error takes it; returns the code."""
    try:
        print(f"flowdistill: {message}", file=sys.stderr, flush=True)
    except OSError:
        _abandon(sys.stderr)
    return code


def _abandon(stream: TextIO | None) -> None:
    """Let a stream that cannot be written lose what it holds, for the flush at exit."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _warning(message: Warning | str, category: type[Warning], *place: Any) -> str:
    """A warning as the user sees it; only those of other kinds concern the code."""
    return f"flowdistill: {message}\n" if category is RuntimeWarning else _format_warning(message, category, *place)


_format_warning = warnings.formatwarning


class _Help(argparse.HelpFormatter):
    """Help that ends with the default, where there is one and the words do not tell it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        told = default is None or default is False or default in ([], argparse.SUPPRESS)
        if not text or not action.option_strings or told or "default" in text:
            return text
        words = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{text} (default: {words})".replace("%", "%%")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line, for tools that make completions or pages of it."""
    from flowdistill import __version__

    parser = _Parser(prog="flowdistill", description="Distil flow and diffusion models into one-step generators.")
    parser.add_argument("--version", action="version", version=f"flowdistill {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train a method on a setting, or a whole recipe")
    train.add_argument("--workdir", help="the run directory; by default runs/ and the recipe's name")
    train.add_argument(
        "--resume", choices=["auto", "never"], default="auto", help="never: refuse a directory with a run"
    )
    train.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    train.add_argument("--timeout", type=float, default=600, help="seconds that processes wait for one another")
    train.add_argument("--dry_run", action="store_true", help="print the plan of the recipe and train nothing")
    train.set_defaults(command=_train)

    plan = commands.add_parser("plan", help="check a recipe and print what it would cost, without its files or a GPU")
    for command in (train, plan):
        command.add_argument("recipe", nargs="?", help="a method, such as freeflow, or a gin file or packaged recipe")
        command.add_argument(
            "--on", metavar="SETTING", help="what a method is trained on, such as digits, or a gin file"
        )
        command.add_argument(
            "--gin_file", action="append", default=[], help="a gin file, read after the others; repeatable"
        )
        command.add_argument("--gpu", default="h200", help="the GPU at whose measured speed a plan states hours")
        command.add_argument("--flops", type=float, help="FLOP/s at which a plan states hours, in place of --gpu")
        command.add_argument("--memory", type=float, metavar="GIB", help="of a device: a plan says which batch fits")
        command.epilog = "--gin.NAME=VALUE sets a binding, as in --gin.train.steps=100; repeatable"
    plan.set_defaults(command=_plan)

    renoise: Any = {
        "action": argparse.BooleanOptionalAction,
        "help": "jump to data and noise again at each step; by default as the student needs it",
    }
    times: Any = {
        "type": float,
        "nargs": "+",
        "help": "times from 1 to 0 between which to jump, such as 1 0.55 0; by default the student's own of --steps",
    }
    batch_size: Any = {"type": int, "help": "samples at a time; by default 100 on a CPU, else 500"}
    labels: Any = {
        "nargs": "+",
        "help": "a class for all, one for each sample, a file of them, in_turn (the default), balanced or random",
    }
    sample = commands.add_parser("sample", help="draw samples of a run's student")
    sample.add_argument("run", help="a run directory, a checkpoint in it, or a released student's file")
    sample.add_argument("--num_samples", type=int, help="by default 64, or as many as there are labels")
    sample.add_argument("--steps", type=int, default=1, help="jumps from noise to data")
    sample.add_argument("--times", **times)
    sample.add_argument("--renoise", **renoise)
    sample.add_argument("--labels", **labels)
    sample.add_argument("--guidance", type=float, help="guidance scale, of a student that takes one")
    sample.add_argument("--seed", type=int, default=0, help="of noise and random labels")
    sample.add_argument("--batch_size", **batch_size)
    sample.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    sample.add_argument(
        "--out",
        default="samples.png",
        help="a .png picture of all, an .npz file as ADM's evaluator reads it, or a folder/ of pictures",
    )
    sample.add_argument("--shards", action="store_true", help="write a folder's pictures into tar files")
    sample.add_argument("--raw", action="store_true", help="numbers as the model makes them, such as latents")
    sample.set_defaults(command=_sample)

    evaluate = commands.add_parser("evaluate", help="measure a run's student")
    evaluate.add_argument("run", help="a run directory, a checkpoint in it, or a released student's file")
    evaluate.add_argument(
        "--protocol", default="plain", help="how figures are made, as flowdistill list protocols shows: what follows"
    )
    evaluate.add_argument("--metrics", nargs="+", help="as flowdistill list metrics shows; by default fid")
    evaluate.add_argument("--num_samples", type=int, help="of the student; by default 10000")
    evaluate.add_argument("--steps", type=int, default=1, help="jumps from noise to data")
    evaluate.add_argument("--times", **times)
    evaluate.add_argument("--renoise", **renoise)
    evaluate.add_argument("--labels", **labels)
    evaluate.add_argument("--guidance", type=float, help="guidance scale, of a student that takes one")
    evaluate.add_argument("--seed", type=int, default=0, help="of noise and random labels")
    evaluate.add_argument("--features", help="digits, inception, ...; by default those of the run's own evaluation")
    evaluate.add_argument("--weights", help="the file of the features' network, such as Inception's")
    evaluate.add_argument("--reference", help="a folder, a .zip, .npz, .npy or .pkl file, or the name of a data set")
    evaluate.add_argument("--batch_size", **batch_size)
    evaluate.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    evaluate.add_argument("--bootstrap", type=int, default=0, help="random halves from which to estimate spreads")
    evaluate.add_argument("--out", help="a JSON file for the figures and all that they rest on")
    evaluate.set_defaults(command=_evaluate)

    search = commands.add_parser("search", help="search for noises that a verifier likes, and give them to the teacher")
    search.add_argument("run", help="a run directory, a checkpoint in it, or a released student's file")
    search.add_argument("--budget", type=float, required=True, help="for a sample, in evaluations of the teacher")
    search.add_argument("--teacher", help="a teacher's name or path; by default the one of the run")
    search.add_argument("--verifier", default="feature_distance", help="as flowdistill list verifiers shows")
    search.add_argument("--strategy", default="best_of", help="as flowdistill list search_strategies shows")
    search.add_argument(
        "--proposer", choices=["student", "teacher"], default="student", help="what noises are tried by"
    )
    search.add_argument("--num_samples", type=int, default=64, help="that are searched for")
    search.add_argument("--labels", **labels)
    search.add_argument("--teacher_steps", type=int, default=16, help="of Euler's method")
    search.add_argument("--guidance", type=float, help="guidance scale of teacher and student")
    search.add_argument("--seed", type=int, default=0, help="of the noises")
    search.add_argument("--batch_size", **batch_size)
    search.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    search.add_argument("--out", help="a folder for the result; by default one in RUN/searches")
    search.epilog = "--gin.NAME=VALUE sets up the verifier and the strategy, as in --gin.zero_order.radius=0.5"
    search.set_defaults(command=_search)

    bench = commands.add_parser("bench", help="train and measure the methods of a suite, and write their tables")
    bench.add_argument(
        "suite",
        help="toy, digits, mnist, ..., or a gin file; speed: what a step of each method costs; "
        "imagenet256, imagenet512, or a Python file: released systems whose --files are at hand",
    )
    bench.add_argument("--quick", action="store_true", help="the quick version of the suite")
    bench.add_argument("--only", nargs="+", default=[], help="parts of the names of rows; others are left out")
    bench.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    bench.add_argument("--runs", default="runs/bench", help="where the trainings lie")
    bench.add_argument("--out", help="where the tables go; by default beside the trainings")
    bench.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    bench.add_argument(
        "--peer", nargs=2, action="append", default=[], metavar=("ADAPTER", "CHECKOUT"),
        help="of speed: another implementation, as in benchmarks/peers, which is imported",
    )  # fmt: skip
    systems = bench.add_argument_group("of imagenet256, imagenet512 and Python files")
    systems.add_argument("--files", help="the folder of the files that others have released")
    systems.add_argument("--protocol", help="how figures are made; by default as the table says")
    systems.add_argument("--reference", help="what is compared with; by default the protocol's, in --files")
    systems.add_argument("--num_samples", type=int, help="of each figure; by default the protocol's")
    systems.add_argument("--weights", help="the file of Inception's weights; by default in --files, or downloaded")
    systems.add_argument("--batch_size", **batch_size)
    bench.epilog = "--gin.bench.NAME=VALUE changes the suite, any other --gin.NAME=VALUE all trainings"
    bench.set_defaults(command=_bench)

    export = commands.add_parser("export", help="write a student as a folder that loads without its run or teacher")
    export.add_argument("run", metavar="SRC", help="a run directory, a checkpoint in it, or a released student's file")
    export.add_argument(
        "folder", metavar="DST", help="a folder for all of it, or hf://OWNER/NAME on the HuggingFace hub"
    )
    export.add_argument("--private", action="store_true", help="make a repository on the hub a private one")
    export.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the stored weights")
    export.add_argument(
        "--programs", nargs="+", choices=["torch", "onnx", "diffusers"], default=[],
        help="for those without flowdistill: student.pt2, student.onnx, a pipeline of diffusers",
    )  # fmt: skip
    export.set_defaults(command=_export)

    convert = commands.add_parser("convert", help="write a checkpoint of others, or a run, as a model folder")
    convert.add_argument("source", metavar="SRC", help="a checkpoint file, or a run whose student is a velocity field")
    convert.add_argument("folder", metavar="DST", type=Path, help="for model.safetensors and config.json")
    convert.add_argument("--teacher", help="what the file is, such as sit-xl/2-256; by default what it says itself")
    convert.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the stored weights")
    for name in ("num_classes", "num_heads", "noise_time"):
        convert.add_argument(f"--{name}", type=int, help="of a SiT whose file does not tell it, see sit_teacher")
    convert.set_defaults(command=_convert)

    encode = commands.add_parser("encode", help="write the latents of images, for trainings from data")
    encode.add_argument("images", metavar="SRC", help="a folder of images or of tar files, or a .zip or .tar file")
    encode.add_argument("folder", metavar="DST", help="for the shards of latents; named again, it is continued")
    encode.add_argument("--vae", required=True, help="the autoencoder, such as stabilityai/sd-vae-ft-ema")
    encode.add_argument("--scale", choices=["sit", "edm2"], default="sit", help="whose teachers the latents are for")
    encode.add_argument("--size", type=int, default=256, help="height and width of the images, in pixels")
    encode.add_argument("--flips", action="store_true", help="encode the mirror images as well")
    encode.add_argument("--draw", action="store_true", help="store one draw, in place of mean and standard deviation")
    encode.add_argument("--seed", type=int, default=0, help="of these draws")
    encode.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of what is stored")
    encode.add_argument("--batch_size", type=int, help="images at a time; by default 4 on a CPU, else 32")
    encode.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    encode.set_defaults(command=_encode)

    listing = commands.add_parser("list", help="list methods, settings and recipes, and what is registered")
    listing.add_argument("kind", nargs="?", help="methods, settings, recipes, objectives, ...; by default all")
    listing.set_defaults(command=list_command)

    show = commands.add_parser(
        "show", help="show a method, a setting or a recipe, or the documentation of something registered"
    )
    show.add_argument("kind", help="methods, settings, recipes, objectives, ...")
    show.add_argument("name", help="as flowdistill list KIND shows it")
    show.set_defaults(command=show_command)

    doctor = commands.add_parser("doctor", help="print versions and devices, and which optional parts work")
    doctor.set_defaults(command=doctor_command)

    cite = commands.add_parser("cite", help="print the BibTeX of what a run or gin file uses")
    cite.add_argument("source", metavar="RUN", help="a run directory, or a gin file")
    cite.set_defaults(command=cite_command)

    for command in (sample, evaluate, search, export):
        command.add_argument(
            "--ema", type=float, help="relative width of the average of the weights, of a run with @post_hoc_ema()"
        )
        released = command.add_argument_group("of a student that others have released, whose file stands for the run")
        released.add_argument("--student", help="what the file is, such as dmf-xl/2-256; by default what it says")
        released.add_argument("--vae", help="the autoencoder, such as stabilityai/sd-vae-ft-ema")
        released.add_argument("--statistics", help="of FACM's latents: its authors' latents_stats.pt")
        for name in _OPEN:
            released.add_argument(f"--{name}", type=int, help="where the file does not tell it, see sit_student")
    for command in (sample, evaluate, search, export, convert, cite):
        command.add_argument(
            "--allow_imports", action="store_true", help="import the modules that the run's configuration imports"
        )
    return parser


def _train(options: argparse.Namespace) -> None:
    from flowdistill.plumbing.distributed import rank_and_world
    from flowdistill.training.trainer import train

    if options.dry_run:
        _plan(options)
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
    _abandon(sys.stdout)


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


def _plan(options: argparse.Namespace) -> None:
    from flowdistill.training.planning import plan

    planned = plan(**_recipe(options), gpu=options.gpu, flops_per_second=options.flops)
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


_OPEN = ("num_classes", "num_heads", "early_blocks")


def _run(options: argparse.Namespace, vae: str | None = None) -> Run:
    """The run that the options name, or what stands for it where they name the file or folder of a student.

    Args:
        options: of the command line.
        vae: the autoencoder of a student's file where the options name none.
    """
    from flowdistill.runs.loading import is_released, load_flow_map
    from flowdistill.runs.run import Run
    from flowdistill.runs.student_folders import is_student

    names = ("vae", "statistics", *_OPEN)
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


def _sample(options: argparse.Namespace) -> None:
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


def _evaluate(options: argparse.Namespace) -> None:
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


def _search(options: argparse.Namespace) -> None:
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


def _bench(options: argparse.Namespace) -> None:
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


def _export(options: argparse.Namespace) -> None:
    from flowdistill.runs.exporting import export

    how = {"dtype": options.dtype, "programs": options.programs, "private": options.private}
    print(export(_run(options), options.folder, **how))


def _encode(options: argparse.Namespace) -> None:
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


def _convert(options: argparse.Namespace) -> None:
    from flowdistill.runs.loading import convert
    from flowdistill.runs.run import Run

    source = Run(options.source, allow_imports=True) if options.allow_imports else options.source
    told = {name: getattr(options, name) for name in ("num_classes", "num_heads", "noise_time")}
    told = {name: value for name, value in told.items() if value is not None}
    print(convert(source, options.folder, teacher=options.teacher, dtype=options.dtype, **told))
