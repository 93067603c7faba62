"""Suites of trainings that are compared: ``flowdistill bench SUITE``."""

from flowdistill.bench.harness import bench
from flowdistill.bench.suite import Row, Suite, load_suite

__all__ = ["Row", "Suite", "bench", "load_suite"]
