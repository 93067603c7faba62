"""The conformance kit: what every teacher, flow map, objective and velocity estimator must satisfy.

Each check raises AssertionError with a sentence that says what is wrong. Run them on your own classes, in the spirit of
scikit-learn's ``check_estimator``:

    def test_my_teacher():
        flowdistill.testing.check_teacher(MyTeacher())
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from flowdistill.interfaces import (
    NULL_LABEL,
    Condition,
    FlowMap,
    GeneratingVelocity,
    NoisingVelocity,
    Objective,
    States,
    StateSource,
    Teacher,
    VelocityEstimator,
)
from flowdistill.plumbing.errors import ConfigError
from flowdistill.states import Prior

__all__ = ["check_exact_start", "check_flow_map", "check_objective", "check_teacher", "check_velocity_estimator"]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _same(a: Tensor, b: Tensor, message: str, tolerance: float = 1e-4) -> None:
    error = float(((a - b).abs().max() / (1 + b.abs().max())).detach())
    _check(error <= tolerance, f"{message} (relative difference {error:.1e})")


def _check_declarations(model: Teacher | FlowMap) -> None:
    name = type(model).__name__
    shape = getattr(model, "sample_shape", None)
    valid = isinstance(shape, tuple) and all(isinstance(k, int) and k > 0 for k in shape)
    _check(valid, f"{name}.sample_shape must be a tuple of positive integers, not {shape!r}")
    classes = model.num_classes
    valid = classes is None or (isinstance(classes, int) and classes > 0)
    _check(valid, f"{name}.num_classes must be None or a positive integer, not {classes!r}")


def check_teacher(teacher: Teacher) -> None:
    """Check a teacher.

    Shapes and dtype; finite velocities on all of [0, 1], both ends included; rows independent of each other; the same
    answer twice; evaluation mode whatever is asked; counted evaluations; labels that act on their own rows alone and
    may be null; reproducible prior. Whether the sign and the direction of time are this library's is for
    `check_exact_start`.
    """
    name = type(teacher).__name__
    _check(isinstance(teacher, Teacher), f"{name} must derive from flowdistill.Teacher")
    _check_declarations(teacher)
    n = 6
    x = teacher.sample_prior(n, _generator())
    _check(tuple(x.shape) == (n, *teacher.sample_shape), f"{name}.sample_prior gives shape {tuple(x.shape)}")
    again = teacher.sample_prior(n, _generator())
    _check(torch.equal(x, again), f"{name}.sample_prior ignores its generator")
    condition = Condition.in_turn(teacher.num_classes, n).to(x.device)
    for time in (0.0, 0.1, 0.5, 0.9, 1.0):
        t = x.new_full((n,), time)
        before = teacher.evaluations
        velocity = teacher.velocity(x, t, condition)
        _check(velocity.shape == x.shape, f"{name}.velocity has shape {tuple(velocity.shape)} for x {tuple(x.shape)}")
        _check(velocity.dtype == x.dtype, f"{name}.velocity has dtype {velocity.dtype} for x {x.dtype}")
        _check(bool(velocity.isfinite().all()), f"{name}.velocity is not finite at t = {time}")
        _check(teacher.evaluations >= before + n, f"{name}.evaluations does not count velocity()")
        _check(torch.equal(velocity, teacher.velocity(x, t, condition)), f"{name}.velocity is not deterministic")
    t = torch.linspace(0.05, 0.95, n).to(x)
    velocity = teacher.velocity(x, t, condition)
    single = torch.cat([teacher.velocity(x[i : i + 1], t[i : i + 1], condition[i : i + 1]) for i in range(n)])
    _same(velocity, single, f"{name}.velocity of a row depends on the other rows")
    teacher.train()
    _check(not teacher.training, f"{name}.train() leaves evaluation mode")
    if teacher.num_classes is not None:
        null = Condition(torch.full_like(condition.labels, NULL_LABEL))  # type: ignore[arg-type]
        _check(bool(teacher.velocity(x, t, null).isfinite().all()), f"{name} does not take the null label {NULL_LABEL}")


def check_exact_start(teacher: Teacher, tolerance: float = 1e-3) -> None:
    """Check the sign and time of a teacher's field at t = 1, where u(n, 1) = n - E[x_0] differs from n by a constant.

    An exact teacher meets ``tolerance``; a trained one is only near it.
    """
    x = teacher.sample_prior(64, _generator())
    condition = Condition(None if teacher.num_classes is None else torch.zeros(64, dtype=torch.long))
    offset = teacher.velocity(x, torch.ones_like(x.flatten(1)[:, 0]), condition) - x
    spread = float((offset - offset.mean(0)).abs().max())
    _check(spread <= tolerance, f"{type(teacher).__name__}: u(n, 1) - n varies by {spread:.1e}; is t = 1 the noise?")


def check_flow_map(flow_map: FlowMap) -> None:
    """Check a flow map.

    Shapes and dtype; X(x, t, t) = x; X = x - (t - s) F; rows independent; counted evaluations; `sample` of one step
    equal to the jump; derivatives with respect to the time s by forward mode equal to central differences; an anchored
    map that refuses several steps.
    """
    name = type(flow_map).__name__
    _check(isinstance(flow_map, FlowMap), f"{name} must derive from flowdistill.FlowMap")
    _check_declarations(flow_map)
    flow_map = copy.deepcopy(flow_map).double()
    n = 6
    x = torch.randn((n, *flow_map.sample_shape), generator=_generator(), dtype=torch.float64)
    condition = Condition.in_turn(flow_map.num_classes, n)
    one = torch.ones(n, dtype=torch.float64)
    t = one if flow_map.anchored else torch.linspace(0.4, 1.0, n, dtype=torch.float64)
    s = t * torch.linspace(0.1, 0.9, n, dtype=torch.float64)
    before = flow_map.evaluations
    average = flow_map.average_velocity(x, t, s, condition)
    _check(flow_map.evaluations == before + n, f"{name}.evaluations does not count average_velocity()")
    _check(average.shape == x.shape, f"{name}.average_velocity has shape {tuple(average.shape)}")
    _check(average.dtype == x.dtype, f"{name}.average_velocity has dtype {average.dtype} for x {x.dtype}")
    _check(bool(average.isfinite().all()), f"{name}.average_velocity is not finite")
    gap = (t - s).reshape(-1, *[1] * (x.ndim - 1))
    _same(flow_map(x, t, s, condition), x - gap * average, f"{name}: X is not x - (t - s) F", 1e-10)
    _same(flow_map(x, t, t, condition), x, f"{name}: X(x, t, t) is not x", 1e-10)
    single = torch.cat(
        [flow_map.average_velocity(x[i : i + 1], t[i : i + 1], s[i : i + 1], condition[i : i + 1]) for i in range(n)]
    )
    _same(average, single, f"{name}.average_velocity of a row depends on the other rows", 1e-8)
    _same(
        flow_map.sample(x, 1, condition),
        flow_map(x, one, one * 0, condition),
        f"{name}.sample of one step is not X(x, 1, 0)",
        1e-10,
    )
    if flow_map.anchored or flow_map.to_data:
        try:
            flow_map.sample(x, 2, condition)
        except ConfigError:
            pass
        else:
            knows = "is anchored" if flow_map.anchored else "jumps to data alone"
            raise AssertionError(f"{name} {knows} and yet samples in two steps without fresh noise")
    if not flow_map.anchored and not getattr(flow_map, "instantaneous", False):
        fresh = torch.stack([x, x]) if flow_map.to_data else None
        samples = flow_map.sample(x, 3, condition, renoise=fresh)
        _check(bool(samples.isfinite().all()), f"{name}.sample(steps=3) is not finite")
    from flowdistill.differentiation import finite_difference, jvp

    with torch.no_grad():
        _, exact = jvp(flow_map, x, t, s, condition, ds=1.0)
        _, central = finite_difference(flow_map, x, t, s, condition, ds=1.0, h=1e-4, scheme="central")
    _same(central, exact, f"{name}: forward-mode dF/ds is not the derivative of F", 1e-5)


def check_velocity_estimator(estimator: VelocityEstimator, student: FlowMap, teacher: Teacher) -> None:
    """Check a velocity estimator on a student and its teacher.

    A generating estimator returns F with a graph and a velocity without, equal to F where the duration is 0. A noising
    estimator returns a detached finite velocity, and the loss of its modules reaches their parameters and none of the
    student's.
    """
    name = type(estimator).__name__
    estimator = copy.deepcopy(estimator)
    estimator.setup(student, teacher)
    n = 8
    source = Prior()
    source.setup(student, teacher)
    states = source.sample(n, _generator())
    if isinstance(estimator, GeneratingVelocity):
        s = torch.linspace(0, 1, n).to(states.t.dtype)
        average, velocity = estimator.velocity(student, states.x, states.t, s, states.condition)
        plain = student.average_velocity(states.x, states.t, s, states.condition)
        _same(average, plain, f"{name}.velocity does not return F")
        trainable = any(p.requires_grad for p in student.parameters())
        _check(average.requires_grad == trainable, f"{name}.velocity returns F without its graph")
        _check(not velocity.requires_grad, f"{name}.velocity lets gradients flow through the velocity")
        _check(bool(velocity.isfinite().all()), f"{name}.velocity is not finite")
        _same(velocity[-1], plain[-1], f"{name}.velocity is not F where the duration is 0")
        return
    _check(isinstance(estimator, NoisingVelocity), f"{name} must be a GeneratingVelocity or a NoisingVelocity")
    assert isinstance(estimator, NoisingVelocity)
    samples = student(states.x, states.t, torch.zeros_like(states.t), states.condition)
    velocity = estimator.velocity(
        samples, torch.linspace(0.1, 1, n).to(states.t.dtype), states.condition, samples=samples
    )
    _check(velocity.shape == samples.shape, f"{name}.velocity has shape {tuple(velocity.shape)}")
    _check(not velocity.requires_grad, f"{name}.velocity lets gradients flow")
    _check(bool(velocity.isfinite().all()), f"{name}.velocity is not finite")
    for key, module in estimator.modules().items():
        student.zero_grad()
        loss = estimator.module_loss(key, samples.detach(), states.condition, generator=_generator())
        _check(loss.shape == (n,), f"{name}.module_loss has shape {tuple(loss.shape)}, not one value a sample")
        loss.mean().backward()  # type: ignore[no-untyped-call]
        _check(_has_gradient(module), f"{name}.module_loss does not reach the parameters of {key}")
        _check(not _has_gradient(student), f"{name}.module_loss reaches the student")


def check_objective(
    objective: Objective, student: FlowMap, teacher: Teacher | None, states: StateSource | None = None
) -> None:
    """Check an objective on a student, a teacher, and a state source (by default the prior).

    The loss is a finite scalar that depends on nothing but its arguments and the generator; its gradient reaches the
    student and no parameter of the teacher or of an auxiliary module; auxiliary losses reach their module alone; a
    data-free objective works on states without clean data.
    """
    name = type(objective).__name__
    _check(isinstance(objective, Objective), f"{name} must derive from flowdistill.Objective")
    objective, student = copy.deepcopy(objective), copy.deepcopy(student)
    source: StateSource = Prior() if states is None else copy.deepcopy(states)
    source.setup(student, teacher)
    objective.setup(student, teacher)
    if teacher is not None:
        teacher.requires_grad_(True)
    batch = source.sample(16, _generator())
    if not objective.needs_data:
        batch = States(x=batch.x, t=batch.t, condition=batch.condition)
    try:
        first = objective.loss(student, teacher, batch, step=0, generator=_generator(1))
        second = objective.loss(student, teacher, batch, step=0, generator=_generator(1))
        _check(first.loss.ndim == 0, f"{name}.loss is not a scalar")
        _check(bool(first.loss.isfinite()), f"{name}.loss is not finite")
        _check(torch.equal(first.loss, second.loss), f"{name}.loss draws random numbers outside its generator")
        for metric, value in first.metrics.items():
            _check(not value.requires_grad, f"{name}: metric {metric} is not detached")
        first.loss.backward()  # type: ignore[no-untyped-call]
        _check(_has_gradient(student), f"{name}.loss does not reach the student")
        _check(_finite_gradient(student), f"{name}.loss has a gradient that is not finite")
        modules = objective.modules()
        for key, module in modules.items():
            _check(not _has_gradient(module), f"{name}.loss reaches the auxiliary module {key}")
        _check(teacher is None or not _has_gradient(teacher), f"{name}.loss reaches the teacher")
        for key, module in modules.items():
            if not any(p.requires_grad for p in module.parameters()):
                continue
            student.zero_grad()
            output = objective.auxiliary_loss(key, student, teacher, batch, step=0, generator=_generator(2))
            if output is None:
                continue
            output.loss.backward()  # type: ignore[no-untyped-call]
            _check(_has_gradient(module), f"{name}.auxiliary_loss does not reach {key}")
            _check(not _has_gradient(student), f"{name}.auxiliary_loss of {key} reaches the student")
            _check(teacher is None or not _has_gradient(teacher), f"{name}.auxiliary_loss reaches the teacher")
    finally:
        if teacher is not None:
            teacher.requires_grad_(False)
            teacher.zero_grad()


def _has_gradient(module: nn.Module) -> bool:
    return any(p.grad is not None for p in module.parameters())


def _finite_gradient(module: nn.Module) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
