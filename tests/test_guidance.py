import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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
    with pytest.raises(ConfigError, match=r"samples have shape \(1,\), the teacher's \(2,\)"):
        GuidedTeacher(GaussianTeacher([0.0, 0.0], 1.0), 2.0, guide=conditional)


def test_a_teacher_without_a_null_label_needs_a_guide():
    """Whether the scale is the teacher's or the condition's; the scale 1 asks for nothing, nor does a guide."""
    teacher = GaussianTeacher([0.0], 1.0, class_means=[[1.0]])
    teacher.null_label = False
    x, t, labels = torch.zeros(2, 1), torch.ones(2), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"GaussianTeacher was trained with a class for every sample.*guided.guide"):
        GuidedTeacher(teacher, 2.0)
    plain = GuidedTeacher(teacher)
    torch.testing.assert_close(plain.velocity(x, t, Condition(labels)), teacher.velocity(x, t, Condition(labels)))
    with pytest.raises(ConfigError, match="its null label means nothing"):
        plain.velocity(x, t, Condition(labels, torch.tensor([1.0, 2.0])))
    guided = GuidedTeacher(teacher, 2.0, guide=GaussianTeacher([0.5], 1.0))
    assert guided.velocity(x, t, Condition(labels)).shape == x.shape


# Channels.


@pytest.fixture
def channels():
    """Five channels, each of which guidance changes."""
    means = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return GaussianTeacher(torch.zeros(5).double(), 0.5, class_means=means)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("autoguidance", [False, True])
def test_the_first_channels_are_guided_and_the_others_are_not(channels, k, autoguidance):
    guide = (
        GaussianTeacher(torch.ones(5).double(), 2.0, class_means=torch.ones(2, 5).double()) if autoguidance else None
    )
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    _, t, condition = inputs()
    plain = channels.velocity(x, t, condition)
    whole = GuidedTeacher(channels, 2.5, guide=guide).velocity(x, t, condition)
    some = GuidedTeacher(channels, 2.5, guide=guide, channels=k).velocity(x, t, condition)
    assert torch.equal(some[:, :k], whole[:, :k])
    assert torch.equal(some[:, k:], plain[:, k:])
    assert (whole - plain).abs().min() > 1e-6


def test_a_condition_names_its_own_interval_and_channels(channels):
    """In place of the teacher's; what it does not name is the teacher's."""
    x, t, condition = inputs()
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    teacher = GuidedTeacher(channels, 2.5, (0.0, 0.1), channels=3)
    for changes, own in (
        ({"interval": (0.3, 0.8)}, GuidedTeacher(channels, 2.5, (0.3, 0.8), channels=3)),
        ({"channels": 2}, GuidedTeacher(channels, 2.5, (0.0, 0.1), channels=2)),
        ({"scale": torch.full((6,), 4.0)}, GuidedTeacher(channels, 4.0, (0.0, 0.1), channels=3)),
    ):
        assert torch.equal(teacher.velocity(x, t, condition.guided(**changes)), own.velocity(x, t, condition))


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_channels_that_there_are_not(channels, k):
    with pytest.raises(ConfigError, match=f"channels must be in 1 to 5, not {k}"):
        GuidedTeacher(channels, 2.0, channels=k)


# Decisions held.


def test_a_decision_that_is_held_is_made_by_the_given_time(plain):
    """Whatever the time of the velocity; each row by its own."""
    x, t, condition = inputs()
    teacher = GuidedTeacher(plain, 3.0, interval=(0.2, 0.6))
    always, never = GuidedTeacher(plain, 3.0).velocity(x, t, condition), plain.velocity(x, t, condition)
    decided_by = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.7, 1.0], dtype=torch.float64)
    held = teacher.velocity(x, t, condition.guided(asked_at=decided_by))
    inside = torch.tensor([False, True, True, True, False, False])
    assert torch.equal(held[inside], always[inside])
    assert torch.equal(held[~inside], never[~inside])
    assert (always - never).abs().sum(1).min() > 1e-6
    assert not torch.equal(held, teacher.velocity(x, t, condition))


def test_a_decision_held_at_the_time_itself_changes_nothing(plain):
    guide = GaussianTeacher(torch.zeros(2).double(), 2.0, class_means=torch.eye(2).double())
    teacher = GuidedTeacher(plain, 3.0, interval=(0.2, 0.6), guide=guide)
    x, t, condition = inputs()
    before = teacher.evaluations
    held = condition.guided(asked_at=t)
    assert torch.equal(teacher.velocity(x, t, held), teacher.velocity(x, t, condition))
    assert teacher.evaluations - before == 4 * len(x)
    assert torch.equal(plain.velocity(x, t, held), plain.velocity(x, t, condition))


# Scale 1.

UNIT = st.floats(0, 1)


@given(
    st.lists(st.floats(-50, 50), min_size=6, max_size=6),
    st.lists(UNIT, min_size=3, max_size=3),
    st.tuples(UNIT, UNIT).map(sorted),
    st.lists(st.sampled_from([NULL_LABEL, 0, 1]), min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_scale_one_is_no_guidance(x, t, interval, labels, autoguidance, channels, dtype):
    """By the teacher's own scale, and by those of the condition, which a scale of the teacher's does not change."""
    plain = GaussianTeacher(torch.zeros(2).to(dtype), 0.5, class_means=torch.eye(2).to(dtype))
    guide = GaussianTeacher(torch.ones(2).to(dtype), 2.0, class_means=-torch.eye(2).to(dtype)) if autoguidance else None
    x, t, labels = torch.tensor(x, dtype=dtype).reshape(3, 2), torch.tensor(t, dtype=dtype), torch.tensor(labels)
    expected = plain.velocity(x, t, Condition(labels))
    own = GuidedTeacher(plain, 1.0, tuple(interval), guide, channels)
    assert torch.equal(own.velocity(x, t, Condition(labels)), expected)
    other = GuidedTeacher(plain, 4.0, tuple(interval), guide, channels)
    assert torch.equal(other.velocity(x, t, Condition(labels, torch.ones(3))), expected)
    assert torch.equal(other.velocity(x, t, Condition(labels, torch.ones(3)).guided(asked_at=t.flip(0))), expected)
