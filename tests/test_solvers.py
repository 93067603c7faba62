import math

import pytest
import torch
from packaged import packaged

from flowdistill import SOLVERS, Condition
from flowdistill.networks import MLP
from flowdistill.solvers import Dopri5, Edm, Euler, EulerMaruyama, Heun, OdeSolver, RungeKutta4
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.wrapped_teachers import NetworkTeacher

OF_ODES = [name for name in packaged(SOLVERS) if issubclass(SOLVERS.get(name), OdeSolver)]


@pytest.fixture
def teacher():
    return GaussianTeacher(torch.tensor([1.0, -1.0]).double(), torch.tensor([0.3, 2.0]).double())


def noise(teacher, n=32):
    return teacher.sample_prior(n, torch.Generator().manual_seed(0))


def error(solver, teacher):
    x = noise(teacher)
    one = torch.ones(len(x)).double()
    exact = GaussianFlowMap(teacher)(x, one, 0 * one).detach()
    return float((solver.solve(teacher, x) - exact).abs().max())


@pytest.mark.parametrize(("build", "order"), [(Euler, 1), (Heun, 2), (RungeKutta4, 4)])
def test_order(build, order, teacher):
    ratio = error(build(steps=40), teacher) / error(build(steps=160), teacher)
    assert 4 ** (order - 0.3) < ratio < 4 ** (order + 0.3)


def test_adaptive_solver_meets_its_tolerance(teacher):
    assert error(Dopri5(atol=1e-9, rtol=1e-9), teacher) < 1e-6


@pytest.mark.parametrize("name", OF_ODES)
def test_backwards_is_the_inverse(name, teacher):
    solver = SOLVERS.build(name, **({} if name == "dopri5" else {"steps": 400}))
    x = noise(teacher)
    back = solver.solve(teacher, solver.solve(teacher, x), start=0.0, end=1.0)
    torch.testing.assert_close(back, x, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", OF_ODES)
def test_rows_may_start_and_end_at_their_own_times(name, teacher):
    solver = SOLVERS.build(name, **({} if name == "dopri5" else {"steps": 500}))
    x = noise(teacher, 8)
    start, end = torch.linspace(0.6, 1.0, 8).double(), torch.linspace(0.5, 0.0, 8).double()
    exact = GaussianFlowMap(teacher)(x, start, end)
    torch.testing.assert_close(solver.solve(teacher, x, start=start, end=end), exact.detach(), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("solver", "each"),
    [
        (Euler(steps=5), 5),
        (Heun(steps=5), 10),
        (Heun(steps=5, repa=True), 9),
        (RungeKutta4(steps=5), 20),
        (Edm(steps=5), 9),
        (Edm(steps=5, churn=2.0), 9),
        (EulerMaruyama(steps=5), 5),
    ],
)
def test_evaluations_are_counted_per_sample(solver, each, teacher):
    before = teacher.evaluations
    solver.solve(teacher, noise(teacher, 7))
    assert teacher.evaluations - before == 7 * each


# The sampler of EDM.


def edm_error(solver, teacher):
    """The sampler starts at sigma_max n, the noise alone, from where the flow map goes on."""
    x, first, scale = noise(teacher), solver.sigma_max, solver.data_scale
    t = torch.full((len(x),), first / (first + scale)).double()
    exact = GaussianFlowMap(teacher)(x * first / (first + scale), t, 0 * t).detach()
    return float((solver.solve(teacher, x) - exact).abs().max())


@pytest.mark.parametrize("settings", [{}, {"data_scale": 2.0}, {"rho": 3.0, "sigma_max": 20.0}])
def test_order_of_edm(settings, teacher):
    ratio = edm_error(Edm(steps=40, **settings), teacher) / edm_error(Edm(steps=160, **settings), teacher)
    assert 4**1.7 < ratio < 4**2.3


def test_noise_levels_of_edm():
    solver = Edm(steps=10, sigma_min=0.01, sigma_max=50.0, rho=5.0)
    levels = solver.levels()
    assert levels.dtype == torch.float64
    assert len(levels) == 11
    assert levels[-1] == 0
    assert math.isclose(levels[0], 50.0)
    assert math.isclose(levels[-2], 0.01)
    roots = levels[:-1] ** (1 / 5.0)
    torch.testing.assert_close(roots.diff(), (roots[-1] - roots[0]).expand(9) / 9)
    published = Edm().levels()
    assert math.isclose(published[0], 80.0)
    assert math.isclose(published[-2], 0.002)
    assert len(published) == 33


def test_the_unit_of_the_data_does_not_matter_to_edm(teacher):
    """Levels in another unit, with the data in that unit, are the same times."""
    half, one = Edm(steps=9), Edm(steps=9, data_scale=1.0, sigma_min=0.004, sigma_max=160.0)
    torch.testing.assert_close(half.solve(teacher, noise(teacher)), one.solve(teacher, noise(teacher)))


def test_edm_churns_only_in_its_range(teacher):
    x = noise(teacher)
    plain = Edm(steps=9).solve(teacher, x)
    nowhere = Edm(steps=9, churn=5.0, churn_range=(81.0, math.inf))
    assert torch.equal(nowhere.solve(teacher, x, generator=torch.Generator().manual_seed(0)), plain)
    somewhere = Edm(steps=9, churn=5.0, churn_range=(80.0, math.inf))
    assert not torch.allclose(somewhere.solve(teacher, x, generator=torch.Generator().manual_seed(0)), plain)


# Stochastic samplers.

STOCHASTIC = [
    Edm(steps=150, churn=20.0),
    EulerMaruyama(steps=150, last_step=0.01),
    EulerMaruyama(steps=150, last_step=0.01, diffusion="decreasing"),
]


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_samples_have_the_mean_and_the_covariance_of_the_data(solver):
    """In coordinates in which the data are N(0, I): moments within 5 standard errors of 20 000 samples."""
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.8]]).double()
    teacher = GaussianTeacher(torch.tensor([1.0, -1.0]).double(), covariance)
    generator, n = torch.Generator().manual_seed(0), 20_000
    samples = solver.solve(teacher, teacher.sample_prior(n, generator), generator=generator)
    root = torch.linalg.cholesky(covariance)
    white = torch.linalg.solve_triangular(root, (samples - teacher.mean).T, upper=False)
    assert white.mean(1).abs().max() < 5 / math.sqrt(n)
    errors = (torch.cov(white) - torch.eye(2)).abs() / torch.tensor([[math.sqrt(2), 1.0], [1.0, math.sqrt(2)]])
    assert errors.max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_the_generator_decides(solver, teacher):
    x = noise(teacher, 4)
    one, again, other = (solver.solve(teacher, x, generator=torch.Generator().manual_seed(k)) for k in (1, 1, 2))
    assert torch.equal(one, again)
    assert (one - other).abs().min() > 1e-6


