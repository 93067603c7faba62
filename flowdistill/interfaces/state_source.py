"""Where the intermediate states of training come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch

from flowdistill.interfaces.jump import States
from flowdistill.interfaces.part import Part
from flowdistill.interfaces.times import Pairs


class StateSource(Part, ABC):
    """Draws the states on which an objective is evaluated."""

    needs_data: ClassVar[bool] = False
    """Whether it reads a data set; its states then carry clean data and noise."""
    knows_all_times: ClassVar[bool] = True
    """Whether states lie at the times t of the law; a source that knows t = 1 alone keeps the law's ratio s/t."""

    @abstractmethod
    def sample(self, batch_size: int, pairs: Pairs, generator: torch.Generator) -> States:
        """Draw a batch of states at times of the law ``pairs``.

        All randomness comes from ``generator``, on whose device the states lie.
        """

    def prefetch(self, batch_size: int, generator: torch.Generator) -> None:
        """Begin to read what `sample` will need for a generator in this state; the default does nothing."""

    def leave_out_data(self) -> None:
        """Take zeros in place of a data set, where only costs are of interest; the default has none."""
