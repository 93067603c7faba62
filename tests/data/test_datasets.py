"""Data sets that people bring: what is converted, and what is refused."""

import numpy as np
import pytest
import torch

from flowdistill import ConfigError, DataError
from flowdistill.data import Digits, ImageDataset
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import SiT
from flowdistill.pairs import Diagonal
from flowdistill.states import NoisedData

SHADES = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)


@pytest.mark.parametrize("images", [SHADES, torch.from_numpy(SHADES), SHADES / 127.5 - 1])
@pytest.mark.parametrize("labels", [[0, 1, 2, 1], np.array([0, 1, 2, 1], dtype=np.uint8), None])
def test_arrays_and_tensors(images, labels):
    dataset = ImageDataset(images, labels)
    wanted = torch.linspace(-1, 1, 256).reshape(4, 1, 8, 8)
    torch.testing.assert_close(dataset.images, wanted, rtol=0, atol=1e-6)
    drawn, classes = dataset.sample(3, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.float32
    if labels is None:
        assert (classes, dataset.num_classes) == (None, None)
    else:
        assert classes.dtype == torch.int64
        assert dataset.num_classes == 3


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.rand(2, 1, 4, 4) * 255, r"in \[-1, 1\], and these in \[.*give uint8, or images / 127.5 - 1"),
        (torch.linspace(0, 1, 32).reshape(2, 1, 4, 4), r"these in \[0, 1\], so 0 is not black: 2 \* images - 1"),
        (torch.full((2, 1, 4, 4), torch.nan), r"these in \[nan, nan\]"),
        (torch.zeros(2, 4, 4), r"the shape \(N, C, H, W\), not \(2, 4, 4\)"),
        (torch.zeros(0, 1, 4, 4), r"not \(0, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.int64), r"not torch\.int64"),
    ],
)
def test_images_that_are_refused(images, words):
    with pytest.raises(DataError, match=words):
        ImageDataset(images)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 2], r"2 images have labels of shape \(2,\), not \(3,\)"),
        ([[0], [1]], r"not \(2, 1\)"),
        ([0.0, 1.0], "whole numbers"),
        ([True, False], "whole numbers"),
        ([0, -1], "whole numbers from 0 on"),
    ],
)
def test_labels_that_are_refused(labels, words):
    with pytest.raises(DataError, match=words):
        ImageDataset(torch.zeros(2, 1, 4, 4) - 1, labels)


def test_more_classes_than_the_student_knows_are_refused_before_training():
    network = SiT(input_size=8, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    student = NetworkFlowMap(network, "instantaneous")
    with pytest.raises(ConfigError, match="the data have 10 classes, and the student knows 3"):
        NoisedData(dataset=ImageDataset(SHADES, [0, 9, 2, 1])).setup(student, None)
    source = NoisedData(dataset=ImageDataset(SHADES, [0, 2, 2, 1]))
    source.setup(student, None)
    assert source.sample(5, Diagonal(), torch.Generator()).condition.labels.max() <= 2
    source = NoisedData(dataset=ImageDataset(SHADES))
    source.setup(student, None)
    assert source.sample(5, Diagonal(), torch.Generator()).condition.labels is None


def test_digits_are_scikit_learns():
    digits, known = Digits(), pytest.importorskip("sklearn.datasets").load_digits()
    assert torch.equal(digits.images, torch.from_numpy(known.images).float()[:, None] / 8 - 1)
    assert torch.equal(digits.labels, torch.from_numpy(known.target).long())
