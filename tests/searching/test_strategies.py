"""Searches for noises against closed forms, and budgets to the last evaluation."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from flowdistill import Condition, ConfigError, DataError, Verifier
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import Jumps
from flowdistill.networks import MLP
from flowdistill.plumbing.flops import Flops
from flowdistill.plumbing.randomness import step_generator
from flowdistill.searching import BestOf, Candidates, PricedModel, SuccessiveHalving, Trials, ZeroOrder
from flowdistill.searching.noises import find
from flowdistill.searching.trials import evaluation_flops
from flowdistill.searching.verifiers import FunctionVerifier
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.wrapped_teachers import NetworkTeacher

LARGEST_OF_TEN = 1.53875  # E max of 10 standard normals, whose deviation is 0.587


def first(samples, condition):
    """The first coordinate."""
    return samples[:, 0]


def trials(
    teacher, student=None, score=first, *, budget=80.0, rows=4, steps=16, batch_size=100, labels=None, price=None
):
    """The trials of ``rows`` samples; without a student the teacher searches alone."""
    condition = Condition(labels)
    unit = evaluation_flops(teacher, condition)
    expensive = PricedModel(teacher, unit, condition)
    cheap = expensive if student is None else PricedModel(student, unit, condition)
    if price is not None:
        cheap.price = price
    return Trials(
        proposer=cheap,
        teacher=expensive,
        teacher_steps=steps,
        verifier=score if isinstance(score, Verifier) else FunctionVerifier(score),
        decode=lambda samples: samples,
        budget=budget,
        condition=condition,
        generators=[step_generator(0, row, "search") for row in range(rows)],
        batch_size=batch_size,
    )


def gaussian(dim=1):
    teacher = GaussianTeacher(mean=[1.0] * dim, covariance=0.25)
    return teacher, GaussianFlowMap(teacher).requires_grad_(False)


@pytest.mark.parametrize("alone", [False, True])
def test_the_best_of_n_noises_is_the_largest_of_n_normals(alone):
    """The teacher is a Gaussian in one dimension: the best sample has the largest noise."""
    teacher, student = gaussian()
    budget = 10 * 4 if alone else 4 + 10
    result = find(BestOf(), trials(teacher, None if alone else student, budget=budget, rows=4000, steps=4))
    error = 4 * 0.587 / math.sqrt(4000)
    assert result.noise.mean().item() == pytest.approx(LARGEST_OF_TEN, abs=error)
    assert result.student_evaluations.mean() == (0 if alone else 10)
    assert result.teacher_evaluations.mean() == (40 if alone else 4)


def test_scores_are_those_of_the_teachers_samples_and_not_of_the_proxy():
    teacher, student = gaussian()
    with torch.no_grad():
        student.mean += 5.0
    result = find(BestOf(), trials(teacher, student, rows=50))
    assert torch.equal(result.scores, result.samples[:, 0])
    again = PricedModel(teacher, 0, Condition())(result.noise, 16, Condition())
    assert torch.allclose(result.samples, again)
    assert result.scores.mean() < 3


def closeness(samples, condition):
    return -(samples - 3.0).square().sum(1)


def test_zero_order_climbs_and_never_falls():
    """On a quadratic far from the data, whose gradient neighbours follow, and against as many independent noises."""
    teacher, _ = gaussian(dim=16)
    scores = [
        find(ZeroOrder(neighbours=5), trials(teacher, score=closeness, budget=2.0 * n, rows=40, steps=2)).scores
        for n in (5, 10, 20, 40, 80)
    ]
    for before, after in itertools.pairwise(scores):
        assert (after >= before).all()
        assert after.mean() > before.mean() + 0.3
    random = find(BestOf(), trials(teacher, score=closeness, budget=160.0, rows=40, steps=2)).scores
    assert scores[-1].mean() > random.mean() + 3


def test_zero_order_of_one_round_is_the_best_of_its_noises():
    teacher, student = gaussian(dim=3)
    a, b = (find(s, trials(teacher, student, budget=16 + 12.0, rows=20)) for s in (BestOf(), ZeroOrder(neighbours=12)))
    assert torch.equal(a.noise, b.noise)
    c, d = (find(ZeroOrder(neighbours=4, radius=r), trials(teacher, student, budget=28.0, rows=20)) for r in (0.1, 1.0))
    assert not torch.equal(c.noise, d.noise)


@pytest.mark.parametrize("radius", [0.2, 0.9])
def test_neighbours_of_noise_are_noise(radius):
    """A verifier that likes the newest best makes a chain of ten neighbours, the last of which is normal again."""
    calls = []

    def newest(samples, condition):
        calls.append(1)
        return torch.full((len(samples),), float(len(calls)))

    teacher, student = gaussian(dim=8)
    problem = trials(teacher, student, newest, budget=16 + 10.0, rows=2000, batch_size=2000)
    noise = find(ZeroOrder(radius=radius, neighbours=1), problem).noise
    assert noise.square().mean().item() == pytest.approx(1.0, abs=4 * math.sqrt(2 / noise.numel()))
    start = trials(teacher, student, rows=2000).draw(1)[0]
    kept = (1 - radius**2) ** (9 / 2)  # nine steps from the first noise
    assert (noise * start).mean().item() == pytest.approx(kept, abs=4 / math.sqrt(noise.numel()))


def test_halving_with_an_exact_student_finds_the_best_of_all():
    """Its scores are the same at every number of steps, so that the best noise survives all rounds."""
    teacher, student = gaussian(dim=3)
    problem, strategy = trials(teacher, student, budget=120.0, rows=30), SuccessiveHalving()
    rounds = strategy.rounds(problem)
    assert rounds == [(1, 30), (2, 15), (4, 7)]  # 30 + 30 + 28 of 88, beside two of the teacher's samples
    result = find(strategy, problem)
    drawn = trials(teacher, student, rows=30).draw(30)
    assert torch.equal(result.noise, drawn.gather(0, drawn[..., :1].argmax(0, keepdim=True).expand(1, 30, 3))[0])
    assert result.student_evaluations.unique().item() == 88
    assert result.teacher_evaluations.unique().item() == 32


def test_halving_lets_the_teacher_decide_between_the_finalists():
    """A proxy that is blind to the score leaves the choice to the teacher, which finds the better of its finalists."""
    teacher, student = gaussian()
    with torch.no_grad():
        student.log_variances.fill_(-60.0)
    student.jumps = Jumps.FROM_NOISE
    result = find(SuccessiveHalving(finalists=10), trials(teacher, student, budget=10 * 4 + 10.0, rows=4000, steps=4))
    assert result.noise.mean().item() == pytest.approx(LARGEST_OF_TEN, abs=4 * 0.587 / math.sqrt(4000))


@pytest.mark.parametrize(
    "strategy", [BestOf(), ZeroOrder(neighbours=3), SuccessiveHalving(), SuccessiveHalving(finalists=3)]
)
@given(st.floats(120, 300), st.floats(0.05, 3.0), st.booleans(), st.booleans())
def test_budgets_are_kept_and_used_up(strategy, budget, price, anchored, guided):
    """For any budget and price: what was counted is within the budget, and one more noise would not have been."""
    plain, student = gaussian(dim=2)
    teacher = GuidedTeacher(plain, 1.5, guide=gaussian(dim=2)[0]) if guided else plain
    student.jumps = Jumps.FROM_NOISE if anchored else Jumps.ANY
    problem = trials(teacher, student, budget=budget, rows=2, steps=8, price=price)
    before = student.evaluations, teacher.evaluations
    result = find(strategy, problem)
    students, teachers = student.evaluations - before[0], teacher.evaluations - before[1]
    assert (result.student_evaluations.sum(), result.teacher_evaluations.sum()) == (students, teachers)
    cost = (students * price + teachers) / 2
    assert result.cost.mean().item() == pytest.approx(cost)
    assert cost <= budget * (1 + 1e-9)
    if isinstance(strategy, SuccessiveHalving):
        rounds = strategy.rounds(problem)
        assert [steps for steps, _ in rounds] == ([1] if anchored else [1, 2, 4])
        sizes = [max(strategy.finalists, (rounds[0][1] + 1) >> i) for i in range(len(rounds))]
        one_more = sum((size - now) * steps * price for size, (steps, now) in zip(sizes, rounds, strict=True))
        assert teachers == 2 * strategy.finalists * 8 * (2 if guided else 1)
    else:
        one_more = price
        assert teachers == 2 * 8 * (2 if guided else 1)
    assert cost + one_more > budget * (1 - 1e-9)


@pytest.mark.parametrize("strategy", [BestOf(), ZeroOrder(), SuccessiveHalving(steps=(1, 2))])
@pytest.mark.parametrize("alone", [False, True])
def test_networks_cost_their_operations(strategy, alone):
    """The cost is the operations of the whole search over those of one evaluation of the teacher's network."""
    torch.manual_seed(0)
    teacher = GuidedTeacher(NetworkTeacher(MLP(dim=2, hidden_size=32, depth=2, num_classes=3)), 1.5)
    student = None if alone else NetworkFlowMap(MLP(dim=2, hidden_size=16, depth=1, num_classes=3)).eval()
    problem = trials(teacher, student, budget=60.3, steps=4, labels=torch.tensor([0, 1, 2, 0]))
    unit = evaluation_flops(teacher, problem.condition)
    with Flops() as flops:
        result = find(strategy, problem)
    assert unit > 1000
    assert problem.teacher.price == 1.0  # of each of the two evaluations of a guided step
    assert flops.total / unit / 4 == pytest.approx(result.cost.mean().item(), rel=1e-9)
    assert 60.3 - 8 < result.cost.mean() <= 60.3
    assert alone or 0.05 < problem.proposer.price < 0.9


