"""Exact flow maps that objectives are judged on."""

import hypothesis.strategies as st
import torch

from flowdistill import Condition, States, Step
from flowdistill.paths import interpolate
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher


@st.composite
def gaussian_teachers(draw, max_dim=32):
    """A Gaussian of 1 to 32 dimensions, with variances from 0.05 to 4 on its axes or on random ones."""
    dim, seed = draw(st.integers(1, max_dim)), draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    mean = torch.randn(dim, generator=g, dtype=torch.float64)
    variances = 0.05 + 4 * torch.rand(dim, generator=g, dtype=torch.float64) ** 2
    if draw(st.booleans()):
        return GaussianTeacher(mean, variances)
    q = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=torch.float64)).Q
    covariance = (q * variances) @ q.T
    return GaussianTeacher(mean, (covariance + covariance.T) / 2)


def perturbed(teacher: GaussianTeacher, amount: float = 0.1) -> GaussianFlowMap:
    """The exact map with its mean and variances moved by about ``amount``."""
    student = GaussianFlowMap(teacher)
    with torch.no_grad():
        student.mean += amount
        student.log_variances += 2 * amount
    return student


STEPS = 10_000
"""The length of a training in tests: `loss_of` turns a step into the part of the training that is done."""


def below(t, seed=11) -> torch.Tensor:
    """Ends s of jumps, uniform in [0, t], the same for the same number of rows."""
    unit = torch.rand(len(t), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return t * unit.to(t.dtype)


def bound(part, student, teacher=None):
    """A part that is set up for the student; another teacher takes the place of the one that it has."""
    if part._student is not student:
        part.setup(student, teacher)
    _teach(part, teacher)
    return part


def _teach(part, teacher):
    part._teacher = teacher
    for inner in part.parts():
        _teach(inner, teacher)


def loss_of(objective, student, teacher, states, *, step=0, generator=None):
    """The loss of an objective, which is set up first if it is not."""
    return bound(objective, student, teacher).loss(states, Step(generator, step, step / STEPS))


def residual_of(objective, student, teacher, states, *, step=0, generator=None):
    """F and the residual of an objective, which is set up first if it is not."""
    found = bound(objective, student, teacher).residual(states, Step(generator, step, step / STEPS))
    return found.average, found.value


def auxiliary_loss_of(objective, name, student, teacher, states, *, step=0, generator=None):
    """The loss of one of an objective's own modules."""
    return bound(objective, student, teacher).auxiliary_loss(name, states, Step(generator, step, step / STEPS))


def prior_states(teacher, n=64, seed=0) -> States:
    x = teacher.sample_prior(n, torch.Generator().manual_seed(seed))
    t = torch.ones(n, dtype=x.dtype)
    return States(x=x, t=t, s=below(t), condition=Condition())


def path_states(teacher, n=64, seed=0) -> States:
    """States at times drawn from [0.05, 1]: prior noise is at home at every time of an exact teacher."""
    g = torch.Generator().manual_seed(seed)
    x = 1.5 * torch.randn(n, *teacher.sample_shape, generator=g, dtype=torch.float64)
    t = 0.05 + 0.95 * torch.rand(n, generator=g, dtype=torch.float64)
    return States(x=x, t=t, s=below(t), condition=Condition())


def gradient(loss, student) -> torch.Tensor:
    """The gradient with respect to all parameters, in one vector."""
    parameters = [p for p in student.parameters() if p.requires_grad]
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, parts, strict=True)]
    )


def judge(objective, student, teacher, states, step=0, seed=1) -> tuple[float, float]:
    """Root mean square of the residual, and norm of the loss gradient."""
    output = loss_of(objective, student, teacher, states, step=step, generator=torch.Generator().manual_seed(seed))
    return float(output.metrics["error"].sqrt()), float(gradient(output.loss, student).norm())


def assert_exact(objective, teacher, states, tolerance=1e-9, step=0) -> None:
    """No residual and no gradient at the exact flow map, and both away from it."""
    residual, slope = judge(objective, GaussianFlowMap(teacher), teacher, states, step)
    assert residual <= tolerance
    assert slope <= tolerance
    residual, slope = judge(objective, perturbed(teacher), teacher, states, step)
    assert residual > 1e-2
    assert slope > 1e-3


def data_states(teacher, n=64, seed=0, low=0.05) -> States:
    """Data of the teacher's distribution, noised to times drawn from [low, 1]."""
    g = torch.Generator().manual_seed(seed)
    clean = teacher.sample_data(n, g)
    noise = torch.randn(clean.shape, generator=g, dtype=clean.dtype)
    t = low + (1 - low) * torch.rand(n, generator=g, dtype=clean.dtype)
    return States(x=interpolate(clean, noise, t), t=t, s=below(t), condition=Condition(), clean=clean, noise=noise)


class _Bent(GaussianFlowMap):
    """The exact map with a bend in its jumps, which leaves the diagonal as it is."""

    def __init__(self, teacher, amount):
        super().__init__(teacher)
        self.bend = torch.nn.Parameter(torch.full((), amount, dtype=torch.float64))

    def average_velocity(self, x, t, s, condition=None):
        t, s = t[:, None], s[:, None]
        exact = super().average_velocity(x, t[:, 0], s[:, 0], condition)
        return exact + self.bend * (t - s) * torch.sin(x + t + 2 * s)


def bent(teacher: GaussianTeacher, amount: float = 0.5) -> GaussianFlowMap:
    """A student whose jumps do not compose: `perturbed` ones do, being exact maps of other Gaussians."""
    return _Bent(teacher, amount)
