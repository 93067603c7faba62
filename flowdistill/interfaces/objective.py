"""What a student is trained to minimise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from flowdistill.interfaces.flow_map import FlowMap, Jumps
from flowdistill.interfaces.jump import States
from flowdistill.interfaces.part import Part
from flowdistill.interfaces.teacher import Teacher
from flowdistill.interfaces.times import OneStep, Pairs
from flowdistill.plumbing.errors import ConfigError


@attrs.frozen(eq=False)
class Step:
    """A step of training, as an objective sees it."""

    generator: torch.Generator
    """The source of all random numbers of the loss."""
    number: int = 0
    """The updates of the student so far."""
    progress: float = 0.0
    """The part of the training that is done, in [0, 1]."""


@attrs.frozen(eq=False)
class ObjectiveOutput:
    """The result of one evaluation of an objective."""

    loss: Tensor
    """A scalar, with a graph."""
    metrics: Mapping[str, Tensor] = attrs.field(factory=dict)
    """Detached scalars for the log, by name."""
    residual_norm: Tensor | None = None
    """The mean over the batch of the norm of a sample's residual, before any weight, by which two objectives are
    balanced."""
    weighted_norm: Tensor | None = None
    """The same after the weight of each sample, which its gradient has."""
    samples: Tensor | None = None
    """The student's one-step samples, detached, of a loss that corrects their distribution."""


class Objective(Part, ABC):
    """A loss for flow maps. Concrete objectives are attrs classes whose fields are their hyper-parameters.

    The trainer calls `setup` once with the models, and then `loss` at every step on states of the law `law`.
    """

    citation: ClassVar[str] = ""
    """BibTeX of the paper."""
    pairs: Pairs = OneStep()
    """The law of the times (t, s) of the states."""
    trains: ClassVar[Jumps] = Jumps.ANY
    """The jumps that a student must be able to make, of which states at t = 1 alone train those from noise."""
    flow_map: ClassVar[str] = "from_teacher"
    """The registered builder of the students that it trains."""
    needs_all_times: ClassVar[bool] = False
    """Whether states at t = 1 alone teach nothing, so that the prior cannot be the state source."""
    auxiliary_updates: int = 1
    """Updates of the extra modules for each update of the student; each after the first is on fresh states."""

    @property
    def needs_data(self) -> bool:
        """Whether the states must carry clean data.

        **If it is False the objective trains on a machine on which no data set exists.**
        """
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's velocity is queried."""
        return True

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take the models; ConfigError for a student that cannot make the jumps from noise that are trained."""
        self.check_jumps(student, self.trains & Jumps.FROM_NOISE)
        super().setup(student, teacher)

    def check_jumps(self, student: FlowMap, needed: Jumps) -> None:
        """ConfigError for a student that cannot make the jumps that are needed."""
        if needed not in student.jumps:
            raise ConfigError(
                f"{type(self).__name__} trains jumps ({_words(needed)}) that this student cannot make "
                f"({_words(student.jumps)}): set another conditioning of the student"
            )

    def law(self, progress: float) -> Pairs:
        """The law of the times of the states when the part ``progress`` of the training is done."""
        return self.pairs

    @abstractmethod
    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """The student's loss on a batch of states; all randomness comes from ``step.generator``."""

    def auxiliary_loss(self, name: str, states: States, step: Step) -> ObjectiveOutput | None:
        """The loss of the extra module ``name``; only its parameters receive gradients.

        None leaves the module untouched at this step.
        """
        raise KeyError(f"{type(self).__name__} has no module named {name!r}")


def _words(jumps: Jumps) -> str:
    return (jumps.name or str(jumps)).lower().replace("_", " ")
