"""The velocity at the states that an objective takes for the teacher's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from flowdistill.interfaces.flow_map import FlowMap
from flowdistill.interfaces.state_source import States
from flowdistill.interfaces.teacher import Teacher


class TargetVelocity(ABC):
    """The dx/dt at the states of training: what makes an objective train from data or distil a teacher.

    Attributes:
        needs_data: whether the states must carry clean data and their noise.
        needs_teacher: whether a teacher's velocity is queried.
    """

    needs_data: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    @abstractmethod
    def velocity(self, student: FlowMap, teacher: Teacher | None, states: States) -> Tensor:
        """The velocity at (x, t), detached, of the shape of x."""