def test_what_is_found_for_a_sample_depends_on_no_other():
    """Neither on how many are evaluated at a time, nor on how many there are."""
    teacher, student = gaussian(dim=3)
    for strategy in (BestOf(), ZeroOrder(), SuccessiveHalving()):
        runs = [
            find(strategy, trials(teacher, student, closeness, rows=rows, batch_size=size))
            for rows, size in ((9, 100), (9, 100), (9, 7), (4, 1))
        ]
        for other in runs[1:]:
            n = len(other)
            assert torch.equal(runs[0].noise[:n], other.noise)
            assert torch.allclose(runs[0].scores[:n], other.scores, rtol=1e-5)


def test_rows_keep_their_labels():
    """Each class has its own mean, and the verifier sees each sample with its own label."""
    teacher = GaussianTeacher(mean=[0.0], covariance=0.01, class_means=[[-10.0], [0.0], [10.0]])
    labels = torch.tensor([2, 0, 1, 2])
    seen = []

    def score(samples, condition):
        seen.append((samples[:, 0] / 10 + 1 - condition.labels).abs().max())
        return samples[:, 0]

    student = GaussianFlowMap(teacher).requires_grad_(False)
    for strategy in (BestOf(), ZeroOrder(), SuccessiveHalving()):
        result = find(strategy, trials(teacher, student, score, labels=labels, batch_size=3))
        assert torch.equal(result.labels, labels)
        assert (result.samples[:, 0] / 10 + 1 - labels).abs().max() < 0.1
    assert max(seen) < 0.1


