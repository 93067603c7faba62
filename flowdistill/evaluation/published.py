"""Means and covariances of features, as others publish them, read as data."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowdistill.evaluation.features import FeatureExtractor
from flowdistill.evaluation.metrics import Moments
from flowdistill.plumbing.errors import DataError, in_one_line
from flowdistill.plumbing.pickles import Function, Object, PickleReader, checked

_DICTS = {"collections.OrderedDict", "dnnlib.util.EasyDict"}
_NUMPY = {"numpy.ndarray", "numpy.dtype", *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core"))}
_MAKERS = {f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")}  # up to protocol 4
_VIEWERS = {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}  # from protocol 5 on


class _StatisticsReader(PickleReader):
    """Reads pickles of dictionaries of arrays."""

    def imported(self, name: str) -> Function:
        if name not in _DICTS | _NUMPY | _MAKERS | _VIEWERS:
            raise ValueError(f"it wants to import {name}")
        return super().imported(name)

    def called(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        name = checked(function, Function).name
        return {} if name in _DICTS and not arguments else Object(name, arguments)


def pickled_moments(path: Path, extractor: FeatureExtractor) -> Moments:
    """The mean and covariance of an extractor's features in a pickle, such as EDM2's ``img512.pkl``.

    The file holds a dictionary of ``mu`` and ``sigma``, or several under the names of metrics: then the extractor's
    `FeatureExtractor.statistics` says which. Nothing of it is executed.

    Raises:
        DataError: the file is damaged or something else, or holds statistics of other features.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            content = checked(_StatisticsReader().read(data), dict)
            sets = {name: v for name, v in content.items() if isinstance(v, dict) and {"mu", "sigma"} <= v.keys()}
            found = content if {"mu", "sigma"} <= content.keys() else sets.get(extractor.statistics or "")
            arrays = None if found is None else {name: _array(data, found[name]) for name in ("mu", "sigma")}
    except Exception as error:  # of a damaged pickle, many
        raise DataError(f"{path} cannot be read as statistics of features: {in_one_line(error)}") from None
    if arrays is None:
        raise DataError(
            f"{path} holds statistics of {', '.join(map(repr, sets)) or 'nothing'}, and none of the features of "
            f"{type(extractor).__name__}: 'fid' are those of inception"
        )
    return checked_moments(path, arrays)


def checked_moments(path: Path, arrays: Mapping[str, Any]) -> Moments:
    """The arrays ``mu`` (D,) and ``sigma`` (D, D) as tensors; DataError unless they can be a mean and a covariance."""
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
        raise DataError(f"{path} holds mu and sigma of {mean.dtype} and {covariance.dtype}, not of numbers")
    if mean.ndim != 1 or not mean.size or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path} holds mu {mean.shape} and sigma {covariance.shape}, not (D,) and (D, D)")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path} holds mu and sigma with values that are NaN or infinite")
    spread = float(np.abs(covariance).max())
    if not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-5 * spread) or covariance.diagonal().min() < 0:
        raise DataError(f"{path} holds a sigma that is not symmetric, or has a negative variance: it is no covariance")
    return torch.from_numpy(mean), torch.from_numpy(covariance)


def _array(data: mmap.mmap, value: Any) -> Any:
    """A copy of an array of floats in a pickle."""
    match value:
        case Object(maker, (Function("numpy.ndarray"), _, _), (1, tuple(shape), kind, bool(columns), range() as place)):
            named = maker in _MAKERS
        case Object(maker, (range() as place, kind, tuple(shape), str(order))):
            named, columns = maker in _VIEWERS, order == "F"
        case _:
            raise ValueError("its mu or sigma is not an array")
    match kind:
        case Object("numpy.dtype", ("f4" | "f8" as number, *_), (_, "<" | ">" as end, None, None, None, *_)) if named:
            numbers = np.frombuffer(data[place.start : place.stop], f"{end}{number}")
            return numbers.reshape(shape[::-1]).T if columns else numbers.reshape(shape)
    raise ValueError("its mu or sigma is not an array of floats")
