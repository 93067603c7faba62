"""pi-Flow: policies learn by imitation."""

import contextlib

import attrs
import pytest
import torch
from exact import below, gradient, loss_of
from exact_policy import WRONG_POLICIES, ExactPolicyMap, generator, judge, mixture, prior

import flowdistill
from flowdistill import Condition, States
from flowdistill.algorithms.piflow import (
    DXHead,
    GMFlowHead,
    PiFlow,
    Policy,
    PolicyFlowMap,
)
from flowdistill.algorithms.piflow import objective as module
from flowdistill.data import ExactSamples
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import OneStep
from flowdistill.networks import MLP
from flowdistill.pairs import ToData
from flowdistill.paths import shifted
from flowdistill.states import NoisedData, Prior
from flowdistill.teachers.gaussian import GaussianTeacher
from flowdistill.testing import check_objective
from flowdistill.times import Always, Grid

# The objective


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_exact_policy_has_no_residual_and_no_gradient(count, segments, dropout):
    """On and off the trajectory: with dropout the states are not where the exact policy leads."""
    teacher = mixture(count)
    student = ExactPolicyMap(teacher, segments=segments)
    objective = PiFlow(dropout=dropout)
    residual, slope = judge(objective, student, teacher, prior(teacher))
    assert residual < 1e-11
    assert slope < 1e-11
    for name in ("means", "log_variance", *(["log_weights"] if count > 1 else [])):
        moved = ExactPolicyMap(teacher, segments=segments)
        with torch.no_grad():
            getattr(moved, name).flatten()[0] += 0.3
        residual, slope = judge(objective, moved, teacher, prior(teacher))
        assert residual > 1e-3
        assert slope > 1e-3


def test_exact_policy_from_noised_data():
    teacher = mixture()
    source = NoisedData(dataset=ExactSamples(teacher))
    source.setup(ExactPolicyMap(teacher), teacher)
    states = source.sample(64, ToData(starts=Grid(steps=2)), generator())
    student = ExactPolicyMap(teacher, segments=2)
    residual, slope = judge(PiFlow(sequence=False), student, teacher, states)
    assert residual < 1e-11
    assert slope < 1e-11
    ((x, t),) = student.calls
    assert x is states.x
    assert set(t.tolist()) == {0.5, 1.0}


class _Wrong(ExactPolicyMap):
    """A student whose policy has a fault."""

    def __init__(self, teacher, fault):
        super().__init__(teacher)
        self.fault = fault

    def policy(self, x, t, condition=None):
        right = super().policy(x, t, condition)
        return attrs.evolve(right, **{name: f(right) for name, f in WRONG_POLICIES[self.fault].items()})


@pytest.mark.parametrize("name", [n for n in WRONG_POLICIES if "later" not in n and "not of the velocity" not in n])
def test_objective_sees_wrong_policies(name):
    teacher = mixture()
    residual, slope = judge(PiFlow(dropout=0.0), _Wrong(teacher, name), teacher, prior(teacher))
    assert (residual > 1e-2) == (name != "right")
    assert (slope > 1e-3) == (name != "right")


