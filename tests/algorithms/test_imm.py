"""Inductive moment matching: what the discrepancy measures, its bias, and the laws of its times."""

import itertools

import attrs
import pytest
import torch
from exact import gradient, loss_of, perturbed

from flowdistill import ConfigError, States
from flowdistill.algorithms.imm import IMM
from flowdistill.data import ExactSamples
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Condition
from flowdistill.networks import MLP
from flowdistill.pairs import Below, Grouped
from flowdistill.paths import interpolate
from flowdistill.states import NoisedData
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.testing import check_objective
from flowdistill.times import Always, Uniform
from flowdistill.velocities import TeacherVelocity

T, S, R = 0.8, 0.2, 0.75
WHOLE = IMM(data_std=1.0)  # the kernel's width is then the length of the jump in one dimension


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def line(variance=0.25):
    """A Gaussian in one dimension, of standard deviation 1/2."""
    return GaussianTeacher(torch.zeros(1).double(), torch.full((1,), variance).double())


def deviation(t):
    return (0.25 * (1 - t) ** 2 + t**2) ** 0.5


def groups(size, n=20_000, r=R, seed=0):
    """What the exact map makes of noised data at T and of the same data and noise at r, (n, size, 1) each."""
    g = generator(seed)
    clean, noise = 0.5 * torch.randn(n, size, 1, generator=g).double(), torch.randn(n, size, 1, generator=g).double()
    later, earlier = (1 - T) * clean + T * noise, (1 - r) * clean + r * noise
    return later * deviation(S) / deviation(T), earlier * deviation(S) / deviation(r)


def measured(y, target, objective=WHOLE):
    """The discrepancy of each group with the terms j = k, and without them."""
    n, size = y.shape[:2]
    gap = torch.full((n,), T - S).double()
    whole = objective.discrepancy(y, target, gap)
    diagonal = objective.discrepancy(y.reshape(-1, 1, 1), target.reshape(-1, 1, 1), gap.repeat_interleave(size))
    return whole, (whole * size**2 - diagonal.reshape(n, size).sum(1)) / (size * (size - 1))


@pytest.mark.parametrize(("size", "floor"), [(4, 0.0119), (2, 0.0238)])
def test_the_exact_map_has_no_discrepancy_but_that_of_the_diagonal(size, floor):
    whole, unbiased = measured(*groups(size))
    assert abs(float(unbiased.mean())) < 4 * float(unbiased.std()) / len(unbiased) ** 0.5
    assert float(unbiased.mean()) == pytest.approx(0, abs=1e-4)
    assert float(whole.mean()) == pytest.approx(floor, abs=2e-4)
    y, target = groups(size)
    closeness = torch.exp(-(y - target).abs() / (T - S)).mean()
    assert float(whole.mean()) == pytest.approx(float(2 / size * (1 - closeness)), abs=2e-4)
    away, _ = measured(0.7 * y, target)
    assert float(away.mean()) > 1.2 * floor


SLOPES = torch.arange(-20, 26) / 20


def best_slope(loss, slopes=SLOPES):
    """The slope of y over that of the exact map with the least loss, the target being exact."""
    y, target = groups(4, n=4000)
    return float(slopes[torch.stack([loss(a * y, target) for a in slopes]).argmin()])


def attraction(y, target):
    """What is left of the discrepancy without k(y_j, y_k), up to a constant: with the terms j = k, and without them."""
    kernel = torch.exp(-torch.cdist(y, target) / (T - S))
    diagonal = kernel.diagonal(dim1=1, dim2=2)
    return -2 * kernel.mean(), -2 * (kernel.sum() - diagonal.sum()) / (kernel.numel() - diagonal.numel())


def test_the_exact_slope_is_best_and_collapse_is_best_without_repulsion():
    assert best_slope(lambda y, target: measured(y, target)[0].mean()) == 1.0
    assert best_slope(lambda y, target: measured(y, target)[1].mean(), SLOPES[20:]) == 1.0
    assert best_slope(lambda y, target: attraction(y, target)[1]) == 0.0
    assert best_slope(lambda y, target: attraction(y, target)[0]) > 0.9  # a consistency loss is in the terms j = k


def test_only_the_diagonal_tells_a_map_from_its_mirror_image():
    y, target = groups(4)
    whole, unbiased = measured(-y, target)
    assert abs(float(unbiased.mean())) < 2e-3
    assert float(whole.mean()) == pytest.approx(0.295, abs=0.01)


def test_a_long_way_from_t_to_r_biases_the_slope():
    y, target = groups(4, n=40_000, r=T - 0.3)
    fine = torch.arange(90, 105) / 100
    losses = torch.stack([measured(a * y, target)[0].mean() for a in fine])
    assert float(fine[losses.argmin()]) == pytest.approx(0.96, abs=0.011)


