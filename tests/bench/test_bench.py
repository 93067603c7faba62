"""Running suites: tables, resuming, failures."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

import flowdistill
from flowdistill import ConfigError
from flowdistill.bench import bench, load_suite
from flowdistill.bench.tables import student_table, write_tables
from flowdistill.cli import main

SUITE = """
bench.rows = {'FreeFlow': ('freeflow', 'plane', 'freeflow.online_warmup = 0.0'), 'two jumps': ('ect', 'plane')}
bench.seeds = (1, 2)
bench.metrics = ('w2', 'mode_coverage')
bench.teacher_steps = (1, 4)
bench.student_steps = (1, 2)
bench.bindings = ('train.steps = 3', 'train.batch_size = 16', 'evaluation.num_samples = 50')
"""


def command(folder, *options):
    return subprocess.run(
        [sys.executable, "-m", "flowdistill", "bench", "tiny.gin", "--jobs", "2", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the suite has been run once."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tiny.gin").write_text(SUITE)
    done = command(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/bench/tiny/table.md\n"
    samples = list((folder / "runs" / "bench" / "teacher_samples").glob("*.safetensors"))
    assert len(samples) == 2, "the teacher's samples are drawn once for each seed, not for each method"
    return folder


def test_a_suite_makes_a_table(folder):
    out = folder / "runs" / "bench" / "tiny"
    records = json.loads((out / "results.json").read_text())["records"]
    students = [record for record in records if record["name"] != "teacher"]
    assert [(record["name"], record["seed"]) for record in students] == [
        ("FreeFlow", 1),
        ("FreeFlow", 2),
        ("two jumps", 1),
        ("two jumps", 2),
    ]
    assert {record["num_samples"] for record in records} == {50}
    for record in students:
        assert record["steps"] == 3
        assert record["evaluations"]["student"] == 3 * 16 * 2
        jumps = {row for row in record["rows"] if row.startswith("student")}
        assert jumps == {"student, 1 step"} | ({"student, 2 steps"} if record["name"] == "two jumps" else set())
        assert set(record["rows"]["student, 1 step"]) == {"evaluations", "w2", "mode_coverage", "w2_to_teacher"}
    table = (out / "table.md").read_text()
    assert "| teacher, 4 steps | 4 |" in table
    assert table.count("| FreeFlow |") == 1
    assert "<table>" in (out / "table.html").read_text()
    assert (out / "quality.png").stat().st_size > 1000


def stamps(folder, pattern):
    return {path.name: path.stat().st_mtime_ns for path in sorted((folder / "runs" / "bench").glob(pattern))}


@pytest.mark.slow
def test_what_is_measured_is_not_repeated(folder, monkeypatch, capsys):
    """Neither what the results hold, nor what lies in a run directory, nor a training for another measurement."""
    monkeypatch.chdir(folder)
    out = folder / "runs" / "bench" / "tiny"
    text, table = (out / "results.json").read_text(), (out / "table.md").read_text()
    records = json.loads(text)["records"]
    (out / "results.json").unlink()
    removed = folder / "runs" / "bench" / records[-1]["run"] / records[-1]["figures"]
    removed.unlink()
    figures, checkpoints = stamps(folder, "*/figures_*.json"), stamps(folder, "*/checkpoints/*/meta.json")
    bench("tiny.gin", jobs=2)
    again = stamps(folder, "*/figures_*.json")
    assert {name for name in again if again[name] != figures.get(name)} == {removed.name}
    assert (out / "results.json").read_text() == text
    assert (out / "table.md").read_text() == table
    # Other samples, and parts of the suite at a time: nothing is trained, and the table grows.
    capsys.readouterr()
    for only in ("FreeFlow", "two"):
        bench("tiny.gin", out="parts", only=[only], bindings=["evaluation.num_samples = 60"])
    lines = [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()]
    done = [line for line in lines if not line.startswith("bench ")]  # how far a slow machine is
    each = [f"{name} seed {seed}" for seed in (1, 2) for name in ("teacher", "FreeFlow")]
    assert done == [*each, "two jumps seed 1", "two jumps seed 2"], "one seed after another"
    parts = json.loads((folder / "parts" / "results.json").read_text())["records"]
    assert [(r["name"], r["seed"], r["run"]) for r in parts[2:]] == [
        (r["name"], r["seed"], r["run"]) for r in records[2:]
    ]
    assert {r["num_samples"] for r in parts} == {60}
    assert stamps(folder, "*/checkpoints/*/meta.json") == checkpoints
    # What is in the results needs no runs.
    before = (folder / "parts" / "results.json").read_text()
    bench("tiny.gin", out="parts", runs="elsewhere", bindings=["evaluation.num_samples = 60"])
    assert (folder / "parts" / "results.json").read_text() == before
    assert not (folder / "elsewhere").exists()
    # Another title is no other training.
    (folder / "retitled.gin").write_text(SUITE.replace("two jumps", "ECT"))
    bench("retitled.gin", out="parts", runs="elsewhere", bindings=["evaluation.num_samples = 60"])
    assert "| ECT |" in (folder / "parts" / "table.md").read_text()
    assert "two jumps" not in (folder / "parts" / "results.json").read_text()


def test_failures_are_named_and_the_others_reported(folder):
    failing = command(folder, "--only", "FreeFlow", "--out", "failed", "--gin.freeflow_prediction.eps=-1.0")
    assert failing.returncode == 1
    assert "2 of 4 runs failed, as failed/table.md says" in failing.stderr
    assert "Traceback" not in failing.stderr
    table = (folder / "failed" / "table.md").read_text()
    assert "Failed: FreeFlow, seed 1: " in table
    assert "| teacher, 4 steps | 4 |" in table


@pytest.mark.parametrize(
    "options",
    [
        ["--only", "nothing"],
        ["--gin.bench.seeds=()"],
        ["--gin.bench.budget=1"],
        ["--quick"],
        ["--jobs", "0"],
    ],
)
def test_mistakes_end_with_one_message(folder, monkeypatch, capsys, options):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as wrong:
        main(["bench", "tiny.gin", *options])
    assert wrong.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("flowdistill: error: ")
    assert "Traceback" not in message


def record(name, seed, value, budget=None):
    row = {"evaluations": 1.0, "w2": value}
    return {
        "group": "", "name": name, "budget": budget, "seed": seed, "num_samples": 10, "machine": "here", "steps": 5,
        "evaluations": {"student": 2000.0, "teacher": 1000.0, "online": 500.0}, "rows": {"student, 1 step": row},
    }  # fmt: skip


W2 = "bench.metrics = ('w2',)"


def table_of(values):
    seeds = range(max(map(len, values.values())))
    suite = load_suite("toy", [f"bench.seeds = {tuple(seeds)}", W2])
    records = [record(name, seed, v) for name, seeds in values.items() for seed, v in enumerate(seeds)]
    return student_table(suite, records)


def test_the_best_is_bold_outside_the_spread_alone():
    head, a, b = table_of({"a": [1.0, 1.2], "b": [2.0, 2.2]})
    assert head == ["", "w2, 1 step", "steps", "student", "teacher", "others"]
    assert a == ["a", "**1.1 ± 0.14**", "5", "2", "1", "0"]
    assert b[1] == "2.1 ± 0.14"
    assert not any("**" in cell for row in table_of({"a": [1.0, 2.0], "b": [1.5, 2.5]}) for cell in row)
    assert not any("**" in cell for row in table_of({"a": [1.0], "b": [2.0]}) for cell in row)  # no spread is known


def test_a_row_says_how_many_seeds_it_lacks():
    """Those that failed, and those that results from elsewhere do not hold."""
    suite = load_suite("toy", [W2])
    failed = {"name": "a", "seed": 3, "error": "killed"}
    assert student_table(suite, [record("a", 1, 1.0), record("a", 2, 1.5), failed])[1][0] == "a (2 of 3 seeds)"
    records = [record("a", 1, 1.0), *(record("b", seed, 1.0) for seed in (1, 2, 3))]
    assert [row[0] for row in student_table(suite, records)[1:]] == ["a (1 of 3 seeds)", "b"]


def test_each_table_has_the_metrics_of_its_recipes(tmp_path):
    suite = load_suite("toy", ["bench.rows = {'Plane: A': ('freeflow', 'plane'), 'Digits: B': ('freeflow', 'digits')}"])
    assert [(row.group, row.name) for row in suite.table()] == [("Plane", "A"), ("Digits", "B")]
    plane, digits = (record(name, 1, 1.0) | {"group": group} for group, name in (("Plane", "A"), ("Digits", "B")))
    digits["rows"] = {"student, 1 step": {"evaluations": 1.0, "fid": 2.0, "recall": 0.5, "fid_to_teacher": 1.5}}
    write_tables("two", suite, [plane, digits], tmp_path)
    heads = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|  |")]
    assert heads == [
        "|  | w2, 1 step | steps | student | teacher | others |",
        "|  | fid, 1 step | fid to teacher, 1 step | recall | steps | student | teacher | others |",
    ]


def test_budgets_have_a_table_each_and_a_plot(tmp_path):
    suite = load_suite("toy", ["bench.budgets = (10, 20)"])
    records = [
        record(name, seed, 1.0 / budget + seed, budget) for name in "ab" for seed in (1, 2) for budget in (10, 20)
    ]
    write_tables("toy", suite, records, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "### Students, 10 evaluations of training" in table
    assert "### Students, 20 evaluations of training" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "quality_10.png",
        "quality_20.png",
        "quality_budgets.png",
    }


@pytest.mark.slow
def test_a_sweep_has_a_table_for_each_metric(tmp_path):
    (tmp_path / "tiny.gin").write_text(
        SUITE.replace("(1, 2)\nbench.metrics", "(1,)\nbench.sweep = ('freeflow.alpha', (0.0, 3.0))\nbench.metrics")
    )
    done = command(tmp_path, "--gin.freeflow.correction_start=0")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "bench" / "tiny"
    records = json.loads((out / "results.json").read_text())["records"]
    assert [(r["name"], r["value"]) for r in records] == [
        ("teacher", None), ("FreeFlow", 0.0), ("FreeFlow", 3.0), ("two jumps", None),
    ]  # fmt: skip
    w2, coverage = (out / "table.md").read_text().split("### ")[1:]
    assert w2.startswith("W2\n\n|  | alpha = 0 | alpha = 3 |\n")
    assert coverage.startswith("Mode coverage\n")
    cells = {name: row for name, *row in (line.strip("| ").split(" | ") for line in w2.splitlines()[4:9])}
    assert list(cells) == ["teacher, 1 step", "teacher, 4 steps", "noise floor", "FreeFlow", "two jumps"]
    assert cells["two jumps"][0] == cells["two jumps"][1] != ""
    one, other = (record["rows"]["student, 1 step"]["w2"] for record in records[1:3])
    assert one != other
    assert (out / "quality.png").stat().st_size > 1000


@pytest.mark.slow
def test_distances_from_trajectories(tmp_path):
    (tmp_path / "tiny.gin").write_text(
        SUITE.replace("(1, 2)\nbench.metrics", "(1,)\nbench.deltas = (0.5, 1.0)\nbench.metrics").replace(
            ", 'two jumps': ('ect', 'plane')", ""
        )
    )
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "bench" / "tiny"
    (student,) = [r for r in json.loads((out / "results.json").read_text())["records"] if r["name"] != "teacher"]
    assert [error["delta"] for error in student["trajectory_errors"]] == [0.5, 1.0]
    assert all(error["mean"] > 0 for error in student["trajectory_errors"])
    assert "| | $\\delta$ = 0.5 | $\\delta$ = 1 |" in (out / "table.md").read_text().replace("|  |", "| |")
    assert (out / "errors.png").is_file()


def test_the_distance_to_the_teacher_is_that_of_a_report(folder, tmp_path):
    """The harness draws the teacher's samples once, and measures what a report measures."""
    out = folder / "runs" / "bench" / "tiny"
    record = json.loads((out / "results.json").read_text())["records"][-1]
    (tmp_path / "one.gin").write_text(record["configuration"])
    flowdistill.train(tmp_path / "one.gin", workdir=tmp_path / "run")
    figures = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    for row in ("student, 1 step", "student, 2 steps"):
        assert figures["rows"][row] == pytest.approx(record["rows"][row], rel=1e-6)


