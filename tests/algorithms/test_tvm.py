"""Terminal velocity matching, and gradients through derivatives."""

import attrs
import pytest
import torch
from exact import assert_exact, bent, data_states, gradient, judge, loss_of, path_states, perturbed, prior_states

from flowdistill import Condition
from flowdistill.algorithms.freeflow import FreeFlowPrediction
from flowdistill.algorithms.identities import Residual, pull
from flowdistill.algorithms.tvm import TerminalVelocityMatching
from flowdistill.algorithms.tvm import objective as module
from flowdistill.data import ExactSamples
from flowdistill.differentiation import jvp
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Jump
from flowdistill.networks import EDM2, MLP, SiT
from flowdistill.pairs import WithDiagonal
from flowdistill.paths import interpolate
from flowdistill.states import NoisedData
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.testing import check_objective
from flowdistill.velocities import FiniteDifference, Jvp, TeacherVelocity


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian() -> GaussianTeacher:
    return GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())


def distillation(share=0.25, **fields) -> TerminalVelocityMatching:
    return TerminalVelocityMatching(target=TeacherVelocity(), pairs=WithDiagonal(share=share, at_ends=True), **fields)


def ending(states, s):
    """The states with jumps to one time."""
    return attrs.evolve(states, s=torch.full_like(states.t, s))


def at_ends(states, rows):
    """The states with the first rows carried along their own data and noise to the ends of their jumps."""
    x = torch.cat([interpolate(states.clean, states.noise, states.s)[:rows], states.x[rows:]])
    return attrs.evolve(states, x=x, t=torch.cat([states.s[:rows], states.t[rows:]]))


@pytest.mark.parametrize("fields", [{}, {"power": 1.0}, {"estimator": Jvp()}, {"share": 0.0}])
@pytest.mark.parametrize("draw", [prior_states, path_states, data_states])
def test_exact_map_has_no_residual_and_no_gradient(draw, fields):
    teacher = gaussian()
    assert_exact(distillation(**fields), teacher, draw(teacher))


def test_an_exact_map_of_another_distribution_is_caught_by_the_teacher_alone():
    """Without one its end moves with its own velocity: only flow matching tells it from the data's."""
    teacher = gaussian()
    states = data_states(teacher)
    alone = TerminalVelocityMatching(target_decay=0.0, pairs=WithDiagonal(share=0.0))
    assert judge(alone, perturbed(teacher), None, states)[0] < 1e-12
    assert judge(alone, bent(teacher), None, states)[0] > 0.1
    assert judge(distillation(share=0.0), perturbed(teacher), teacher, states)[0] > 1e-2


def test_no_mean_gradient_from_data_at_the_exact_map():
    """Over 64 batches, within 4 standard errors; elsewhere far outside."""
    teacher = gaussian()
    objective = TerminalVelocityMatching(target_decay=0.0)
    student, moved = bent(teacher, 0.0), bent(teacher)
    with torch.no_grad():
        moved.mean += 0.3
    exact, wrong = [], []
    for seed in range(64):
        states = data_states(teacher, n=256, seed=seed)
        for model, into in ((student, exact), (moved, wrong)):
            loss = loss_of(objective, model, None, states, step=0, generator=generator(seed)).loss
            into.append(gradient(loss, model))
    gradients = torch.stack(exact)
    error = gradients.std(0) / len(gradients) ** 0.5
    assert (gradients.mean(0).abs() < 4 * error + 1e-12).all()
    far = torch.stack(wrong).mean(0).abs() > 8 * error
    assert far[:2].any()  # the mean
    assert far[-1]  # the bend


# With a teacher and from noise alone it is FreeFlow's prediction but for one stop-gradient.


def both(student, teacher, **fields):
    """The outputs of matching, and of FreeFlow's prediction at the same durations."""
    states = ending(prior_states(teacher), 0.3)
    objectives = distillation(share=0.0, **fields), FreeFlowPrediction(estimator=Jvp(), power=0.0)
    return tuple(loss_of(of, student, teacher, states, step=0, generator=generator()) for of in objectives)


