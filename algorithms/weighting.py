"""Weights of samples that are learned in training."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import gin
import torch
from attrs.validators import ge, instance_of
from torch import Tensor, nn

from flowdistill.interfaces import FlowMap, ObjectiveOutput, Part, Teacher
from flowdistill.networks import Linear, ScalarEmbedding


@gin.register("learned_weighting", module="weightings")
@attrs.define(kw_only=True, eq=False, slots=False)
class LearnedWeighting(Part):
    """A weight e^w(t) that brings the mean error of every time to 1, by a small network w.

    The network minimises e^w(t) E - w(t), where E is the error of a sample, so that e^w(t) is the reciprocal of the
    mean error at t (Karras et al. 2024, EDM2, arXiv 2312.02696, equation 21, whose u is -w).
    The errors are those of the samples that were weighted in the present training step.
    """

    size: int = attrs.field(default=128, validator=ge(1))
    """The width of the network."""
    name: str = attrs.field(default="weighting", validator=instance_of(str))
    """The name of the module; two weightings in one objective need two names."""

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Start from the weight 1 at all times."""
        super().setup(student, teacher)
        last = Linear(self.size, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self._network = nn.Sequential(ScalarEmbedding(self.size), nn.SiLU(), last)
        self._step = -1
        self._rows: list[tuple[Tensor, Tensor]] = []

    def modules(self) -> Mapping[str, nn.Module]:
        """The network."""
        return {self.name: self._network}

    def __call__(self, t: Tensor, error: Tensor, number: int) -> Tensor:
        """The weights e^w(t) (B,), detached, of samples at times t (B,) in the training step ``number``.

        Their errors (B,) are kept for `loss`.
        """
        if number != self._step:
            self._step, self._rows = number, []
        self._rows.append((t, error.detach()))
        with torch.no_grad():
            return self._logarithm(t).exp().to(error.dtype)

    def loss(self) -> ObjectiveOutput | None:
        """The mean of e^w E - w over the samples of the step; None before any were weighted."""
        if not self._rows:
            return None
        t, error = (torch.cat(column) for column in zip(*self._rows, strict=True))
        logarithm = self._logarithm(t)
        return ObjectiveOutput((logarithm.exp() * error - logarithm).mean())

    def _logarithm(self, t: Tensor) -> Tensor:
        with torch.autocast(t.device.type, enabled=False):
            logarithm: Tensor = self._network(t)[:, 0]
        return logarithm
