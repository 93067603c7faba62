"""The conformance kit: what every teacher, flow map, objective, velocity estimator and law of times must satisfy.

Each kind has a function that lists its checks by name, and one that runs them all.
A check is called without arguments, and raises AssertionError with a sentence that says what is wrong.
In the spirit of scikit-learn's ``parametrize_with_checks``, each becomes a test of its own:

    @pytest.mark.parametrize("check", flowdistill.testing.teacher_checks(MyTeacher()), ids=str)
    def test_my_teacher(check):
        check()
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from flowdistill.data import Dataset
from flowdistill.differentiation import finite_difference, jvp
from flowdistill.interfaces import (
    NULL_LABEL,
    Condition,
    FlowMap,
    GeneratingVelocity,
    Jump,
    Jumps,
    NoisingVelocity,
    Objective,
    Pairs,
    States,
    StateSource,
    Step,
    Teacher,
    VelocityEstimator,
)
from flowdistill.pairs import Durations
from flowdistill.plumbing.errors import ConfigError
from flowdistill.states import NoisedData, Prior, TeacherTrajectories

__all__ = [
    "Check",
    "check_exact_start",
    "check_flow_map",
    "check_objective",
    "check_pairs",
    "check_teacher",
    "check_velocity_estimator",
    "flow_map_checks",
    "objective_checks",
    "pairs_checks",
    "teacher_checks",
    "velocity_estimator_checks",
]


@attrs.frozen
class Check:
    """One check of the kit: call it, and it raises AssertionError if the object fails."""

    name: str
    """What is checked, in snake case."""
    run: Callable[[], None] = attrs.field(repr=False)
    """The check."""

    def __call__(self) -> None:
        """Run the check."""
        self.run()

    def __str__(self) -> str:
        return self.name


def _checks(case: Any, *arguments: Any) -> list[Check]:
    """The public methods of a class of checks, each on an object of its own."""

    def bound(name: str) -> Check:
        return Check(name, lambda: getattr(case(*arguments), name)())

    return [bound(name) for name in vars(case) if not name.startswith("_")]


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


def teacher_checks(teacher: Teacher) -> list[Check]:
    """The checks of a teacher.

    Whether the sign and the direction of time are this library's is for `check_exact_start`.
    """
    return _checks(_OfTeacher, teacher)


def check_teacher(teacher: Teacher) -> None:
    """Run `teacher_checks`."""
    for check in teacher_checks(teacher):
        check()


class _OfTeacher:
    def __init__(self, teacher: Teacher) -> None:
        self._teacher, self._name, self._n = teacher, type(teacher).__name__, 6
        _check(isinstance(teacher, Teacher), f"{self._name} must derive from flowdistill.Teacher")
        _check_declarations(teacher)
        self._x = teacher.sample_prior(self._n, _generator())
        self._condition = Condition.in_turn(teacher.num_classes, self._n).to(self._x.device)

    def prior_is_reproducible(self) -> None:
        shape = tuple(self._x.shape)
        _check(shape == (self._n, *self._teacher.sample_shape), f"{self._name}.sample_prior gives shape {shape}")
        again = self._teacher.sample_prior(self._n, _generator())
        _check(torch.equal(self._x, again), f"{self._name}.sample_prior ignores its generator")

    def velocity_is_defined_at_all_times(self) -> None:
        for time in (0.0, 0.1, 0.5, 0.9, 1.0):
            velocity = self._teacher.velocity(self._x, self._x.new_full((self._n,), time), self._condition)
            where = f"{self._name}.velocity"
            shape = tuple(velocity.shape)
            _check(velocity.shape == self._x.shape, f"{where} has shape {shape} for x {tuple(self._x.shape)}")
            _check(velocity.dtype == self._x.dtype, f"{where} has dtype {velocity.dtype} for x {self._x.dtype}")
            _check(bool(velocity.isfinite().all()), f"{where} is not finite at t = {time}")

    def velocity_is_deterministic(self) -> None:
        t = self._x.new_full((self._n,), 0.5)
        velocity, again = (self._teacher.velocity(self._x, t, self._condition) for _ in range(2))
        _check(torch.equal(velocity, again), f"{self._name}.velocity is not deterministic")

    def evaluations_are_counted(self) -> None:
        before = self._teacher.evaluations
        self._teacher.velocity(self._x, self._x.new_full((self._n,), 0.5), self._condition)
        counted = self._teacher.evaluations >= before + self._n
        _check(counted, f"{self._name}.evaluations does not count velocity()")

    def rows_are_independent(self) -> None:
        t = torch.linspace(0.05, 0.95, self._n).to(self._x)
        velocity, rows = self._teacher.velocity(self._x, t, self._condition), []
        for i in range(self._n):
            row = slice(i, i + 1)
            rows.append(self._teacher.velocity(self._x[row], t[row], self._condition[row]))
        _same(velocity, torch.cat(rows), f"{self._name}.velocity of a row depends on the other rows")

    def stays_in_evaluation_mode(self) -> None:
        self._teacher.train()
        _check(not self._teacher.training, f"{self._name}.train() leaves evaluation mode")

    def takes_the_null_label(self) -> None:
        if self._teacher.num_classes is None or not self._teacher.null_label:
            return
        velocity = self._teacher.velocity(self._x, self._x.new_full((self._n,), 0.5), self._condition.unlabelled())
        _check(bool(velocity.isfinite().all()), f"{self._name} does not take the null label {NULL_LABEL}")

    def follows_guidance_if_it_says_so(self) -> None:
        if not self._teacher.takes_guidance:
            return
        t = self._x.new_full((self._n,), 0.5)
        scale = self._x.new_full((self._n,), 3.0)
        told = self._condition.guided(scale=scale, interval=(0.0, 1.0))
        off = self._condition.guided(scale=scale, interval=(0.8, 1.0))
        plain = self._condition.guided(scale=torch.ones_like(scale))
        velocity = {key: self._teacher.velocity(self._x, t, c) for key, c in (("on", told), ("off", off), ("1", plain))}
        _same(velocity["off"], velocity["1"], f"{self._name} takes guidance and ignores its interval")
        _check(not torch.equal(velocity["on"], velocity["1"]), f"{self._name} takes guidance and ignores its scale")


def check_exact_start(teacher: Teacher, tolerance: float = 1e-3) -> None:
    """Check the sign and time of a teacher's field at t = 1, where u(n, 1) = n - E[x_0] differs from n by a constant.

    An exact teacher meets ``tolerance``; a trained one is only near it.
    """
    x = teacher.sample_prior(64, _generator())
    condition = Condition(None if teacher.num_classes is None else torch.zeros(64, dtype=torch.long))
    offset = teacher.velocity(x, torch.ones_like(x.flatten(1)[:, 0]), condition) - x
    spread = float((offset - offset.mean(0)).abs().max())
    _check(spread <= tolerance, f"{type(teacher).__name__}: u(n, 1) - n varies by {spread:.1e}; is t = 1 the noise?")


def flow_map_checks(flow_map: FlowMap) -> list[Check]:
    """The checks of a flow map, on the jumps that it says it can make."""
    return _checks(_OfFlowMap, flow_map)


def check_flow_map(flow_map: FlowMap) -> None:
    """Run `flow_map_checks`."""
    for check in flow_map_checks(flow_map):
        check()


class _OfFlowMap:
    def __init__(self, flow_map: FlowMap) -> None:
        self._name, n = type(flow_map).__name__, 6
        _check(isinstance(flow_map, FlowMap), f"{self._name} must derive from flowdistill.FlowMap")
        _check_declarations(flow_map)
        self._map = copy.deepcopy(flow_map).double()
        x = torch.randn((n, *flow_map.sample_shape), generator=_generator(), dtype=torch.float64)
        one = torch.ones(n, dtype=torch.float64)
        t = torch.linspace(0.4, 1.0, n, dtype=torch.float64) if flow_map.has_velocity else one
        s = t * torch.linspace(0.1, 0.9, n, dtype=torch.float64)
        self._jump = Jump(x, t, s, Condition.in_turn(flow_map.num_classes, n))
        self._whole = Jump(x, one, one * 0, self._jump.condition)

    def average_velocity_is_defined(self) -> None:
        average, x = self._map.average_velocity(*self._jump), self._jump.x
        where = f"{self._name}.average_velocity"
        _check(average.shape == x.shape, f"{where} has shape {tuple(average.shape)}")
        _check(average.dtype == x.dtype, f"{where} has dtype {average.dtype} for x {x.dtype}")
        _check(bool(average.isfinite().all()), f"{where} is not finite")

    def evaluations_are_counted(self) -> None:
        before = self._map.evaluations
        self._map.average_velocity(*self._jump)
        counted = self._map.evaluations == before + len(self._jump)
        _check(counted, f"{self._name}.evaluations does not count average_velocity()")

    def jumps_follow_the_average_velocity(self) -> None:
        end = self._jump.land(self._map.average_velocity(*self._jump))
        _same(self._map(*self._jump), end, f"{self._name}: X is not x - (t - s) F", 1e-10)
        _same(self._map(*self._jump.staying()), self._jump.x, f"{self._name}: X(x, t, t) is not x", 1e-10)

    def rows_are_independent(self) -> None:
        average = self._map.average_velocity(*self._jump)
        rows = [self._map.average_velocity(*self._jump[i : i + 1]) for i in range(len(self._jump))]
        _same(average, torch.cat(rows), f"{self._name}.average_velocity of a row depends on the other rows", 1e-8)

    def one_step_is_the_jump_to_data(self) -> None:
        x, t, s, condition = self._whole
        start = self._map.grid(1).to(t)[0]
        jump = self._map(x, start * t, s, condition)
        what = f"{self._name}.sample of one step is not X(x, t, 0) with t the start of its grid"
        _same(self._map.sample(x, 1, condition), jump, what, 1e-10)

    def several_steps_are_as_declared(self) -> None:
        x, condition = self._whole.x, self._whole.condition
        if self._map.jumps in (Jumps.FROM_NOISE, Jumps.TO_DATA):
            try:
                self._map.sample(x, 2, condition)
            except ConfigError:
                pass
            else:
                knows = "jumps to data alone" if self._map.jumps is Jumps.TO_DATA else "is anchored"
                raise AssertionError(f"{self._name} {knows} and yet samples in two steps without fresh noise")
        if self._map.jumps in (Jumps.ANY, Jumps.TO_DATA):
            fresh = torch.stack([x, x]) if self._map.jumps is Jumps.TO_DATA else None
            samples = self._map.sample(x, 3, condition, renoise=fresh)
            _check(bool(samples.isfinite().all()), f"{self._name}.sample(steps=3) is not finite")

    def forward_mode_is_the_derivative(self) -> None:
        with torch.no_grad():
            _, exact = jvp(self._map, self._jump, ds=1.0)
            _, central = finite_difference(self._map, self._jump, ds=1.0, h=1e-4, scheme="central")
        _same(central, exact, f"{self._name}: forward-mode dF/ds is not the derivative of F", 1e-5)

    def takes_the_scales_that_it_declares(self) -> None:
        if self._map.guidance is None:
            return
        scale = torch.full((len(self._jump),), self._map.guidance, dtype=torch.float64)
        told = attrs.evolve(self._jump, condition=self._jump.condition.guided(scale=scale))
        default = self._map.average_velocity(*self._jump)
        _same(self._map.average_velocity(*told), default, f"{self._name}.guidance is not the scale by default", 1e-10)


def pairs_checks(pairs: Pairs) -> list[Check]:
    """The checks of a law of pairs of times."""
    return _checks(_OfPairs, pairs)


def check_pairs(pairs: Pairs) -> None:
    """Run `pairs_checks`."""
    for check in pairs_checks(pairs):
        check()


class _OfPairs:
    def __init__(self, pairs: Pairs) -> None:
        self._pairs, self._name, self._n = pairs, type(pairs).__name__, 64
        self._t, self._s = pairs.sample(self._n, _generator())

    def times_are_ordered(self) -> None:
        for word, time in (("t", self._t), ("s", self._s)):
            _check(time.shape == (self._n,), f"{self._name} draws {word} of shape {tuple(time.shape)}")
            _check(bool(((time >= 0) & (time <= 1)).all()), f"{self._name} draws {word} outside [0, 1]")
        _check(bool((self._s <= self._t).all()), f"{self._name} draws s > t")

    def draws_are_reproducible(self) -> None:
        again = self._pairs.sample(self._n, _generator())
        same = torch.equal(self._t, again[0]) and torch.equal(self._s, again[1])
        _check(same, f"{self._name} draws random numbers outside its generator")

    def diagonal_comes_first(self) -> None:
        rows = self._pairs.on_diagonal(self._n)
        _check(0 <= rows <= self._n, f"{self._name}.on_diagonal is {rows} of {self._n}")
        _check(torch.equal(self._t[:rows], self._s[:rows]), f"{self._name}: the first {rows} rows are not s = t")


def velocity_estimator_checks(estimator: VelocityEstimator, student: FlowMap, teacher: Teacher) -> list[Check]:
    """The checks of a velocity estimator on a student and its teacher."""
    case = _OfGeneratingVelocity if isinstance(estimator, GeneratingVelocity) else _OfNoisingVelocity
    return _checks(case, estimator, student, teacher)


def check_velocity_estimator(estimator: VelocityEstimator, student: FlowMap, teacher: Teacher) -> None:
    """Run `velocity_estimator_checks`."""
    for check in velocity_estimator_checks(estimator, student, teacher):
        check()


def _prior_states(student: FlowMap, teacher: Teacher | None, n: int) -> States:
    source = Prior()
    source.setup(student, teacher)
    return source.sample(n, Durations(), _generator())


class _OfGeneratingVelocity:
    def __init__(self, estimator: GeneratingVelocity, student: FlowMap, teacher: Teacher) -> None:
        self._name, self._student = type(estimator).__name__, student
        estimator = copy.deepcopy(estimator)
        estimator.setup(student, teacher)
        states = _prior_states(student, teacher, 8)
        self._jump = states.to(torch.linspace(0, 1, 8).to(states.t.dtype))
        self._average, self._velocity = estimator.estimate(self._jump)

    def returns_the_average_velocity_with_its_graph(self) -> None:
        plain = self._student.average_velocity(*self._jump)
        _same(self._average, plain, f"{self._name}.estimate does not return F")
        trainable = any(p.requires_grad for p in self._student.parameters())
        _check(self._average.requires_grad == trainable, f"{self._name}.estimate returns F without its graph")

    def velocity_is_finite_and_detached(self) -> None:
        _check(not self._velocity.requires_grad, f"{self._name}.estimate lets gradients flow through the velocity")
        _check(bool(self._velocity.isfinite().all()), f"{self._name}.estimate is not finite")

    def velocity_is_the_average_at_no_duration(self) -> None:
        _same(self._velocity[-1], self._average[-1], f"{self._name}.estimate is not F at a duration of 0")


class _OfNoisingVelocity:
    def __init__(self, estimator: NoisingVelocity, student: FlowMap, teacher: Teacher) -> None:
        self._name, self._student = type(estimator).__name__, student
        valid = isinstance(estimator, NoisingVelocity)
        _check(valid, f"{self._name} must be a GeneratingVelocity or a NoisingVelocity")
        self._estimator = copy.deepcopy(estimator)
        self._estimator.setup(student, teacher)
        self._states = _prior_states(student, teacher, 8)
        self._samples: Tensor = student(*self._states.to(0.0))

    def velocity_is_finite_and_detached(self) -> None:
        r = torch.linspace(0.1, 1, len(self._samples)).to(self._states.t.dtype)
        velocity = self._estimator.estimate(self._samples, r, self._states.condition, samples=self._samples)
        _check(velocity.shape == self._samples.shape, f"{self._name}.estimate has shape {tuple(velocity.shape)}")
        _check(not velocity.requires_grad, f"{self._name}.estimate lets gradients flow")
        _check(bool(velocity.isfinite().all()), f"{self._name}.estimate is not finite")

    def modules_learn_alone(self) -> None:
        for key, module in self._estimator.modules().items():
            self._student.zero_grad()
            loss = self._estimator.module_loss(key, self._samples.detach(), self._states.condition, _generator())
            one_each = loss.shape == (len(self._samples),)
            _check(one_each, f"{self._name}.module_loss has shape {tuple(loss.shape)}, not one value a sample")
            loss.mean().backward()  # type: ignore[no-untyped-call]
            _check(_has_gradient(module), f"{self._name}.module_loss does not reach the parameters of {key}")
            _check(not _has_gradient(self._student), f"{self._name}.module_loss reaches the student")


def objective_checks(
    objective: Objective, student: FlowMap, teacher: Teacher | None, states: StateSource | None = None
) -> list[Check]:
    """The checks of an objective on a student and a teacher.

    Args:
        objective: the objective.
        student: a student that it can train.
        teacher: a teacher; None for an objective that needs none.
        states: the state source; None is what the objective says that it needs: noised data that the kit makes up, the
            teacher's trajectories, or the prior.
    """
    return _checks(_OfObjective, objective, student, teacher, states)


def check_objective(
    objective: Objective, student: FlowMap, teacher: Teacher | None, states: StateSource | None = None
) -> None:
    """Run `objective_checks`."""
    for check in objective_checks(objective, student, teacher, states):
        check()


class _Noise(Dataset):
    """Data without any structure, of the shape and the classes of a model."""

    def __init__(self, model: FlowMap) -> None:
        self.sample_shape, self.num_classes = model.sample_shape, model.num_classes

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        labels = None
        if self.num_classes is not None:
            labels = torch.randint(self.num_classes, (batch_size,), generator=generator)
        return torch.randn((batch_size, *self.sample_shape), generator=generator), labels


def _source(objective: Objective, student: FlowMap) -> StateSource:
    """A source of the states that an objective says it needs."""
    if objective.needs_data or (objective.needs_all_times and not objective.needs_teacher):
        return NoisedData(dataset=_Noise(student))
    return TeacherTrajectories(steps=2) if objective.needs_all_times else Prior()


class _OfObjective:
    def __init__(
        self, objective: Objective, student: FlowMap, teacher: Teacher | None, states: StateSource | None
    ) -> None:
        self._name = type(objective).__name__
        _check(isinstance(objective, Objective), f"{self._name} must derive from flowdistill.Objective")
        self._fresh = copy.deepcopy(objective)
        self._objective, self._student = copy.deepcopy(objective), copy.deepcopy(student)
        self._teacher = copy.deepcopy(teacher)
        if self._teacher is not None:
            self._teacher.requires_grad_(True)
        source = _source(objective, student) if states is None else copy.deepcopy(states)
        source.setup(self._student, self._teacher)
        self._objective.setup(self._student, self._teacher)
        self._states = source.sample(16, self._objective.law(0.0), _generator())
        if not objective.needs_data:
            self._states = attrs.evolve(self._states, clean=None)

    def _loss(self) -> Any:
        return self._objective.loss(self._states, Step(_generator(1)))

    def loss_is_a_finite_scalar(self) -> None:
        output = self._loss()
        _check(output.loss.ndim == 0, f"{self._name}.loss is not a scalar")
        _check(bool(output.loss.isfinite()), f"{self._name}.loss is not finite")

    def metrics_are_detached(self) -> None:
        for metric, value in self._loss().metrics.items():
            _check(not value.requires_grad, f"{self._name}: metric {metric} is not detached")

    def loss_is_reproducible(self) -> None:
        same = torch.equal(self._loss().loss, self._loss().loss)
        _check(same, f"{self._name}.loss draws random numbers outside its generator")

    def gradients_reach_the_student_alone(self) -> None:
        loss = self._loss().loss
        _check(loss.requires_grad and loss.ndim == 0, f"{self._name}.loss is not a scalar with a graph")
        loss.backward()
        _check(_has_gradient(self._student), f"{self._name}.loss does not reach the student")
        _check(_finite_gradient(self._student), f"{self._name}.loss has a gradient that is not finite")
        for key, module in self._objective.modules().items():
            _check(not _has_gradient(module), f"{self._name}.loss reaches the auxiliary module {key}")
        self._check_teacher_untouched("loss")

    def auxiliary_losses_reach_their_module_alone(self) -> None:
        self._loss()
        for key, module in self._objective.modules().items():
            if not any(p.requires_grad for p in module.parameters()):
                continue
            self._student.zero_grad()
            output = self._objective.auxiliary_loss(key, self._states, Step(_generator(2)))
            if output is None:
                continue
            output.loss.backward()  # type: ignore[no-untyped-call]
            _check(_has_gradient(module), f"{self._name}.auxiliary_loss does not reach {key}")
            _check(not _has_gradient(self._student), f"{self._name}.auxiliary_loss of {key} reaches the student")
            self._check_teacher_untouched("auxiliary_loss")

    def law_of_times_is_right(self) -> None:
        for progress in (0.0, 1.0):
            check_pairs(self._objective.law(progress))

    def students_that_cannot_jump_are_refused(self) -> None:
        if self._objective.trains is Jumps.NONE:
            return
        self._student.jumps = Jumps.NONE
        try:
            self._fresh.setup(self._student, self._teacher)
        except ConfigError:
            return
        raise AssertionError(f"{self._name}.setup takes a student that cannot jump, and trains its jumps")

    def _check_teacher_untouched(self, what: str) -> None:
        _check(self._teacher is None or not _has_gradient(self._teacher), f"{self._name}.{what} reaches the teacher")


def _has_gradient(module: nn.Module) -> bool:
    return any(p.grad is not None for p in module.parameters())


def _finite_gradient(module: nn.Module) -> bool:
    return all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
