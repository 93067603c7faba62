"""The command line, in processes of its own: what it prints, what it leaves, and its exit codes."""

import inspect
import json
import os
import pty
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import command, write

import flowdistill
from flowdistill import NETWORKS, TEACHERS
from flowdistill.cli import main, parser
from flowdistill.plumbing import config
from flowdistill.plumbing.config import methods, recipes, settings
from flowdistill.plumbing.registry import REGISTRIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write(folder / "ring.gin")
    done = command("train", "--gin_file", "ring.gin", "--workdir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("report.md")
    return folder


def fails(folder, *arguments, code=2, **kwargs):
    """The message of a command that fails with one, and no traceback."""
    done = command(*arguments, cwd=folder, **kwargs)
    assert done.returncode == code, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_sample_and_evaluate(folder):
    assert command("sample", "run", "--num_samples", 20, cwd=folder).stdout == "samples.png\n"
    assert (folder / "samples.png").read_bytes()[:4] == b"\x89PNG"
    assert command("sample", "run", "--num_samples", 5, "--out", "x.npz", cwd=folder).returncode == 0
    assert np.load(folder / "x.npz")["samples"].shape == (5, 2)
    done = command("evaluate", "run", "--metrics", "w2", "sliced_w2", "--num_samples", 50, cwd=folder)
    names = ("w2", "sliced_w2", "w2_noise_floor", "sliced_w2_noise_floor")
    assert re.fullmatch("".join(rf"{name}: [\d.]+\n" for name in names), done.stdout)


def test_default_run_directory_and_overrides(folder):
    done = command("train", "--gin_file", "ring.gin", "--gin.train.steps=2", "--gin.train.seed=7", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "train.seed = 7" in (folder / "runs" / "ring" / "config.gin").read_text()
    records = (folder / "runs" / "ring" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] == 2


def test_a_method_on_a_setting(folder):
    few = ("--gin.train.steps=2", "--gin.evaluation.num_samples=20", "--gin.evaluation.teacher_steps=(1,)")
    done = command("train", "meanflow", "--on", "digits", *few, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "runs/meanflow-digits/report.md"
    assert "@digits()" in (folder / "runs" / "meanflow-digits" / "config.gin").read_text()


def test_list_show_cite(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def said(*arguments):
        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        assert exit_.value.code == 0
        return capsys.readouterr().out

    listed = command("list", cwd=folder).stdout
    for name in ("freeflow", "meanflow", "digits_teacher", "ring", "finite_difference", "freeflow/digits.gin"):
        assert name in listed
    solvers = command("list", "solvers", cwd=folder).stdout.splitlines()
    assert [line.split()[0] for line in solvers] == ["dopri5", "edm", "euler", "heun", "rk4", "sde"]
    objectives = {line.split()[0]: line for line in command("list", "objectives", cwd=folder).stdout.splitlines()}
    here = {name: flowdistill.OBJECTIVES.get(name) for name in flowdistill.OBJECTIVES.names()}
    assert objectives.keys() == {name for name, found in here.items() if found.__module__.startswith("flowdistill.")}
    assert objectives["meanflow"].split()[1] == "data"
    assert objectives["meanflow_distillation"].split()[1] == "teacher"
    teachers = command("list", "teachers", cwd=folder).stdout
    for name in ("ring", "mnist_sit", "sit-xl/2-256", "sit-xl/2-repa-512", "edm2-xxl-512-uncond", "edm2-s-64"):
        assert name in re.split(r"[\s,]+", teachers)
    assert "EDM2 network" in said("show", "teachers", "edm2-s-512")
    shown = said("show", "objectives", "freeflow")
    assert "alpha=1.0" in shown
    assert "freeflow/ring.gin" not in shown
    assert "freeflow/freeflow.gin" in shown
    assert "2511.19428" in shown
    assert "The fraction of the batch for the correction" in shown
    assert "\n_" not in said("show", "flow_maps", "sit_student")  # what PyTorch's modules keep for themselves
    assert "from data" in said("show", "methods", "meanflow")
    assert "@freeflow_prediction()" in said("show", "recipes", "freeflow/ring.gin")
    for source in ("run", "freeflow/ring.gin"):
        assert "@article{tong2025freeflow" in said("cite", source)
    assert re.fullmatch(r"flowdistill \d+\.\d+\.\d+\n", command("--version", cwd=folder).stdout)


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_a_list_fits_the_terminal(columns, monkeypatch, capsys):
    """A heading for each kind, a row for each name, and what does not fit is cut after a whole word."""
    monkeypatch.setenv("COLUMNS", str(columns))

    def listed(*kind):
        with pytest.raises(SystemExit):
            main(["list", *kind])
        return capsys.readouterr().out

    blocks = {block.splitlines()[0]: block.splitlines()[1:] for block in listed().rstrip().split("\n\n")}
    blocks = {heading.split(" (")[0]: rows for heading, rows in blocks.items()}
    files = {"methods": list(methods()), "settings": list(settings()), "recipes": recipes()}
    assert blocks.keys() == {*REGISTRIES, *files}
    for kind, rows in blocks.items():
        names = REGISTRIES[kind].names() if kind in REGISTRIES else files[kind]
        assert [row.split()[0] for row in rows] == names
        assert max(map(len, rows)) <= columns
        assert max(map(len, listed(kind).splitlines())) <= columns
    ring, networks = blocks["teachers"][TEACHERS.names().index("ring")], blocks["networks"]
    assert ring.endswith("Equal round Gaussians on a circle.")
    description = inspect.getdoc(flowdistill.networks.MLP).splitlines()[0]
    shown = networks[NETWORKS.names().index("mlp")].split(maxsplit=1)[1]
    assert shown == description or (shown.endswith(" …") and description.startswith(f"{shown[:-1]}"))


def test_mistakes_end_with_one_message_and_exit_code_2(folder, capsys, monkeypatch):
    """Within this process, to save the start of one for each; the first also in a process of its own."""
    monkeypatch.chdir(folder)

    def refused(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "freeflow/ring.gin" in fails(folder, "train", "--gin_file", "freeflow/rong.gin")
    assert "name a method and a setting" in refused("train")
    assert "name a setting to train it on" in refused("train", "meanflow")
    assert "did you mean meanflow" in refused("train", "meenflow", "--on", "digits")
    assert "did you mean digits" in refused("train", "meanflow", "--on", "digit")
    assert "name a method to train on it" in refused("train", "--on", "digits", "--gin_file", "ring.gin")
    assert "line 1" in refused("train", "--gin_file", write(folder / "typo.gin", "train.stepps = 3"))
    assert "did you mean" in refused("train", "--gin_file", "ring.gin", "--gin.train.objectve=1", "--workdir", "x")
    written = "--gin.train.steps lacks its value: write --gin.train.steps="
    assert f"{written}VALUE" in refused("train", "--gin_file", "ring.gin", "--gin.train.steps")
    assert f"{written}VALUE" in refused("train", "--gin.train.steps", "--gin_file", "ring.gin")
    assert f"{written}3\n" in refused("train", "--gin_file", "ring.gin", "--gin.train.steps", "3")
    assert "belongs to train" in refused("sample", "run", "--gin.train.steps=3")
    assert "neither a run" in refused("sample", "nowhere")
    assert "did you mean" in refused("evaluate", "run", "--metrics", "w3")
    assert "did you mean freeflow" in refused("show", "objectives", "freflow")
    assert "did you mean solvers" in refused("list", "solver")
    assert "must end in" in refused("sample", "run", "--out", "x.bmp")
    assert "no images" in refused("sample", "run", "--out", "x.bmp/")
    assert "--raw" in refused("sample", "run", "--raw")
    assert "takes no labels" in refused("sample", "run", "--labels", "3")
    assert "guidance" in refused("sample", "run", "--guidance", "2")
    assert "anchored" in refused("sample", "run", "--steps", "2")
    assert "at least 1" in refused("sample", "run", "--num_samples", "0")
    assert "another configuration" in refused(
        "train", "--gin_file", "ring.gin", "--gin.train.seed=3", "--workdir", "run"
    )
    assert "device" in refused("train", "--gin_file", "ring.gin", "--device", "quantum", "--workdir", "x")
    assert "usage" in refused("tarin")
    assert not (folder / "x").exists()


def test_a_loss_that_is_not_finite_ends_with_exit_code_1(folder):
    message = fails(folder, "train", "--gin_file", "ring.gin", "--gin.AdamW.lr=1e30", "--workdir", "diverged", code=1)
    assert "NaN or infinite at step" in message


def test_output_that_cannot_be_written_ends_with_exit_code_1(folder):
    (folder / "file").write_text("")
    assert "file" in fails(folder, "train", "--gin_file", "ring.gin", "--workdir", "file/run", code=1)


def test_a_reader_that_stops_early_gets_no_message():
    """Quiet, as of any command, but no success: what was interrupted could be a training run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flowdistill", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()  # as head does
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_a_terminal_sees_a_live_bar(folder):
    """On a pseudo-terminal the bar shows steps, error, learning rate, speed and time left, and never a nan."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "flowdistill", "train", "--gin_file", "ring.gin", "--workdir", "bar"],
        cwd=folder,
        stderr=secondary,
        stdout=secondary,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(secondary)
    output = b""
    while True:
        try:
            chunk = os.read(primary, 65536)
        except OSError:
            break
        if not chunk:
            break
        output += chunk
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
    assert re.search(r"bar .*12/12 +error [\d.]+ +lr [\d.]+ +[\d.]+ steps/s +\d:\d\d:\d\d", text)
    assert "nan" not in text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_a_lack_of_memory_is_told_in_one_line(error, monkeypatch, capsys):
    def lack(*args, **kwargs):
        raise error

    monkeypatch.setattr("flowdistill.training.trainer.train", lack)
    with pytest.raises(SystemExit) as ended:
        main(["train", "meanflow", "--on", "plane"])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("flowdistill: error: the memory does not suffice (")


def test_bare_words_of_bindings_are_text(folder):
    done = command("plan", "ring.gin", "--gin.train.precision=bf16", cwd=folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("a.b=bf16", "a.b='bf16'"),
        ("a.b = /data/my files/x-1.pt", "a.b ='/data/my files/x-1.pt'"),
        ("a.b=C:/x", "a.b='C:/x'"),
        *((same, same) for same in (
            "a.b=1e-3", "a.b=-3", "a.b=True", "a.b=None", "a.b=none", "a.b=@AdamW", "a.b=%c", "a.b='x'", "a.b=(1, 2)",
            "a.b=[x]", "a.b=", "a.b={'x': 1}", "a.b=\"x\"", "a.b=1 # why",
        )),
    ],
)  # fmt: skip
def test_what_is_quoted(typed, read):
    assert config.quoted(typed) == read


def test_paths_that_are_not_there_are_answered_as_paths(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    for arguments in (["convert", "no/such.pt", "x"], ["convert", "such.pt", "x"]):
        with pytest.raises(SystemExit):
            main(arguments)
        message = capsys.readouterr().err
        assert "there is no such file" in message
        assert len(message) < 500
    with pytest.raises(SystemExit):
        main(["train", "--gin_file", str(folder)])
    assert "is a folder, and no gin file" in capsys.readouterr().err


def test_every_option_has_help_and_its_default():
    (action,) = (a for a in parser()._actions if hasattr(a, "choices") and a.choices and "train" in a.choices)
    for name, each in action.choices.items():
        for option in each._actions:
            assert option.help, (name, option.dest)
    text = " ".join(action.choices["evaluate"].format_help().split())
    for told in ("by default fid", "(default: plain)", "(default: 0)", "(default: 1)"):
        assert told in text


def test_a_finished_run_prints_what_it_measured(folder):
    few = ["--gin.train.steps=2", "--gin.evaluation.num_samples=20", "--workdir", "measured"]
    done = command("train", "meanflow", "--on", "plane", *few, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "measured/report.md\n"
    rows = json.loads((folder / "measured" / "evaluation.json").read_text())["rows"]
    for name, row in rows.items():
        (line,) = (line for line in done.stderr.splitlines() if line.strip().startswith(name + "  "))
        assert line.split()[-len(row) :] == [f"{value:.3g}" for value in row.values()]


@pytest.mark.slow
def test_the_doctor(tmp_path):
    """Extras are there, missing, or broken; another process is asked, since a broken one may die."""
    for name, code in (("wandb", "import os; os.abort()"), ("onnxscript", "raise RuntimeError('of another build')")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
    done = command("doctor", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert lines["flowdistill"].endswith(flowdistill.__version__)
    assert torch.__version__ in lines["torch"]
    assert lines["[hub]"].endswith("works")
    assert "RuntimeError: of another build" in lines["[onnx]"]
    assert "does not work" in lines["[wandb]"]
    assert "pip install 'flowdistill[clip]'" in lines["[clip]"]
