"""Shortcut models: jumps that double, the finest level, guidance, and the average that gives the targets."""

import itertools

import attrs
import pytest
import torch
from exact import bent, gradient, loss_of, path_states, perturbed, residual_of
from runs import write

import flowdistill
from flowdistill import Condition, ConfigError, States
from flowdistill.algorithms.identities import Residual
from flowdistill.algorithms.shortcut import Shortcut
from flowdistill.data import ExactSamples
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import MLP
from flowdistill.pairs import Dyadic
from flowdistill.paths import interpolate
from flowdistill.states import NoisedData
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.testing import check_objective
from flowdistill.velocities import TeacherVelocity


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian() -> GaussianTeacher:
    return GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())


def classes() -> GaussianTeacher:
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.5]]).double()
    return GaussianTeacher(torch.zeros(2).double(), torch.tensor([0.5, 0.8]).double(), class_means=means)


def distillation(**fields) -> Shortcut:
    return Shortcut(target=TeacherVelocity(), **{"target_decay": 0.0, **fields})


def noised(teacher, t, s=None, seed=0) -> States:
    """Data at given times, with jumps to given times, or none."""
    g = generator(seed)
    clean, s = teacher.sample_data(len(t), g), t if s is None else s
    noise = torch.randn(clean.shape, generator=g, dtype=clean.dtype)
    return States(x=interpolate(clean, noise, t), t=t, s=s, condition=Condition(), clean=clean, noise=noise)


def at_level(teacher, level, n=64) -> tuple[States, torch.Tensor]:
    """Data at the starts of jumps of length 2^-level, and the ends of these."""
    t = (1 + torch.arange(n) % 2**level).double() / 2**level
    return noised(teacher, t), t - 0.5**level


def residual(objective, student, teacher, states, s) -> torch.Tensor:
    return residual_of(objective, student, teacher, attrs.evolve(states, s=s), step=0, generator=generator())[1]


def size(values) -> float:
    return float(values.square().mean().sqrt())


@pytest.mark.parametrize("level", range(6))
def test_exact_map_doubles_its_own_jumps(level):
    """No residual at any level but the finest, whatever the state."""
    teacher = gaussian()
    states, s = at_level(teacher, level)
    assert residual(distillation(), GaussianFlowMap(teacher), teacher, states, s).abs().max() < 1e-13
    moved = attrs.evolve(states, x=path_states(teacher).x)
    assert residual(distillation(), GaussianFlowMap(teacher), teacher, moved, s).abs().max() < 1e-13


def _second_half_at_the_start(student, second, first, jump, r):
    average = student.average_velocity(*jump)
    return Residual(average, (average - (first + second(jump.x, r, jump.condition)) / 2).detach())


def test_second_half_starts_where_the_first_ends(monkeypatch):
    """In the longest jumps the second half at x_t in place of x' leaves 0.13 here."""
    teacher = gaussian()
    student, (states, s) = GaussianFlowMap(teacher), at_level(teacher, 0, n=20_000)
    assert size(residual(distillation(), student, teacher, states, s)) < 1e-14
    monkeypatch.setattr("flowdistill.algorithms.shortcut.objective.semigroup", _second_half_at_the_start)
    assert size(residual(distillation(), student, teacher, states, s)) == pytest.approx(0.128, abs=0.005)


def test_finest_level_is_of_first_order_in_its_length():
    """Two Euler steps leave a residual at the exact map that halves with the length of the jump."""
    teacher = gaussian()
    errors = []
    for level in (5, 6, 7):
        states, s = at_level(teacher, level, n=512)
        objective = distillation(levels=level + 1)
        errors.append(size(residual(objective, GaussianFlowMap(teacher), teacher, states, s)))
    assert 0 < errors[-1] < 0.01
    assert [a / b for a, b in itertools.pairwise(errors)] == pytest.approx([2, 2], rel=0.1)


