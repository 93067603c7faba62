"""Suites of trainings that are compared: ``flowdistill bench SUITE``."""

from flowdistill.bench.harness import bench
from flowdistill.bench.speed import Cost, speed
from flowdistill.bench.suite import Row, Suite, load_suite

__all__ = ["Cost", "Row", "Suite", "bench", "load_suite", "speed"]
