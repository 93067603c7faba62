"""Feature extractors: small ones trained by this library, and torch-fidelity's Inception and DINOv2."""

from __future__ import annotations

import functools
import http.client
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdistill.decoders import quantize
from flowdistill.plumbing.caches import usable
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import load_tensors, module_fingerprint
from flowdistill.plumbing.registry import FEATURES, register_features
from flowdistill.plumbing.torch_fidelity import torch_fidelity

WEIGHTS = Path(__file__).parent / "weights"


class FeatureExtractor(nn.Module, ABC):
    """Maps images to the features that metrics compare."""

    channels: int = 3
    """The channels of the images."""
    image_size: int | None = None
    """The height and width of the images; None is any."""
    quantized: bool = False
    """Whether features are those of images stored as bytes, as all published figures are; a model's images are then
    rounded as its authors round them."""
    classifies: bool = False
    """Whether the logits are of the classes that a model's labels number."""
    statistics: str | None = None
    """The name of its features' mean and covariance in EDM2's files of several; None is in none."""
    reference: Tensor | None = None
    """The features (N, D) of the real data that the extractor was trained on, where they come with it."""
    reference_labels: Tensor | None = None
    """The classes (N,) of the real data, where they are known."""

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, D) and, of a classifier, logits (B, K), of images (B, channels, H, W) in [-1, 1]."""

    def fingerprint(self) -> str:
        """A hash of the class and its weights; stored features are known by it."""
        return module_fingerprint(self)


class SmallClassifier(FeatureExtractor):
    """A classifier of small grey images: three convolutions and two linear layers, between which lie the 64 features.

    Features are multiplied by ``scale``, chosen when the network was trained such that two sets of real images are at
    the Frechet distance that its card names. The labels of the reference are what the classifier says of it.

    Args:
        size: height and width of the images.
    """

    channels = 1
    classifies = True
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.image_size = size
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, padding=1, stride=2),
            nn.SiLU(),
        )
        self.features = nn.Linear(64 * (size // 4) ** 2, 64)
        self.head = nn.Linear(64, 10)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 64) and logits (B, 10) of images (B, 1, size, size) in [-1, 1]."""
        hidden = self.features(self.convolutions(images).flatten(1))
        return hidden * self.scale, self.head(F.silu(hidden))


def _trained(name: str, size: int) -> SmallClassifier:
    network = SmallClassifier(size)
    tensors = load_tensors(WEIGHTS / f"{name}.safetensors")
    network.load_state_dict({key: tensors[key] for key in network.state_dict()})
    network.reference = tensors["reference"].float()
    with torch.no_grad():
        network.reference_labels = network.head(F.silu(network.reference / network.scale)).argmax(1)
    return network.eval().requires_grad_(False)


@register_features("digits")
def digits() -> SmallClassifier:
    """A classifier of 8x8 digits, with the features of all real ones.

    Examples:
        >>> features, logits = digits()(torch.zeros(2, 1, 8, 8))
        >>> features.shape, logits.shape
        (torch.Size([2, 64]), torch.Size([2, 10]))
    """
    return _trained("digits", 8)


@register_features("mnist")
def mnist() -> SmallClassifier:
    """A classifier of MNIST's 28x28 digits, with the features of its 10 000 test images."""
    return _trained("mnist", 28)


@register_features("fashion_mnist")
def fashion_mnist() -> SmallClassifier:
    """A classifier of Fashion-MNIST's 28x28 clothes, with the features of its 10 000 test images."""
    return _trained("fashion_mnist", 28)


class _TorchFidelity(FeatureExtractor):
    """One of torch-fidelity's networks, which take bytes. It is made when it is first needed."""

    quantized = True

    def __init__(self) -> None:
        super().__init__()
        self._network: nn.Module | None = None

    @abstractmethod
    def _make(self) -> nn.Module:
        """The network, with its weights."""

    @property
    def network(self) -> nn.Module:
        """The network, with its weights."""
        if self._network is None:
            self._network = self._make()
        return self._network

    def _outputs(self, images: Tensor) -> Any:
        return self.network.to(images.device)(quantize(images, "nearest"))

    def fingerprint(self) -> str:
        """See `FeatureExtractor.fingerprint`."""
        self.network  # noqa: B018, which makes the weights
        return super().fingerprint()


