"""Arguments that gin can write, as tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowdistill.plumbing.errors import ConfigError


def tensor(value: Any, name: str, ndim: int) -> Tensor:
    """A float tensor of ``ndim`` dimensions, from nested lists or from a tensor, which keeps its dtype."""
    try:
        result = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} is not an array of numbers: {error}") from None
    if result.ndim != ndim or not bool(result.isfinite().all()):
        raise ConfigError(f"{name} must be finite with {ndim} dimensions, not of shape {tuple(result.shape)}")
    return result


def spectrum(covariance: Any, means: Tensor) -> tuple[Tensor, Tensor | None]:
    """Variances (..., D) along the axes of a basis (..., D, D), or along the coordinates where that is None.

    ``covariance`` of Gaussians with means (..., D) is one variance, or variances (..., D), or matrices (..., D, D).

    Raises:
        ConfigError: negative variances, or a matrix that is not symmetric.
    """
    value = torch.as_tensor(covariance, dtype=means.dtype)
    basis = None
    if value.ndim == 0:
        variances = value.expand(means.shape).clone()
    elif value.shape == means.shape:
        variances = value
    elif value.shape == (*means.shape, means.shape[-1]):
        if not torch.allclose(value, value.mT, atol=1e-6):
            raise ConfigError("a covariance matrix must be symmetric")
        variances, basis = torch.linalg.eigh(value)
        # eigenvalues that are zero but for rounding
        variances = torch.where(variances.abs() < 1e-7 * variances.abs().max(), 0.0, variances)
    else:
        raise ConfigError(
            f"covariance of shape {tuple(value.shape)} fits neither {tuple(means.shape)} (variances) "
            f"nor {(*means.shape, means.shape[-1])} (matrices)"
        )
    if bool((variances < 0).any()):
        raise ConfigError("variances must not be negative")
    return variances, basis
