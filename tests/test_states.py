import pytest
import torch
from packaged import packaged

import flowdistill
from flowdistill import STATE_SOURCES, ConfigError
from flowdistill.data import Digits, ExactSamples, RandomAffine
from flowdistill.flow_maps import from_teacher
from flowdistill.interfaces import Jumps, Pairs
from flowdistill.pairs import Below
from flowdistill.solvers import Euler
from flowdistill.states import NoisedData, Prior, StudentRollouts, TeacherTrajectories
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher, Ring
from flowdistill.times import Uniform

LAW = Below()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Fixed(Pairs):
    """Given times."""

    def __init__(self, *times):
        self.times = times

    def sample(self, n, generator):
        return self.times


@pytest.fixture
def pair():
    teacher = GaussianTeacher([1.0, 0.0], [0.3, 1.5], class_means=[[1.0, 1.0], [-1.0, 0.0]])
    return GaussianFlowMap(teacher), teacher


def build(name, teacher):
    return STATE_SOURCES.build(name, **({"dataset": ExactSamples(teacher)} if name == "noised_data" else {}))


@pytest.mark.parametrize("name", packaged(STATE_SOURCES))
def test_every_source_draws_states_from_its_generator(name, pair):
    source = build(name, pair[1])
    source.setup(*pair)
    states = source.sample(16, LAW, generator())
    assert states.x.shape == (16, 2)
    assert states.t.shape == (16,)
    assert ((states.t >= 0) & (states.t <= 1)).all()
    assert ((states.s >= 0) & (states.s <= states.t)).all()
    assert states.condition.labels.shape == (16,)
    assert (states.clean is not None) == source.needs_data
    assert torch.equal(states.x, source.sample(16, LAW, generator()).x)
    assert not torch.equal(states.x, source.sample(16, LAW, generator(1)).x)
    assert len(states[:5]) == 5


def test_sources_draw_the_times_of_the_law(pair):
    """All of them the same, for the same generator; the prior stands at t = 1 and keeps the ratio s/t."""
    t, s = LAW.sample(16, generator())
    for name in packaged(STATE_SOURCES):
        source = build(name, pair[1])
        source.setup(*pair)
        states = source.sample(16, Fixed(t, s), generator())
        at_one = not source.knows_all_times
        torch.testing.assert_close(states.t, torch.ones(16) if at_one else t)
        torch.testing.assert_close(states.s, s / t if at_one else s)


def test_prior_draws_guidance_from_its_range(pair):
    source = Prior(guidance=(1.0, 2.0))
    pair[0].guidance = 1.0  # as one that takes scales
    source.setup(*pair)
    guidance = source.sample(4000, LAW, generator()).condition.scale
    assert 1.0 <= guidance.min() < 1.01
    assert 1.99 < guidance.max() <= 2.0
    with pytest.raises(ConfigError, match="guidance"):
        Prior(guidance=(2.0, 1.0))


def test_trajectories_and_rollouts_lie_on_the_flow(pair):
    """Both reach X(z, 1, t): the one by Euler steps, the other exactly for an exact student."""
    student, teacher = pair
    for source, tolerance in ((TeacherTrajectories(steps=2000), 5e-3), (StudentRollouts(), 1e-5)):
        source.setup(student, teacher)
        states = source.sample(64, LAW, generator())
        exact = student(states.noise, torch.ones(64), states.t, states.condition)
        torch.testing.assert_close(states.x, exact.detach(), rtol=0, atol=tolerance)


def test_trajectories_stop_at_their_own_times(pair):
    student, teacher = pair
    source = TeacherTrajectories(steps=16)
    source.setup(student, teacher)
    states = source.sample(8, Below(starts=Uniform(low=0.5)), generator())
    one = Euler(steps=16).solve(teacher, states.noise[3:4], states.condition[3:4], end=float(states.t[3]))
    torch.testing.assert_close(states.x[3:4], one)


def test_noised_data_lie_on_the_linear_path(pair):
    source = NoisedData(dataset=ExactSamples(pair[1]), label_dropout=0.25)
    states = source.sample(4000, LAW, generator())
    t = states.t[:, None]
    torch.testing.assert_close(states.x, (1 - t) * states.clean + t * states.noise)
    dropped = (states.condition.labels == flowdistill.NULL_LABEL).float().mean()
    assert float(dropped) == pytest.approx(0.25, abs=0.03)


def test_data_of_another_shape_are_refused(pair):
    with pytest.raises(ConfigError, match="shape"):
        NoisedData(dataset=Digits()).setup(*pair)


def test_random_affine():
    images = Digits().images[:8]
    assert torch.equal(RandomAffine(strength=0.5)(images, generator()), RandomAffine(strength=0.5)(images, generator()))
    torch.testing.assert_close(RandomAffine(strength=0.0)(images, generator()), images, rtol=0, atol=1e-5)
    assert (RandomAffine(strength=0.5)(images, generator()) - images).abs().mean() > 0.05


def test_exact_samples_refuse_a_teacher_without_data():
    with pytest.raises(ConfigError, match="not an exact teacher"):
        ExactSamples(flowdistill.load_teacher("digits_teacher"))
    assert ExactSamples(Ring()).sample(5, generator())[1] is None


def test_digits_are_images_with_labels():
    images, labels = Digits().sample(2000, generator())
    assert images.shape == (2000, 1, 8, 8)
    assert images.min() == -1
    assert images.max() == 1
    assert labels.unique().tolist() == list(range(10))


def test_a_range_of_guidance_needs_a_student_that_is_told(pair):
    teacher = flowdistill.load_teacher("digits_teacher")
    for source in (Prior(guidance=(1.0, 2.0)), NoisedData(dataset=Digits(), guidance=(1.0, 2.0))):
        with pytest.raises(ConfigError, match=r"from_teacher\.guidance"):
            source.setup(from_teacher(teacher), teacher)
        source.setup(from_teacher(teacher, guidance=1.5), teacher)
    Prior(guidance=2.0).setup(from_teacher(teacher), teacher)


def test_rollouts_of_a_map_to_data_are_its_samples_noised(pair):
    student, teacher = pair
    student.jumps = Jumps.TO_DATA
    source = StudentRollouts()
    source.setup(student, teacher)
    states = source.sample(64, LAW, generator())
    ends = (states.x - states.t[:, None] * states.noise) / (1 - states.t[:, None])
    noise = teacher.sample_prior(64, generator())
    labels = states.condition
    expected = student(noise, torch.ones(64), torch.zeros(64), labels)
    middle = states.t < 0.9
    torch.testing.assert_close(ends[middle], expected.detach()[middle], rtol=1e-3, atol=1e-3)