@register_features("inception")
class Inception(_TorchFidelity):
    """Inception v3 with the weights and the resizing of the original TensorFlow graph, by torch-fidelity.

    The 2048 features are those of FID and KID, and of precision and recall as ADM measures them (Dhariwal and Nichol
    2021, arXiv 2105.05233); the 1008 logits, without their bias, are those of the Inception score.

    Args:
        weights: torch-fidelity's file ``weights-inception-2015-12-05-6726825d.pth``; None downloads it once (91 MB) to
            the folder of torch.hub.

    Raises:
        CheckpointError: at the first use: the file is missing, damaged or of another network, or cannot be downloaded.

    Examples:
        >>> features, logits = Inception("weights.pth")(torch.zeros(2, 3, 32, 32))  # doctest: +SKIP
    """

    statistics = "fid"

    def __init__(self, weights: str | Path | None = None) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, 2048) and logits (B, 1008) of images (B, 3, H, W) in [-1, 1] of any size."""
        features, logits = self._outputs(images)
        return features, logits

    def _make(self) -> nn.Module:
        module = torch_fidelity("feature_extractor_inceptionv3")
        path = _download(module.URL_INCEPTION_V3) if self.weights is None else Path(self.weights)
        try:
            torch.load(path, weights_only=True)  # since torch-fidelity would run what a pickle says
            network: nn.Module = module.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except FileNotFoundError:
            raise CheckpointError(f"there is no file {path} of Inception's weights") from None
        except Exception as error:  # of a pickle, anything
            reason = str(error).splitlines()[0] if str(error) else repr(error)
            raise CheckpointError(f"{path} does not hold torch-fidelity's weights of Inception: {reason}") from None
        return network


def _download(address: str) -> Path:
    path = Path(torch.hub.get_dir()) / "checkpoints" / address.rsplit("/", 1)[-1]
    if not path.is_file():
        path = usable(path.parent) / path.name
        try:
            torch.hub.download_url_to_file(address, str(path), hash_prefix=path.stem.rsplit("-", 1)[-1], progress=False)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise CheckpointError(
                f"the weights of Inception could not be downloaded from {address} ({error}): put the file at {path}, "
                "or give its place, as Inception(weights=...), --weights, or inception_features.weights in a gin file"
            ) from None
    return path


_Size = Literal["s", "b", "l", "g"]


@register_features("dinov2")
class DinoV2(_TorchFidelity):
    """DINOv2 (Oquab et al. 2023, arXiv 2304.07193) by torch-fidelity, which takes code and weights from torch.hub.

    Its Frechet distance agrees better with people's judgement than Inception's (Stein et al. 2023, arXiv 2306.04675).

    Args:
        size: of the transformer, "s", "b", "l" or "g", with 384, 768, 1024 or 1536 features.

    Raises:
        ConfigError: another size.
        CheckpointError: at the first use: it cannot be fetched.

    Examples:
        >>> features, _ = DinoV2("l")(torch.zeros(2, 3, 32, 32))  # doctest: +SKIP
    """

    def __init__(self, size: _Size = "l") -> None:
        super().__init__()
        if size not in get_args(_Size):
            raise ConfigError(f"the size of DINOv2 is one of {get_args(_Size)}, not {size!r}")
        self.size = size

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        """Features (B, D) of images (B, 3, H, W) in [-1, 1] of any size."""
        return self._outputs(images)[0], None

    def _make(self) -> nn.Module:
        module = torch_fidelity("feature_extractor_dinov2")
        kept = Path(torch.hub.get_dir())
        if not (kept / "facebookresearch_dinov2_main").is_dir() and (place := usable(kept)) != kept:
            torch.hub.set_dir(place)
        try:
            network: nn.Module = module.FeatureExtractorDinoV2(f"dinov2-vit-{self.size}-14", ["dinov2"])
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            hub = torch.hub.get_dir()
            raise CheckpointError(
                f"DINOv2 could not be fetched by torch.hub ({error}): put the repository facebookresearch/dinov2 at "
                f"{hub}/facebookresearch_dinov2_main and dinov2_vit{self.size}14_pretrain.pth into {hub}/checkpoints"
            ) from None
        return network


def load_features(features: str | FeatureExtractor) -> FeatureExtractor:
    """A feature extractor by its registered name, which is built once, or the one that is given.

    Raises:
        ConfigError: an unknown name; the nearest are listed.
    """
    return _built(features) if isinstance(features, str) else features


@functools.cache
def _built(name: str) -> FeatureExtractor:
    extractor: FeatureExtractor = FEATURES.build(name)
    return extractor


def load_reference(name: str) -> Tensor:
    """The stored features (N, D) of the real data that an extractor belongs to, float32: no data set is read.

    Raises:
        ConfigError: an unknown name; the nearest are listed. Or no features come with the extractor.
    """
    reference = load_features(name).reference
    if reference is None:
        raise ConfigError(f"{name} comes without features of real data: name a reference")
    return reference
