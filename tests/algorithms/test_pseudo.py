"""FreeFlow with the student's diagonal as its noising velocity: what trains the diagonal, and what it corrects."""

import attrs
import pytest
import torch
from exact import STEPS, below, bound, gradient, loss_of, perturbed, prior_states

from flowdistill import Condition, ConfigError, FlowMap, States, Step
from flowdistill.algorithms.corrections import one_step_samples
from flowdistill.algorithms.freeflow import FreeFlow, FreeFlowCorrection, FreeFlowPrediction, FreeFlowPseudo
from flowdistill.flow_maps import from_teacher
from flowdistill.networks import MLP
from flowdistill.states import Prior
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.velocities import Exact, Jvp, PseudoVelocity


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(mean, variance=0.5):
    return GaussianTeacher(torch.as_tensor(mean).double(), torch.full((len(mean),), variance).double())


class TwoParts(FlowMap):
    """Jumps of one Gaussian, and on the diagonal the velocity of another: a student whose diagonal may be wrong."""

    def __init__(self, jumps, diagonal):
        super().__init__()
        self.off, self.diagonal = GaussianFlowMap(jumps), GaussianFlowMap(diagonal)
        self.sample_shape = self.off.sample_shape

    def average_velocity(self, x, t, s, condition=None):
        on = (t == s)[:, None]
        return torch.where(on, self.diagonal.average_velocity(x, t, t), self.off.average_velocity(x, t, s))


def objective_of(student, teacher, **kwargs):
    kwargs.setdefault("prediction", FreeFlowPrediction(estimator=Jvp()))
    objective = FreeFlowPseudo(**kwargs)
    objective.setup(student, teacher)
    return objective


def loss_at(objective, student, teacher, states, step=0, seed=1):
    return loss_of(objective, student, teacher, states, step=step, generator=generator(seed))


def test_a_consistent_student_is_corrected_as_by_its_exact_velocity():
    """The diagonal of a Gaussian map is the velocity of its samples: the same gradient to rounding, not zero."""
    teacher = gaussian([1.0, -1.0])
    student, states = perturbed(teacher, 0.2), prior_states(teacher, 256)
    own = GaussianTeacher(student.mean.detach(), student.log_variances.detach().exp())
    gradients = []
    for noising in (PseudoVelocity(), Exact(distribution=own)):
        objective = FreeFlowCorrection(noising=noising)
        objective.setup(student, teacher)
        gradients.append(gradient(loss_at(objective, student, teacher, states).loss, student))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert gradients[0].norm() > 1e-2


def test_a_diagonal_of_the_teacher_corrects_nothing():
    """Why the diagonal must be trained: a student that copies its teacher's velocity sees no difference."""
    teacher = gaussian([1.0, -1.0])
    student = TwoParts(gaussian([0.0, 0.0]), teacher)
    objective = FreeFlowCorrection(noising=PseudoVelocity())
    objective.setup(student, teacher)
    output = loss_at(objective, student, teacher, prior_states(teacher))
    assert output.metrics["error"] < 1e-24
    assert gradient(output.loss, student).norm() < 1e-12


def mean_gradient(jumps, diagonal, teacher, n=60):
    """Mean and standard error of the loss gradient over batches."""
    student = TwoParts(jumps, diagonal)
    objective = objective_of(student, teacher)
    gradients = []
    for seed in range(n):
        output = loss_at(objective, student, teacher, prior_states(teacher, 256, seed), seed=n + seed)
        gradients.append(gradient(output.loss, student))
    stacked = torch.stack(gradients)
    return stacked.mean(0), stacked.std(0) / n**0.5


def test_vanishes_on_average_at_the_flow_map():
    """At the exact map the rest is the noise of flow matching; away from it, in jumps or diagonal, it is far from 0."""
    teacher = gaussian([1.0, -1.0])
    mean, error = mean_gradient(teacher, teacher, teacher)
    assert (mean.abs() <= 4 * error + 1e-12).all()
    for jumps, diagonal in [(gaussian([0.5, -0.5]), teacher), (teacher, gaussian([0.5, -0.5]))]:
        mean, error = mean_gradient(jumps, diagonal, teacher)
        assert (mean.abs() > 10 * error + 1e-6).any()


def tracking_of(objective, student, teacher, states):
    """What the tracking adds to the gradient of FreeFlow, from the same draws."""
    plain = FreeFlow(**{a.name: getattr(objective, a.name) for a in attrs.fields(FreeFlow)})
    shared = generator(1)
    without = loss_of(plain, student, teacher, states, generator=shared)
    rows = round(objective.correction_fraction * len(states))
    z = states.x[:rows]
    r = objective.tracking_times.sample(rows, shared).double()
    noise = torch.randn(z.shape, generator=shared, dtype=torch.float64)
    x = student(z, torch.ones(rows).double(), torch.zeros(rows).double()).detach()
    noised = (1 - r)[:, None] * x + r[:, None] * noise
    by_hand = objective.tracking * (student.velocity(noised, r) - (noise - x)).square().mean()
    return without.loss + by_hand, by_hand


