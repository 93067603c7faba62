"""The abstractions of the library and the records that they exchange."""

from flowdistill.interfaces.condition import NULL_LABEL, Condition
from flowdistill.interfaces.decoder import Decoder
from flowdistill.interfaces.flow_map import FlowMap
from flowdistill.interfaces.objective import Objective, ObjectiveOutput
from flowdistill.interfaces.state_source import States, StateSource
from flowdistill.interfaces.target_velocity import TargetVelocity
from flowdistill.interfaces.teacher import Teacher
from flowdistill.interfaces.velocity_estimator import (
    GeneratingVelocity,
    NoisingVelocity,
    VelocityEstimator,
)
from flowdistill.interfaces.verifier import Verifier

__all__ = [
    "NULL_LABEL",
    "Condition",
    "Decoder",
    "FlowMap",
    "GeneratingVelocity",
    "NoisingVelocity",
    "Objective",
    "ObjectiveOutput",
    "StateSource",
    "States",
    "TargetVelocity",
    "Teacher",
    "VelocityEstimator",
    "Verifier",
]
