"""Sets of samples as metrics see them: features, logits and labels, in memory and in files."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from flowdistill.decoders import Rounding, quantize
from flowdistill.evaluation.features import FeatureExtractor, load_features
from flowdistill.evaluation.metrics import Moments, moments
from flowdistill.interfaces import Decoder
from flowdistill.plumbing.errors import ConfigError, DataError, NonFiniteError
from flowdistill.plumbing.files import read_tensors, write_tensors

_CHUNK = 500  # images that an extractor sees at a time


@attrs.frozen(eq=False)
class SampleSet:
    """Samples as metrics see them. Sets can be sliced, and joined by `join`.

    Examples:
        >>> len(SampleSet(torch.zeros(8, 2))[:3])
        3
    """

    _features: Tensor | None
    labels: Tensor | None = None
    """The classes that were asked for, (N,), where there are classes."""
    logits: Tensor | None = None
    """The logits of a classifier, (N, num_classes), where the feature extractor is one."""
    _moments: Moments | None = None
    modes: tuple[Tensor, float] | None = None
    """The centres (K, D) of an exact mixture of equally likely components, and the radius within which a sample is near
    one."""
    device: torch.device | str = "cpu"
    """Where neighbours are looked for in the set, which lies on the CPU, and in those that are compared with it."""

    @property
    def features(self) -> Tensor:
        """The features (N, D); the samples themselves, flattened, where there is no feature extractor.

        Raises:
            ConfigError: the set is a reference that was published as mean and covariance alone.
        """
        if self._features is None:
            raise ConfigError("the reference holds a mean and a covariance alone: only fid can be measured against it")
        return self._features

    @functools.cached_property
    def moments(self) -> Moments:
        """Mean (D,) and covariance (D, D) of the features, float64; those that were published, where they were."""
        return moments(self.features) if self._moments is None else self._moments

    def __len__(self) -> int:
        """The number of samples; 0 for a set of moments alone."""
        return 0 if self._features is None else len(self._features)

    def __getitem__(self, rows: slice | Tensor) -> SampleSet:
        """The set of some rows: ``rows`` is a slice, a mask, or row numbers."""
        labels, logits = (None if v is None else v[rows] for v in (self.labels, self.logits))
        return SampleSet(self.features[rows], labels, logits, modes=self.modes, device=self.device)

    @classmethod
    def join(cls, parts: Sequence[SampleSet]) -> SampleSet:
        """The set of all rows of some sets."""
        columns = ([part.labels for part in parts], [part.logits for part in parts])
        labels, logits = (None if column[0] is None else torch.cat(column) for column in columns)  # type: ignore[arg-type]
        return SampleSet(torch.cat([part.features for part in parts]), labels, logits)

    def save(self, path: Path) -> None:
        """Write to a safetensors file, which is there whole or not at all."""
        mean, covariance = self._moments or (None, None)
        tensors = {
            "features": self._features,
            "labels": self.labels,
            "logits": self.logits,
            "mean": mean,
            "covariance": covariance,
        }
        write_tensors(path, tensors, hashed=True)

    @classmethod
    def load(cls, path: Path) -> SampleSet | None:
        """What `save` has written to a file; None where there is no such file, or it is damaged."""
        tensors = read_tensors(path)
        if tensors is None:
            return None
        published = (tensors["mean"], tensors["covariance"]) if "mean" in tensors else None
        return SampleSet(tensors.get("features"), tensors.get("labels"), tensors.get("logits"), published)


@torch.no_grad()
def sample_set(
    samples: Tensor,
    labels: Tensor | None,
    features: str | FeatureExtractor | None,
    decoder: Decoder | None = None,
    rounding: Rounding | None = None,
) -> SampleSet:
    """Samples (N, ...) and what a feature extractor says of them, or of the images they decode to; on the CPU.

    Args:
        samples: of a model, or images in [-1, 1].
        labels: classes (N,), where there are any.
        features: an extractor or its name; None is the samples themselves.
        decoder: turns samples into images.
        rounding: of the decoder's images to bytes; None is the decoder's own.

    Raises:
        NonFiniteError: samples are not finite.
        DataError: they are not images of the extractor's channels and size.
        ConfigError: an unknown name.
    """
    if not bool(torch.isfinite(samples).all()):
        raise NonFiniteError("some samples are NaN or infinite: nothing can be measured")
    labels = None if labels is None else labels.cpu()
    if features is None:
        return SampleSet(samples.flatten(1).cpu(), labels)
    extractor = load_features(features).to(samples.device)
    parts = [_extract(extractor, part, decoder, rounding) for part in torch.split(samples, _CHUNK)]
    logits = [part for _, part in parts if part is not None]
    return SampleSet(
        torch.cat([part for part, _ in parts]),
        labels if extractor.classifies else None,
        torch.cat(logits) if logits else None,
    )


def _extract(
    extractor: FeatureExtractor, samples: Tensor, decoder: Decoder | None, rounding: Rounding | None
) -> tuple[Tensor, Tensor | None]:
    images = samples.float() if decoder is None else decoder.decode(samples)
    if images.ndim != 4 or images.shape[1] not in (1, extractor.channels):
        raise DataError(
            f"{type(extractor).__name__} takes images of {extractor.channels} channels, not {tuple(images.shape[1:])}"
        )
    if decoder is not None and extractor.quantized:
        pixels = decoder.to_uint8(images) if rounding is None else quantize(images, rounding)
        images = pixels.float() / 127.5 - 1
    side = extractor.image_size
    if side is not None and images.shape[-2:] != (side, side):
        raise DataError(f"these features are of images of {side} by {side} pixels, not {tuple(images.shape[-2:])}")
    features, logits = extractor(images.expand(-1, extractor.channels, -1, -1))
    return features.float().cpu(), None if logits is None else logits.float().cpu()
