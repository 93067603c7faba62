"""The abstractions of the library and the records that they exchange."""

from flowdistill.interfaces._counting import Counted
from flowdistill.interfaces.condition import NULL_LABEL, Condition, Guidance
from flowdistill.interfaces.decoder import Decoder
from flowdistill.interfaces.flow_map import FlowMap, Jumps
from flowdistill.interfaces.jump import Jump, States
from flowdistill.interfaces.objective import Objective, ObjectiveOutput, Step
from flowdistill.interfaces.part import Part
from flowdistill.interfaces.state_source import StateSource
from flowdistill.interfaces.target_velocity import TargetVelocity
from flowdistill.interfaces.teacher import ExactTeacher, Teacher
from flowdistill.interfaces.times import OneStep, Pairs, TimeSampler
from flowdistill.interfaces.velocity_estimator import (
    GeneratingVelocity,
    NoisingVelocity,
    VelocityEstimator,
)
from flowdistill.interfaces.verifier import Verifier

__all__ = [
    "NULL_LABEL",
    "Condition",
    "Counted",
    "Decoder",
    "ExactTeacher",
    "FlowMap",
    "GeneratingVelocity",
    "Guidance",
    "Jump",
    "Jumps",
    "NoisingVelocity",
    "Objective",
    "ObjectiveOutput",
    "OneStep",
    "Pairs",
    "Part",
    "StateSource",
    "States",
    "Step",
    "TargetVelocity",
    "Teacher",
    "TimeSampler",
    "VelocityEstimator",
    "Verifier",
]
