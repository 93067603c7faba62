"""Flow matching, which trains every teacher: the sign of its target, its minimum, and its law of times."""

import pytest
import torch
from exact import data_states, gradient, loss_of, perturbed

from flowdistill.algorithms.flow_matching import FlowMatching
from flowdistill.interfaces import FlowMap
from flowdistill.teachers.gaussian import GaussianTeacher


def example():
    return GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())


def test_the_target_is_noise_minus_data():
    """By hand, and the sign at a glance: dx/dt points to noise, since t = 1 is noise."""
    student, states = perturbed(example()), data_states(example(), n=64)
    found = loss_of(FlowMatching(), student, None, states, step=0, generator=torch.Generator())
    predicted = student.average_velocity(states.x, states.t, states.t, states.condition)
    wanted = (predicted - (states.noise - states.clean)).square().mean()
    torch.testing.assert_close(found.loss, wanted, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient(found.loss, student), gradient(wanted, student), rtol=1e-8, atol=1e-14)


class Scaled(FlowMap):
    """The teacher's velocity times a parameter c."""

    def __init__(self, teacher, factor):
        super().__init__()
        self.teacher, self.sample_shape = teacher, teacher.sample_shape
        self.factor = torch.nn.Parameter(torch.full((), factor, dtype=torch.float64))

    def average_velocity(self, x, t, s, condition=None):
        return self.factor * self.teacher.velocity(x, t, condition)


@pytest.mark.parametrize("factor", [-1.0, 0.9, 1.0, 1.1])
def test_the_teachers_velocity_is_the_minimum(factor):
    """The slope of the mean loss in c is 2 (c - 1) E|u|^2, so the teacher's own velocity is where it vanishes."""
    teacher, states = example(), data_states(example(), n=100_000)
    student = Scaled(teacher, factor)
    found = loss_of(FlowMatching(), student, None, states, step=0, generator=torch.Generator())
    (slope,) = torch.autograd.grad(found.loss, student.factor)
    square = float(teacher.velocity(states.x, states.t).square().mean())
    assert float(slope) / (2 * square) == pytest.approx(factor - 1, abs=0.02)