def diagonal_slope(gap, deterministic=False):
    """d/da of the expected diagonal term at a = 1, by quadrature over x_t and v given x_t."""
    nodes = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    density = torch.exp(-nodes.square() / 2) / torch.exp(-nodes.square() / 2).sum()
    x = deviation(T) * nodes[:, None]
    mean = (T - 0.25 * (1 - T)) / deviation(T) ** 2 * x
    velocity = mean if deterministic else mean + 0.5 / deviation(T) * nodes
    target = deviation(S) / deviation(T - gap) * (x - gap * velocity)
    a = torch.ones((), dtype=torch.float64, requires_grad=True)
    y = (a * deviation(S) / deviation(T) * x).expand_as(target)
    loss = WHOLE.discrepancy(y.reshape(-1, 1, 1), target.reshape(-1, 1, 1), torch.full((y.numel(),), T - S).double())
    weights = density[:, None] * (torch.ones_like(target) / target.shape[1] if deterministic else density)
    return float(torch.autograd.grad((weights * loss.reshape(y.shape)).sum(), a)[0])


def test_the_diagonal_biases_the_gradient_by_the_order_of_the_gap():
    slopes = [diagonal_slope(gap) for gap in (0.08, 0.04, 0.02)]
    assert slopes[0] > 0
    for long, short in itertools.pairwise(slopes):
        assert long / short == pytest.approx(2, abs=0.25)


def test_the_rest_of_the_gradient_vanishes_on_average():
    y, target = groups(4)

    def slopes(start):
        a = torch.full((len(y),), start, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(measured(a[:, None, None] * y, target)[1].sum(), a)[0]

    exact, away = slopes(1.0), slopes(0.8)
    assert abs(float(exact.mean())) < 4 * float(exact.std()) / len(y) ** 0.5
    assert abs(float(away.mean())) > 12 * float(away.std()) / len(y) ** 0.5


# The objective.


def noised(teacher, n=64, size=4, seed=0, low=0.0, end=0.0):
    """Data at times in groups, and jumps from there to a time ``end`` that all share, or to uniform times."""
    g = generator(seed)
    clean, noise = teacher.sample_data(n, g), teacher.sample_prior(n, g)
    ends = Uniform() if end is None else Always(value=end)
    pairs = Below(starts=Uniform(low=low, high=0.994), ends=ends)
    t, s = (time.double() for time in Grouped(pairs=pairs, size=size).sample(n, g))
    return States(x=interpolate(clean, noise, t), t=t, s=s, condition=Condition(), clean=clean, noise=noise)


class _WithoutRepulsion(IMM):
    def discrepancy(self, y, target, gap):
        attraction = super().discrepancy(y.detach(), target, gap) * 0
        width = self.data_std * y.shape[2] * gap[:, None, None]
        return attraction - 2 * torch.exp(-torch.cdist(y, target) / width).mean((1, 2))


@pytest.mark.parametrize(("objective", "collapses"), [(IMM, False), (_WithoutRepulsion, True)])
def test_training_recovers_the_spread_and_without_repulsion_loses_it(objective, collapses):
    """A map whose variance starts too small, from data: r is the end of every jump, so the targets are data."""
    teacher = line()
    student = GaussianFlowMap(line(0.12))
    objective = objective(data_std=0.5, decrement=1e6, group_size=32)
    optimizer = torch.optim.Adam([student.log_variances], lr=0.05)
    for step in range(150):
        states = noised(teacher, n=512, size=32, seed=step)
        optimizer.zero_grad()
        loss_of(objective, student, None, states, step=step, generator=generator(step)).loss.backward()
        optimizer.step()
    variance = float(student.log_variances.detach().exp())
    if collapses:
        assert variance < 0.03
    else:
        assert variance == pytest.approx(0.25, rel=0.15)


def test_mean_gradient_from_data_is_small_at_the_exact_map():
    """What the diagonal leaves for short ways from t to r is far below the gradient at another map."""
    teacher = GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())
    objective = IMM(decrement=0.5, group_size=16, data_std=1.0)
    means = []
    for student in (GaussianFlowMap(teacher), perturbed(teacher, 0.4)):
        rows = []
        for seed in range(24):
            states = noised(teacher, n=256, size=16, seed=seed)
            rows.append(
                gradient(loss_of(objective, student, None, states, step=0, generator=generator(seed)).loss, student)
            )
        means.append(float(torch.stack(rows).mean(0).norm()))
    assert means[0] < 0.3 * means[1]


