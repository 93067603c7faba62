"""Exact teachers: Gaussians and mixtures whose velocity, data and, where there is one, flow map are in closed form."""

from flowdistill.teachers.gaussian.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.teachers.gaussian.mixture import GaussianMixtureTeacher
from flowdistill.teachers.gaussian.plane import Checkerboard, Pinwheel, Ring, TwoMoons
from flowdistill.teachers.gaussian.product import ProductMixtureFlowMap, ProductMixtureTeacher

__all__ = [
    "Checkerboard",
    "GaussianFlowMap",
    "GaussianMixtureTeacher",
    "GaussianTeacher",
    "Pinwheel",
    "ProductMixtureFlowMap",
    "ProductMixtureTeacher",
    "Ring",
    "TwoMoons",
]
