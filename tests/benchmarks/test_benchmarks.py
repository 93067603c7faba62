"""The benchmark script, and that the README shows what it wrote."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("suite", ["mnist", "ring"])
def test_readme_shows_the_committed_results(suite):
    table = (ROOT / "benchmarks" / "results" / f"freeflow_{suite}.md").read_text()
    assert table.strip() in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_a_suite_runs_and_is_resumed(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "freeflow.py"), "ring", "--steps", "10"]
    first, second = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600) for _ in "12")
    assert first.returncode == 0, first.stderr
    assert "| FreeFlow prediction, 1 step | 1 |" in first.stdout
    assert first.stdout.splitlines()[-9:] == second.stdout.splitlines()[-9:]
    assert "step 10/10" not in second.stdout
