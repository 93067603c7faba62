"""Verifiers: distances in the features of an extractor, a classifier, CLIP, and functions of users."""

from __future__ import annotations

import functools
import importlib
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from attrs.validators import min_len
from torch import Tensor

from flowdistill.decoders import quantize
from flowdistill.evaluation.features import FeatureExtractor, load_features
from flowdistill.evaluation.references import load_images
from flowdistill.evaluation.samples import sample_set
from flowdistill.interfaces import Condition, Verifier
from flowdistill.plumbing.distributed import rank_and_world
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import fingerprint
from flowdistill.plumbing.registry import DATASETS, register_verifier
from flowdistill.plumbing.torch_fidelity import torch_fidelity


def _named(part: object) -> str:
    """A setting in a few words: networks in full would fill the screen."""
    return repr(part) if part is None or isinstance(part, str) else getattr(part, "__qualname__", type(part).__name__)


class _OfFeatures(Verifier):
    """What the verifiers of a feature extractor share."""

    features: str | FeatureExtractor | None
    _extractor: FeatureExtractor

    def setup(self, features: str | FeatureExtractor | None) -> None:
        """Load the extractor; ConfigError where there is none."""
        features = features if self.features is None else self.features
        if features is None:
            raise ConfigError("the verifier needs the features of a registered extractor, such as digits: name them")
        self._extractor = load_features(features)

    def fingerprint(self) -> str:
        """See `Verifier.fingerprint`; the weights of the extractor are part of it."""
        return fingerprint(f"{self!r} {self._extractor.fingerprint()}")


@register_verifier("feature_distance")
@attrs.define(kw_only=True)
class FeatureDistance(_OfFeatures):
    """Minus the distance of an image's features to the mean of real images' of its class.

        -|f(x) - mu_y|,   mu_y = E[f(x) | y]

    It rewards what is typical of a class: the samples that it chooses are less varied than the data.

    Examples:
        >>> verifier = FeatureDistance(features="digits")
        >>> verifier.setup(None)
        >>> scores = verifier.scores(torch.zeros(2, 1, 8, 8), Condition(torch.tensor([3, 7])))
        >>> scores.shape, bool((scores < 0).all())
        (torch.Size([2]), True)
    """

    features: str | FeatureExtractor | None = attrs.field(default=None, repr=_named)
    """A feature extractor or its name, Inception and DINOv2 among them; None is the one of the run's own evaluation."""
    reference: str | None = None
    """The name of a data set of images, by whose classes the means are taken; None is the data that come with the
    extractor. Samples without a label are compared with the mean of all classes."""
    _means: Tensor = attrs.field(init=False, repr=False)

    def setup(self, features: str | FeatureExtractor | None) -> None:
        """Take the means; ConfigError where there is no extractor, or no real data with classes."""
        super().setup(features)
        real, labels = self._extractor.reference, self._extractor.reference_labels
        if self.reference is not None:
            dataset = DATASETS.build(self.reference)
            real, labels = load_images(dataset, self._extractor).features, dataset.labels
        if real is None or labels is None:
            raise ConfigError(
                f"{type(self._extractor).__name__} comes without real data whose classes are known: name a data set as "
                "the reference of feature_distance"
            )
        classes = [real[labels == label].mean(0) for label in range(int(labels.max()) + 1)]
        self._means = torch.stack([*classes, real.mean(0)])

    def scores(self, images: Tensor, condition: Condition) -> Tensor:
        """Scores (B,), at most 0, on the CPU."""
        found = sample_set(images, None, self._extractor).features
        labels = torch.full((len(found),), -1) if condition.labels is None else condition.labels.cpu()
        classes = len(self._means) - 1
        if int(labels.max()) >= classes:
            raise ConfigError(f"feature_distance has real data of {classes} classes, and none of class {labels.max()}")
        distances: Tensor = torch.linalg.vector_norm(found - self._means[labels], dim=1)
        return -distances