@pytest.mark.slow
def test_the_samples_of_a_teacher_are_those_of_its_weights(tmp_path):
    """A teacher whose weights have changed in its file is not compared by what it drew before."""
    (tmp_path / "mine.py").write_text(
        "import json, pathlib\n"
        "import flowdistill\n"
        "from flowdistill.teachers.gaussian import GaussianMixtureTeacher\n"
        "@flowdistill.register_teacher('of_a_file')\n"
        "class OfAFile(GaussianMixtureTeacher):\n"
        "    def __init__(self):\n"
        "        super().__init__(json.loads(pathlib.Path('means.json').read_text()), 0.01)\n"
    )
    (tmp_path / "recipe.gin").write_text(
        "import mine\ninclude 'settings/plane.gin'\ninclude 'freeflow/freeflow.gin'\ninclude 'freeflow/plane.gin'\n"
        "distribution = @of_a_file()\n"
    )
    (tmp_path / "tiny.gin").write_text(
        SUITE.replace("'freeflow', 'plane', 'freeflow.online_warmup = 0.0'", "'recipe.gin',")
    )
    distances = []
    for mean, metrics in ((0.0, "('w2',)"), (5.0, "('w2', 'sliced_w2')")):
        (tmp_path / "means.json").write_text(json.dumps([[mean, 0.0]]))
        done = command(tmp_path, "--only", "FreeFlow", "--gin.bench.seeds=(1,)", f"--gin.bench.metrics={metrics}")
        assert done.returncode == 0, done.stderr
        records = json.loads((tmp_path / "runs" / "bench" / "tiny" / "results.json").read_text())["records"]
        distances.append(records[-1]["rows"]["student, 1 step"]["w2_to_teacher"])
    assert distances[1] > distances[0] + 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_a_killed_suite(tmp_path, number):
    """SIGKILL comes to the suite alone, SIGINT, from Ctrl-C, to its processes as well."""
    (tmp_path / "tiny.gin").write_text(SUITE.replace("train.steps = 3", "train.steps = 1_000_000"))
    running = subprocess.Popen(
        [sys.executable, "-m", "flowdistill", "bench", "tiny.gin", "--jobs", "2"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # What a shell script starts in the background ignores Ctrl-C, the tests among it and whatever they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    runs = tmp_path / "runs" / "bench"

    def wait_for(condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def size():
        return sum(path.stat().st_size for path in runs.glob("*/metrics.jsonl"))

    wait_for(lambda: runs.is_dir() and size() > 0)
    if number == signal.SIGINT:
        os.killpg(running.pid, number)
    else:
        running.kill()
    assert running.wait(timeout=60) != 0

    def still():
        before = size()
        time.sleep(2)
        return size() == before

    wait_for(still)


@pytest.mark.parametrize("text", ["{", "[]", '{"records": [{}]}'])
def test_damaged_results(folder, tmp_path, monkeypatch, text):
    monkeypatch.chdir(folder)
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match="is not what flowdistill bench writes"):
        bench("tiny.gin", out=tmp_path)
    assert (tmp_path / "results.json").read_text() == text


def test_from_python(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"no row of tiny\.gin"):
        bench("tiny.gin", only=["nothing"])