def test_finest_level_is_two_euler_steps_of_the_teacher():
    """At x, and where half an Euler step leads; nothing of the student is in it."""
    teacher, student = gaussian(), perturbed(gaussian())
    states, s = at_level(teacher, 6)
    length = (states.t - s) / 2
    first = teacher.velocity(states.x, states.t)
    second = teacher.velocity(states.x - length[:, None] * first, states.t - length)
    wanted = student.average_velocity(states.x, states.t, s) - (first + second) / 2
    torch.testing.assert_close(residual(distillation(), student, teacher, states, s), wanted.detach())


def test_gradient_is_zero_at_the_exact_map_and_of_a_detached_target_elsewhere():
    teacher = gaussian()
    t, s = (time.double() for time in Dyadic(levels=6).sample(256, generator()))
    states = noised(teacher, t, s)
    objective = distillation(share=0.25, levels=20)  # far finer than the jumps, none of which is of the finest level
    student = GaussianFlowMap(teacher)
    output = loss_of(objective, student, teacher, states, step=0, generator=generator(1))
    assert float(output.metrics["error"]) < 1e-24
    assert gradient(output.loss, student).norm() < 1e-12

    student = bent(teacher)
    output = loss_of(objective, student, teacher, states, step=0, generator=generator(1))
    assert float(output.metrics["error"]) > 1e-3
    s[:64] = t[:64]
    average = student.average_velocity(states.x, t, s)
    r = (t + s) / 2
    with torch.no_grad():
        first = student.average_velocity(states.x, t, r)
        second = student.average_velocity(states.x - (t - r)[:, None] * first, r, s)
        target = torch.where((s == t)[:, None], teacher.velocity(states.x, t), (first + second) / 2)
    wanted = gradient((average - target).square().mean(), student)
    assert wanted.norm() > 1e-2
    torch.testing.assert_close(gradient(output.loss, student), wanted, rtol=1e-9, atol=1e-12)


def test_flow_matching_loss_is_the_conditional_variance():
    """E |F(x, t, t) - (n - x_0)|^2 at the exact map is the mean of sigma^2 / S_t, S_t = (1 - t)^2 sigma^2 + t^2."""
    teacher = gaussian()
    t = Shortcut(share=1.0).law(0.0).sample(200_000, generator())[0].double()
    output = loss_of(
        Shortcut(share=1.0),
        GaussianFlowMap(teacher),
        None,
        noised(teacher, t),
        step=0,
        generator=generator(1),
    )
    variance = (1 - t).square()[:, None] * teacher.variances + t.square()[:, None]
    assert float(output.loss.detach()) == pytest.approx(float((teacher.variances / variance).mean()), rel=0.02)


def test_no_mean_gradient_from_data_at_the_exact_map():
    """Over 64 batches, within 4 standard errors with a shortest jump of 2^-11; elsewhere far outside."""
    teacher = gaussian()
    objective = Shortcut(target_decay=0.0, levels=12, share=0.5)
    student, moved = bent(teacher, 0.0), bent(teacher)
    with torch.no_grad():
        moved.mean += 0.3
    exact, wrong = [], []
    for seed in range(64):
        t, s = (time.double() for time in objective.law(0.0).sample(512, generator(seed)))
        states = noised(teacher, t, s, seed)
        for model, into in ((student, exact), (moved, wrong)):
            loss = loss_of(objective, model, None, states, step=0, generator=generator(seed)).loss
            into.append(gradient(loss, model))
    gradients = torch.stack(exact)
    error = gradients.std(0) / len(gradients) ** 0.5
    assert (gradients.mean(0).abs() < 4 * error + 1e-8).all()  # of the finest level
    far = torch.stack(wrong).mean(0).abs() > 8 * error
    assert far[:2].any()  # the mean
    assert far[-1]  # the bend


class _Recording(GaussianFlowMap):
    """An exact map that remembers at which times and labels it was asked."""

    def average_velocity(self, x, t, s, condition=None):
        labels = None if condition is None else condition.labels
        self.asked.append((t.detach().clone(), s.detach().clone(), labels))
        return super().average_velocity(x, t, s, condition)


def recording(teacher) -> _Recording:
    student = _Recording(teacher)
    student.asked = []
    return student


