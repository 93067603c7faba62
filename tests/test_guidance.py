import pytest
import torch

from flowdistill import NULL_LABEL, Condition, ConfigError
from flowdistill.guidance import GuidedTeacher
from flowdistill.teachers.gaussian import GaussianTeacher


@pytest.fixture
def plain():
    return GaussianTeacher(torch.zeros(2).double(), 0.5, class_means=torch.eye(2).double())


def inputs(n=6):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, torch.linspace(0.05, 1.0, n).double(), Condition(torch.arange(n) % 2)


def test_guided_velocity_is_the_extrapolation(plain):
    x, t, condition = inputs()
    strong, weak = plain.velocity(x, t, condition), plain.velocity(x, t, condition.drop())
    guided = GuidedTeacher(plain, 2.5).velocity(x, t, condition)
    torch.testing.assert_close(guided, weak + 2.5 * (strong - weak))


def test_scales_of_the_condition_come_first(plain):
    x, t, condition = inputs()
    scales = torch.linspace(0.0, 3.0, 6)
    each = GuidedTeacher(plain, 9.0).velocity(x, t, Condition(condition.labels, scales))
    for i, scale in enumerate(scales.tolist()):
        one = GuidedTeacher(plain, scale).velocity(x[i : i + 1], t[i : i + 1], condition[i : i + 1])
        torch.testing.assert_close(each[i : i + 1], one)


def test_interval_includes_its_ends(plain):
    x, _, condition = inputs()
    t = torch.tensor([0.0, 0.2, 0.3, 0.6, 0.61, 1.0], dtype=torch.float64)
    teacher = GuidedTeacher(plain, 3.0, interval=(0.2, 0.6))
    guided = (teacher.velocity(x, t, condition) - plain.velocity(x, t, condition)).abs().sum(1) > 1e-6
    assert guided.tolist() == [False, True, True, True, False, False]


def test_scale_one_is_the_plain_teacher_at_one_evaluation(plain):
    x, t, condition = inputs()
    before = plain.evaluations
    assert torch.equal(GuidedTeacher(plain, 1.0).velocity(x, t, condition), plain.velocity(x, t, condition))
    assert plain.evaluations - before == 2 * len(x)


def test_autoguidance_uses_the_guide_with_the_same_label(plain):
    guide = GaussianTeacher(torch.zeros(2).double(), 2.0, class_means=torch.eye(2).double())
    x, t, condition = inputs()
    strong, weak = plain.velocity(x, t, condition), guide.velocity(x, t, condition)
    guided = GuidedTeacher(plain, 1.5, guide=guide)
    torch.testing.assert_close(guided.velocity(x, t, condition), weak + 1.5 * (strong - weak))
    assert guided.evaluations == plain.evaluations + guide.evaluations


def test_rows_without_a_label_are_not_guided(plain):
    x, t, _ = inputs()
    null = Condition(torch.full((6,), NULL_LABEL))
    torch.testing.assert_close(GuidedTeacher(plain, 4.0).velocity(x, t, null), plain.velocity(x, t, null))


def test_what_cannot_be_guided():
    unconditional = GaussianTeacher([0.0], 1.0)
    with pytest.raises(ConfigError, match="class-conditional"):
        GuidedTeacher(unconditional, 2.0)
    conditional = GaussianTeacher([0.0], 1.0, class_means=[[1.0]])
    with pytest.raises(ConfigError, match="interval"):
        GuidedTeacher(conditional, 2.0, interval=(0.5, 0.2))
    with pytest.raises(ConfigError, match="labels"):
        GuidedTeacher(conditional, 2.0).velocity(torch.zeros(1, 1), torch.ones(1))
