"""A trajectory objective and a distribution objective in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, lt
from torch import nn

from flowdistill.interfaces import FlowMap, Objective, ObjectiveOutput, States, Teacher
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_objective


@register_objective("combined")
@attrs.define(kw_only=True)
class Combined(Objective):
    """An objective that follows trajectories, and a correction of the distribution that they lead to.

    Of each batch a fraction goes to the correction, whose loss is scaled by

        lambda = alpha E|R_prediction| / E|R_correction|

    with the raw residuals R of both parts (FreeFlow, arXiv 2511.19428), or by alpha itself. An adaptive lambda is at
    most 10^4 alpha: where the velocities are equal, as at the start of an online network that copies the teacher,
    their difference is rounding errors that must not be scaled up to the size of the prediction's.

    Attributes:
        prediction: the objective that follows trajectories.
        correction: the correction, which starts from the noises of its states.
        correction_fraction: fraction of the batch for the correction, in (0, 1); each part has at least one state.
        alpha: ratio of the scaled correction residual to the prediction's, or lambda itself.
        balance: "adaptive", or "fixed" for lambda = alpha.
        correction_start: training step of the first correction; until then the whole batch is prediction.
        online_warmup: steps before ``correction_start`` from which the correction's own modules are trained.

    Raises:
        ConfigError: from `loss`, for a batch of a single state.
    """

    prediction: Objective = attrs.field(validator=instance_of(Objective))
    correction: Objective = attrs.field(validator=instance_of(Objective))
    correction_fraction: float = attrs.field(default=0.25, validator=and_(gt(0.0), lt(1.0)))
    alpha: float = attrs.field(default=1.0, validator=ge(0.0))
    balance: Literal["adaptive", "fixed"] = attrs.field(default="adaptive", validator=in_(("adaptive", "fixed")))
    correction_start: int = attrs.field(default=0, validator=ge(0))
    online_warmup: int = attrs.field(default=0, validator=ge(0))

    @property
    def citation(self) -> str:  # type: ignore[override]
        """Of both parts."""
        return "\n\n".join(dict.fromkeys((self.prediction.citation, self.correction.citation)))

    @property
    def needs_data(self) -> bool:
        """Whether either part does."""
        return self.prediction.needs_data or self.correction.needs_data

    @property
    def needs_teacher(self) -> bool:
        """Whether either part does."""
        return self.prediction.needs_teacher or self.correction.needs_teacher

    @property
    def auxiliary_updates(self) -> int:  # type: ignore[override]
        """Those of the correction, which share the step with those of the prediction."""
        return max(self.prediction.auxiliary_updates, self.correction.auxiliary_updates)

    def setup(self, student: FlowMap, teacher: Teacher | None) -> None:
        """Set both parts up."""
        self.prediction.setup(student, teacher)
        self.correction.setup(student, teacher)
        if shared := self.prediction.modules().keys() & self.correction.modules().keys():
            raise ConfigError(f"prediction and correction both have a module named {', '.join(sorted(shared))}")

    def modules(self) -> Mapping[str, nn.Module]:
        """What both parts train."""
        return {**self.prediction.modules(), **self.correction.modules()}

    def after_step(self, student: FlowMap, step: int) -> None:
        """Let both parts follow the student."""
        self.prediction.after_step(student, step)
        self.correction.after_step(student, step)

    def _split(self, states: States) -> tuple[States, States]:
        if len(states) < 2:
            raise ConfigError(
                "prediction and correction share each batch, so it needs at least 2 states: a larger train.batch_size"
            )
        rows = min(max(1, round(self.correction_fraction * len(states))), len(states) - 1)
        return states[rows:], states[:rows]

    def loss(
        self, student: FlowMap, teacher: Teacher | None, states: States, *, step: int, generator: torch.Generator
    ) -> ObjectiveOutput:
        """Prediction loss + lambda times correction loss."""
        for_prediction, for_correction = self._split(states)  # a batch too small is known from the first step on
        if step < self.correction_start:
            return self.prediction.loss(student, teacher, states, step=step, generator=generator)
        prediction = self.prediction.loss(student, teacher, for_prediction, step=step, generator=generator)
        correction = self.correction.loss(student, teacher, for_correction, step=step, generator=generator)
        scale = self._scale(prediction, correction)
        renamed = {f"correction_{name}": value for name, value in correction.metrics.items()}
        metrics = {**prediction.metrics, **renamed, "lambda": scale}
        return ObjectiveOutput(prediction.loss + scale * correction.loss, metrics, prediction.residual_norm)

    def _scale(self, prediction: ObjectiveOutput, correction: ObjectiveOutput) -> torch.Tensor:
        if self.balance == "fixed":
            dtype = torch.promote_types(prediction.loss.dtype, torch.float32)
            return torch.full_like(prediction.loss, self.alpha, dtype=dtype)
        if prediction.residual_norm is None or correction.residual_norm is None:
            raise ConfigError("an adaptive balance needs two objectives that report their residual_norm")
        floor = (1e-4 * prediction.residual_norm).clamp_min(torch.finfo(prediction.residual_norm.dtype).tiny)
        return self.alpha * prediction.residual_norm / torch.maximum(correction.residual_norm, floor)

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
        """That of the part whose module it is, on its rows; None before the warm-up of the correction's."""
        corrects = name in self.correction.modules()
        if corrects and step < self.correction_start - self.online_warmup:
            return None
        part = self.correction if corrects else self.prediction
        if step >= self.correction_start or corrects:
            states = self._split(states)[1 if corrects else 0]
        return part.auxiliary_loss(name, student, teacher, states, step=step, generator=generator)