def test_halves_carry_the_next_level_and_the_diagonal_at_the_finest():
    teacher, student = gaussian(), recording(gaussian())
    t = torch.full((8,), 0.75).double()
    s = torch.tensor([0.5, 0.5, 0.5, 0.75 - 1 / 64] * 2).double()
    residual(Shortcut(target_decay=0.0), student, None, noised(teacher, t), s)
    first, whole, second = student.asked
    finest = t - s < 0.1
    r = (t + s) / 2
    assert torch.equal(first[0], t)
    assert torch.equal(first[1], torch.where(finest, t, r))
    assert torch.equal(whole[1], s)
    assert torch.equal(second[0], r)
    assert torch.equal(second[1], torch.where(finest, r, s))


def labelled(teacher, t, s=None) -> States:
    labels = torch.arange(len(t)) % 2
    return attrs.evolve(noised(teacher, t, s), condition=Condition(labels))


def test_guidance_is_in_both_halves_of_the_finest_level_and_nowhere_else():
    teacher, scale = classes(), 1.5
    student = recording(teacher)
    t = torch.full((8,), 0.75).double()
    s = torch.tensor([0.5, 0.5, 0.5, 0.75 - 1 / 64] * 2).double()
    states = labelled(teacher, t)
    got = residual(Shortcut(target_decay=0.0, guidance=scale), student, None, states, s)
    unlabelled = [asked for asked in student.asked if (asked[2] == -1).any()]
    assert [len(asked[0]) for asked in unlabelled] == [2, 2]
    assert all(torch.equal(asked[0], asked[1]) for asked in unlabelled)
    plain = residual(Shortcut(target_decay=0.0), student, None, states, s)
    finest = t - s < 0.1
    assert torch.equal(got[~finest], plain[~finest])

    few = states[finest]
    null = few.condition.drop()

    def guided(x, t):
        strong, weak = student.velocity(x, t, few.condition), student.velocity(x, t, null)
        return weak + scale * (strong - weak)

    with torch.no_grad():
        first = guided(few.x, few.t)
        second = guided(few.x - first / 128, few.t - 1 / 128)
        wanted = student.average_velocity(few.x, few.t, s[finest], few.condition) - (first + second) / 2
    torch.testing.assert_close(got[finest], wanted)
    assert (got[finest] - plain[finest]).abs().max() > 0.1


def test_guidance_needs_labels_and_no_teacher():
    with pytest.raises(ConfigError, match="guide the teacher"):
        distillation(guidance=1.5)
    states, s = at_level(gaussian(), 6)
    with pytest.raises(ConfigError, match="labels"):
        residual(Shortcut(target_decay=0.0, guidance=1.5), GaussianFlowMap(gaussian()), None, states, s)


@pytest.mark.parametrize("taught", [False, True])
def test_evaluations_of_a_step(taught):
    """Of 64 rows 8 jump: one evaluation of the student for each row, two of its average for each jump.

    A teacher gives 56 diagonal velocities, and two for each jump of the finest level; guidance adds those to the
    average's instead.
    """
    teacher = classes()
    student = GaussianFlowMap(teacher)
    objective = Shortcut(target=TeacherVelocity()) if taught else Shortcut(guidance=1.5)
    objective.setup(student, teacher)
    t = torch.full((64,), 0.5).double()
    states = labelled(teacher, t, t - 1 / 64)  # all jumps are of the finest level
    loss_of(objective, student, teacher if taught else None, states, step=0, generator=generator())
    assert student.evaluations == 64
    assert objective.tutor.evaluations == (16 if taught else 32)
    assert teacher.evaluations == (56 + 16 if taught else 0)


def test_it_passes_the_kit_with_data_and_with_a_teacher():
    torch.manual_seed(0)
    student = NetworkFlowMap(MLP(dim=2, hidden_size=16, num_classes=2), "two_time")
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    teacher = GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]])
    check_objective(distillation(target_decay=0.9, share=0.5), student, teacher)
    source = NoisedData(dataset=ExactSamples(teacher))
    check_objective(Shortcut(guidance=1.5, share=0.5), student, None, source)


