"""The quick suite of the plane gives the committed figures again, within their spread over the seeds."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "toy_quick" / "results.json"


def figures(path):
    """All values of each figure over the seeds."""
    found = defaultdict(list)
    for record in json.loads(path.read_text())["records"]:
        for row, columns in record["rows"].items():
            for column, value in columns.items():
                found[record["group"], record["name"], row, column].append(value)
    return found


@pytest.mark.slow
def test_the_committed_table_regenerates(tmp_path):
    command = [sys.executable, "-m", "flowdistill", "bench", "toy", "--quick", "--jobs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    ours, committed = figures(tmp_path / "runs" / "bench" / "toy_quick" / "results.json"), figures(COMMITTED)
    assert ours.keys() == committed.keys()
    wrong = {}
    for name, values in committed.items():
        assert len(values) == 3
        reach = max(max(values) - min(values), 0.02 * max(values))
        (value,) = ours[name]
        if not min(values) - reach <= value <= max(values) + reach:
            wrong[name] = value, values
    assert not wrong
