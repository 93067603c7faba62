"""Guidance mixed into the velocity of the data: its fixed points, its interval, and the rows that it leaves alone."""

import attrs
import pytest
import torch
from exact import below, bound, gradient, judge, loss_of
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdistill import NULL_LABEL, Condition, ConfigError, States
from flowdistill.algorithms.meanflow import MeanFlow
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import TargetVelocity
from flowdistill.pairs import WithDiagonal
from flowdistill.paths import interpolate
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.velocities import ConditionalVelocity


def teacher():
    mean, variances = torch.tensor([0.5, -0.5]).double(), torch.tensor([0.3, 2.0]).double()
    return GaussianTeacher(mean, variances, class_means=torch.tensor([[2.0, 0.0], [0.0, -1.5]]).double())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def expected_states(n=96, seed=0, guidance=None) -> States:
    """States whose n - x_0 is its own mean given the state and the label, which may be the null label.

    Whatever is linear in the velocity has no noise on them.
    """
    g = generator(seed)
    x = 1.5 * torch.randn(n, 2, generator=g, dtype=torch.float64)
    t = 0.05 + 0.9 * torch.rand(n, generator=g, dtype=torch.float64)
    labels = torch.randint(-1, 2, (n,), generator=g)
    scales = None
    if guidance is not None:
        low, high = guidance
        scales = low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)
    condition = Condition(labels, scales)
    u = teacher().velocity(x, t, condition)
    return States(x=x, t=t, s=below(t), condition=condition, clean=x - t[:, None] * u, noise=x + (1 - t)[:, None] * u)


def guided(scale, interval=(0.0, 1.0)) -> GaussianFlowMap:
    return GaussianFlowMap(GuidedTeacher(teacher(), scale, interval))


def meanflow(velocity) -> MeanFlow:
    return MeanFlow(target=velocity, power=0.0, pairs=WithDiagonal(share=0.25))


def assert_fixed_point(velocity, student, others, states):
    residual, slope = judge(meanflow(velocity), student, None, states)
    assert residual < 1e-6  # the map keeps its scale in float32
    assert slope < 1e-6
    for other in others:
        residual, slope = judge(meanflow(velocity), other, None, states)
        assert residual > 1e-2
        assert slope > 1e-3


@given(omega=st.floats(0.2, 3.0), kappa=st.floats(0.0, 0.92))
@settings(max_examples=20)
def test_fixed_point_of_the_mixture_is_guidance_by_omega_over_one_minus_kappa(omega, kappa):
    scale = omega / (1 - kappa)
    others = (guided(scale + 0.5), guided(scale - 0.5))
    assert_fixed_point(ConditionalVelocity(omega=omega, kappa=kappa), guided(scale), others, expected_states())


@pytest.mark.parametrize(("omega", "kappa", "scale"), [(1.0, 0.5, 2.0), (0.2, 0.92, 2.5), (2.0, 0.0, 2.0)])
def test_published_settings_of_meanflow(omega, kappa, scale):
    assert_fixed_point(ConditionalVelocity(omega=omega, kappa=kappa), guided(scale), [guided(1.0)], expected_states())


class _ModelGuidance(TargetVelocity):
    """Decoupled MeanFlow's own form, v + omega (F(x, t, t | y) - F(x, t, t | no label)), for rows with a label."""

    needs_data = True

    @torch.no_grad()
    def __call__(self, states):
        labelled = self.student.velocity(states.x, states.t, states.condition)
        unlabelled = self.student.velocity(states.x, states.t, states.condition.drop())
        return states.noise - states.clean + 0.6 * (labelled - unlabelled)


