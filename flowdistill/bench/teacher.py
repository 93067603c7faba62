"""Measure the teacher of a configuration: ``python -m flowdistill.bench.teacher --gin_file FILE --workdir DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from flowdistill import config
from flowdistill.evaluation.report import compare, write_figures


def main() -> None:
    """Write the ``figures.json`` that a training of the configuration would leave, without the student's rows."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gin_file", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with config.parsed([options.gin_file], []), config.errors_located():
        teacher, evaluation = config.value("train.teacher"), config.value("train.evaluation")
    options.workdir.mkdir(parents=True, exist_ok=True)
    write_figures(options.workdir, compare(None, teacher.to(options.device), evaluation), evaluation)


if __name__ == "__main__":
    main()
