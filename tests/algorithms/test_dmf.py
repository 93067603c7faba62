"""Decoupled MeanFlow: the converted network, the two halves of a batch, the logarithmic loss, guidance, times."""

import attrs
import pytest
import torch
from exact import (
    assert_exact,
    below,
    bound,
    data_states,
    gaussian_teachers,
    gradient,
    judge,
    loss_of,
    path_states,
    perturbed,
    prior_states,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import flowdistill
from flowdistill import OBJECTIVES, Condition, States
from flowdistill.algorithms import trajectory
from flowdistill.algorithms.dmf import DecoupledMeanFlow
from flowdistill.flow_maps import from_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import GeneratingVelocity, Jump
from flowdistill.networks import EDM2, MLP
from flowdistill.pairs import SortedPair, WithDiagonal
from flowdistill.paths import interpolate
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.testing import check_objective
from flowdistill.times import LogitNormal
from flowdistill.velocities import ConditionalVelocity, Jvp, TeacherVelocity
from flowdistill.wrapped_teachers import NetworkTeacher


def teacher(class_means=None):
    return GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double(), class_means)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def objective(**kwargs) -> DecoupledMeanFlow:
    return DecoupledMeanFlow(**{"pairs": WithDiagonal(share=0.5), **kwargs})


def distilling(**kwargs) -> DecoupledMeanFlow:
    return objective(target=TeacherVelocity(), **kwargs)


def loss_at(of, student, states, against=None, seed=0):
    return loss_of(of, student, against, states, step=0, generator=generator(seed)).loss


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# The converted network.


def edm2():
    torch.manual_seed(0)
    network = EDM2(8, 3, 5, 8, (1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return NetworkTeacher(network)


@pytest.mark.parametrize("build", [lambda: flowdistill.load_teacher("digits_teacher"), edm2], ids=["digits", "edm2"])
def test_a_converted_network_is_its_teacher_on_the_diagonal_bit_for_bit(build):
    of = build()
    student = from_teacher(of, "decoupled")
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in of.parameters())
    x, t = of.sample_prior(5, generator()), torch.linspace(0.1, 1.0, 5)
    condition = Condition(torch.arange(5) % of.num_classes)
    assert torch.equal(student.velocity(x, t, condition), of.velocity(x, t, condition))
    jump = student.average_velocity(x, t, 0.3 * t, condition)
    assert (jump - of.velocity(x, t, condition)).abs().flatten(1).amax(1).min() > 1e-3


def test_only_the_blocks_after_the_encoder_see_s():
    """In values and in the derivative with respect to s, and with two thirds of the blocks in the encoder."""
    of = flowdistill.load_teacher("digits_teacher")
    student = from_teacher(of, "decoupled")
    blocks, early = student.network.blocks, student.network.early_blocks
    assert (early, len(blocks)) == (3, 4)
    seen = [[] for _ in blocks]
    for block, kept in zip(blocks, seen, strict=True):
        block.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out.detach()))
    x, t = of.sample_prior(5, generator()), torch.linspace(0.1, 1.0, 5)
    condition = Condition(torch.arange(5))
    for share in (1.0, 0.5, 0.0):
        student.average_velocity(x, t, share * t, condition)
    for i, (first, *others) in enumerate(seen):
        assert all(torch.equal(first, other) == (i < early) for other in others)
    _, slope = bound(Jvp(), student).derivative(Jump(x, t, 0.5 * t, condition), ds=1.0)
    assert slope.abs().max() > 1e-3
    all_early = from_teacher(of, "decoupled", early_blocks=4)  # the last layer still sees s
    with torch.no_grad():
        all_early.network.final_layer.adaLN_modulation[1].weight.zero_()
    _, slope = bound(Jvp(), all_early).derivative(Jump(x, t, 0.5 * t, condition), ds=1.0)
    assert slope.abs().max() == 0


def test_it_trains_a_converted_network():
    of = GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]])
    student = from_teacher(of, "decoupled", network=MLP(dim=2, hidden_size=16, num_classes=2))
    check_objective(distilling(), student, of)


# The exact map.


@given(of=gaussian_teachers(), power=st.sampled_from((0.0, 1.0)))
@settings(max_examples=10)
def test_exact_map_has_no_residual_and_no_gradient(of, power):
    for draw in (path_states, prior_states, data_states):
        assert_exact(distilling(power=power), of, draw(of))


def test_from_data_there_is_no_mean_gradient_at_the_exact_map():
    """Without a weight: over 48 batches within 4 standard errors of zero, in every component."""
    of = objective(power=0.0)
    student, moved = GaussianFlowMap(teacher()), perturbed(teacher())
    found = {student: [], moved: []}
    for seed in range(48):
        states = data_states(teacher(), n=512, seed=seed, low=0.0)
        for model, gradients in found.items():
            gradients.append(gradient(loss_at(of, model, states, seed=seed), model))
    scores = {model: torch.stack(g).mean(0) / torch.stack(g).std(0) * 48**0.5 for model, g in found.items()}
    assert (scores[student].abs() < 4).all()
    assert (scores[moved].abs() > 8).any()


