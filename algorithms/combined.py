"""A trajectory objective and a distribution objective in one."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from attrs.validators import and_, ge, gt, in_, instance_of, le, lt

from flowdistill.interfaces import Jumps, Objective, ObjectiveOutput, Pairs, States, Step
from flowdistill.pairs import Joined, rows_of
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_objective


@register_objective("combined")
@attrs.define(kw_only=True, slots=False)
class Combined(Objective):
    """An objective that follows trajectories, and a correction of the distribution that they lead to.

    Of each batch a fraction goes to the correction, whose loss is scaled by

        lambda = alpha E|R_prediction| / E|R_correction|

    with the residuals R of both parts (FreeFlow, arXiv 2511.19428), raw or weighted, or by alpha itself.
    Each part's loss is the mean over its own rows.
    The mean over all rows of a batch would divide this lambda by the ratio of their numbers, 3 for a quarter.
    An adaptive lambda is at most 10^4 alpha.
    At the start of an online network that copies the teacher the two velocities are equal: their difference is rounding
    errors, which must not be scaled up to the size of the prediction's.

    Raises:
        ConfigError: from `loss`, for a batch of a single state.
    """

    prediction: Objective = attrs.field(validator=instance_of(Objective))
    """The objective that follows trajectories."""
    correction: Objective = attrs.field(validator=instance_of(Objective))
    """The correction, which starts from the noises of its states."""
    correction_fraction: float = attrs.field(default=0.25, validator=and_(gt(0.0), lt(1.0)))
    """The fraction of the batch for the correction; each part has at least one state."""
    alpha: float = attrs.field(default=1.0, validator=ge(0.0))
    """The ratio of the scaled correction residual to the prediction's, or lambda itself."""
    balance: Literal["adaptive", "weighted", "fixed"] = attrs.field(
        default="adaptive", validator=in_(("adaptive", "weighted", "fixed"))
    )
    """"adaptive" compares the raw residuals, "weighted" those with the weights w of each part, E|w R|; "fixed" is
    lambda = alpha."""
    correction_start: float = attrs.field(default=0.0, validator=and_(ge(0.0), le(1.0)))
    """The part of the training after which the correction begins; until then the whole batch is prediction."""
    online_warmup: float = attrs.field(default=0.0, validator=and_(ge(0.0), le(1.0)))
    """The part of the training before ``correction_start`` in which the correction's own modules are trained."""

    @property
    def citation(self) -> str:  # type: ignore[override]
        """The BibTeX of both parts."""
        return "\n\n".join(dict.fromkeys((self.prediction.citation, self.correction.citation)))

    @property
    def trains(self) -> Jumps:  # type: ignore[override]
        """The jumps of both parts."""
        return self.prediction.trains | self.correction.trains

    @property
    def needs_all_times(self) -> bool:  # type: ignore[override]
        """Whether the prediction does."""
        return self.prediction.needs_all_times

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

    def law(self, progress: float) -> Pairs:
        """The prediction's law, and from the correction's start on the correction's law for its rows."""
        prediction = self.prediction.law(progress)
        if progress < self.correction_start:
            return prediction
        return Joined(first=self.correction.law(progress), others=prediction, share=self.correction_fraction)

    def split(self, states: States) -> tuple[States, States]:
        """The states of the prediction and of the correction."""
        if len(states) < 2:
            raise ConfigError(
                "prediction and correction share each batch, so it needs at least 2 states: a larger train.batch_size"
            )
        rows = rows_of(self.correction_fraction, len(states))
        return states[rows:], states[:rows]

    def warmed_up(self, progress: float) -> bool:
        """Whether the warm-up of the correction's own modules has begun."""
        return progress >= self.correction_start - self.online_warmup - 1e-9  # a difference of two decimals

    def loss(self, states: States, step: Step) -> ObjectiveOutput:
        """Prediction loss + lambda times correction loss."""
        for_prediction, for_correction = self.split(states)  # a batch too small is known from the first step on
        if step.progress < self.correction_start:
            return self.prediction.loss(states, step)
        prediction = self.prediction.loss(for_prediction, step)
        correction = self.correction.loss(for_correction, step)
        scale = self._scale(prediction, correction)
        renamed = {f"correction_{name}": value for name, value in correction.metrics.items()}
        return attrs.evolve(
            prediction,
            loss=prediction.loss + scale * correction.loss,
            metrics={**prediction.metrics, **renamed, "lambda": scale},
            samples=correction.samples,
        )

    def _scale(self, prediction: ObjectiveOutput, correction: ObjectiveOutput) -> torch.Tensor:
        if self.balance == "fixed":
            dtype = torch.promote_types(prediction.loss.dtype, torch.float32)
            return torch.full_like(prediction.loss, self.alpha, dtype=dtype)
        parts = (prediction, correction)
        ours, theirs = (p.weighted_norm if self.balance == "weighted" else p.residual_norm for p in parts)
        if ours is None or theirs is None:
            raise ConfigError("this balance needs two objectives that report the norms of their residuals")
        return self.alpha * ours / torch.maximum(theirs, (1e-4 * ours).clamp_min(torch.finfo(ours.dtype).tiny))

    def auxiliary_loss(self, name: str, states: States, step: Step) -> ObjectiveOutput | None:
        """The loss of the part whose module it is, on its rows; None before the warm-up of the correction's."""
        corrects = name in self.correction.modules()
        if corrects and not self.warmed_up(step.progress):
            return None
        part = self.correction if corrects else self.prediction
        if step.progress >= self.correction_start or corrects:
            states = self.split(states)[1 if corrects else 0]
        return part.auxiliary_loss(name, states, step)
