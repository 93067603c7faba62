"""What a training has recorded in its run directory: ``metrics.jsonl`` and ``evaluation.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_records(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; lines that are none, as a kill may leave, are left out."""
    return [record for record in map(record_of, record_lines(workdir)) if record is not None]


def record_lines(workdir: Path) -> list[bytes]:
    """The lines of metrics.jsonl that are not empty; none if there is no such file."""
    path = workdir / "metrics.jsonl"
    return list(filter(None, path.read_bytes().split(b"\n"))) if path.is_file() else []


def record_of(line: bytes) -> dict[str, Any] | None:
    """The record in a line: a step and numbers by name; None if it is no record.

    Examples:
        >>> record_of(b'{"step": 2, "loss": 0.5}'), record_of(b'{"step": 2, "lo'), record_of(b'{"loss": 0.5}')
        ({'step': 2, 'loss': 0.5}, None, None)
    """
    try:
        record = json.loads(line)
        if type(record["step"]) is int and all(_is_number(value) for value in record.values()):
            return dict(record)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return None


def _is_number(value: Any) -> bool:
    """Whether a value is a number that arrays can hold."""
    return isinstance(value, float) or (type(value) is int and 0 <= value < 2**63)


def read_evaluation(workdir: Path, step: int) -> dict[str, Any] | None:
    """The rows of metrics that a run measured when it ended at a step, and of how many samples; None if it did not."""
    try:
        found = json.loads((workdir / "evaluation.json").read_text(encoding="utf-8"))
        if found["step"] != step:
            return None
        rows = {name: {key: float(value) for key, value in row.items()} for name, row in found["rows"].items()}
        return {"num_samples": int(found["num_samples"]), "rows": rows}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        return None
