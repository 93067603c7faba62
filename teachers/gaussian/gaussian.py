"""The Gaussian teacher and its exact flow map.

For data N(mu, C), rotated to the eigenvectors of C with eigenvalues S, and
sigma_t^2 = (1 - t)^2 S + t^2, z = x - (1 - t) mu:

    u(x, t)    = -mu + (t - (1 - t) S) z / sigma_t^2
    F(x, t, s) = -mu + ((t + s) - S (2 - t - s)) z / (sigma_t (sigma_t + sigma_s))

The second form divides by no t - s, so that it loses no digits as s approaches t, where it is the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import NULL_LABEL, Condition, ExactTeacher, FlowMap, Teacher
from flowdistill.paths import expand_time
from flowdistill.plumbing.registry import register_flow_map, register_teacher
from flowdistill.teachers.gaussian._arrays import spectrum, tensor


def _rotate(x: Tensor, basis: Tensor | None) -> Tensor:
    return x if basis is None else x @ basis.to(x.dtype)


def _rotate_back(x: Tensor, basis: Tensor | None) -> Tensor:
    return x if basis is None else x @ basis.to(x.dtype).mT


def _sigma(t: Tensor, variances: Tensor) -> Tensor:
    """sigma_t, kept above 0 so that a point mass has a finite velocity at t = 0."""
    tiny = torch.finfo(t.dtype).tiny
    return ((1 - t).square() * variances + t.square()).clamp_min(tiny).sqrt()


def _average(x: Tensor, t: Tensor, s: Tensor, mean: Tensor, variances: Tensor, basis: Tensor | None) -> Tensor:
    """F(x, t, s) of the Gaussian flow map, for times (B, 1) and means (B, D)."""
    sigma_t, sigma_s = _sigma(t, variances), _sigma(s, variances)
    factor = ((t + s) - variances * (2 - t - s)) / (sigma_t * (sigma_t + sigma_s))
    return _rotate_back(factor * _rotate(x - (1 - t) * mean, basis), basis) - mean


def _row_means(labels: Tensor | None, mean: Tensor, class_means: Tensor | None, x: Tensor) -> Tensor:
    """The mean of each row's class; that of the null label for NULL_LABEL."""
    if labels is None or class_means is None:
        return mean.to(x.dtype).expand(len(x), -1)
    table = torch.cat([class_means, mean[None]]).to(x.dtype)
    return table[torch.where(labels == NULL_LABEL, len(class_means), labels)]


@register_teacher("gaussian")
class GaussianTeacher(ExactTeacher):
    """Gaussian data in any dimension, with classes that differ in their means.

    Args:
        mean: (D,), of the data without a label.
        covariance: one variance, variances (D,), or a matrix (D, D); of all classes.
        class_means: (K, D); None is an unconditional teacher.

    Raises:
        ConfigError: shapes that do not fit, or a covariance that is none.

    Examples:
        >>> teacher = GaussianTeacher(mean=[1.0, 0.0], covariance=0.25)
        >>> teacher.velocity(torch.zeros(1, 2), torch.ones(1))  # at t = 1 it is x - mean
        tensor([[-1.,  0.]])
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor | None
    class_means: Tensor | None

    def __init__(self, mean: Any = (0.0, 0.0), covariance: Any = 1.0, class_means: Any = None) -> None:
        super().__init__()
        centre = tensor(mean, "mean", 1)
        variances, basis = spectrum(covariance, centre)
        self.register_buffer("mean", centre)
        self.register_buffer("variances", variances)
        self.register_buffer("basis", basis)
        self.register_buffer(
            "class_means", None if class_means is None else tensor(class_means, "class_means", 2).to(centre)
        )
        self.sample_shape = (len(centre),)
        self.num_classes = None if self.class_means is None else len(self.class_means)

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """u(x, t), the average velocity over an interval of no length."""
        labels = None if condition is None else condition.labels
        mean = _row_means(labels, self.mean, self.class_means, x)
        time = expand_time(t, x)
        return _average(x, time, time, mean, self.variances.to(x.dtype), self.basis)

    def sample_data(
        self, n: int, generator: torch.Generator | None = None, condition: Condition | None = None
    ) -> Tensor:
        """Draw ``n`` samples (n, D) of the data of the labels."""
        noise = self.sample_prior(n, generator)
        mean = _row_means(None if condition is None else condition.labels, self.mean, self.class_means, noise)
        return mean + _rotate_back(self.variances.sqrt() * noise, self.basis)


@register_flow_map("exact_gaussian")
class GaussianFlowMap(FlowMap):
    """The exact flow map of a `GaussianTeacher`, guided or not.

    Guidance by gamma between classes of one covariance moves the mean, mu_gamma = mu_null + gamma (mu_y - mu_null), so
    the guided map is exact as well; at the edges of a guidance interval two maps are composed.

    ``mean``, ``class_means`` and ``log_variances`` are parameters: the map is a student that starts at the truth.

    Args:
        teacher: a `GaussianTeacher`, or a `GuidedTeacher` of one without a guide.

    Examples:
        >>> teacher = GaussianTeacher(mean=[0.0], covariance=4.0)
        >>> GaussianFlowMap(teacher).sample(torch.tensor([[1.0]])).item()  # N(0, 1) to N(0, 4)
        2.0
    """

    basis: Tensor | None

    def __init__(self, teacher: Teacher) -> None:
        super().__init__()
        self.interval, self.scale = (0.0, 1.0), 1.0
        if isinstance(teacher, GuidedTeacher):
            self.interval, self.scale = teacher.interval, teacher.scale
            teacher = teacher.teacher
        assert isinstance(teacher, GaussianTeacher)
        self.sample_shape, self.num_classes = teacher.sample_shape, teacher.num_classes
        self.mean = nn.Parameter(teacher.mean.clone())
        self.log_variances = nn.Parameter(teacher.variances.log())
        self.register_buffer("basis", None if teacher.basis is None else teacher.basis.clone())
        self.class_means = None if teacher.class_means is None else nn.Parameter(teacher.class_means.clone())

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """F(x, t, s); where a guidance edge lies between, the mean of the parts weighted by their lengths."""
        labels = None if condition is None else condition.labels
        plain = _row_means(labels, self.mean, self.class_means, x)
        variances, t, s = self.log_variances.exp().to(x.dtype), expand_time(t, x), expand_time(s, x)
        asked = None if condition is None else condition.scale
        if self.scale == 1.0 and asked is None:
            return _average(x, t, s, plain, variances, self.basis)
        scale = self.scale if asked is None else asked
        null = self.mean.to(x.dtype)
        guided = null + expand_time(torch.as_tensor(scale, dtype=x.dtype, device=x.device).expand(len(x)), x) * (
            plain - null
        )
        low, high = self.interval
        ends = [t, torch.clamp(t, max=high).clamp(min=s), torch.clamp(t, max=low).clamp(min=s), s]
        moved = torch.zeros_like(x)
        for mean, start, end in zip((plain, guided, plain), ends[:-1], ends[1:], strict=True):
            part = _average(x - moved, start, end, mean, variances, self.basis)
            moved = moved + (start - end) * part
        inside = (t >= low) & (t <= high)
        velocity = _average(x, t, t, torch.where(inside, guided, plain), variances, self.basis)
        gap = t - s
        return torch.where(gap == 0, velocity, moved / torch.where(gap == 0, torch.ones_like(gap), gap))