def test_model_guidance_is_a_mixture_with_omega_one():
    """v + 0.6 (F_y - F) guides by 1 / (1 - 0.6) = 2.5, and is the mixture with omega = 1 and kappa = 0.6."""
    states, mixed = expected_states(), ConditionalVelocity(omega=1.0, kappa=0.6)
    assert_fixed_point(mixed, guided(2.5), [guided(1.6)], states)
    student = guided(1.3)
    ours, theirs = (bound(v, student)(states) for v in (mixed, _ModelGuidance()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_without_kappa_every_row_is_guided_by_its_own_scale():
    states = expected_states(guidance=(1.0, 8.0))
    student = GaussianFlowMap(teacher())  # takes the scales of the condition
    assert_fixed_point(ConditionalVelocity(kappa=None), student, [], states)
    told_wrong = attrs.evolve(states, condition=states.condition.guided(scale=states.condition.scale + 1))
    target = bound(ConditionalVelocity(kappa=None), student)
    assert (target(told_wrong) - target(states)).abs().max() > 0.1


@pytest.mark.parametrize("interval", [(0.0, 0.75), (0.3, 0.8)])
def test_fixed_point_with_an_interval_is_the_map_that_is_guided_there(interval):
    velocity = ConditionalVelocity(omega=0.2, kappa=0.92, interval=interval)
    others = (guided(2.5), guided(2.5, (0.0, 0.5)), guided(1.0))
    assert_fixed_point(velocity, guided(2.5, interval), others, expected_states())


def test_the_mixture_by_its_formula_away_from_the_fixed_point():
    states, student = expected_states(guidance=(1.0, 4.0)), guided(1.7)
    with torch.no_grad():
        student.class_means += 0.3
    x, t, labels = states.x, states.t, states.condition.labels
    plain = states.noise - states.clean
    scales = states.condition.scale
    labelled = student.velocity(x, t, states.condition)
    unlabelled = student.velocity(x, t, Condition(torch.full_like(labels, NULL_LABEL), scales))
    inside = (t >= 0.2) & (t <= 0.7) & (labels != NULL_LABEL)
    assert 0 < inside.sum() < (labels != NULL_LABEL).sum() < len(labels)
    for kappa, weight in ((0.4, torch.full_like(t, 0.4)), (None, 1 - 1 / scales)):
        got = bound(ConditionalVelocity(omega=0.7, kappa=kappa, interval=(0.2, 0.7)), student)(states)
        weight = weight[:, None]
        wanted = 0.7 * plain + weight * labelled + (0.3 - weight) * unlabelled
        torch.testing.assert_close(got[inside], wanted[inside], rtol=1e-12, atol=1e-12)
        assert torch.equal(got[~inside], plain[~inside])
        assert not got.requires_grad


MIXTURES = {
    "right": (lambda v, y, n: 1.0 * v + 0.5 * y - 0.5 * n, False),
    "labels exchanged": (lambda v, y, n: 1.0 * v + 0.5 * n - 0.5 * y, True),
    "weights that do not add up to 1": (lambda v, y, n: 1.0 * v + 0.5 * y + 0.5 * n, True),
    "guidance of the student's own velocities": (lambda v, y, n: n + 2.0 * (y - n), True),
    "the data's velocity in place of the labelled one": (lambda v, y, n: 1.5 * v - 0.5 * n, True),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mutants_of_the_mixture(name):
    mix, wrong = MIXTURES[name]

    class Mixture(TargetVelocity):
        needs_data = True

        @torch.no_grad()
        def __call__(self, states):
            labelled = self.student.velocity(states.x, states.t, states.condition)
            unlabelled = self.student.velocity(states.x, states.t, states.condition.drop())
            plain = states.noise - states.clean
            labels = states.condition.labels[:, None]
            return torch.where(labels == NULL_LABEL, plain, mix(plain, labelled, unlabelled))

    residual, slope = judge(meanflow(Mixture()), guided(2.0), None, expected_states())
    assert (residual > 0.1) == wrong
    assert (slope > 0.05) == wrong


def test_from_data_the_guided_map_has_no_mean_gradient():
    """Over 48 batches of noisy velocities the mean gradient is within 4 standard errors of zero, in every component."""
    objective = meanflow(ConditionalVelocity(omega=1.0, kappa=0.5))
    student, moved = guided(2.0), guided(2.5)
    gradients = {student: [], moved: []}
    for seed in range(48):
        g = generator(seed)
        condition = Condition(torch.randint(2, (512,), generator=g))
        clean = teacher().sample_data(512, g, condition)
        noise = torch.randn(512, 2, generator=g, dtype=torch.float64)
        t = torch.rand(512, generator=g, dtype=torch.float64)
        states = States(x=interpolate(clean, noise, t), t=t, s=below(t), condition=condition, clean=clean, noise=noise)
        for model, found in gradients.items():
            found.append(gradient(loss_of(objective, model, None, states, step=0, generator=g).loss, model))
    mean, error = {}, {}
    for model, found in gradients.items():
        stacked = torch.stack(found)
        mean[model], error[model] = stacked.mean(0), stacked.std(0) / len(found) ** 0.5
    assert (mean[student].abs() < 4 * error[student]).all()
    assert (mean[moved].abs() > 4 * error[moved]).any()


@pytest.mark.parametrize(
    ("velocity", "evaluations"),
    [(ConditionalVelocity(), 0), (ConditionalVelocity(omega=1.5), 2), (ConditionalVelocity(kappa=None), 2)],
)
def test_mixing_costs_two_evaluations_a_row(velocity, evaluations):
    student, states = guided(2.0), expected_states(guidance=(1.0, 2.0))
    bound(velocity, student)(states)
    assert student.evaluations == evaluations * len(states)


def test_what_mixing_needs():
    states = expected_states()
    with pytest.raises(ConfigError, match="guidance scales"):
        bound(ConditionalVelocity(kappa=None), guided(2.0))(states)
    unlabelled = attrs.evolve(states, condition=Condition())
    with pytest.raises(ConfigError, match="labels"):
        bound(ConditionalVelocity(omega=2.0), guided(2.0))(unlabelled)
