"""The records of a training: ``metrics.jsonl`` in its run directory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    path = workdir / "metrics.jsonl"
    return list(_records(path.read_text().splitlines())) if path.is_file() else []


def _records(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