def test_from_noise_its_residual_is_that_of_freeflow_and_its_gradient_is_not():
    teacher = gaussian()
    for student in (perturbed(teacher), bent(teacher)):
        own, freeflow = both(student, teacher)
        torch.testing.assert_close(own.metrics["error"], freeflow.metrics["error"])
        torch.testing.assert_close(own.loss, freeflow.loss)
        torch.testing.assert_close(own.residual_norm, freeflow.residual_norm)
        a, b = gradient(own.loss, student), gradient(freeflow.loss, student)
        assert (a - b).norm() > 0.1 * b.norm() > 1e-3
        own, freeflow = both(student, teacher, estimator=Jvp())
        torch.testing.assert_close(gradient(own.loss, student), gradient(freeflow.loss, student))


def test_both_gradients_vanish_at_the_exact_map():
    student = GaussianFlowMap(gaussian())
    for output in both(student, gaussian()):
        assert gradient(output.loss, student).norm() < 1e-12


# Both terms and their parts.


def first_term(student, field, states, s) -> torch.Tensor:
    """|dX/ds - sg v(X, s)|^2 by reverse-mode differentiation."""
    s = s.clone().requires_grad_()
    average = student.average_velocity(states.x, states.t, s)
    dummy = torch.zeros_like(average, requires_grad=True)
    (slope,) = torch.autograd.grad(average, s, dummy, create_graph=True)
    (derivative,) = torch.autograd.grad(slope, dummy, torch.ones_like(s), create_graph=True)
    gap = (states.t - s.detach())[:, None]
    target = field((states.x - gap * average).detach(), s.detach(), Condition()).detach()
    return (average - gap * derivative - target).square().mean()


@pytest.mark.parametrize("taught", [False, True])
def test_gradient_is_that_of_both_terms(taught):
    """The second term at the terminal time of the state's own data and noise, the first with the average as target."""
    teacher, student = gaussian(), bent(gaussian())
    states = at_ends(ending(data_states(teacher), 0.04), 32)
    s = torch.full((32,), 0.04).double()
    objective = distillation(share=0.5) if taught else TerminalVelocityMatching()
    objective.setup(student, teacher)
    assert list(objective.modules()) == ([] if taught else ["target"])
    with torch.no_grad():
        student.mean += 0.2
    field = teacher.velocity if taught else objective.tutor.velocity
    assert taught or objective.tutor is not student
    x = interpolate(states.clean[:32], states.noise[:32], s)
    wanted = teacher.velocity(x, s) if taught else states.noise[:32] - states.clean[:32]
    second = (student.velocity(x, s) - wanted).square().mean()
    first = first_term(student, field, states[32:], s)
    output = loss_of(objective, student, teacher, states, step=0, generator=generator())
    torch.testing.assert_close(output.loss, (first + second) / 2)
    got, terms = gradient(output.loss, student), [gradient(term, student) for term in (first, second)]
    assert min(term.norm() for term in terms) > 1e-3
    torch.testing.assert_close(got, (terms[0] + terms[1]) / 2)


def test_the_second_term_is_at_the_ends_of_the_pairs():
    """Its law, and that flow matching at t, a mistake that the exact map cannot show, would be another loss."""
    t, s = TerminalVelocityMatching().law(0.0).sample(20_000, generator())
    assert torch.equal(t[:10_000], s[:10_000])
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(t[:10_000].quantile(levels), s[10_000:].quantile(levels), rtol=0, atol=0.02)
    assert (t[10_000:].quantile(levels) - s[10_000:].quantile(levels)).min() > 0.01
    teacher, student = gaussian(), perturbed(gaussian())
    states = ending(data_states(teacher, low=0.7), 0.04)
    objective = distillation(share=1.0)
    right = loss_of(objective, student, teacher, at_ends(states, 64), step=0, generator=generator()).loss
    wrong = (student.velocity(states.x, states.t) - teacher.velocity(states.x, states.t)).square().mean()
    assert (right - wrong).abs() > 0.1 * right