def test_tracking_is_flow_matching_on_detached_samples():
    teacher = gaussian([1.0, -1.0])
    student = TwoParts(gaussian([0.5, 0.0]), gaussian([0.0, 0.2]))
    objective = objective_of(student, teacher, tracking=0.7)
    states = prior_states(teacher)
    output = loss_at(objective, student, teacher, states)
    total, tracked = tracking_of(objective, student, teacher, states)
    torch.testing.assert_close(output.loss, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient(output.loss, student), gradient(total, student), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(output.metrics["tracking_error"], tracked.detach() / 0.7)
    assert gradient(tracked, student.off).norm() == 0
    assert gradient(tracked, student.diagonal).norm() > 0.1


def diagonal_gradient(objective, student, teacher, states):
    return gradient(loss_at(objective, student, teacher, states).loss, student.diagonal)


def test_prediction_leaves_the_diagonal_alone():
    """At t < 1 the prediction would pull F(x, t, t) to the teacher; it starts from the noises instead."""
    teacher = gaussian([1.0, -1.0])
    student = TwoParts(gaussian([0.5, 0.0]), gaussian([0.0, 0.2]))
    prior = prior_states(teacher)
    within = States(x=0.5 * prior.x, t=0.5 * prior.t, s=below(0.5 * prior.t), condition=Condition(), noise=prior.x)
    pulled = diagonal_gradient(FreeFlowPrediction(), student, teacher, attrs.evolve(within, s=within.t))
    assert pulled.norm() > 0.1
    objective = objective_of(student, teacher)
    _, tracked = tracking_of(objective, student, teacher, prior)
    for states in (prior, within):
        torch.testing.assert_close(
            diagonal_gradient(objective, student, teacher, states), gradient(tracked, student.diagonal)
        )


@pytest.mark.parametrize("tracked", [True, False])
def test_training_in_one_dimension(tracked):
    """From the teacher's diagonal and wrong jumps, the correction finds the teacher only if the diagonal is tracked."""
    teacher = gaussian([1.0], 0.25)
    student, source = TwoParts(gaussian([0.0], 1.0), teacher), Prior()
    source.setup(student, teacher)
    objective = objective_of(
        student, teacher, tracking=1.0 if tracked else 1e-12, balance="fixed", correction_fraction=0.9
    )
    objective.prediction = bound(Silent(), student, teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for step in range(300):
        loss = loss_at(
            objective, student, teacher, source.sample(128, objective.law(1.0), generator(step)), seed=1000 + step
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = torch.stack([student.off.mean, student.off.log_variances.exp().sqrt()]).detach().flatten()
    if tracked:
        torch.testing.assert_close(found, torch.tensor([1.0, 0.5]).double(), atol=0.06, rtol=0)
    else:
        torch.testing.assert_close(found, torch.tensor([0.0, 1.0]).double(), atol=1e-3, rtol=0)


class Silent(FreeFlowPrediction):
    """A prediction that teaches nothing."""

    def loss(self, *arguments, **keywords):
        output = super().loss(*arguments, **keywords)
        return attrs.evolve(output, loss=0 * output.loss)


def test_tracking_starts_with_the_warm_up():
    teacher = gaussian([1.0, -1.0])
    student, states = perturbed(teacher), prior_states(teacher)
    objective = objective_of(student, teacher, correction_start=10 / STEPS, online_warmup=4 / STEPS)
    metrics = {step: set(loss_at(objective, student, teacher, states, step).metrics) for step in (5, 6, 10)}
    assert metrics[5] == {"error"}
    assert metrics[6] == {"error", "tracking_error"}
    assert metrics[10] == {"error", "correction_error", "lambda", "tracking_error"}


def test_evaluations_per_sample():
    """No further network. Prediction 2 each for 3/4 of the rows; for 1/4 correction 2 and tracking 1."""
    teacher = GaussianTeacher([1.0, 0.0], 0.5)
    student = from_teacher(teacher, "two_time", network=MLP(dim=2, hidden_size=8, depth=1))
    objective, source = FreeFlowPseudo(), Prior()
    source.setup(student, teacher)
    objective.setup(student, teacher)
    assert not objective.modules()
    states = source.sample(64, objective.law(1.0), generator())
    before = teacher.evaluations
    loss_at(objective, student, teacher, states)
    assert student.evaluations == 64 * (0.75 * 2 + 0.25 * 2 + 0.25 * 1)
    assert teacher.evaluations - before == 64


def test_tracking_takes_the_samples_of_the_correction():
    """Those of the student's own one-step samples, to the bit, so that sharing them changes nothing."""
    teacher = GaussianTeacher([1.0, 0.0], 0.5)
    student, states = perturbed(teacher), prior_states(teacher)
    objective = objective_of(student, teacher)
    rows = objective.split(states)[1]
    output = objective.correction.loss(rows, Step(generator()))
    assert torch.equal(output.samples, one_step_samples(student, rows))
    assert not output.samples.requires_grad


def test_an_anchored_student_has_no_diagonal():
    teacher = GaussianTeacher([1.0, 0.0], 0.5)
    student = from_teacher(teacher, "anchored", network=MLP(dim=2, hidden_size=8, depth=1))
    with pytest.raises(ConfigError, match="two_time"):
        FreeFlowPseudo().setup(student, teacher)
