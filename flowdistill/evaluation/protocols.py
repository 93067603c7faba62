"""Protocols: whatever changes a figure beside the model, under the names of those who publish by them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
from attrs.validators import and_, deep_iterable, ge, gt, in_, instance_of, lt, min_len, optional

from flowdistill.decoders import ROUNDINGS, Rounding
from flowdistill.plumbing.registry import register_protocol

_ADM = "VIRTUAL_imagenet256_labeled.npz"


def _published(reference: str | None = _ADM, labels: str = "random", **own: Any) -> dict[str, Any]:
    """The defaults of a preset."""
    return {"labels": labels, **own, "reference": reference, "features": "inception", "num_samples": 50_000}


_ALL = ("fid", "inception_score", "precision", "recall")
_NAMES: Any = deep_iterable(instance_of(str), iterable_validator=min_len(1))


def _names(value: str | Sequence[str]) -> Sequence[str]:
    return (value,) if isinstance(value, str) else value


@register_protocol(
    "plain",
    presets={
        "adm": _published(rounding="down", metrics=_ALL),
        "edm2": _published("img512.pkl", rounding="down", metrics=("fid", "inception_score")),
        "sit": _published(rounding="nearest", autoencoder="ema", metrics=_ALL),
        "repa": _published(rounding="down", autoencoder="ema", metrics=_ALL),
        "dmf": _published(None, rounding="down", autoencoder="ema"),
        "meanflow_pytorch": _published(rounding="down", autoencoder="ema", shift=1.0),
        "secant": _published(rounding="nearest", autoencoder="ema", shift=1.0),
        "imf": _published(labels="balanced", rounding="nearest", autoencoder="mse"),
        "piflow": _published(rounding="nearest", autoencoder="ema"),
        "facm": _published(labels="balanced"),
    },
)
@attrs.frozen(kw_only=True)
class Protocol:
    """Whatever changes a figure beside the model and its guidance.

    Figures compare only where their protocols are one. The presets say what the authors' code does, as far as it was
    read; None leaves the matter to the model, whose decoder and grid are its own authors'. ``edm2``'s own script draws
    50 000 images several times and takes the least figure; here they are drawn once.

    Examples:
        >>> Protocol(num_samples=5000, labels="random").features is None
        True
    """

    metrics: Sequence[str] = attrs.field(default=("fid",), converter=_names, validator=_NAMES)
    """The names of registered metrics."""
    features: str | None = None
    """The name of a feature extractor."""
    reference: str | None = None
    """The file that is compared with, as its authors name it."""
    num_samples: int = attrs.field(default=10_000, validator=and_(instance_of(int), ge(2)))
    """The samples of each model."""
    labels: str = attrs.field(default="in_turn", validator=in_(("in_turn", "balanced", "random")))
    """The choice of classes, see `flowdistill.sample`."""
    rounding: Rounding | None = attrs.field(default=None, validator=optional(in_(ROUNDINGS)))
    """The rounding of images to bytes, see `flowdistill.decoders.quantize`; None is the model's own."""
    autoencoder: Literal["ema", "mse"] | None = attrs.field(default=None, validator=optional(in_(("ema", "mse"))))
    """The fine-tuned autoencoder of Stable Diffusion that decodes latents; None is the one that the model has. The
    command line and tables of systems load it; a model in Python is to be loaded with it."""
    shift: float | None = attrs.field(default=None, validator=optional(and_(gt(0.0), lt(math.inf))))
    """The shift of evenly spaced times of several steps, see `flowdistill.paths.shifted`; None is the model's grid."""

    def otherwise(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the settings of a figure that are other than the protocol says.

        Args:
            settings: values by the names of the protocol's fields; files by their paths, the autoencoder by the name of
                its repository or folder, and None for what does not matter here.

        Examples:
            >>> Protocol(reference="a.npz", labels="random").otherwise({"reference": "b/a.npz", "labels": "in_turn"})
            {'labels': 'in_turn'}
        """
        said = {**attrs.asdict(self), "autoencoder": vae_of(self.autoencoder), "metrics": None}
        return {
            name: value
            for name, value in settings.items()
            if value is not None and said[name] is not None and _last(value) != _last(said[name])
        }


def _last(value: Any) -> Any:
    """The last part of a path or of a repository's name; any other value as it is."""
    return value.replace("\\", "/").rpartition("/")[2] if isinstance(value, str) else value


def vae_of(autoencoder: Literal["ema", "mse"] | None) -> str | None:
    """The HuggingFace repository of an autoencoder.

    Examples:
        >>> vae_of("ema")
        'stabilityai/sd-vae-ft-ema'
    """
    return None if autoencoder is None else f"stabilityai/sd-vae-ft-{autoencoder}"
