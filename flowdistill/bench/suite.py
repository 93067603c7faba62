"""What a suite is: the trainings that its gin file asks for."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path

import attrs
import gin
import torch
from attrs.validators import min_len

from flowdistill.plumbing import config
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.files import fingerprint
from flowdistill.plumbing.gin_errors import errors_located
from flowdistill.plumbing.randomness import ONE_AT_A_TIME
from flowdistill.plumbing.statements import Statement, parts_of
from flowdistill.training.loop import configured_loop


@attrs.frozen(kw_only=True)
class Row:
    """A row of a table: gin files with bindings."""

    group: str
    """The table that it belongs to."""
    name: str
    """Its title."""
    recipe: str
    """The method and the setting, or the gin file, in words."""
    files: tuple[Path, ...]
    """The gin files, in the order in which they are read."""
    bindings: tuple[str, ...]
    """The bindings that are read after the files."""

    @property
    def statements(self) -> list[Statement]:
        """The bindings of the files."""
        return [statement for path in self.files for statement in config.statements(path)]


@attrs.frozen(kw_only=True)
class Job:
    """A training of a row and its measurement, by its budget (None is the recipe's own steps) and its seed.

    Or, where ``teacher`` is True, the measurement of its teacher.
    """

    row: Row
    """The row."""
    budget: int | None
    """The network evaluations that the training may spend, see `Suite`; None is the recipe's own steps."""
    seed: int
    """The seed of the training and of its evaluation."""
    gin: str
    """The whole configuration."""
    value: float | None = None
    """The value of the suite's sweep; None where the row does not have its parameter."""
    teacher: bool = False
    """Whether the teacher is measured, and nothing is trained."""

    @property
    def run(self) -> str:
        """The name of the run directory: what is trained, and nothing else, decides it."""
        if self.teacher:
            return f"teacher_{_hash(self._bindings())}"
        return _hash([binding for binding in self._bindings() if binding.part != "evaluation"])

    @property
    def figures(self) -> str:
        """The name of its figures in the run directory, decided by the whole configuration."""
        return f"figures_{_hash(self._bindings())}.json"

    def _bindings(self) -> list[Statement]:
        return config.statements_of(self.gin, self.row.name)


@gin.register("bench")
@attrs.frozen(kw_only=True)
class Suite:
    """The trainings of a gin file, which binds these attributes as ``bench.rows`` and so on."""

    rows: Mapping[str, Sequence[str]] = attrs.field(validator=min_len(1))
    """A method, a setting and bindings by the title of the row, or a gin file and bindings. ``TABLE: ROW`` puts a row
    into a table of its own. By the title of a table, ``*`` in the name of the method makes a row of every packaged
    method that matches."""
    bindings: Sequence[str] = ()
    """The bindings for all rows whose recipes have the part that they set: ``mnist.folder = '...'`` does not disturb
    methods without data."""
    budgets: Sequence[int | None] = attrs.field(default=(None,), validator=min_len(1))
    """The network evaluations that a training may spend, of all its networks, each on one sample; None is the recipe's
    own number of steps. Steps are what a budget pays for, see `evaluations_per_state`."""
    sweep: tuple[str, Sequence[float]] | None = None
    """A parameter and the numbers that it takes in turn, such as ``('random_affine.strength', (0.0, 0.5))``, in the
    rows that have the part that it sets; the others are trained once. Teachers are measured at each where it is a
    parameter of ``evaluation``."""
    seeds: Sequence[int] = attrs.field(default=(1, 2, 3), validator=min_len(1))
    """The seeds of the trainings and of their evaluations."""
    teacher_steps: Sequence[int] = (1, 4)
    """The Euler steps at which the teacher of a table is measured."""
    student_steps: Sequence[int] = (1, 2, 4)
    """The jumps at which students are measured."""
    deltas: Sequence[float] = ()
    """The durations at which the distance of students from the teacher's trajectories is measured."""
    metrics: Sequence[str] = ()
    """The registered metrics; none is each table's own, those of its recipes. Students are ranked by the first, of
    which less is better."""
    quick: Sequence[str] = ()
    """The bindings, of the suite and of all rows, that make it a matter of minutes."""

    def table(self) -> list[Row]:
        """The rows, in the order of the file and of the names of recipes."""
        found = []
        for title, (method, *bindings) in self.rows.items():
            setting = bindings.pop(0) if bindings and "=" not in bindings[0] else None
            if "*" not in method:
                group, _, name = title.rpartition(": ")
                found.append(_row(group, name, method, setting, bindings))
                continue
            if setting is None:
                raise ConfigError(f"bench.rows: {method!r} needs a setting, such as 'digits'")
            matching = fnmatch.filter(config.methods(), method)
            if not matching:
                raise ConfigError(f"bench.rows: no packaged method matches {method!r}")
            found += [_row(title, name, name, setting, bindings) for name in matching]
        return found

    def jobs(self, rows: Sequence[Row], costs: MutableMapping[str, float]) -> list[Job]:
        """The trainings of rows: every budget, every value of the sweep and every seed.

        Args:
            rows: of `table`.
            costs: evaluations per state of configurations, which take a while to count; new ones are added.
        """
        measured = self._measured(self.teacher_steps[-1:])
        found = []
        for row, budget in itertools.product(rows, self.budgets):
            for value, bindings in self._swept(row):
                if budget is not None:
                    bindings = [*bindings, self._steps(row, bindings, budget, costs)]
                for seed in self.seeds:
                    seeded = [f"train.seed = {seed}", f"evaluation.seed = {seed}"]
                    text = _text(row.files, *bindings, *measured, *seeded)
                    found.append(Job(row=row, budget=budget, seed=seed, gin=text, value=value))
        return found

    def teachers(self, rows: Sequence[Row]) -> list[Job]:
        """The measurements of the teacher of each table, with the settings of the table's first row."""
        measured = self._measured(self.teacher_steps)
        found = []
        for first in reversed({row.group: row for row in reversed(rows)}.values()):
            row = attrs.evolve(first, name="teacher")
            swept = self.sweep is not None and self.sweep[0].startswith("evaluation.")
            for value, bindings in self._swept(first) if swept else [(None, self._bindings(first))]:
                for seed in self.seeds:
                    text = _text(row.files, *bindings, *measured, f"evaluation.seed = {seed}")
                    found.append(Job(row=row, budget=None, seed=seed, gin=text, value=value, teacher=True))
        return found

    def _swept(self, row: Row) -> list[tuple[float | None, list[str]]]:
        """The values of the sweep in a row, and the row's bindings at each."""
        bindings = self._bindings(row)
        if self.sweep is None:
            return [(None, bindings)]
        parameter, values = self.sweep
        parts = parts_of(*row.statements, *_statements(bindings))
        if not _set_up(f"{parameter} = None") & parts:
            return [(None, bindings)]
        return [(value, [*bindings, f"{parameter} = {value}"]) for value in values]

    def _bindings(self, row: Row) -> list[str]:
        """Those for all rows, without what sets a part that the recipe does not have, and then the row's own."""
        parts = {"train"} | parts_of(*row.statements, *_statements(row.bindings))
        kept = []
        for binding in self.bindings:
            if _set_up(binding) & parts:
                kept.append(binding)
                parts |= parts_of(*_statements([binding]))
        return [*kept, *row.bindings]

    def _measured(self, teacher_steps: Sequence[int]) -> list[str]:
        return [
            *([f"evaluation.metrics = {tuple(self.metrics)}"] if self.metrics else []),
            f"evaluation.teacher_steps = {tuple(teacher_steps)}",
            f"evaluation.student_steps = {tuple(self.student_steps)}",
            *([f"evaluation.deltas = {tuple(self.deltas)}"] if self.deltas else []),
        ]

    def _steps(self, row: Row, bindings: Sequence[str], budget: int, costs: MutableMapping[str, float]) -> str:
        """The binding that makes a training spend a budget."""
        bindings = [binding for binding in bindings if _set_up(binding) != {"evaluation"}]
        key = _hash([*row.statements, *_statements(bindings)])
        if key not in costs:
            costs[key] = evaluations_per_state(row.files, bindings)
        with config.parsed(row.files, bindings):
            batch = config.value("train.batch_size") * config.value("train.accumulation", 1)
        return f"train.steps = {max(1, round(budget / (costs[key] * batch)))}"


def _row(group: str, name: str, method: str, setting: str | None, bindings: Sequence[str]) -> Row:
    files = [config.find_gin_file(method)] if setting is None else config.composed(method, setting)
    recipe = method if setting is None else f"{method} on {setting}"
    return Row(group=group, name=name, recipe=recipe, files=tuple(files), bindings=tuple(bindings))


def _text(files: Sequence[Path], *bindings: str) -> str:
    """The text of a gin file."""
    return "\n".join([*(f"include '{config.packaged_name(path)}'" for path in files), *bindings]) + "\n"


def _hash(bindings: Sequence[Statement]) -> str:
    return fingerprint("\n".join(map(str, bindings)))[:16]


def _statements(bindings: Sequence[str]) -> list[Statement]:
    return [statement for binding in bindings for statement in config.statements_of(binding, f"binding {binding!r}")]


def _set_up(binding: str) -> set[str]:
    """The parts that a binding sets up: ``schedule`` of ``train/schedule.warmup = 20``; an include may have several."""
    return {statement.part for statement in _statements([binding])}


def evaluations_per_state(files: Sequence[str | Path], bindings: Sequence[str] = (), parts: int = 4) -> float:
    """The evaluations of all networks that a training spends on a state: the mean over its steps.

    Methods have phases of different costs, so the steps in the middle of ``parts`` equal parts of the training are
    taken, on a small batch, and counted.

    Examples:
        >>> evaluations_per_state(["freeflow/ring.gin"])
        3.0
    """
    small = ["train.batch_size = 16", "train.accumulation = 1", "train.ema = None"]
    with ONE_AT_A_TIME, torch.random.fork_rng(), config.parsed(files, [*bindings, *small]):
        loop = configured_loop("costs", "cpu")
    for part in range(parts):
        loop.step = int(loop.training.steps * (part + 0.5) / parts)
        loop.train_step()
    evaluations: int = sum(loop.counters.values())
    return evaluations / (16 * parts)


def load_suite(name: str | Path, bindings: Sequence[str] = (), quick: bool = False) -> Suite:
    """The suite of a gin file, or a packaged one by its name.

    Args:
        name: ``toy``, ``mnist``, ...: the file ``suites/NAME.gin`` of the package; or a gin file.
        bindings: ``bench.NAME = VALUE`` changes the suite; any other binding is one of all rows.
        quick: the suite's quick version, its own ``quick`` bindings read before the given ones.

    Raises:
        ConfigError: there is no such file, or it sets something that suites do not have.
    """
    path = name if str(name).endswith(".gin") else f"suites/{name}.gin"
    suite = _parsed(path, bindings)
    if not quick:
        return suite
    if not suite.quick:
        raise ConfigError(f"{name} has no quick version: set bench.quick to bindings such as 'bench.seeds = (1,)'")
    return _parsed(path, [*suite.quick, *bindings])


def _parsed(path: str | Path, bindings: Sequence[str]) -> Suite:
    ours = [binding for binding in bindings if _set_up(binding) == {"bench"}]
    with config.parsed([path], ours), errors_located():
        suite: Suite = gin.get_configurable("bench")()
        config.check_all_used()
    return attrs.evolve(suite, bindings=[*suite.bindings, *(b for b in bindings if b not in ours)])
