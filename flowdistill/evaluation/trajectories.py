"""How far a flow map is from its teacher's trajectories, and from being a flow map at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch
from torch import Tensor

from flowdistill.evaluation.features import FeatureExtractor, load_features
from flowdistill.evaluation.samples import sample_set
from flowdistill.interfaces import Condition, FlowMap, Jumps, Teacher
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.randomness import step_generator
from flowdistill.solvers import OdeSolver, RungeKutta4

_BATCH = 100


@attrs.frozen
class ErrorAt:
    """An error at a duration."""

    delta: float
    """The duration, in (0, 1]."""
    mean: float
    """The mean error over the noises."""
    standard_error: float
    """The standard error of the mean."""


@torch.no_grad()
def trajectory_error(
    student: FlowMap,
    teacher: Teacher,
    deltas: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0),
    n: int = 256,
    *,
    guidance: float | None = None,
    solver: OdeSolver | None = None,
    seed: int = 0,
) -> list[ErrorAt]:
    """How far jumps from the prior end from the teacher's trajectories, as a function of their duration.

        e(delta) = E_z |X(z, 1, 1 - delta) - x(1 - delta)| / (E_z |x(1 - delta) - z|^2)^(1/2)

    where x(t) solves dx/dt = u(x, t) from x(1) = z. The unit is the distance travelled, so that e is the relative error
    of the average velocity: 0 for the exact map, about 1 for one that stays where it is.

    Args:
        student: a map of the teacher's sample shape; an anchored one will do.
        teacher: guided already, if it is to be.
        deltas: durations in (0, 1].
        n: noises; classes are taken in turn.
        guidance: scale for both; None is their own.
        solver: of the ODE between one delta and the next; None is Runge-Kutta's with 16 steps, 64 evaluations each.
        seed: of the noise.

    Raises:
        ConfigError: durations that are not in (0, 1], or for a map to data other ones than 1.

    Examples:
        >>> from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
        >>> teacher = GaussianTeacher(mean=[1.0, 0.0], covariance=0.25)
        >>> [f"{e.delta}: {e.mean:.3f}" for e in trajectory_error(GaussianFlowMap(teacher), teacher, (0.5, 1.0))]
        ['0.5: 0.000', '1.0: 0.000']
    """
    durations = checked_deltas(deltas)
    if student.jumps is Jumps.TO_DATA and durations != [1.0]:
        raise ConfigError("a map to data ends at t = 0 alone: its error is that at deltas = (1.0,)")
    integrate = RungeKutta4() if solver is None else solver

    def ends(noise: Tensor, condition: Condition) -> tuple[list[Tensor], list[Tensor]]:
        jumps, truth, x, start = [], [], noise, 1.0
        for delta in durations:
            x, start = integrate.solve(teacher, x, condition, start=start, end=1 - delta), 1 - delta
            truth.append(x)
            jumps.append(_jump(student, noise, 1.0, 1 - delta, condition))
        return jumps, truth

    return _errors(student, durations, n, guidance, seed, ends)


@torch.no_grad()
def semigroup_error(
    student: FlowMap,
    deltas: Sequence[float] = (0.125, 0.25, 0.5, 0.75, 1.0),
    n: int = 256,
    *,
    guidance: float | None = None,
    seed: int = 0,
) -> list[ErrorAt]:
    """How far two jumps of half the duration end from one, which the flow map of any ODE makes no difference between.

        e(delta) = E_z |X(X(z, 1, r), r, s) - X(z, 1, s)| / (E_z |X(z, 1, s) - z|^2)^(1/2)

    with r = 1 - delta/2 and s = 1 - delta. It asks for no teacher, and is 0 also for the map of a wrong one: read it
    beside `trajectory_error`.

    Args:
        student: a map for all s <= t.
        deltas: durations in (0, 1].
        n: noises; classes are taken in turn.
        guidance: scale; None is the student's own.
        seed: of the noise.

    Raises:
        ConfigError: an anchored student or a map to data, whose jumps cannot be composed, or durations that are not in
            (0, 1].

    Examples:
        >>> from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
        >>> student = GaussianFlowMap(GaussianTeacher(mean=[1.0, 0.0], covariance=0.25))
        >>> [f"{e.delta}: {e.mean:.3f}" for e in semigroup_error(student, (0.5, 1.0))]
        ['0.5: 0.000', '1.0: 0.000']
    """
    if student.jumps is not Jumps.ANY:
        raise ConfigError("only a map between any two times has jumps that can be composed")
    durations = checked_deltas(deltas)

    def ends(noise: Tensor, condition: Condition) -> tuple[list[Tensor], list[Tensor]]:
        composed = []
        for delta in durations:
            middle = _jump(student, noise, 1.0, 1 - delta / 2, condition)
            composed.append(_jump(student, middle, 1 - delta / 2, 1 - delta, condition))
        return composed, [_jump(student, noise, 1.0, 1 - delta, condition) for delta in durations]

    return _errors(student, durations, n, guidance, seed, ends)


@torch.no_grad()
def class_agreement(
    student: FlowMap,
    teacher: Teacher,
    features: str | FeatureExtractor,
    n: int = 1000,
    *,
    guidance: float | None = None,
    solver: OdeSolver | None = None,
    seed: int = 0,
) -> float:
    """Fraction of noises that student, in one step, and teacher carry to images of one class, as a classifier sees it.

    A student of the right distribution on the wrong trajectories has the classes of its labels, as ``accuracy`` says,
    but of an unconditional teacher it agrees no more often than chance.

    Args:
        student: a map of the teacher's sample shape.
        teacher: guided already, if it is to be.
        features: a feature extractor that classifies, or its name.
        n: noises; classes are taken in turn.
        guidance: scale for both; None is their own.
        solver: of the teacher's ODE; None is Runge-Kutta's with 16 steps, 64 evaluations.
        seed: of the noise.

    Raises:
        ConfigError: features without logits.

    Examples:
        >>> import flowdistill
        >>> teacher = flowdistill.load_teacher("digits_teacher")
        >>> one_step = flowdistill.flow_maps.from_teacher(teacher)
        >>> class_agreement(one_step, teacher, "digits", n=50) > 0.3  # means of the classes are recognised
        True
    """
    extractor = load_features(features)
    integrate = RungeKutta4() if solver is None else solver
    same = []
    for noise, condition in _noises(student, n, guidance, seed):
        pair = (_jump(student, noise, 1.0, 0.0, condition), integrate.solve(teacher, noise, condition))
        logits = [sample_set(samples, None, extractor, student.decoder).logits for samples in pair]
        if logits[0] is None or logits[1] is None:
            raise ConfigError(f"{type(extractor).__name__} gives no classes: name features that classify")
        same.append(logits[0].argmax(1) == logits[1].argmax(1))
    return float(torch.cat(same).double().mean())


def checked_deltas(deltas: Sequence[float]) -> list[float]:
    """Durations in ascending order; ConfigError if there are none, or one is not in (0, 1]."""
    if not deltas or not all(0 < delta <= 1 for delta in deltas):
        raise ConfigError(f"deltas must be in (0, 1], not {tuple(deltas)}")
    return sorted(deltas)


def _jump(student: FlowMap, x: Tensor, t: float, s: float, condition: Condition) -> Tensor:
    end: Tensor = student(x, x.new_full((len(x),), t), x.new_full((len(x),), s), condition)
    return end


def _noises(student: FlowMap, n: int, guidance: float | None, seed: int) -> list[tuple[Tensor, Condition]]:
    parameter = next(student.parameters())
    shape = (n, *student.sample_shape)
    noise = torch.randn(shape, generator=step_generator(seed, 0, "trajectories"), dtype=parameter.dtype)
    condition = Condition.in_turn(student.num_classes, n, guidance)
    parts = [slice(i, i + _BATCH) for i in range(0, n, _BATCH)]
    return [(noise[part].to(parameter.device), condition[part].to(parameter.device)) for part in parts]


def _errors(
    student: FlowMap,
    deltas: list[float],
    n: int,
    guidance: float | None,
    seed: int,
    ends: Callable[[Tensor, Condition], tuple[list[Tensor], list[Tensor]]],
) -> list[ErrorAt]:
    """Distances of the first ends, one for each delta, from the second, in units of the latter's from the noise."""
    if n < 2:
        raise ConfigError(f"an error with its standard error takes at least 2 noises, not {n}")
    apart: list[list[Tensor]] = [[] for _ in deltas]
    travelled: list[list[Tensor]] = [[] for _ in deltas]
    for noise, condition in _noises(student, n, guidance, seed):
        for i, (end, truth) in enumerate(zip(*ends(noise, condition), strict=True)):
            apart[i].append((end - truth).flatten(1).double().norm(dim=1).cpu())
            travelled[i].append((truth - noise).flatten(1).double().norm(dim=1).cpu())
    result = []
    for delta, distances, lengths in zip(deltas, apart, travelled, strict=True):
        relative = torch.cat(distances) / torch.cat(lengths).square().mean().sqrt()
        result.append(ErrorAt(delta, float(relative.mean()), float(relative.std() / n**0.5)))
    return result