def test_its_law_is_that_of_the_paper():
    """Seven rows in eight at times k/128, and jumps of lengths 1, 1/2, ..., 1/64, equally likely, on their grids."""
    t, s = Shortcut().law(0.0).sample(80_000, generator())
    assert torch.equal(t[:70_000], s[:70_000])
    assert (128 * t[:70_000] % 1 == 0).all()
    assert t[:70_000].min() == 1 / 128
    length = (t - s)[70_000:]
    counts = torch.stack([(length == 0.5**level).double().mean() for level in range(7)])
    torch.testing.assert_close(counts, torch.full((7,), 1 / 7).double(), rtol=0, atol=0.015)
    assert (t[70_000:] / length % 1 == 0).all()


# The average of the student, which several objectives share.


def small() -> NetworkFlowMap:
    torch.manual_seed(0)
    return NetworkFlowMap(MLP(dim=2, hidden_size=8, depth=1), "two_time")


def test_the_average_follows_the_student():
    """theta' <- d theta' + (1 - d) theta with d = min(decay, (1 + n) / (10 + n)); its gradients are never taken."""
    student = small().train()
    objective = Shortcut(target_decay=0.25)
    objective.setup(student, None)
    average = objective.modules()["target"]
    assert objective.tutor is average
    assert not average.training
    assert not any(p.requires_grad for p in average.parameters())
    wanted = [p.detach().clone() for p in student.parameters()]
    for step in range(4):
        with torch.no_grad():
            for p in student.parameters():
                p.add_(1.0)
        objective.after_step(step)
        decay = min(0.25, (1 + step) / (10 + step))
        wanted = [decay * a + (1 - decay) * p.detach() for a, p in zip(wanted, student.parameters(), strict=True)]
        for a, b in zip(average.parameters(), wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_without_decay_the_student_is_its_own_target():
    student, objective = small(), Shortcut(target_decay=0.0)
    objective.setup(student, None)
    objective.after_step(0)
    assert not objective.modules()
    assert objective.tutor is student


def test_targets_come_from_the_average():
    """Moving the student alone leaves the target of the loss where it was."""
    teacher = gaussian()
    student = GaussianFlowMap(teacher)
    objective = Shortcut()
    objective.setup(student, None)
    states, s = at_level(teacher, 0)
    with torch.no_grad():
        student.mean += 0.3
    got = residual(objective, student, None, states, s)
    true = GaussianFlowMap(teacher).average_velocity(states.x, states.t, s)
    torch.testing.assert_close(got, (student.average_velocity(states.x, states.t, s) - true).detach())


RUN = """
distribution = @ring()
train.teacher = %distribution
train.flow_map = @network()
network.network = @mlp()
mlp.hidden_size = 8
mlp.depth = 1
mlp.num_classes = None
train.objective = @shortcut()
shortcut.target_decay = 0.8
shortcut.share = 0.5
train.states = @noised_data()
noised_data.dataset = @exact_samples()
exact_samples.teacher = %distribution
train.optimizer = @AdamW
AdamW.lr = 1e-2
train.steps = 8
train.batch_size = 16
train.log_every = 2
train.sample_every = 0
train.checkpoint_every = 4
"""


def test_a_run_with_an_average_continues_bit_for_bit(tmp_path):
    config = write(tmp_path / "shortcut.gin", RUN)
    flowdistill.train(gin_file=config, workdir=tmp_path / "whole")
    flowdistill.train(gin_file=config, gin_bindings=["train.steps = 6"], workdir=tmp_path / "parts")
    flowdistill.train(gin_file=config, workdir=tmp_path / "parts")
    whole, parts = (sorted((tmp_path / name / "checkpoints").glob("step_*"))[-1] for name in ("whole", "parts"))
    for name in ("student", "target"):
        file = f"{name}.safetensors"
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    assert (whole / "target.safetensors").read_bytes() != (whole / "student.safetensors").read_bytes()
