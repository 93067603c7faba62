"""What a student is trained to minimise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from flowdistill.interfaces.flow_map import FlowMap
from flowdistill.interfaces.state_source import States
from flowdistill.interfaces.teacher import Teacher


@attrs.frozen(eq=False)
class ObjectiveOutput:
    """The result of one evaluation of an objective.

    Attributes:
        loss: scalar, with a graph.
        metrics: detached scalars for the log, by name.
        residual_norm: mean over the batch of the norm of a sample's residual, before any weight; what adaptive
            balancing of two objectives compares.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = attrs.field(factory=dict)
    residual_norm: Tensor | None = None


class Objective(ABC):
    """A loss for flow maps. Concrete objectives are attrs classes whose fields are their hyper-parameters.

    Attributes:
        citation: BibTeX of the paper.
        auxiliary_updates: updates of the extra modules for each update of the student; the first is on the student's
            own states, each further one on fresh states.
    """

    citation: ClassVar[str] = ""
    auxiliary_updates: int = 1

    @property
    def needs_data(self) -> bool:
        """Whether the states must carry clean data.

        **Where it is False the objective trains on a machine on which no data set exists.**
        """
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher's velocity is queried."""
        return True

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Build what depends on the models, such as an online network; called once before training."""

    @abstractmethod
    def loss(
        self,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        *,
        step: int,
        generator: torch.Generator,
    ) -> ObjectiveOutput:
        """The student's loss on a batch of states; all randomness comes from ``generator``."""

    def modules(self) -> Mapping[str, nn.Module]:
        """Extra modules by name, saved in checkpoints.

        Each that has parameters to train is trained by an optimiser of its own on `auxiliary_loss`.
        """
        return {}

    def after_step(self, student: FlowMap, step: int) -> None:
        """Follow the student after its update number ``step``, as an average of its weights does."""

    def auxiliary_loss(
        self,
        name: str,
        student: FlowMap,
        teacher: Teacher | None,
        states: States,
        *,
        step: int,
        generator: torch.Generator,
    ) -> ObjectiveOutput | None:
        """The loss of the extra module ``name``; only its parameters receive gradients.

        None leaves the module untouched at this step.
        """
        raise KeyError(f"{type(self).__name__} has no module named {name!r}")