TEACHERS = {
    "right": (lambda u, x, t: u(x, t), False),
    "in the other sign": (lambda u, x, t: -u(x, t), True),
    "at the start": (lambda u, x, t: u(x, torch.ones_like(t)), True),
    "with time reversed": (lambda u, x, t: u(x, 1 - t), True),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_mutants_of_the_target(name, monkeypatch):
    change, wrong = TEACHERS[name]
    teacher = mixture()
    right = teacher.velocity
    student = ExactPolicyMap(teacher)
    monkeypatch.setattr(teacher, "velocity", lambda x, t, condition: change(right, x, t))
    residual, slope = judge(PiFlow(), student, teacher, prior(teacher))
    assert (residual > 0.1) == wrong
    assert (slope > 1e-2) == wrong


def wanted_gradient(objective, student, teacher, states):
    """The gradient of 1/2 |pi - u|^2 at fixed states, by the rules of the method written out for one segment."""
    g = generator(1)
    policy = student.policy(states.x, states.t)
    leader = policy.dropout(objective.dropout, g)
    losses = []
    for _ in range(2):
        t = torch.rand(len(states), generator=g).double()
        x, now = states.x, states.t
        for i in range(student.substeps):
            following = states.t + (t - states.t) * (i + 1) / student.substeps
            x, now = x + (following - now)[:, None] * leader.velocity(x, now), following
        x = x.detach()
        losses.append((policy.velocity(x, t) - teacher.velocity(x, t)).square().mean() / 2)
    return gradient(sum(losses) / 2, student)


def moved_student(teacher):
    student = ExactPolicyMap(teacher)
    with torch.no_grad():
        student.means += 0.3
        student.log_variance += 0.5
    return student


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_reaches_the_policy_at_fixed_states(dropout, monkeypatch):
    """And loss and metric are the mean squares; a rollout with a graph is seen, and dropout in the trained policy."""
    teacher = mixture()
    objective, student, states = PiFlow(dropout=dropout), moved_student(teacher), prior(teacher)
    wanted = wanted_gradient(objective, student, teacher, states)
    output = loss_of(objective, student, teacher, states, step=0, generator=generator(1))
    torch.testing.assert_close(output.loss, output.metrics["error"] / 2)
    torch.testing.assert_close(gradient(output.loss, student), wanted, rtol=1e-9, atol=1e-12)
    with monkeypatch.context() as patched:
        patched.setattr(module.torch, "no_grad", contextlib.nullcontext)
        mutant = loss_of(objective, student, teacher, states, step=0, generator=generator(1))
    assert float((gradient(mutant.loss, student) - wanted).norm()) > 0.05 * float(wanted.norm())
    if not dropout:
        return
    policy, g = (
        student.policy(states.x, states.t),
        generator(1),
    )  # the same leader and times, but for the trained policy
    monkeypatch.setattr(student, "policy", lambda *_: policy.dropout(dropout, g))
    mutant = loss_of(PiFlow(dropout=0.0), student, teacher, states, step=0, generator=g)
    assert float((gradient(mutant.loss, student) - wanted).norm()) > 0.05 * float(wanted.norm())


def test_segments_follow_each_other():
    """Each starts where the policy of the one before led, without a graph; the loss is their mean."""
    teacher = mixture()
    student = moved_student(teacher)
    student.segments = 3
    states = prior(teacher)
    output = loss_of(PiFlow(dropout=0.0), student, teacher, states, step=0, generator=generator(1))
    (x0, t0), (x1, t1), (x2, t2) = student.calls
    assert x0 is states.x
    for t, wanted in ((t0, 1.0), (t1, 2 / 3), (t2, 1 / 3)):
        torch.testing.assert_close(t, torch.full_like(t, wanted))
    torch.testing.assert_close(x1, student(x0, t0, t1))
    torch.testing.assert_close(x2, student(x1, t1, t2))
    assert not x1.requires_grad
    assert not x2.requires_grad
    single, losses = moved_student(teacher), []
    single.segments, g = 3, generator(1)
    for x, t in ((x0, t0), (x1, t1), (x2, t2)):
        part = States(x=x, t=t, s=below(t), condition=Condition())
        losses.append(loss_of(PiFlow(dropout=0.0, sequence=False), single, teacher, part, step=0, generator=g).loss)
    torch.testing.assert_close(output.loss, sum(losses) / 3)


def test_a_sequence_starts_at_the_noise_of_its_states():
    teacher = mixture()
    student = ExactPolicyMap(teacher)
    noise, x = prior(teacher).x, prior(teacher, seed=2).x
    states = States(
        x=x,
        t=torch.full((64,), 0.5).double(),
        s=below(torch.full((64,), 0.5).double()),
        condition=Condition(),
        noise=noise,
    )
    loss_of(PiFlow(), student, teacher, states, step=0, generator=generator())
    assert student.calls[0][0] is noise
    assert (student.calls[0][1] == 1).all()


@pytest.mark.parametrize("position", [0.0, 0.25, 1.0])
def test_times_are_positions_in_the_segment(position, monkeypatch):
    teacher = mixture()
    student = ExactPolicyMap(teacher, segments=2, shift=3.0)
    seen = []
    right = teacher.velocity
    monkeypatch.setattr(teacher, "velocity", lambda x, t, condition: seen.append((x, t)) or right(x, t))
    states = prior(teacher)
    objective = PiFlow(times=Always(value=position), dropout=0.0, states_per_segment=3)
    loss_of(objective, student, teacher, states, step=0, generator=generator())
    assert len(seen) == 6
    for (x, t), raw in zip(seen, [0.5 + position / 2] * 3 + [position / 2] * 3, strict=True):
        torch.testing.assert_close(t, torch.full_like(t, float(shifted(torch.tensor(raw), 3.0))))
        if raw >= 0.5:
            torch.testing.assert_close(x, student(states.x, states.t, t))


@pytest.mark.parametrize("segments", [1, 2])
def test_network_evaluations(segments):
    """Of each sample and segment: one of the student, one of the teacher for each state."""
    teacher = mixture(dim=2).float()
    student = PolicyFlowMap(NetworkFlowMap(MLP(), "instantaneous"), segments=segments, substeps=3)
    loss_of(PiFlow(), student, teacher, prior(teacher, n=8), step=0, generator=generator())
    assert student.evaluations == 8 * segments
    assert teacher.evaluations == 8 * segments * 2


@pytest.mark.parametrize("head", [GMFlowHead, DXHead])
@pytest.mark.parametrize("sequence", [True, False])
def test_objective_conforms(head, sequence):
    teacher = GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]])
    torch.manual_seed(0)
    field = NetworkFlowMap(MLP(dim=2, hidden_size=16, num_classes=2), "instantaneous")
    states = Prior() if sequence else NoisedData(dataset=ExactSamples(teacher))
    pairs = OneStep() if sequence else ToData(starts=Grid(steps=2))
    check_objective(
        PiFlow(sequence=sequence, pairs=pairs), PolicyFlowMap(field, head, substeps=3, segments=2), teacher, states
    )


def test_a_run_loads_again(tmp_path):
    result = flowdistill.train(
        "piflow",
        on="plane",
        gin_bindings=[
            "train.steps = 2",
            "train.batch_size = 8",
            "evaluation.num_samples = 20",
            "policy.substeps = 3",
            "gmflow.components = 3",
            "mlp.hidden_size = 16",
        ],
        workdir=tmp_path / "run",
    )
    noise = torch.randn(4, 2)
    loaded = flowdistill.load_flow_map(tmp_path / "run")
    assert isinstance(loaded, PolicyFlowMap)
    assert torch.equal(loaded.sample(noise), result.flow_map.sample(noise))
    assert isinstance(loaded.policy(noise, torch.ones(4)), Policy)
