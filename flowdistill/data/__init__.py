"""Data sets. Only data-based objectives ever build one."""

from flowdistill.data.datasets import Dataset, Digits, ExactSamples

__all__ = ["Dataset", "Digits", "ExactSamples"]
