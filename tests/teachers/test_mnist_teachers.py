"""The teachers of MNIST and Fashion-MNIST draw images of the asked class, and their data are not needed for it."""

import pytest
import torch

import flowdistill
from flowdistill import Condition
from flowdistill.evaluation import SampleSet, measure, sample_set
from flowdistill.guidance import GuidedTeacher
from flowdistill.solvers import Euler

FEATURES = {"mnist_sit": "mnist", "mnist_edm2": "mnist", "fashion_sit": "fashion_mnist"}


def images(name, n, steps):
    teacher = GuidedTeacher(flowdistill.load_teacher(name), scale=1.5)
    condition = Condition.in_turn(10, n)
    noise = teacher.sample_prior(n, torch.Generator().manual_seed(0))
    with torch.no_grad():
        samples = Euler(steps=steps).solve(teacher, noise, condition)
    assert teacher.evaluations == 2 * steps * n
    return sample_set(samples, condition.labels, FEATURES[name], teacher.decoder)


@pytest.mark.parametrize(
    ("name", "n"),
    [
        ("mnist_sit", 200),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("mnist_edm2", 60), ("fashion_sit", 200))),
    ],
)
def test_guided_samples_obey_their_labels(name, n):
    drawn = images(name, n, steps=8)
    assert measure(["accuracy"], drawn, drawn)["accuracy"] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist_sit", "fashion_sit"])
def test_several_steps_cover_the_real_images_and_one_does_not(name):
    reference = SampleSet(flowdistill.evaluation.load_reference(FEATURES[name])[:1000])
    one, eight = (measure(["fid", "recall"], images(name, 300, steps), reference) for steps in (1, 8))
    assert one["recall"] <= 0.05
    assert eight["recall"] >= 0.4
    assert eight["fid"] <= one["fid"] / 4


def test_the_decoder_takes_the_padding_off():
    teacher = flowdistill.load_teacher("mnist_edm2")
    samples = teacher.sample_prior(2)
    assert teacher.sample_shape == (1, 32, 32)
    assert torch.equal(teacher.decoder.decode(samples), samples[..., 2:30, 2:30])