def _derivative_of(change):
    def residual(estimator, field, jump, progress):
        average, slope = estimator.derivative(jump, ds=1.0)
        gap = (jump.t - jump.s)[:, None]
        target = field(jump.land(average).detach(), jump.s, jump.condition).detach()
        return Residual(average, change(average, gap, slope) - target)

    return residual


CHANGES = {
    "right": (lambda f, gap, d: f - gap * d, False),
    "no derivative": (lambda f, gap, d: f, True),
    "wrong sign": (lambda f, gap, d: f + gap * d, True),
    "factor t - s dropped": (lambda f, gap, d: f - d, True),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("taught", [False, True])
def test_mistakes_leave_a_residual_at_the_exact_map(name, taught, monkeypatch):
    change, wrong = CHANGES[name]
    monkeypatch.setattr(module, "lagrangian", _derivative_of(change))
    teacher = gaussian()
    alone = TerminalVelocityMatching(target_decay=0.0, pairs=WithDiagonal(share=0.0))
    objective = distillation(share=0.0) if taught else alone
    assert (judge(objective, GaussianFlowMap(teacher), teacher, data_states(teacher))[0] > 0.1) == wrong


@pytest.mark.parametrize(
    ("draw", "taught", "target_rows", "teacher_rows"),
    [(data_states, False, 32, 0), (data_states, True, 0, 64), (prior_states, True, 0, 64)],
)
def test_evaluations_of_a_step(draw, taught, target_rows, teacher_rows):
    """Of 64 rows half are for each term: F once in both, and one velocity of the end."""
    teacher = gaussian()
    student = GaussianFlowMap(teacher)
    objective = TerminalVelocityMatching(target=TeacherVelocity()) if taught else TerminalVelocityMatching()
    objective.setup(student, teacher)
    states = draw(teacher)
    loss_of(objective, student, teacher if taught else None, states, step=0, generator=generator())
    assert student.evaluations == 64
    assert teacher.evaluations == teacher_rows
    if target_rows:
        assert objective.tutor.evaluations == target_rows


def test_it_passes_the_kit_with_data_and_with_a_teacher():
    torch.manual_seed(0)
    student = NetworkFlowMap(MLP(dim=2, hidden_size=16, num_classes=2), "two_time")
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    teacher = GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]])
    source = NoisedData(dataset=ExactSamples(teacher))
    check_objective(distillation(), student, teacher)
    check_objective(distillation(), student, teacher, source)
    check_objective(TerminalVelocityMatching(), student, None, source)
    check_objective(TerminalVelocityMatching(estimator=FiniteDifference()), student, None, source)


# Derivatives with a graph.


def sit_map() -> NetworkFlowMap:
    network = SiT(4, 2, 1, hidden_size=16, depth=2, num_heads=2, num_classes=3, qk_norm=True)
    return NetworkFlowMap(network, "two_time")


