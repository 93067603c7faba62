"""Decoders: pixels as they are, and the autoencoder of Stable Diffusion."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import attrs
import torch
from attrs.validators import gt, in_, optional
from torch import Tensor

from flowdistill.interfaces import Decoder
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.registry import register_decoder

Rounding = Literal["nearest", "down"]
ROUNDINGS = get_args(Rounding)


def quantize(images: Tensor, rounding: Rounding) -> Tensor:
    """Images in [-1, 1] as bytes: 127.5 (x + 1), cut to [0, 255], to the nearest integer or the next one below.

    SiT and the pixel models of EDM2 round to the nearest, REPA and the latent models of EDM2 down; the Frechet distance
    feels the difference.

    Examples:
        >>> quantize(torch.tensor([-2.0, -1.0, 0.0, 0.9999]), "nearest").tolist()
        [0, 0, 128, 255]
        >>> quantize(torch.tensor([-2.0, -1.0, 0.0, 0.9999]), "down").tolist()
        [0, 0, 127, 254]
    """
    scaled = 127.5 * images + (128.0 if rounding == "nearest" else 127.5)
    return scaled.clamp(0, 255).to(torch.uint8)


def as_bytes(samples: Tensor, decoder: Decoder | None) -> Tensor | None:
    """The images of samples as bytes (B, H, W, C), on the CPU, rounded as the model's authors round.

    Args:
        samples: of a model.
        decoder: turns them into images; None leaves them as they are, and rounds to the nearest.

    Returns:
        The bytes; None where samples are not images of 1 or 3 channels.

    Examples:
        >>> as_bytes(torch.ones(1, 3, 2, 4), None).shape, as_bytes(torch.zeros(1, 2), None)
        (torch.Size([1, 2, 4, 3]), None)
    """
    images = samples if decoder is None else decoder.decode(samples)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return None
    pixels = quantize(images, "nearest") if decoder is None else decoder.to_uint8(images)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu()


@register_decoder("pixels")
@attrs.frozen(kw_only=True)
class Pixels(Decoder):
    """Samples that are images already, up to their unit and a margin."""

    scale: float = attrs.field(default=1.0, validator=gt(0.0))
    """The factor by which samples are multiplied to lie in [-1, 1]."""
    crop: int | None = attrs.field(default=None, validator=optional(gt(0)))
    """The height and width of the part in the middle that is the image; None is all of it."""
    rounding: Rounding = attrs.field(default="nearest", validator=in_(ROUNDINGS))
    """The rounding to bytes, see `quantize`."""

    def decode(self, samples: Tensor) -> Tensor:
        """The samples in [-1, 1], without their margin; ConfigError if they are smaller than ``crop``."""
        images = samples.float() * self.scale
        if self.crop is None:
            return images
        if self.crop > min(images.shape[-2:]):
            raise ConfigError(f"pixels.crop {self.crop} is larger than the images, {tuple(images.shape[-2:])}")
        margin = (images.shape[-1] - self.crop) // 2
        return images[..., margin : margin + self.crop, margin : margin + self.crop]

    def to_uint8(self, images: Tensor) -> Tensor:
        """See `Decoder.to_uint8`."""
        return quantize(images, self.rounding)


Numbers: TypeAlias = "float | Sequence[Numbers]"


def _frozen(value: Numbers) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, Sequence) else value


def _pair(value: Sequence[float]) -> tuple[float, float]:
    first, second = value
    return first, second


def _text(value: str | Path | None) -> str | None:
    return None if value is None else str(value)


@register_decoder("stable_diffusion_vae")
@attrs.frozen(kw_only=True)
class StableDiffusionVae(Decoder):
    """Samples that are affinely scaled latents of Stable Diffusion's autoencoder, through diffusers."""

    vae: str | None = attrs.field(default=None, converter=_text)
    """The autoencoder's folder or its HuggingFace repository, such as ``stabilityai/sd-vae-ft-ema``; None knows the
    latents' scale but decodes nothing."""
    scale: Numbers = attrs.field(default=0.18215, converter=_frozen)
    """The scale of each channel, of each position (C, H, W), or one for all: samples are raw latents times scale plus
    bias."""
    bias: Numbers = attrs.field(default=0.0, converter=_frozen)
    """The bias, as the scale."""
    pixel_range: tuple[float, float] = attrs.field(default=(-1.0, 1.0), converter=_pair)
    """The values of black and white in the autoencoder's output: (-1, 1) as it was trained, or (0, 1) as EDM2 uses
    it."""
    rounding: Rounding = attrs.field(default="nearest", validator=in_(ROUNDINGS))
    """The rounding to bytes, see `quantize`."""

    @property
    def ready(self) -> bool:
        """Whether an autoencoder was given."""
        return self.vae is not None

    def latents(self, samples: Tensor) -> Tensor:
        """The raw latents that the autoencoder expects, (samples - bias) / scale."""
        scale, bias = self._affine(samples)
        return (samples - bias) / scale

    def _affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and bias as tensors that fit a batch of latents."""
        scale, bias = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (self.scale, self.bias))
        return tuple(v if v.ndim == 3 else v.reshape(-1, 1, 1) for v in (scale, bias))  # type: ignore[return-value]

    def autoencoder(self, device: torch.device | str = "cpu") -> Any:
        """The autoencoder, which is loaded once; ConfigError if none was given, or it cannot be loaded."""
        if self.vae is None:
            raise ConfigError("latents need an autoencoder: load the teacher with vae='stabilityai/sd-vae-ft-ema'")
        inside = Path(self.vae).rglob("*") if Path(self.vae).is_dir() else ()
        return _load_vae(self.vae, max((path.stat().st_mtime_ns for path in inside), default=0)).to(device)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the autoencoder's posterior on the scale of samples, of images in [-1, 1].

        Raises:
            ConfigError: see `decode`.
        """
        vae, (black, white) = self.autoencoder(images.device), self.pixel_range
        posterior = vae.encode((images.float() * (white - black) + (white + black)) / 2).latent_dist
        scale, bias = self._affine(posterior.mean)
        return posterior.mean * scale + bias, posterior.std * scale.abs()

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Images of the latents, one sample at a time, since the autoencoder needs much memory.

        Raises:
            ConfigError: no autoencoder was given, it cannot be loaded, or diffusers is not installed.
        """
        vae = self.autoencoder(samples.device)
        decoded = torch.cat([vae.decode(latent).sample for latent in torch.split(self.latents(samples.float()), 1)])
        black, white = self.pixel_range
        return (2 * decoded - (white + black)) / (white - black)

    def to_uint8(self, images: Tensor) -> Tensor:
        """See `Decoder.to_uint8`."""
        return quantize(images, self.rounding)


_EDM2_MEAN, _EDM2_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
EDM2_LATENTS: dict[str, Any] = {
    "scale": tuple(1 / std for std in _EDM2_STD),
    "bias": tuple(-mean / std for mean, std in zip(_EDM2_MEAN, _EDM2_STD, strict=True)),
    "pixel_range": (0.0, 1.0),
    "rounding": "down",
}
"""The fields of `StableDiffusionVae` for EDM2's latents, which are standardised channel by channel."""


@functools.cache
def _load_vae(name: str, changed: int) -> Any:
    """The autoencoder as it was at the last change of its folder; loaded once."""
    from flowdistill.plumbing.torch_fidelity import torch_fidelity

    try:
        torch_fidelity("version")  # after it torchvision can be imported, which diffusers does
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError:
        raise ConfigError("decoding latents needs diffusers: pip install 'flowdistill[vae]'") from None
    try:
        vae, info = diffusers.AutoencoderKL.from_pretrained(
            name,
            local_files_only=Path(name).exists(),
            use_safetensors=True,  # never a pickle
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the autoencoder {name} cannot be loaded: {error}") from None
    if info["missing_keys"]:  # which diffusers fills with random numbers
        raise ConfigError(f"the autoencoder {name} cannot be loaded: it lacks {sorted(info['missing_keys'])[0]}, ...")
    return vae.eval().requires_grad_(False)
