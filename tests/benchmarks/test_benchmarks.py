"""The benchmark scripts, and that the README says what one of them wrote."""

import json
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


def test_ratios_on_the_page_of_costs_are_those_of_the_committed_table():
    costs = json.loads((SCRIPTS / "results" / "speed_float32" / "results.json").read_text())
    found = {(cost["group"], cost["name"]): cost for cost in costs}
    pairs = [("meanflow, loss and gradients", "zhuyu_meanflow")]
    pairs += [("meanflow_distillation, loss and gradients", "fastgen_meanflow")]
    page = (ROOT / "docs" / "costs.md").read_text()
    for figure, words in (("measured", "ours takes {} and {} of the time of the first, and {} and {} of the second"),
                          ("counted", "The counts are {} and {}, and {} and {}:")):  # fmt: skip
        ratios = [
            f"{found[setting, ours][figure] / found[setting, theirs][figure]:.2f}"
            for ours, theirs in pairs
            for setting in ("mnist_sit", "mnist_edm2")
        ]
        assert words.format(*ratios) in page


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
