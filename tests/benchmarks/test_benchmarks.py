"""The benchmark scripts, and that the README says what one of them wrote."""

import runpy
from pathlib import Path

import pytest

from flowdistill.bench import load_suite
from flowdistill.plumbing import config
from flowdistill.training.loop import configured_loop

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "benchmarks"


def test_figures_of_the_readme_are_those_of_the_committed_table():
    table = (SCRIPTS / "results" / "freeflow" / "table.md").read_text().partition("### Digits")[0]
    rows = {name.strip(): cells for _, name, *cells in (line.split("|") for line in table.splitlines() if "|" in line)}
    student, teacher = rows["FreeFlow"][0].strip("* "), rows["teacher, 16 steps"][1].strip()
    assert f"is {student} against {teacher}," in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("suite", ["digits", "mnist"])
def test_every_student_of_a_search_is_a_training(suite, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    rows = runpy.run_path(str(SCRIPTS / "search.py"))["STUDENTS"][suite]
    description = load_suite("freeflow", [f"bench.rows = {rows}", "bench.seeds = (1,)", "train.steps = 2"])
    jobs = description.jobs(description.table(), {})
    assert [job.row.name for job in jobs] == ["prediction alone", "correction alone", "both"]
    for job in jobs:
        gin_file = tmp_path / "student.gin"
        gin_file.write_text(job.gin)
        with config.parsed([gin_file], []):
            configured_loop(tmp_path, "cpu")
