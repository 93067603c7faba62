"""Suites of trainings that are compared, tables of released systems, costs: ``flowdistill bench SUITE``."""

from flowdistill.bench.harness import bench
from flowdistill.bench.speed import Cost, speed
from flowdistill.bench.suite import Row, Suite, load_suite
from flowdistill.bench.systems import System, SystemTable, bench_systems

__all__ = ["Cost", "Row", "Suite", "System", "SystemTable", "bench", "bench_systems", "load_suite", "speed"]
