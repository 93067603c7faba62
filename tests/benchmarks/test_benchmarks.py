"""The benchmark scripts, and that the README says what one of them wrote."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from flowdistill.plumbing import config
from flowdistill.training.trainer import configured_loop

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"


def test_figures_of_the_readme_are_those_of_the_committed_table():
    table = (SCRIPTS / "results" / "freeflow_mnist.md").read_text()
    rows = {name.strip(): cells for _, name, *cells in (line.split("|") for line in table.splitlines() if "|" in line)}
    student, teacher = (rows[name][1].strip() for name in ("FreeFlow, 1 step", "teacher, 16 steps"))
    assert f"is {student} against {teacher}," in (ROOT / "README.md").read_text()


def test_every_variant_is_a_training(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    searched = runpy.run_path(str(SCRIPTS / "search.py"))["variants"]
    suites = runpy.run_path(str(SCRIPTS / "freeflow.py"))["SUITES"].values()
    for variant in [*(v for suite in suites for v in suite), *searched("digits").values(), *searched("mnist").values()]:
        gin_file = tmp_path / "variant.gin"
        gin_file.write_text(variant.configuration("train.seed = 1", "evaluation.seed = 1", "train.steps = 2"))
        with config.parsed([gin_file], []):
            configured_loop(tmp_path, "cpu")


def test_recipes_of_the_step_on_imagenet(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    for recipe, changes in runpy.run_path(str(SCRIPTS / "imagenet_step.py"))["ROWS"].values():
        with config.parsed([recipe], changes):
            assert config.value("train.steps")


@pytest.mark.slow
def test_a_suite_runs_and_is_resumed(tmp_path):
    command = [sys.executable, str(SCRIPTS / "freeflow.py"), "ring", "--steps", "10"]
    first, second = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600) for _ in "12")
    assert first.returncode == 0, first.stderr
    assert "| FreeFlow prediction, 1 step | 1 |" in first.stdout
    assert first.stdout.splitlines()[-9:] == second.stdout.splitlines()[-9:]
    assert "step 10/10" not in second.stdout