def test_candidates_are_sorted_for_each_sample():
    x = torch.tensor([[1.0, 5.0], [3.0, 4.0], [2.0, 6.0]])
    best = Candidates(x[..., None], -x[..., None], x).top(2)
    assert best.scores.tolist() == [[3.0, 6.0], [2.0, 5.0]]
    assert best.noise[..., 0].tolist() == [[3.0, 6.0], [2.0, 5.0]]
    assert best.samples[..., 0].tolist() == [[-3.0, -6.0], [-2.0, -5.0]]


def test_progress_adds_up_to_the_cost():
    teacher, student = gaussian()
    told = []
    problem = trials(teacher, student, rows=7, batch_size=10)
    object.__setattr__(problem, "progress", told.append)
    result = find(BestOf(), problem)
    assert sum(told) == pytest.approx(result.cost.sum().item())


@pytest.mark.parametrize(
    ("strategy", "least"),
    [(BestOf(), 16.5), (ZeroOrder(), 16.5), (SuccessiveHalving(), 39), (SuccessiveHalving(finalists=1), 19.5)],
)
def test_too_small_a_budget_names_the_least(strategy, least):
    teacher, student = gaussian()
    with pytest.raises(ConfigError, match=rf"steps costs 16, and this search at least {least}$"):
        find(strategy, trials(teacher, student, budget=least - 0.01, price=0.5))
    find(strategy, trials(teacher, student, budget=least, price=0.5))


@pytest.mark.parametrize(
    "score", [lambda x, c: x[:, 0] * math.nan, lambda x, c: x, lambda x, c: x[1:, 0]], ids=["nan", "shape", "length"]
)
def test_scores_that_cannot_be_compared(score):
    with pytest.raises(DataError, match="finite scores"):
        find(BestOf(), trials(*gaussian(), score))


def test_settings_out_of_range():
    for build in (
        lambda: ZeroOrder(radius=0.0),
        lambda: ZeroOrder(radius=1.1),
        lambda: ZeroOrder(neighbours=0),
        lambda: SuccessiveHalving(finalists=0),
        lambda: SuccessiveHalving(steps=()),
        lambda: SuccessiveHalving(steps=(0,)),
    ):
        with pytest.raises(ValueError, match="must be"):
            build()
