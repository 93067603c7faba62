"""Trained models, by the run directory that holds them."""

from flowdistill.runs.run import (
    check_counts,
    convert,
    evaluate,
    find_checkpoint,
    load_flow_map,
    load_teacher,
    make_condition,
    sample,
)

__all__ = [
    "check_counts",
    "convert",
    "evaluate",
    "find_checkpoint",
    "load_flow_map",
    "load_teacher",
    "make_condition",
    "sample",
]