def test_with_a_teacher_the_loss_at_the_exact_map_is_of_second_order_in_the_gap():
    """There an Euler step from t to r is the only error; at another map the loss is of first order."""
    teacher = GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())
    states = noised(teacher, n=512, low=0.3)
    exact, away = [], []
    for decrement in (0.04, 0.02, 0.01):
        objective = IMM(decrement=decrement, data_std=1.0, target=TeacherVelocity())
        for student, errors in ((GaussianFlowMap(teacher), exact), (perturbed(teacher), away)):
            output = loss_of(objective, student, teacher, states, step=0, generator=generator())
            errors.append(float(output.metrics["error"]))
    for long, short in itertools.pairwise(exact):
        assert long / short == pytest.approx(4, abs=0.4)
    for long, short in itertools.pairwise(away):
        assert long / short == pytest.approx(2, abs=0.2)
    assert away[-1] > 10 * exact[-1]


def test_with_a_teacher_the_kernel_has_its_kink_beside_the_exact_map():
    """The minimum, where y = y', is off by the second order in the gap; the gradient at the map does not shrink."""
    g = generator()
    x = deviation(T) * torch.randn(2000, 4, 1, generator=g).double()
    rate = (T - 0.25 * (1 - T)) / deviation(T) ** 2
    offsets, slopes = [], []
    for gap in (0.04, 0.02):
        target = deviation(S) / deviation(T - gap) * (1 - gap * rate) * x
        best = deviation(T) / deviation(T - gap) * (1 - gap * rate)
        a = torch.ones((), dtype=torch.float64, requires_grad=True)
        assert float(measured(best * deviation(S) / deviation(T) * x, target)[0].mean()) < 1e-6
        loss = measured(a * deviation(S) / deviation(T) * x, target)[0].mean()
        offsets.append(abs(best - 1))
        slopes.append(abs(float(torch.autograd.grad(loss, a)[0])))
    assert offsets[0] / offsets[1] == pytest.approx(4, abs=0.4)
    assert slopes[0] / slopes[1] == pytest.approx(1, abs=0.1)
    assert slopes[1] > 0.05


def test_gradient_is_that_of_a_detached_target():
    teacher = line()
    student, states = perturbed(teacher), noised(teacher, low=0.2, end=0.1)
    objective = IMM(data_std=0.7)
    output = loss_of(objective, student, None, states, step=0, generator=generator())
    s = states.t.clamp(max=0.1)
    r = objective.before(states.t, s)
    y = student(states.x, states.t, s).reshape(-1, 4, 1)
    target = student(interpolate(states.clean, states.noise, r), r, s).reshape(-1, 4, 1)
    width = 0.7 * (states.t - s)[::4, None, None]

    def expected(other):
        value = torch.zeros(len(y)).double()
        for a, b, sign in ((y, y, 1), (other, other, 1), (y, other, -2)):
            distance = (a - b.mT).abs().clamp_min(1e-8)
            value = value + sign * torch.exp(-distance / width).mean((1, 2))
        return (objective.weight(states.t[::4]) * value).mean(), value.mean()

    loss, error = expected(target.detach())
    torch.testing.assert_close(output.loss, loss)
    torch.testing.assert_close(output.metrics["error"], error)
    assert output.residual_norm is None
    right = gradient(output.loss, student)
    torch.testing.assert_close(right, gradient(loss, student))
    assert (gradient(expected(target)[0], student) - right).norm() > 0.02 * right.norm()