def test_the_published_model_guidance_has_its_fixed_point_at_2_5():
    """Weight 0.6 at t <= 0.7 is guidance by 1 / (1 - 0.6) there, in both halves; rows without a label are plain."""
    means = torch.tensor([[2.0, 0.0], [0.0, -1.5]]).double()
    of, g = teacher(means), generator()
    condition = Condition(torch.randint(-1, 2, (256,), generator=g))
    x, t = 1.5 * torch.randn(256, 2, generator=g).double(), 0.05 + 0.9 * torch.rand(256, generator=g).double()
    u = of.velocity(x, t, condition)  # n - x_0 is its own mean
    states = States(x=x, t=t, s=below(t), condition=condition, clean=x - t[:, None] * u, noise=x + (1 - t)[:, None] * u)
    velocity = ConditionalVelocity(omega=1.0, kappa=0.6, interval=(0.0, 0.7))
    guided = objective(target=velocity)
    error, slope = judge(guided, GaussianFlowMap(GuidedTeacher(of, 2.5, (0.0, 0.7))), None, states)
    assert error < 1e-9
    assert slope < 1e-9
    for scale, interval in ((2.5, (0.0, 1.0)), (1.6, (0.0, 0.7))):
        error, slope = judge(guided, GaussianFlowMap(GuidedTeacher(of, scale, interval)), None, states)
        assert error > 0.1
        assert slope > 1e-3


class _Directed(GeneratingVelocity):
    """A derivative in another direction."""

    def __init__(self, change):
        self.change = change

    def derivative(self, jump, *, dx=None, dt=0.0, ds=0.0, progress=0.0):
        dx, dt, ds = self.change(dx, dt, ds)
        return bound(Jvp(), self.student).derivative(jump, dx=dx, dt=dt, ds=ds)


