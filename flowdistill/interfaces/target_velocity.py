"""The velocity at the states that an objective takes for the teacher's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from flowdistill.interfaces.jump import States
from flowdistill.interfaces.part import Part


class TargetVelocity(Part, ABC):
    """The dx/dt at the states of training, by which an objective trains from data or distils a teacher."""

    needs_data: ClassVar[bool] = False
    """Whether the states must carry clean data and their noise."""
    needs_teacher: ClassVar[bool] = False
    """Whether a teacher's velocity is queried."""

    @abstractmethod
    def __call__(self, states: States) -> Tensor:
        """The velocity at (x, t), detached, of the shape of x."""
