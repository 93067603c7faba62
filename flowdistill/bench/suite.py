"""What a suite is: the trainings that its gin file asks for."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import gin
from attrs.validators import min_len

from flowdistill import config
from flowdistill.errors import ConfigError
from flowdistill.planning import evaluations_per_state


@attrs.frozen(kw_only=True)
class Row:
    """A row of a table: a recipe with bindings.

    Attributes:
        group: the table that it belongs to.
        name: its title.
        recipe: a packaged recipe or a gin file.
        bindings: read after the recipe.
    """

    group: str
    name: str
    recipe: str
    bindings: tuple[str, ...]


@attrs.frozen(kw_only=True)
class Job:
    """A training of a row, by its budget (None is the recipe's own steps) and its seed.

    Or, where ``teacher`` is True, the measurement of its teacher.
    """

    row: Row
    budget: int | None
    seed: int
    gin: str
    teacher: bool = False

    @property
    def key(self) -> str:
        """The name of the run directory: what is trained, and nothing else, decides it."""
        return "teacher_" * self.teacher + hashlib.sha256(self.gin.encode()).hexdigest()[:16]


@gin.register("bench")  # type: ignore[untyped-decorator]
@attrs.frozen(kw_only=True)
class Suite:
    """The trainings of a gin file, which binds these attributes as ``bench.rows`` and so on.

    Attributes:
        rows: a recipe and bindings by the title of the row; or by the title of a table, where ``*`` in the name of the
            recipe makes a row of every packaged recipe that matches.
        bindings: for all rows, such as metrics and the numbers of samples.
        budgets: network evaluations that a training may spend, of all its networks, each on one sample; None is the
            recipe's own number of steps. Steps are what a budget pays for, see `evaluations_per_state`.
        in_steps: parameters that are numbers of steps and keep their proportion to the recipe's when a budget changes
            them, such as ``freeflow.correction_start``.
        seeds: of the trainings and of their evaluations.
        teacher_steps: Euler steps at which the teacher of a table is measured.
        student_steps: jumps at which students are measured.
        metrics: registered metrics; students are ranked by the first, of which less is better.
        quick: bindings, of the suite and of all rows, that make it a matter of minutes.
    """

    rows: Mapping[str, Sequence[str]] = attrs.field(validator=min_len(1))
    bindings: Sequence[str] = ()
    budgets: Sequence[int | None] = attrs.field(default=(None,), validator=min_len(1))
    in_steps: Sequence[str] = ()
    seeds: Sequence[int] = attrs.field(default=(1, 2, 3), validator=min_len(1))
    teacher_steps: Sequence[int] = (1, 4)
    student_steps: Sequence[int] = (1, 2, 4)
    metrics: Sequence[str] = attrs.field(default=("fid", "precision", "recall"), validator=min_len(1))
    quick: Sequence[str] = ()

    def table(self) -> list[Row]:
        """The rows, in the order of the file and of the names of recipes."""
        found = []
        for title, (recipe, *bindings) in self.rows.items():
            if "*" not in recipe:
                found.append(Row(group="", name=title, recipe=recipe, bindings=tuple(bindings)))
                continue
            matching = fnmatch.filter(config.recipes(), recipe)
            if not matching:
                raise ConfigError(f"bench.rows: no packaged recipe matches {recipe!r}")
            tail = recipe.rpartition("*")[2]
            for name in matching:
                short = name.removesuffix(tail).rstrip("_/")
                found.append(Row(group=title, name=short, recipe=name, bindings=tuple(bindings)))
        return found

    def jobs(self, rows: Sequence[Row]) -> list[Job]:
        """The trainings of rows: every budget and every seed."""
        return [
            job
            for row in rows
            for budget in self.budgets
            for job in self._of_row(row, budget, [*self.bindings, *row.bindings])
        ]

    def _of_row(self, row: Row, budget: int | None, bindings: list[str]) -> list[Job]:
        bindings = [*bindings, *self._measured(self.teacher_steps[-1:])]
        if budget is not None:
            bindings += self._steps(row.recipe, bindings, budget)
        seeded = [[*bindings, f"train.seed = {seed}", f"evaluation.seed = {seed}"] for seed in self.seeds]
        return [
            Job(row=row, budget=budget, seed=seed, gin="\n".join([f"include '{row.recipe}'", *lines]) + "\n")
            for seed, lines in zip(self.seeds, seeded, strict=True)
        ]

    def teachers(self, rows: Sequence[Row]) -> list[Job]:
        """The measurements of the teacher of each table, with the settings of the table's first row."""
        first = {row.group: row for row in reversed(rows)}
        return [
            Job(
                row=attrs.evolve(row, name="teacher"), budget=None, seed=seed, gin="\n".join(lines) + "\n", teacher=True
            )
            for row in reversed(first.values())
            for seed in self.seeds
            for lines in [
                [
                    f"include '{row.recipe}'",
                    *self.bindings,
                    *row.bindings,
                    *self._measured(self.teacher_steps),
                    f"evaluation.seed = {seed}",
                ]
            ]
        ]

    def _measured(self, teacher_steps: Sequence[int]) -> list[str]:
        return [
            f"evaluation.metrics = {tuple(self.metrics)}",
            f"evaluation.teacher_steps = {tuple(teacher_steps)}",
            f"evaluation.student_steps = {tuple(self.student_steps)}",
        ]

    def _steps(self, recipe: str, bindings: Sequence[str], budget: int) -> list[str]:
        """Bindings that make a training spend a budget."""
        with config.parsed([recipe], bindings):
            own, batch = config.value("train.steps"), config.value("train.batch_size")
            batch *= config.value("train.accumulation", 1)
            lengths = {name: value for name in self.in_steps if (value := config.value(name)) is not None}
        steps = max(1, round(budget / (evaluations_per_state(recipe, bindings) * batch)))
        scaled = {name: _scaled(value, steps / own) for name, value in lengths.items()}
        return [f"train.steps = {steps}", *(f"{name} = {value!r}" for name, value in scaled.items())]


def _scaled(value: Any, factor: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_scaled(part, factor) for part in value)
    return round(value * factor)


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
    ours = [binding for binding in bindings if binding.startswith("bench.")]
    with config.parsed([path], ours), config.errors_located():
        suite: Suite = gin.get_configurable("bench")()
        config.check_all_used()
    return attrs.evolve(suite, bindings=[*suite.bindings, *(b for b in bindings if b not in ours)])