DIRECTIONS = {
    "right": (lambda v, dt, ds: (v, 1.0, 0.0), False),
    "(v, 0, 0)": (lambda v, dt, ds: (v, 0.0, 0.0), True),
    "(v, 0, 1)": (lambda v, dt, ds: (v, 0.0, 1.0), True),
    "(v, 1, 1)": (lambda v, dt, ds: (v, 1.0, 1.0), True),
    "(-v, -1, 0)": (lambda v, dt, ds: (-v, -1.0, 0.0), True),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_mutants_of_the_derivative(name):
    change, wrong = DIRECTIONS[name]
    of = distilling(estimator=_Directed(change))
    error, slope = judge(of, GaussianFlowMap(teacher()), teacher(), path_states(teacher(), n=512))
    assert (error > 0.1) == wrong
    assert (slope > 0.05) == wrong


# The two halves.


def test_flow_matching_has_times_of_its_own():
    """Half of the rows lie at logit-normal(0, 1) times; the others are sorted pairs of two other laws."""
    t, s = DecoupledMeanFlow().law(0.0).sample(40_000, generator())
    assert torch.equal(t[:20_000], s[:20_000])
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(t[:20_000].quantile(levels), LogitNormal().quantile(levels), rtol=0, atol=0.015)
    assert (s[20_000:] < t[20_000:]).all()


def test_flow_matching_is_on_the_first_half_at_the_times_of_its_states():
    states, student = data_states(teacher(), n=8), perturbed(teacher(), 0.3)
    off = attrs.evolve(states, s=states.s + 0.01 * (torch.arange(8) >= 4))
    on = attrs.evolve(states, s=states.s + 0.01 * (torch.arange(8) < 4))
    plain, moved_off, moved_on = (loss_at(objective(), student, batch) for batch in (states, off, on))
    assert torch.equal(plain, moved_on)  # the ends of rows on the diagonal do not matter
    assert not torch.equal(plain, moved_off)


def published(student, states, joined=False):
    """Half of each loss, the mean of log(e + 0.01) over rows with detached targets; the log of the mean if joined."""
    n = len(states) // 2
    on, off, s = states[:n], states[n:], states.s
    first = (student.velocity(on.x, on.t) - (on.noise - on.clean)).square().mean(1)
    v = off.noise - off.clean
    average, slope = torch.func.jvp(
        lambda x, t: student.average_velocity(x, t, s[n:]), (off.x, off.t), (v, torch.ones_like(off.t))
    )
    target = (v - (off.t - s[n:])[:, None] * slope).detach()
    second = (average - target).square().mean(1)
    if joined:
        return 0.5 * ((first.mean() + 0.01).log() + (second.mean() + 0.01).log())
    return 0.5 * ((first + 0.01).log().mean() + (second + 0.01).log().mean())


def test_the_gradient_is_that_of_half_the_two_logarithmic_losses():
    states, student = data_states(teacher()), perturbed(teacher(), 0.3)
    loss = loss_at(objective(), student, states)
    close(gradient(loss, student), gradient(published(student, states), student))
    joined = gradient(published(student, states, joined=True), student)
    assert (gradient(loss, student) - joined).norm() > 0.05 * joined.norm()


def test_equal_halves_at_the_states_own_times_are_meanflow_distillation():
    states, student = path_states(teacher()), perturbed(teacher(), 0.3)
    shared = {"pairs": WithDiagonal(share=0.5), "power": 1.0, "eps": 0.01, "reduction": "mean"}
    other = OBJECTIVES.build("meanflow_distillation", **shared)
    assert torch.equal(loss_at(distilling(), student, states, teacher()), loss_at(other, student, states, teacher()))


def rows_touched(states, others):
    """Which rows' gradients differ between two batches, each row with a class mean of its own."""
    found = []
    for batch in (states, others):
        student = GaussianFlowMap(teacher(torch.zeros(8, 2).double()))
        found.append(torch.autograd.grad(loss_at(objective(), student, batch), student.class_means)[0])
    return (found[0] != found[1]).any(1).nonzero().flatten().tolist()


@pytest.mark.parametrize("row", [1, 6])
def test_the_weight_of_a_sample_depends_on_no_other(row, monkeypatch):
    """In either half, as it would with a variance that is broadcast over the batch."""
    states = attrs.evolve(data_states(teacher(), n=8), condition=Condition(torch.arange(8)))
    x, noise = states.x.clone(), states.noise.clone()
    noise[row] += 3.0
    x[row] = interpolate(states.clean, noise, states.t)[row]
    others = attrs.evolve(states, x=x, noise=noise)
    assert rows_touched(states, others) == [row]
    right = trajectory.pull

    def broadcast(residual, *, power, eps, reduction):
        weight = (residual.value.square().mean(1) + eps) ** -power
        return right(residual, scale=weight.mean().expand(len(weight)), reduction=reduction)

    monkeypatch.setattr(trajectory, "pull", broadcast)
    assert len(rows_touched(states, others)) > 1


@pytest.mark.parametrize(
    ("velocity", "students", "teachers"),
    [
        (ConditionalVelocity(), 1.5, 0),
        (ConditionalVelocity(omega=1.0, kappa=0.6), 3.5, 0),
        (TeacherVelocity(), 1.5, 1),
    ],
)
def test_evaluations_a_row(velocity, students, teachers):
    """1 for flow matching, 2 for MeanFlow, and 2 for guidance."""
    states = attrs.evolve(data_states(teacher()), condition=Condition(torch.zeros(64, dtype=torch.long)))
    of = teacher(torch.zeros(1, 2).double())
    student = GaussianFlowMap(of)
    loss_at(objective(target=velocity), student, states, of)
    assert student.evaluations == students * 64
    assert of.evaluations == teachers * 64


# The pairs of times.


@pytest.mark.parametrize("laws", [(0.4, 1.0, -1.2, 1.0), (-0.4, 1.0, -0.4, 1.0), (-0.5, 0.7, 0.5, 1.5)])
def test_sorted_pairs_have_the_joint_law_of_two_sorted_draws(laws):
    first, second = LogitNormal(mean=laws[0], std=laws[1]), LogitNormal(mean=laws[2], std=laws[3])
    law, g = SortedPair(first=first, second=second), generator()
    t, s = law.sample(40_000, g)
    assert (s <= t).all()
    a, b = first.sample(40_000, g), second.sample(40_000, g)
    levels = torch.linspace(0.05, 0.95, 19)
    larger, smaller = torch.maximum(a, b), torch.minimum(a, b)
    for ours, theirs in ((t, larger), (s, smaller), (t - s, larger - smaller), (t * s, larger * smaller)):
        torch.testing.assert_close(ours.quantile(levels), theirs.quantile(levels), rtol=0, atol=0.015)


def test_published_pairs():
    """Quantiles of t and of t - s at 5, 25, 50, 75 and 95 %; independent draws of the two laws would miss them."""
    law, g = DecoupledMeanFlow().pairs.pairs, generator()
    t, s = law.sample(100_000, g)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    wanted = torch.tensor([0.27, 0.46, 0.61, 0.75, 0.89]), torch.tensor([0.04, 0.17, 0.34, 0.51, 0.72])
    torch.testing.assert_close(t.quantile(levels), wanted[0], rtol=0, atol=0.01)
    torch.testing.assert_close((t - s).quantile(levels), wanted[1], rtol=0, atol=0.01)
    mutant = (t - law.second.sample_below(t, g)).quantile(levels)
    assert (mutant - wanted[1]).abs().max() > 0.015


def test_published_settings():
    of = DecoupledMeanFlow()
    assert (of.power, of.eps, of.reduction) == (1.0, 0.01, "mean")
    two_laws = SortedPair(first=LogitNormal(mean=0.4), second=LogitNormal(mean=-1.2))
    assert of.pairs == WithDiagonal(pairs=two_laws, share=0.5, times=LogitNormal(mean=0.0, std=1.0))