def test_equal_samples_have_a_finite_gradient():
    """Where |a - b| alone has none, as between each sample and itself."""
    y = torch.zeros(2, 3, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(WHOLE.discrepancy(y, y.detach(), torch.tensor([0.5, 0.0]).double()).sum(), y)
    assert torch.equal(slope, torch.zeros_like(y))
    naive = torch.exp(-(y[:, :, None] - y[:, None]).square().sum(-1).sqrt()).sum()
    assert torch.autograd.grad(naive, y)[0].isnan().any()


@pytest.mark.parametrize("dimension", [1, 7])
def test_the_kernel_widens_with_the_jump_and_the_dimension(dimension):
    y = torch.zeros(1, 1, dimension).double()
    target = y + 0.3
    distance = 0.3 * dimension**0.5
    for gap in (0.1, 0.9):
        value = IMM(data_std=0.4).discrepancy(y, target, torch.tensor([gap]).double())
        assert float(value) == pytest.approx(
            2 * (1 - float(torch.exp(torch.tensor(-distance / (dimension * gap * 0.4)))))
        )


@pytest.mark.parametrize(("a", "b"), [(1.0, 4.0), (2.0, 4.0), (1.0, 5.0)])
def test_weight(a, b):
    """w = sigmoid(b - l) (-dl/dt)/2 alpha^a / (alpha^2 + t^2), alpha = 1 - t."""
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    ratio = 2 * ((1 - t) / t).log()
    (rate,) = torch.autograd.grad(ratio.sum(), t)
    wanted = torch.sigmoid(b - ratio) * -rate / 2 * (1 - t) ** a / ((1 - t) ** 2 + t**2)
    torch.testing.assert_close(IMM(weight_power=a, weight_shift=b).weight(t), wanted)
    ends = IMM(weight_power=a, weight_shift=b).weight(torch.tensor([0.0, 1.0]))
    assert ends.isfinite().all()


def test_r_is_lower_by_a_constant_in_the_ratio_of_noise_to_data():
    objective = IMM()
    t = torch.linspace(0.1, 0.994, 100, dtype=torch.float64)
    r = objective.before(t, torch.zeros_like(t))
    torch.testing.assert_close(t / (1 - t) - r / (1 - r), torch.full_like(t, 160 / 4096))
    assert torch.equal(objective.before(t, t - 1e-6), t - 1e-6)
    edges = torch.tensor([0.0, 1e-3, 1.0])
    for decrement in (160 / 4096, 1.0, 1e6):
        assert torch.equal(IMM(decrement=decrement).before(edges, 0 * edges), torch.tensor([0.0, 0.0, 1.0]))


class _Spy(GaussianFlowMap):
    """Keeps the times it is asked for."""

    def average_velocity(self, x, t, s, condition=None):
        self.__dict__.setdefault("seen", []).append((x, t, s))
        return super().average_velocity(x, t, s, condition)


@pytest.mark.parametrize("velocity", ["data", "teacher"])
def test_times_points_and_evaluations(velocity):
    """One s and one r for each group; the point at r is that of the same data and noise, or an Euler step."""
    teacher = line()
    student, states = _Spy(teacher), noised(teacher, end=None)
    objective = IMM() if velocity == "data" else IMM(target=TeacherVelocity())
    assert objective.needs_data == (velocity == "data")
    loss_of(objective, student, teacher, states, step=0, generator=generator())
    (x_r, r, s), (x_t, t, end) = student.seen
    assert torch.equal(t, states.t)
    assert torch.equal(x_t, states.x)
    assert torch.equal(s, end)
    assert len(s.unique()) == 16
    for times in (r, s):
        assert torch.equal(times, times[::4].repeat_interleave(4))
    assert (r < t).all()
    assert (r >= s).all()
    point = interpolate(states.clean, states.noise, r)
    if velocity == "teacher":
        point = states.x - (t - r)[:, None] * teacher.velocity(states.x, t)
    torch.testing.assert_close(x_r, point)
    teacher_evaluations = teacher.evaluations - (64 if velocity == "teacher" else 0)
    assert student.evaluations == 2 * 64
    assert teacher_evaluations == (64 if velocity == "teacher" else 0)


def test_its_law_has_one_pair_for_each_group():
    """The objective owns the groups: no state source can give it states of other times."""
    objective = IMM(group_size=4, pairs=Below(starts=Uniform(low=0.2)))
    t, s = objective.law(0.0).sample(16, generator())
    for time in (t, s):
        groups = time.reshape(4, 4)
        assert (groups == groups[:, :1]).all()
        assert len(groups[:, 0].unique()) == 4
    assert (t >= 0.2).all()
    states = noised(line(), n=64)
    with pytest.raises(ConfigError, match="does not divide"):
        loss_of(IMM(group_size=3), GaussianFlowMap(line()), None, states, step=0, generator=generator())


def test_labels_within_a_group_are_told_apart_by_the_diagonal_alone():
    """A map that takes each of two classes to the other has the right samples as a whole."""
    objective, n = IMM(data_std=1.0), 4000
    g = generator()
    signs = 2.0 * torch.randint(2, (n, 4, 1), generator=g).double() - 1
    y = signs + 0.5 * torch.randn(n, 4, 1, generator=g).double()
    target = y + 0.01 * torch.randn(n, 4, 1, generator=g).double()
    right, right_unbiased = measured(y, target, objective)
    swapped, swapped_unbiased = measured(y - 2 * signs, target, objective)
    spread = float(swapped_unbiased.std()) / n**0.5
    assert abs(float((swapped_unbiased - right_unbiased).mean())) < 4 * spread
    assert float(swapped.mean()) > float(right.mean()) + 0.2


@pytest.mark.parametrize("velocity", ["data", "teacher"])
def test_conformance(velocity):
    teacher = GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]])
    torch.manual_seed(0)
    student = NetworkFlowMap(MLP(dim=2, hidden_size=16, num_classes=2))
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    source = NoisedData(dataset=ExactSamples(teacher))
    objective = IMM() if velocity == "data" else IMM(target=TeacherVelocity())
    check_objective(objective, student, teacher if velocity == "teacher" else None, source)


def test_fields_are_checked():
    for wrong in ({"group_size": 0}, {"decrement": 0.0}, {"data_std": 0.0}, {"weight_power": 0.5}):
        with pytest.raises(ValueError, match="must be"):
            attrs.evolve(IMM(), **wrong)
