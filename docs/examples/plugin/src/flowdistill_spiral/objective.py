"""An objective."""

import math

import attrs
from torch.nn.functional import softplus

import flowdistill
from flowdistill.algorithms.identities import lagrangian
from flowdistill.pairs import Durations
from flowdistill.velocities import FiniteDifference


@flowdistill.register_objective("log_cosh_prediction")
@attrs.define(kw_only=True, slots=False)
class LogCoshPrediction(flowdistill.Objective):
    """FreeFlow's prediction, whose residual R = v_G - u is measured by the mean of c^2 log cosh(R / c)."""

    trains = flowdistill.Jumps.FROM_NOISE

    pairs: flowdistill.Pairs = attrs.field(factory=Durations)
    """The law of the jumps."""
    estimator: flowdistill.GeneratingVelocity = attrs.field(factory=FiniteDifference)
    """The estimator of v_G."""
    c: float = 0.5
    """The size of a residual from which on its distance grows linearly."""

    def loss(self, states, step):
        """The mean distance; one evaluation of the teacher."""
        residual = lagrangian(self.estimator, self.teacher.velocity, states, step.progress)
        size = residual.attached.abs() / self.c
        distance = self.c**2 * (size + softplus(-2 * size) - math.log(2))  # log cosh, without overflow
        return flowdistill.ObjectiveOutput(distance.mean(), {"error": residual.value.detach().square().mean()})
