"""Velocities: those that objectives are trained on, and estimates of those that a student has."""

from flowdistill.velocities.generating import FiniteDifference, Jvp
from flowdistill.velocities.noising import Exact, Minibatch, OnlineNetwork, PseudoVelocity
from flowdistill.velocities.targets import ConditionalVelocity, TeacherVelocity

__all__ = [
    "ConditionalVelocity",
    "Exact",
    "FiniteDifference",
    "Jvp",
    "Minibatch",
    "OnlineNetwork",
    "PseudoVelocity",
    "TeacherVelocity",
]