@pytest.mark.parametrize("diffusion", ["sigma", "decreasing"])
def test_more_noise_on_the_way_or_less(diffusion, teacher):
    """How much depends on the diffusion: from one start, samples spread by its noise."""
    solver, x = EulerMaruyama(steps=50, diffusion=diffusion), noise(teacher, 1).expand(500, -1)
    spread = solver.solve(teacher, x, generator=torch.Generator().manual_seed(0)).std(0) / teacher.variances.sqrt()
    assert ((spread > 0.3) & (spread < 1.1)).all()


def test_settings_that_cannot_work():
    for build, settings in (
        (Edm, {"steps": 1}),
        (Edm, {"sigma_min": 0.0}),
        (Edm, {"churn": -1.0}),
        (EulerMaruyama, {"steps": 1}),
        (EulerMaruyama, {"last_step": 1.0}),
        (EulerMaruyama, {"diffusion": "constant"}),
        (RungeKutta4, {"steps": 0}),
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            build(**settings)


# Precision.


class Recording(NetworkTeacher):
    """Remembers in which precision it was asked."""

    def velocity(self, x, t, condition=None):
        self.asked = getattr(self, "asked", set()) | {x.dtype}
        return super().velocity(x, t, condition)


@pytest.mark.parametrize("name", packaged(SOLVERS))
def test_states_may_be_in_double_precision_over_a_network_in_single(name):
    torch.manual_seed(0)
    network = MLP(dim=2, hidden_size=8, depth=1, num_classes=3)
    torch.nn.init.normal_(network.output.weight, std=0.1)
    teacher, condition = Recording(network), Condition(torch.tensor([0, 1, 2, -1]))
    # The adaptive solver must not ask for more than single precision gives; random numbers differ with the dtype.
    settings = {"atol": 1e-4, "rtol": 1e-4} if name == "dopri5" else {"steps": 6}
    solver, x = SOLVERS.build(name, **settings), torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    samples = solver.solve(teacher, x.double(), condition, generator=torch.Generator().manual_seed(1))
    assert teacher.asked == {torch.float32}
    assert samples.dtype == torch.float64
    assert not torch.equal(samples, samples.float().double())
    single = solver.solve(teacher, x, condition, generator=torch.Generator().manual_seed(1))
    assert single.dtype == torch.float32
    if name != "sde":
        torch.testing.assert_close(samples.float(), single, rtol=1e-3, atol=1e-3)
    double = solver.solve(
        NetworkTeacher(network.double()), x.double(), condition, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(samples, double, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", packaged(SOLVERS))
def test_states_may_be_in_single_precision_over_a_teacher_in_double(name, teacher):
    settings = {"atol": 1e-4, "rtol": 1e-4} if name == "dopri5" else {"steps": 6}
    generator = torch.Generator().manual_seed(1)
    samples = SOLVERS.build(name, **settings).solve(teacher, noise(teacher, 4).float(), generator=generator)
    assert samples.dtype == torch.float32
