"""Parts of a training that are bound to its models."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from torch import nn

from flowdistill.interfaces.flow_map import FlowMap
from flowdistill.interfaces.teacher import Teacher
from flowdistill.plumbing.errors import ConfigError


class Part:
    """A part of a training: it is given the student and the teacher once, before the first step.

    Parts among the fields of an attrs class are set up with it, and their modules are its own.
    """

    _student: FlowMap | None = None
    _teacher: Teacher | None = None

    def parts(self) -> list[Part]:
        """The fields that are parts themselves."""
        kind: type = type(self)
        if not attrs.has(kind):
            return []
        values = (getattr(self, field.name) for field in attrs.fields(kind))
        return [value for value in values if isinstance(value, Part)]

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take the models; called once before training.

        Raises:
            ConfigError: the models do not fit.
        """
        self._student, self._teacher = student, teacher
        for part in self.parts():
            part.setup(student, teacher)

    @property
    def student(self) -> FlowMap:
        """The student."""
        if self._student is None:
            raise RuntimeError(f"{type(self).__name__} has no student yet: call setup first")
        return self._student

    @property
    def teacher(self) -> Teacher:
        """The teacher; ConfigError if there is none."""
        if self._teacher is None:
            raise ConfigError(f"{type(self).__name__} needs a teacher: set train.teacher")
        return self._teacher

    def modules(self) -> Mapping[str, nn.Module]:
        """Further modules by name, saved in checkpoints.

        An optimiser of its own trains each that has parameters to train, see `Objective.auxiliary_loss`.

        Raises:
            ConfigError: two parts have a module of the same name.
        """
        found: dict[str, nn.Module] = {}
        for part in self.parts():
            modules = part.modules()
            if shared := found.keys() & modules.keys():
                raise ConfigError(f"two parts of {type(self).__name__} have a module named {', '.join(sorted(shared))}")
            found.update(modules)
        return found

    def after_step(self, number: int) -> None:
        """Follow the student after its update ``number``, as an average of its weights does."""
        for part in self.parts():
            part.after_step(number)
