"""The digits teacher is a good teacher: sharp digits of the asked class, in their variety."""

import pytest
import torch

import flowdistill
from flowdistill.evaluation.comparison import Evaluation, compare
from flowdistill.guidance import GuidedTeacher

METRICS = ("fid", "recall", "accuracy")


@pytest.fixture(scope="module")
def rows():
    teacher = GuidedTeacher(flowdistill.load_teacher("digits_teacher"), scale=1.1)
    return compare(
        None, teacher, Evaluation(metrics=METRICS, features="digits", num_samples=1000, teacher_steps=(1, 32))
    )


def test_guided_samples_obey_their_labels(rows):
    assert rows["teacher, 32 steps"]["accuracy"] >= 0.97


def test_samples_cover_the_real_digits(rows):
    """At 1000 samples, two halves of the real digits are about 2.1 apart."""
    assert rows["teacher, 32 steps"]["recall"] >= 0.7
    assert rows["teacher, 32 steps"]["fid"] <= 1.5


def test_one_euler_step_is_the_mean_of_the_class(rows):
    """Why accuracy alone proves nothing."""
    assert rows["teacher, 1 step"]["accuracy"] >= 0.97
    assert rows["teacher, 1 step"]["recall"] <= 0.05


def test_evaluations_are_counted(rows):
    """Two networks a guided step."""
    assert [row["evaluations"] for row in rows.values()] == [2, 64, 64]


def test_the_null_label_is_the_average_over_classes():
    """Trained by dropping labels: near noise, where the classes are alike, its velocity is their mean."""
    teacher = flowdistill.load_teacher("digits_teacher")
    x = teacher.sample_prior(200, torch.Generator().manual_seed(0))
    t = torch.full((200,), 0.98)
    of_class = [teacher.velocity(x, t, flowdistill.Condition(torch.full((200,), k))) for k in range(10)]
    null = teacher.velocity(x, t, flowdistill.Condition(torch.full((200,), flowdistill.NULL_LABEL)))
    mean = torch.stack(of_class).mean(0)
    spread = torch.stack([(v - mean).square().mean() for v in of_class]).mean()
    assert (null - mean).square().mean() < 0.2 * spread