def edm2_map() -> NetworkFlowMap:
    network = EDM2(8, 1, 3, 8, (1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8)
    return NetworkFlowMap(network, "two_time")


MAPS = {
    "gaussian": (lambda: GaussianFlowMap(GaussianTeacher(torch.ones(3).double(), 0.5)), (3,)),
    "mlp": (lambda: NetworkFlowMap(MLP(dim=3, hidden_size=16), "two_time"), (3,)),
    "sit": (sit_map, (1, 4, 4)),
    "edm2": (edm2_map, (1, 8, 8)),
}
DIRECTIONS = {"end": (0.0, 0.0, 1.0), "start": (0.0, 1.0, 0.0), "trajectory": (1.0, 1.0, 0.0)}


@pytest.fixture(params=MAPS)
def case(request):
    """A flow map in float64, and x, t, s, a direction of x, something of the shape of F, and a condition."""
    torch.manual_seed(0)
    build, shape = MAPS[request.param]
    student = build().double().eval()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    x, v, w = torch.randn(3, 5, *shape, dtype=torch.float64)
    t, s = torch.linspace(0.5, 0.9, 5).double(), torch.linspace(0.1, 0.4, 5).double()
    labels = torch.arange(5) % 3 if student.num_classes else None
    return student, x, t, s, v, w, Condition(labels)


def scalar(average, slope, w) -> torch.Tensor:
    """Something in which both matter, and the derivative not linearly."""
    return ((average - 0.4 * slope - w).square() * (1 + slope)).mean()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_through_a_derivative(case, direction):
    """With respect to all parameters, against a central difference along a random direction of them."""
    student, x, t, s, v, w, condition = case
    a, dt, ds = DIRECTIONS[direction]
    arguments = {"dx": a * v, "dt": dt, "ds": ds}
    jump = Jump(x, t, s, condition)
    average, slope = jvp(student, jump, **arguments, graph=True)
    plain, wanted = jvp(student, jump, **arguments)
    assert average.requires_grad
    assert slope.requires_grad
    torch.testing.assert_close(average, plain)
    torch.testing.assert_close(slope, wanted)
    got = gradient(scalar(average, slope, w), student)
    detached = gradient(scalar(average, slope.detach(), w), student)

    parameters = [p for p in student.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in parameters]
    step, values = 1e-5, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(sign * step * d)
            values.append(scalar(*jvp(student, jump, **arguments), w))
    flat = torch.cat([d.flatten() for d in direction])
    difference = (values[0] - values[1]) / (2 * step)
    assert float(got @ flat) == pytest.approx(float(difference), rel=1e-5)
    assert float(detached @ flat) != pytest.approx(float(difference), rel=1e-3)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["gaussian", "mlp"], indirect=True)
def test_gradients_through_a_derivative_are_those_of_double_backward(case, direction):
    student, x, t, s, v, w, condition = case
    a, dt, ds = DIRECTIONS[direction]
    average, slope = jvp(student, Jump(x, t, s, condition), dx=a * v, dt=dt, ds=ds, graph=True)
    inputs = [value.clone().requires_grad_() for value in (x, t, s)]
    plain = student.average_velocity(*inputs, condition)
    dummy = torch.zeros_like(plain, requires_grad=True)
    slopes = torch.autograd.grad(plain, inputs, dummy, create_graph=True)
    tangents = (a * v, torch.full_like(t, dt), torch.full_like(s, ds))
    (wanted,) = torch.autograd.grad(slopes, dummy, tangents, create_graph=True)
    torch.testing.assert_close(slope, wanted)
    right = gradient(scalar(plain, wanted, w), student)
    assert right.norm() > 1e-3
    torch.testing.assert_close(gradient(scalar(average, slope, w), student), right)


def test_layers_that_replace_their_weights_do_so_before_a_derivative_with_a_graph():
    """In training mode, after an update, without an evaluation before; the derivative is that of the plain way."""
    torch.manual_seed(0)
    student = edm2_map().train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x, t, s = torch.randn(2, 1, 8, 8), torch.ones(2), torch.full((2,), 0.25)
    average, slope = jvp(student, Jump(x, t, s), ds=1.0, graph=True)
    (average + slope).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    plain, wanted = jvp(student, Jump(x, t, s), ds=1.0)
    torch.testing.assert_close(average, plain)
    torch.testing.assert_close(slope, wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_a_residual_with_a_graph_is_the_distance_itself(power, reduction):
    """Its gradient is that of a w |R|^2 with a detached weight; F's own graph is not in it."""
    g = generator()
    average = torch.randn(5, 3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    base = torch.randn(5, 3, 2, generator=g, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(5, generator=g, dtype=torch.float64)
    residual = base.sin()
    output = pull(Residual(average, residual), power=power, eps=0.01, reduction=reduction, scale=scale)
    norm = getattr(residual.square().flatten(1), reduction)(1)
    weight = scale * (norm.detach() + 0.01) ** -power
    (wanted,) = torch.autograd.grad((weight * norm).mean(), base, retain_graph=True)
    got, none = torch.autograd.grad(output.loss, (base, average), allow_unused=True)
    assert none is None
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(output.loss, (weight * norm).mean())
    assert not output.metrics["error"].requires_grad
    assert not output.residual_norm.requires_grad
