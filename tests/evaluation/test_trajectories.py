"""Errors of flow maps whose errors are known."""

import pytest
import torch

import flowdistill
from flowdistill import Condition, ConfigError, FlowMap
from flowdistill.evaluation import class_agreement, semigroup_error, trajectory_error
from flowdistill.flow_maps import from_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import Jumps
from flowdistill.solvers import Euler
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher

DELTAS = (1.0, 0.25, 0.5)


class Offset(FlowMap):
    """A map whose average velocity is wrong by a constant times (t - s)^power."""

    def __init__(self, exact, offset, power=0, **flags):
        super().__init__()
        self.exact, self.offset, self.power = exact, torch.nn.Parameter(offset), power
        self.sample_shape, self.num_classes = exact.sample_shape, exact.num_classes
        for name, value in flags.items():
            setattr(self, name, value)

    def average_velocity(self, x, t, s, condition=None):
        exact = self.exact.average_velocity(x, t, s, condition)
        return exact + (t - s)[:, None] ** self.power * self.offset


def teacher(**kwargs):
    return GaussianTeacher(torch.tensor([1.0, -1.0, 0.5]).double(), torch.tensor([0.2, 1.0, 3.0]).double(), **kwargs)


def travelled(delta):
    """Root mean square of |x(1 - delta) - z| = |(sigma - 1) z + delta mu|."""
    variances = teacher().variances
    scale = (delta**2 * variances + (1 - delta) ** 2).sqrt() - 1
    return float((scale.square() + (delta * teacher().mean).square()).sum().sqrt())


def test_the_exact_map_has_no_error_guided_or_not():
    exact = GaussianFlowMap(teacher())
    for found in (trajectory_error(exact, teacher(), DELTAS), semigroup_error(exact, DELTAS)):
        assert [error.delta for error in found] == sorted(DELTAS)
        assert max(error.mean for error in found) < 1e-6
    guided = GuidedTeacher(teacher(class_means=torch.eye(3)), 2.0)
    found = trajectory_error(GaussianFlowMap(guided), guided, DELTAS)
    assert max(error.mean for error in found) < 1e-6
    assert trajectory_error(GaussianFlowMap(teacher(class_means=torch.eye(3))), guided, DELTAS)[-1].mean > 0.1


def test_a_constant_error_of_the_average_velocity():
    """It is delta |c| away at the end of a jump; the unit is known up to the noise of 4000 samples."""
    offset = torch.tensor([0.3, 0.0, -0.4]).double()
    student = Offset(GaussianFlowMap(teacher()), offset, jumps=Jumps.FROM_NOISE)
    for error in trajectory_error(student, teacher(), DELTAS, n=4000):
        assert error.mean == pytest.approx(0.5 * error.delta / travelled(error.delta), rel=0.03)
        assert error.standard_error < 1e-6  # the same for all noises


def test_jumps_that_do_not_compose():
    """With 3 (t - s) c in F a jump is 3 (t - s)^2 c away; translations of a standard normal's map compose."""
    standard = GaussianTeacher(torch.zeros(2).double(), 1.0)
    student = Offset(GaussianFlowMap(standard), torch.tensor([0.6, 0.8]).double(), power=1)
    found = semigroup_error(student, (1.0,), n=2000)[0]
    noise_to_end = 1.0  # the exact map stays at z, so that the whole way is the offset's
    composed = sum_of_halves()
    assert found.mean == pytest.approx(abs(composed - noise_to_end) / noise_to_end, rel=1e-6)
    assert found.standard_error < 1e-6


def sum_of_halves():
    """Two jumps of 1/2: each moves by (1/2)^2 c; the exact map scales the first by sigma_0/sigma_(1/2) = 2^(1/2)."""
    return 0.25 * 2**0.5 + 0.25


def test_the_standard_error_is_that_of_the_mean():
    student = GaussianFlowMap(teacher())
    with torch.no_grad():
        student.log_variances += 0.3
    few, many = (trajectory_error(student, teacher(), (1.0,), n=n)[0] for n in (100, 6400))
    assert few.standard_error == pytest.approx(8 * many.standard_error, rel=0.3)
    assert abs(few.mean - many.mean) < 4 * few.standard_error


def test_a_solver_with_few_steps_makes_an_error_of_its_own():
    exact = GaussianFlowMap(teacher())
    coarse = trajectory_error(exact, teacher(), (0.5, 1.0), solver=Euler(steps=4))
    assert coarse[-1].mean > 1e-2


def test_the_same_noise_is_of_the_same_class():
    guided = GuidedTeacher(flowdistill.load_teacher("digits_teacher"), 1.5)
    one_step = from_teacher(guided.teacher)

    class Steps(type(one_step)):
        """The teacher's own samples, in one jump of a map."""

        def forward(self, x, t, s, condition=None):
            return Euler(steps=16).solve(guided, x, condition)

    same = Steps(one_step.network)
    assert class_agreement(same, guided, "digits", n=60, solver=Euler(steps=16)) == 1.0
    wrong = Steps(one_step.network)
    wrong.forward = lambda x, t, s, c: Euler(steps=16).solve(guided, x, Condition((c.labels + 1) % 10))
    assert class_agreement(wrong, guided, "digits", n=60, solver=Euler(steps=16)) < 0.2


def test_what_cannot_be_asked():
    anchored = Offset(GaussianFlowMap(teacher()), torch.zeros(3).double(), jumps=Jumps.FROM_NOISE)
    to_data = Offset(GaussianFlowMap(teacher()), torch.zeros(3).double(), jumps=Jumps.TO_DATA)
    for student in (anchored, to_data):
        with pytest.raises(ConfigError, match="between any two times"):
            semigroup_error(student)
    with pytest.raises(ConfigError, match="ends at t = 0"):
        trajectory_error(to_data, teacher())
    assert trajectory_error(to_data, teacher(), (1.0,))[0].mean < 1e-6
    for deltas in ((), (0.0, 0.5), (1.5,)):
        with pytest.raises(ConfigError, match="deltas must be in"):
            trajectory_error(anchored, teacher(), deltas)
    with pytest.raises(ConfigError, match="at least 2 noises"):
        trajectory_error(anchored, teacher(), n=1)
