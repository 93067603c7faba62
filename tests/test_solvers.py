import pytest
import torch

from flowdistill import SOLVERS
from flowdistill.solvers import Dopri5, Euler, Heun
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher


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


@pytest.mark.parametrize(("build", "order"), [(Euler, 1), (Heun, 2)])
def test_order(build, order, teacher):
    ratio = error(build(steps=40), teacher) / error(build(steps=160), teacher)
    assert 4 ** (order - 0.3) < ratio < 4 ** (order + 0.3)


def test_adaptive_solver_meets_its_tolerance(teacher):
    assert error(Dopri5(atol=1e-9, rtol=1e-9), teacher) < 1e-6


@pytest.mark.parametrize("name", SOLVERS.names())
def test_backwards_is_the_inverse(name, teacher):
    solver = SOLVERS.build(name, **({} if name == "dopri5" else {"steps": 400}))
    x = noise(teacher)
    back = solver.solve(teacher, solver.solve(teacher, x), start=0.0, end=1.0)
    torch.testing.assert_close(back, x, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", SOLVERS.names())
def test_rows_may_start_and_end_at_their_own_times(name, teacher):
    solver = SOLVERS.build(name, **({} if name == "dopri5" else {"steps": 500}))
    x = noise(teacher, 8)
    start, end = torch.linspace(0.6, 1.0, 8).double(), torch.linspace(0.5, 0.0, 8).double()
    exact = GaussianFlowMap(teacher)(x, start, end)
    torch.testing.assert_close(solver.solve(teacher, x, start=start, end=end), exact.detach(), rtol=0, atol=5e-3)


def test_evaluations_are_counted_per_sample(teacher):
    for solver, each in ((Euler(steps=5), 5), (Heun(steps=5), 10)):
        before = teacher.evaluations
        solver.solve(teacher, noise(teacher, 7))
        assert teacher.evaluations - before == 7 * each
