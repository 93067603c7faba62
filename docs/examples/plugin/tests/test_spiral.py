"""The conformance kit on both parts, and what each is besides."""

import pytest
import torch
from flowdistill_spiral import LogCoshPrediction, Spiral

from flowdistill.flow_maps import from_teacher
from flowdistill.networks import MLP
from flowdistill.testing import objective_checks, teacher_checks

TEACHER = Spiral(modes=6)
STUDENT = from_teacher(TEACHER, "anchored", network=MLP(dim=2, hidden_size=8))


@pytest.mark.parametrize("check", teacher_checks(TEACHER), ids=str)
def test_teacher(check):
    check()


@pytest.mark.parametrize("check", objective_checks(LogCoshPrediction(), STUDENT, TEACHER), ids=str)
def test_objective(check):
    check()


def test_the_spiral_ends_at_its_radius():
    distances = Spiral(modes=5).means.norm(dim=1)
    torch.testing.assert_close(distances, torch.linspace(0.225, 1.5, 5))