@register_verifier("class_log_probability")
@attrs.define(kw_only=True)
class ClassLogProbability(_OfFeatures):
    """The log-probability log p(y | x) that a classifier gives the class that was asked for.

    Examples:
        >>> verifier = ClassLogProbability(features="digits")
        >>> verifier.setup(None)
        >>> verifier.scores(torch.zeros(2, 1, 8, 8), Condition(torch.tensor([3, 7]))).shape
        torch.Size([2])
    """

    features: str | FeatureExtractor | None = attrs.field(default=None, repr=_named)
    """A feature extractor that classifies as the model's labels do, or its name; None is the one of the run's own
    evaluation."""

    def setup(self, features: str | FeatureExtractor | None) -> None:
        """Load the extractor; ConfigError where it is none that classifies."""
        super().setup(features)
        if not self._extractor.classifies:
            raise ConfigError(f"class_log_probability needs a classifier, not {type(self._extractor).__name__}")

    def scores(self, images: Tensor, condition: Condition) -> Tensor:
        """Scores (B,), at most 0, on the CPU."""
        if condition.labels is None:
            raise ConfigError("class_log_probability needs a class-conditional model")
        logits = sample_set(images, None, self._extractor).logits
        assert logits is not None
        return logits.log_softmax(1).gather(1, condition.labels.cpu()[:, None]).squeeze(1)


@register_verifier("clip_score")
@attrs.define(kw_only=True)
class ClipScore(Verifier):
    """The cosine between an image and a text in CLIP (Radford et al. 2021, arXiv 2103.00020), through transformers.

    Examples:
        >>> verifier = ClipScore(prompts=["a photo of a tench", "a photo of a goldfish"])
    """

    prompts: Sequence[str] = attrs.field(converter=tuple, validator=min_len(1))
    """A text for each class, or one for all samples."""
    model: str = "openai/clip-vit-base-patch32"
    """A folder, or a repository on HuggingFace."""

    def scores(self, images: Tensor, condition: Condition) -> Tensor:
        """Scores (B,) in [-1, 1].

        Raises:
            ConfigError: transformers is not installed, or a class has no prompt.
            CheckpointError: the model cannot be loaded.
        """
        rows = torch.zeros(len(images), dtype=torch.long)
        if len(self.prompts) > 1 and condition.labels is not None:
            rows = condition.labels.cpu()
        if not 0 <= int(rows.min()) <= int(rows.max()) < len(self.prompts):
            raise ConfigError(f"clip_score has {len(self.prompts)} prompts: give one for all samples or for each class")
        network, processor = _clip(self.model)
        asked, places = torch.unique(rows, return_inverse=True)
        pixels = quantize(images.expand(-1, 3, -1, -1), "nearest").permute(0, 2, 3, 1).cpu().numpy()
        texts = [self.prompts[row] for row in asked.tolist()]
        inputs = processor(text=texts, images=list(pixels), return_tensors="pt", padding=True).to(images.device)
        output = network.to(images.device)(**inputs)
        scores: Tensor = (output.image_embeds * output.text_embeds[places]).sum(1)
        return scores


@functools.cache
def _clip(name: str) -> Any:
    try:
        torch_fidelity("version")  # after it torchvision can be imported, which transformers does
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError("clip_score needs transformers: pip install 'flowdistill[clip]'") from None
    try:
        network = transformers.CLIPModel.from_pretrained(name, use_safetensors=True)  # never a pickle
        return network.eval().requires_grad_(False), transformers.CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"the CLIP model {name} cannot be loaded: {error}") from None


Score = Callable[[Tensor, Condition], Tensor]


@attrs.frozen
class FunctionVerifier(Verifier):
    """A function as a verifier. Nothing says whether it is the same in two calls, so its results are not reused."""

    function: Score = attrs.field(repr=_named)
    """The function, of images and their condition."""

    def scores(self, images: Tensor, condition: Condition) -> Tensor:
        """What the function returns."""
        return self.function(images, condition)

    def fingerprint(self) -> str:
        """A new one each time; ConfigError where several processes would have to agree on it."""
        if rank_and_world()[1] > 1:
            raise ConfigError("processes cannot share a search by a plain function: derive a class from Verifier")
        return uuid.uuid4().hex
