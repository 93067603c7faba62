"""The command line: ``flowdistill train | plan | sample | evaluate | search | bench | export | list | ...``."""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from flowdistill.cli.commands import (
    OPEN,
    abandon,
    bench_command,
    convert_command,
    encode_command,
    evaluate_command,
    export_command,
    plan_command,
    sample_command,
    search_command,
    train_command,
)
from flowdistill.cli.doctor import doctor_command
from flowdistill.cli.launching import COMMANDS, launch_command, tell_launcher
from flowdistill.cli.listing import cite_command, list_command, show_command
from flowdistill.plumbing.errors import FlowDistillError, TrainingInterrupted


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
    if given[:1] == ["launch"] and not {"-h", "--help"} & {*given[1:2]}:  # the rest is torchrun's, and a command's
        options = argparse.Namespace(command=launch_command, arguments=given[1:])
    else:
        options = commands.parse_args([a for a in given if not a.startswith("--gin.")])
    launched = (train_command, plan_command, search_command, bench_command, launch_command)
    if bindings and options.command not in launched:
        commands.error("--gin.NAME=VALUE belongs to train, plan, search and bench")
    if bindings:
        from flowdistill.plumbing.config import quoted

        bindings = [quoted(binding) for binding in bindings]
    options.bindings = bindings
    if options.command in (train_command, plan_command, search_command, bench_command):
        sys.path.append(os.getcwd())  # a gin file may import the user's own modules
    warnings.formatwarning = _warning  # type: ignore[assignment]
    try:
        options.command(options)
        if sys.stdout is not None:  # as it is where it was closed
            sys.stdout.flush()
    except TrainingInterrupted as stop:
        from flowdistill.plumbing.distributed import rank_and_world

        tell_launcher()
        code = 0 if options.command is train_command else 130
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
        abandon(sys.stdout)
        sys.exit(1)
    except OSError as error:
        abandon(sys.stdout)
        sys.exit(_fail(error, 1))
    except KeyboardInterrupt:
        from flowdistill.plumbing.distributed import rank_and_world

        if rank_and_world()[0] > 0:
            sys.exit(130)
        whence = "from the last checkpoint" if options.command is train_command else "with what is kept of it"
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
        abandon(sys.stderr)
    return code


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

    commands.add_parser(
        "launch",
        usage="flowdistill launch [torchrun's options] COMMAND ...",
        help="run a command in several processes, of one machine or of several",
        description="Run a command in several processes, by torchrun, whose options come first: --nproc_per_node 8 on "
        "one machine, where it is the number of GPUs by default; --nnodes, --rdzv_backend, --rdzv_endpoint and "
        f"--rdzv_id on several; --max-restarts after the death of a process. Commands: {', '.join(COMMANDS)}. "
        "A signal is passed on: all processes save once, and launch ends with 0.",
    )

    train = commands.add_parser("train", help="train a method on a setting, or a whole recipe")
    train.add_argument("--workdir", help="the run directory; by default runs/ and the recipe's name")
    train.add_argument(
        "--resume", choices=["auto", "never"], default="auto", help="never: refuse a directory with a run"
    )
    train.add_argument("--device", help="cpu, cuda, ...; by default a GPU if there is one")
    train.add_argument("--timeout", type=float, default=600, help="seconds that processes wait for one another")
    train.add_argument("--dry_run", action="store_true", help="print the plan of the recipe and train nothing")
    train.set_defaults(command=train_command)

    plan = commands.add_parser("plan", help="check a recipe and print what it would cost, without its files or a GPU")
    for command in (train, plan):
        command.add_argument("recipe", nargs="?", help="a method, such as freeflow, or a gin file or packaged recipe")
        command.add_argument(
            "--on", metavar="SETTING", help="what a method is trained on, such as digits, or a gin file"
        )
        command.add_argument(
            "--gin_file", action="append", default=[], help="a gin file, read after the others; repeatable"
        )
        command.add_argument(
            "--gpu", default="h200", help="the GPU at whose speed a plan states hours, such as h100-80"
        )
        command.add_argument("--processes", type=int, default=1, help="that share out the step of a plan, a GPU each")
        command.add_argument("--flops", type=float, help="FLOP/s at which a plan states hours, in place of --gpu")
        command.add_argument("--memory", type=float, metavar="GIB", help="of a device: a plan says which batch fits")
        command.epilog = "--gin.NAME=VALUE sets a binding, as in --gin.train.steps=100; repeatable"
    plan.set_defaults(command=plan_command)

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
    sample.set_defaults(command=sample_command)

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
    evaluate.set_defaults(command=evaluate_command)

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
    search.set_defaults(command=search_command)

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
    bench.set_defaults(command=bench_command)

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
    export.set_defaults(command=export_command)

    convert = commands.add_parser("convert", help="write a checkpoint of others, or a run, as a model folder")
    convert.add_argument("source", metavar="SRC", help="a checkpoint file, or a run whose student is a velocity field")
    convert.add_argument("folder", metavar="DST", type=Path, help="for model.safetensors and config.json")
    convert.add_argument("--teacher", help="what the file is, such as sit-xl/2-256; by default what it says itself")
    convert.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of the stored weights")
    for name in ("num_classes", "num_heads", "noise_time"):
        convert.add_argument(f"--{name}", type=int, help="of a SiT whose file does not tell it, see sit_teacher")
    convert.set_defaults(command=convert_command)

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
    encode.set_defaults(command=encode_command)

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
        for name in OPEN:
            released.add_argument(f"--{name}", type=int, help="where the file does not tell it, see sit_student")
    for command in (sample, evaluate, search, export, convert, cite):
        command.add_argument(
            "--allow_imports", action="store_true", help="import the modules that the run's configuration imports"
        )
    return parser
