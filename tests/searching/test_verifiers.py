"""Verifiers: what they score, and what they need."""

import sys
import types

import pytest
import torch

import flowdistill
from flowdistill import CheckpointError, Condition, ConfigError
from flowdistill.data import ImageDataset
from flowdistill.evaluation import FeatureExtractor, load_features, load_images
from flowdistill.searching import ClassLogProbability, ClipScore, FeatureDistance
from flowdistill.searching import verifiers as module
from flowdistill.searching.verifiers import FunctionVerifier


class Corner(FeatureExtractor):
    """Two pixels of a grey image."""

    channels = 1

    def forward(self, images):
        return images[:, 0, 0, :2], None


@flowdistill.register_dataset("two_classes")
class TwoClasses(ImageDataset):
    num_classes = 2

    def __init__(self):
        images = torch.zeros(4, 1, 2, 2)
        images[:, 0, 0, 0] = torch.tensor([0.0, 0.2, 0.8, 1.0])
        images[:, 0, 1, 1] = -1.0  # black
        super().__init__(images, torch.tensor([0, 0, 1, 1]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("cache")
def test_feature_distance_is_that_to_the_mean_of_the_class():
    verifier = FeatureDistance(features=Corner(), reference="two_classes")
    verifier.setup("digits")
    images = torch.zeros(3, 1, 2, 2)
    images[:, 0, 0, :2] = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.4, 0.4]])
    scores = verifier.scores(images, Condition(torch.tensor([0, 1, 0])))
    assert scores.tolist() == pytest.approx([0.0, -0.8, -0.5], abs=1e-6)
    without = verifier.scores(images, Condition())
    assert without.tolist() == pytest.approx([-0.4, -0.4, -(0.17**0.5)], abs=1e-6)
    assert torch.equal(without, verifier.scores(images, Condition(torch.tensor([-1, -1, -1]))))
    with pytest.raises(ConfigError, match="2 classes, and none of class 2"):
        verifier.scores(images, Condition(torch.tensor([0, 1, 2])))


@pytest.mark.usefixtures("cache")
def test_stored_features_of_digits_have_the_classes_of_the_data_set():
    """So that no data set is needed for the means of its classes."""
    stored, read = FeatureDistance(features="digits"), FeatureDistance(features="digits", reference="digits")
    stored.setup(None)
    read.setup(None)
    assert torch.allclose(stored._means, read._means, atol=0.05)
    extractor = load_features("mnist")
    assert extractor.reference_labels.bincount().tolist() == pytest.approx(
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009], abs=12
    )  # of MNIST's test images


@pytest.mark.usefixtures("cache")
def test_class_log_probability_is_the_classifiers():
    images, labels = flowdistill.DATASETS.build("digits").images[:50], flowdistill.DATASETS.build("digits").labels[:50]
    verifier = ClassLogProbability()
    verifier.setup("digits")
    right, wrong = (verifier.scores(images, Condition(y)) for y in (labels, (labels + 1) % 10))
    logits = load_images("digits", "digits").logits[:50]
    assert torch.allclose(right, -torch.nn.functional.cross_entropy(logits, labels, reduction="none"), atol=1e-4)
    assert right.mean() > -0.05
    assert wrong.mean() < -4
    with pytest.raises(ConfigError, match="class-conditional"):
        verifier.scores(images, Condition())


def test_what_verifiers_need():
    for verifier, features, match in (
        (FeatureDistance(), None, "name them"),
        (FeatureDistance(), Corner(), "name a data set as the reference"),
        (FeatureDistance(reference="digts"), "digits", "did you mean digits"),
        (FeatureDistance(features="digts"), None, "did you mean digits"),
        (ClassLogProbability(), Corner(), "needs a classifier, not Corner"),
    ):
        with pytest.raises(ConfigError, match=match):
            verifier.setup(features)


def test_fingerprints_tell_settings_and_weights_apart(monkeypatch):
    verifiers = [
        FeatureDistance(features="digits"),
        FeatureDistance(features="mnist"),
        ClassLogProbability(features="digits"),
        ClipScore(prompts=["a"]),
        ClipScore(prompts=["b"]),
        FunctionVerifier(len),
        FunctionVerifier(len),
    ]
    for verifier in verifiers:
        verifier.setup(None)
    assert len({verifier.fingerprint() for verifier in verifiers}) == len(verifiers)
    again = FeatureDistance(features=load_features("digits"))
    again.setup(None)
    repeated = FeatureDistance(features=load_features("digits"))
    repeated.setup(None)
    assert again.fingerprint() == repeated.fingerprint()
    assert len(repr(again)) < 100
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="cannot share a search by a plain function"):
        FunctionVerifier(len).fingerprint()


@pytest.fixture
def clip(monkeypatch):
    """A stand-in for transformers: a text is embedded as its length, an image as its brightness."""

    class Network(torch.nn.Module):
        def forward(self, lengths, pixels):
            return types.SimpleNamespace(image_embeds=pixels, text_embeds=lengths)

    def process(text, images, return_tensors, padding):
        assert images[0].shape == (4, 4, 3)
        assert images[0].dtype == "uint8"
        values = torch.tensor([[float(image.mean())] for image in images])
        lengths = torch.tensor([[float(len(t))] for t in text])

        class Inputs(dict):
            def to(self, device):
                return self

        return Inputs(lengths=lengths, pixels=values)

    def load(name, **kwargs):
        if name == "nowhere":
            raise OSError("no such model")
        return Network()

    library = types.ModuleType("transformers")
    library.CLIPModel = types.SimpleNamespace(from_pretrained=load)
    library.CLIPProcessor = types.SimpleNamespace(from_pretrained=lambda name: process)
    monkeypatch.setitem(sys.modules, "transformers", library)
    module._clip.cache_clear()
    yield
    module._clip.cache_clear()


@pytest.mark.usefixtures("clip")
def test_clip_compares_each_image_with_the_text_of_its_class():
    images = torch.tensor([1.0, -1.0, 1.0])[:, None, None, None].expand(3, 1, 4, 4)
    several = ClipScore(prompts=["a", "bb", "ccc"])
    assert several.scores(images, Condition(torch.tensor([2, 1, 0]))).tolist() == [3 * 255, 0, 255]
    assert ClipScore(prompts=["four"]).scores(images, Condition(torch.tensor([2, 1, 0]))).tolist() == [1020, 0, 1020]
    with pytest.raises(ConfigError, match="3 prompts: give one"):
        several.scores(images, Condition(torch.tensor([0, 3, 1])))
    with pytest.raises(CheckpointError, match="nowhere cannot be loaded: no such model"):
        ClipScore(prompts=["a"], model="nowhere").scores(images, Condition())


def test_clip_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    module._clip.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install 'flowdistill\[clip\]'"):
        ClipScore(prompts=["a cat"]).scores(torch.zeros(1, 3, 4, 4), Condition())
    with pytest.raises(ValueError, match="prompts"):
        ClipScore(prompts=[])
