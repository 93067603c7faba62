"""Where the intermediate states of training come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from flowdistill.interfaces.condition import Condition
from flowdistill.interfaces.flow_map import FlowMap
from flowdistill.interfaces.teacher import Teacher


@attrs.frozen(eq=False)
class States:
    """A batch of states on the way from noise to data.

    Attributes:
        x: the states, ``(B, *sample_shape)``.
        t: their times, (B,), in [0, 1].
        condition: their labels and guidance scales.
        clean: the data x_0 of each state, where there are any.
        noise: the noise n of each state, where it is known.
    """

    x: Tensor
    t: Tensor
    condition: Condition
    clean: Tensor | None = None
    noise: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def at_prior(self) -> States:
        """The noises from which the states come as states at t = 1; the states themselves where these are unknown."""
        if self.noise is None or self.noise is self.x:
            return self
        return States(x=self.noise, t=torch.ones_like(self.t), condition=self.condition, noise=self.noise)

    def __getitem__(self, index: slice | Tensor) -> States:
        """Some rows of the batch: ``index`` is a slice, a mask, or row numbers."""
        return States(
            x=self.x[index],
            t=self.t[index],
            condition=self.condition[index],
            clean=None if self.clean is None else self.clean[index],
            noise=None if self.noise is None else self.noise[index],
        )


class StateSource(ABC):
    """Draws the states on which a trajectory objective is evaluated."""

    needs_data: ClassVar[bool] = False

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Take what the source needs of the run: shapes, classes, a teacher to roll out."""

    @abstractmethod
    def sample(self, batch_size: int, generator: torch.Generator) -> States:
        """Draw a batch; all randomness comes from ``generator``, on whose device the states lie."""
