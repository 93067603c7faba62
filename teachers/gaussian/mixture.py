"""Gaussian mixtures.

With v_k = (1 - t)^2 S_k + t^2 along the axes of component k and responsibilities gamma_k,

    u(x, t) = sum_k gamma_k(x, t) [-mu_k + (t - (1 - t) S_k) / v_k (x - (1 - t) mu_k)].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowdistill.interfaces import NULL_LABEL, Condition, ExactTeacher
from flowdistill.paths import expand_time
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_teacher
from flowdistill.teachers.gaussian._arrays import spectrum, tensor


@register_teacher("gaussian_mixture")
class GaussianMixtureTeacher(ExactTeacher):
    """A mixture of Gaussians in any dimension, class-conditional if its components have labels.

    Args:
        means: (K, D).
        covariance: one variance, variances (K, D), or matrices (K, D, D); positive.
        weights: (K,), positive, normalised here; None is equal weights.
        labels: class of each component, (K,), numbered from 0 without gaps; None is an unconditional teacher. The null
            label is the whole mixture.

    Raises:
        ConfigError: shapes that do not fit, weights that are not positive, or labels with gaps.

    Examples:
        >>> teacher = GaussianMixtureTeacher(means=[[-1.0], [1.0]], covariance=0.01, labels=[0, 1])
        >>> x, t = torch.zeros(2, 1), torch.ones(2)
        >>> teacher.velocity(x, t, Condition(torch.tensor([0, 1]))).squeeze(1)
        tensor([ 1., -1.])
    """

    means: Tensor
    variances: Tensor
    basis: Tensor | None
    log_weights: Tensor
    component_labels: Tensor | None

    def __init__(self, means: Any, covariance: Any = 1.0, weights: Any = None, labels: Any = None) -> None:
        super().__init__()
        centres = tensor(means, "means", 2)
        variances, basis = spectrum(covariance, centres)
        if not bool((variances > 0).all()):
            raise ConfigError("the variances of a mixture must be positive")
        count = len(centres)
        mass = centres.new_ones(count) if weights is None else tensor(weights, "weights", 1).to(centres)
        if len(mass) != count or not bool((mass > 0).all()):
            raise ConfigError(f"weights must be {count} positive numbers")
        self.register_buffer("means", centres)
        self.register_buffer("variances", variances)
        self.register_buffer("basis", basis)
        self.register_buffer("log_weights", (mass / mass.sum()).log())
        classes = None if labels is None else torch.as_tensor(labels, dtype=torch.long)
        if classes is not None and (
            len(classes) != count or set(classes.tolist()) != set(range(int(classes.max()) + 1))
        ):
            raise ConfigError(f"labels must be {count} integers that are numbered from 0 without gaps")
        self.register_buffer("component_labels", classes)
        self.sample_shape = (centres.shape[1],)
        self.num_classes = None if classes is None else int(classes.max()) + 1

    @property
    def modes(self) -> tuple[Tensor, float] | None:
        """The centres of equal components, and three of their deviations in the plane, as is usual there."""
        if not torch.allclose(self.log_weights, self.log_weights[0]):
            return None
        return self.means.cpu(), 3 * math.sqrt(float(self.variances.max()) * self.means.shape[1] / 2)

    def _priors(self, n: int, condition: Condition | None) -> Tensor:
        """Log weights (n, K) of the components, those of other classes at minus infinity."""
        priors = self.log_weights.expand(n, -1)
        if self.component_labels is None or condition is None or condition.labels is None:
            return priors
        labels = condition.labels[:, None]
        other = (labels != NULL_LABEL) & (labels != self.component_labels)
        return priors.masked_fill(other, -torch.inf).log_softmax(1)

    def _components(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets from the components' centres along their axes, those over variances, and log densities (B, K)."""
        t = expand_time(t, x)[:, None]
        offset = x[:, None] - (1 - t) * self.means.to(x.dtype)
        if self.basis is not None:
            offset = torch.einsum("bkd,kde->bke", offset, self.basis.to(x.dtype))
        variances = (1 - t).square() * self.variances.to(x.dtype) + t.square()
        scaled = offset / variances
        exponent = (offset * scaled).sum(-1) + variances.log().sum(-1)
        return offset, scaled, -0.5 * (exponent + x.shape[1] * math.log(2 * math.pi))

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """The marginal velocity of the class's components."""
        _, scaled, densities = self._components(x, t)
        responsibilities = (self._priors(len(x), condition).to(x.dtype) + densities).softmax(1)[..., None]
        time = expand_time(t, x)[:, None]
        slope = (time - (1 - time) * self.variances.to(x.dtype)) * scaled
        if self.basis is not None:
            slope = torch.einsum("bke,kde->bkd", slope, self.basis.to(x.dtype))
        return (responsibilities * (slope - self.means.to(x.dtype))).sum(1)

    def log_prob(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Log density (B,) of the marginal at time t."""
        densities = self._components(x, t)[2]
        return (self._priors(len(x), condition).to(x.dtype) + densities).logsumexp(1)

    def sample_data(
        self, n: int, generator: torch.Generator | None = None, condition: Condition | None = None
    ) -> Tensor:
        """Draw ``n`` samples (n, D) of the data of the labels."""
        chosen = torch.multinomial(self._priors(n, condition).exp(), 1, generator=generator)[:, 0]
        noise = self.variances[chosen].sqrt() * self.sample_prior(n, generator)
        if self.basis is not None:
            noise = torch.einsum("be,bde->bd", noise, self.basis[chosen])
        return self.means[chosen] + noise
