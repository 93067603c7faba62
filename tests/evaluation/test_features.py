"""Registered feature extractors, those of users among them."""

import re

import gin
import pytest
import torch

import flowdistill
from flowdistill import ConfigError, DataError
from flowdistill.evaluation import FeatureExtractor, load_features, load_images, measure, sample_set
from flowdistill.evaluation.features import WEIGHTS, Inception
from flowdistill.plumbing import config


@flowdistill.register_features("brightness")
class Brightness(FeatureExtractor):
    """Mean and spread of the pixels."""

    channels = 1

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, images):
        pixels = self.gain * images.flatten(1)
        return torch.stack([pixels.mean(1), pixels.std(1)], 1), None


def test_an_extractor_of_a_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reference = load_images("digits", "brightness")
    dark = sample_set(torch.full((50, 1, 8, 8), -0.8), torch.zeros(50), "brightness")
    assert measure(["fid"], dark, reference)["fid"] > 0.1
    assert dark.labels is None  # nothing says what its classes are
    with pytest.raises(ConfigError, match="classifies"):
        measure(["accuracy"], dark, reference)
    with pytest.raises(ConfigError, match="without features of real data"):
        flowdistill.evaluation.load_reference("brightness")


def test_names_for_gin_files():
    """They end in _features, so that digits and mnist remain the data sets."""
    bindings = ["evaluation.features = @inception_features()", "inception_features.weights = 'weights.pth'"]
    with config.parsed([], [*bindings, "noised_data.dataset = @digits()"]):
        extractor = gin.query_parameter("evaluation.features").scoped_configurable_fn()
        assert isinstance(extractor, Inception)
        assert extractor.weights == "weights.pth"
        assert isinstance(
            gin.query_parameter("noised_data.dataset").scoped_configurable_fn(), flowdistill.DATASETS.get("digits")
        )
    assert {"digits", "mnist", "fashion_mnist", "inception", "dinov2"} <= set(flowdistill.FEATURES.names())


def test_fingerprints_tell_classes_and_weights_apart():
    prints = {e.fingerprint() for e in (Brightness(), Brightness(2.0), load_features("digits"), load_features("mnist"))}
    prints.add(load_features("fashion_mnist").fingerprint())
    assert len(prints) == 5
    assert Brightness(2.0).fingerprint() in prints


@pytest.mark.parametrize(("name", "accuracy"), [("digits", 0.98), ("mnist", 0.98), ("fashion_mnist", 0.88)])
def test_the_cards_accuracy_and_a_reference_that_holds_each_class(name, accuracy):
    """The reference is of real data, whose ten classes are about equally common."""
    card = (WEIGHTS / f"{name}.md").read_text()
    assert float(re.search(r"held-out images \| ([\d.]+)", card)[1]) >= accuracy
    extractor = load_features(name)
    counts = torch.bincount(extractor.reference_labels, minlength=10) / len(extractor.reference)
    assert len(counts) == 10
    assert 0.07 < counts.min() <= counts.max() < 0.13


def test_images_that_an_extractor_does_not_take():
    with pytest.raises(DataError, match="takes images of 1 channels"):
        sample_set(torch.zeros(2, 3, 8, 8), None, "digits")
    with pytest.raises(DataError, match="takes images of 1 channels"):
        sample_set(torch.zeros(2, 5), None, "digits")
    with pytest.raises(DataError, match="of 8 by 8 pixels, not \\(28, 28\\)"):
        sample_set(torch.zeros(2, 1, 28, 28), None, "digits")
    with pytest.raises(ConfigError, match="size of DINOv2"):
        flowdistill.FEATURES.build("dinov2", size="xl")
