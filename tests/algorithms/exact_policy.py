"""Policies of known fields, and judges of the objective that imitates them."""

import torch
from exact import below, gradient, loss_of
from torch import nn

from flowdistill import Condition, States
from flowdistill.algorithms.piflow import (
    GMFlowPolicy,
    PolicyFlowMap,
)
from flowdistill.interfaces import FlowMap
from flowdistill.paths import expand_time
from flowdistill.teachers.gaussian import GaussianMixtureTeacher

VARIANCE = 0.15


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(count=5, dim=3, seed=0):
    g = generator(seed)
    means = torch.randn(count, dim, generator=g, dtype=torch.float64)
    weights = 0.2 + torch.rand(count, generator=g, dtype=torch.float64)
    return GaussianMixtureTeacher(means, torch.full((count, dim), VARIANCE, dtype=torch.float64), weights)


def random_states(dim=3, n=64, t_src=None, seed=1):
    """Any x_src and x, with t below t_src, both ends included."""
    g = generator(seed)
    x_src, x = 1.5 * torch.randn(2, n, dim, generator=g, dtype=torch.float64)
    upper = 0.05 + 0.95 * torch.rand(n, generator=g, dtype=torch.float64)
    t_src = upper if t_src is None else torch.full_like(upper, t_src)
    t = t_src * torch.linspace(0, 1, n, dtype=torch.float64)
    return x_src, t_src, x, t


def exact_policy(x, t, means, log_variance, log_weights):
    """The Gaussian-mixture policy whose velocity is that of a mixture of equal isotropic variances, everywhere."""
    t_ = expand_time(t, x)[:, None]
    variance = log_variance.exp()
    total = (1 - t_).square() * variance + t_.square()
    offset = x[:, None] - (1 - t_) * means
    logits = log_weights - (offset.square() / (2 * total)).sum(2)
    denoised = means + (1 - t_) * variance / total * offset
    outputs = (x[:, None] - denoised) / t_
    return GMFlowPolicy(x, t, outputs, logits[:, :, None], (variance / total[:, 0, 0]).log() / 2)


class ExactPolicyMap(PolicyFlowMap):
    """A student with the exact policy of a mixture, whose parameters are those of the mixture."""

    def __init__(self, teacher, substeps=16, segments=1, shift=1.0):
        FlowMap.__init__(self)
        self.sample_shape, self.num_classes = teacher.sample_shape, teacher.num_classes
        self.substeps, self.segments, self.shift = substeps, segments, shift
        self.means = nn.Parameter(teacher.means.clone())
        self.log_variance = nn.Parameter(teacher.variances[0, 0].log())
        self.log_weights = nn.Parameter(teacher.log_weights.clone())
        self.calls = []

    def policy(self, x, t, condition=None):
        self.calls.append((x, t))
        return exact_policy(x, t, self.means, self.log_variance, self.log_weights)


def prior(teacher, n=64, seed=0):
    x = teacher.sample_prior(n, generator(seed))
    return States(
        x=x, t=torch.ones(n, dtype=x.dtype), s=below(torch.ones(n, dtype=x.dtype)), condition=Condition(), noise=x
    )


def judge(objective, student, teacher, states, seed=1):
    """Root mean square of the residual, and norm of the loss gradient."""
    output = loss_of(objective, student, teacher, states, step=0, generator=generator(seed))
    return float(output.metrics["error"].sqrt()), float(gradient(output.loss, student).norm())


WRONG_POLICIES = {
    "right": {},
    "another standard deviation": {"log_std": lambda p: p.log_std + 0.2},
    "standard deviation of the denoised sample, not of the velocity": {"log_std": lambda p: p.log_std + p.t_src.log()},
    "equal weights": {"logits": lambda p: torch.zeros_like(p.logits)},
    "denoised samples for velocities": {
        "outputs": lambda p: p.x_src[:, None] - expand_time(p.t_src, p.outputs) * p.outputs
    },
    "evaluated elsewhere": {"x_src": lambda p: p.x_src + 0.1},
    "evaluated later": {"t_src": lambda p: (p.t_src + 0.1).clamp(max=1.0)},
}
