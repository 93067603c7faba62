"""Improved MeanFlow's released students, whose network is another one than SiT."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill.decoders import StableDiffusionVae
from flowdistill.interfaces import NULL_LABEL, Condition, Decoder, FlowMap
from flowdistill.interfaces.condition import check_interval
from flowdistill.networks.imf import IMFTransformer
from flowdistill.networks.sit_files import classes_of, names_in, read_state, unreadable
from flowdistill.plumbing.dry import weights, weights_unread
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import fill_module
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_flow_map, unknown_name
from flowdistill.runs.pretrained import locate
from flowdistill.students.sit import WHITENING

# Blocks and width of the published sizes, and the guidance scale and interval that their authors recommend.
_SIZES: dict[str, tuple[int, int, float, tuple[float, float]]] = {
    "b": (12, 768, 8.0, (0.4, 0.65)),
    "m": (24, 768, 10.5, (0.4, 0.6)),
    "l": (32, 1024, 10.5, (0.4, 0.6)),
    "xl": (48, 1024, 8.0, (0.42, 0.62)),
}
VARIANTS = ["imf", *(f"imf-{size}/2-256" for size in _SIZES)]
"""The family, of any size, and its published architectures."""


@register_flow_map("imf_map")
class IMFFlowMap(FlowMap):
    """A student of improved MeanFlow (Geng et al. 2025, arXiv 2512.02012).

        F(x, t, s) = network(x, t - s, 1 - 1/gamma, low, high)

    It is trained with all guidance scales gamma and intervals of times [low, high], both of which it is told.

    Args:
        transformer: the arguments of `IMFTransformer`.
        guidance: the guidance scale of samples that name none.
        interval: the interval of samples that name none.
        decoder: turns samples into images.
    """

    def __init__(
        self,
        transformer: Mapping[str, Any],
        guidance: float,
        interval: tuple[float, float] = (0.0, 1.0),
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        self._transformer = dict(transformer)
        try:
            with weights():
                self.network = IMFTransformer(**self._transformer)
        except TypeError as error:
            raise ConfigError(f"these are no arguments of improved MeanFlow's transformer: {error}") from None
        self.guidance, self.interval, self.decoder = guidance, check_interval(interval), decoder
        size = self._transformer["input_size"]
        self.sample_shape = (self._transformer["in_channels"], size, size)
        self.num_classes = self._transformer["num_classes"]

    def built_by(self) -> tuple[str, dict[str, Any]]:
        """Its own arguments."""
        names = ("guidance", "interval", "decoder")
        return "imf_map", {"transformer": self._transformer, **{name: getattr(self, name) for name in names}}

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        """F(x, t, s)."""
        condition = Condition() if condition is None else condition
        low, high = (condition.guidance and condition.guidance.interval) or self.interval
        scale = torch.full_like(t, self.guidance or 1.0) if condition.scale is None else condition.scale.to(t.dtype)
        labels = condition.labels
        labels = torch.full((len(x),), NULL_LABEL, device=x.device) if labels is None else labels
        ends = (torch.full_like(t, low), torch.full_like(t, high))
        output: Tensor = self.network(x, t - s, 1 - 1 / scale, *ends, labels)
        return output


@register_flow_map("imf_student", variants=VARIANTS)
class IMFStudent(IMFFlowMap):
    """A released student of improved MeanFlow, in PyTorch: see `IMFFlowMap`.

    Args:
        checkpoint: a file such as ``iMF-XL-2.pth``, or where HuggingFace has it, see `locate`.
        variant: as in ``load_flow_map("imf-xl/2-256", checkpoint=...)``; None takes what the shapes say.
        vae: the autoencoder of the decoder, see `StableDiffusionVae`; the authors used ``stabilityai/sd-vae-ft-mse``.
        guidance: the guidance scale of samples that name none; None is what the authors recommend for the size.
        interval: the interval of samples that name none; None likewise.
        input_size: height and width of the latents, which no shape tells.
        num_classes: the number of classes; None is 1000 of 1001 labels.

    Raises:
        CheckpointError: no such file, or one that is damaged, hostile, or of another architecture.
        ConfigError: an unknown variant, or a size for which nothing is recommended.
    """

    suffixes = (".pth", ".pt", ".safetensors")
    citation = bibtex("geng2025imeanflow")

    def __init__(
        self,
        checkpoint: str | Path,
        variant: str | None = None,
        vae: str | None = None,
        guidance: float | None = None,
        interval: tuple[float, float] | None = None,
        input_size: int = 32,
        num_classes: int | None = None,
    ) -> None:
        if variant is not None and variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        if weights_unread():
            size = (variant or "").removeprefix("imf").strip("-").partition("/")[0]
            if size not in _SIZES:
                raise ConfigError("a plan reads no checkpoint: give imf_student.variant, such as imf-xl/2-256")
            depth, width, scale, ends = _SIZES[size]
            super().__init__(_published(depth, width), guidance or scale, interval or ends, _latents(vae))
            self.eval()
            return

        path = locate(checkpoint)
        try:
            stored, said = read_state(path)
        except Exception as error:
            raise unreadable(path, "a student of improved MeanFlow", error) from None
        tensors = {_ours(name): v.float() for name, v in stored.items() if not _of_training(name)}
        arguments = _arguments(tensors)

        # What the size says, which must be the one that the caller names.
        depth, width = arguments["shared_depth"] + arguments["head_depth"], arguments["hidden_size"]
        sizes = {size: told for size, told in _SIZES.items() if told[:2] == (depth, width)}
        if variant not in (None, "imf", *(f"imf-{size}/2-256" for size in sizes)):
            raise CheckpointError(f"{path} is not {variant}: it has {depth} blocks of the width {width}")
        if not sizes and (guidance is None or interval is None):
            raise ConfigError(
                f"{path} has {depth} blocks of the width {width}, which no published one has: give guidance and "
                "interval"
            )
        _, _, scale, ends = next(iter(sizes.values()), (depth, width, guidance or 1.0, interval or (0.0, 1.0)))
        rows = arguments["num_classes"] + 1
        told = classes_of(path, rows, 1000 if num_classes is None and rows == 1001 else num_classes, said)
        if not told["null_label"]:
            raise CheckpointError(f"{path} has no null label, as all students of improved MeanFlow have")

        # The network, at first without values.
        arguments |= {"input_size": input_size, "num_classes": told["num_classes"]}
        guidance, interval = scale if guidance is None else guidance, ends if interval is None else interval
        try:
            with torch.device("meta"):
                super().__init__(arguments, guidance, interval, _latents(vae))
        except RuntimeError as error:
            raise CheckpointError(f"{path} describes no student of improved MeanFlow: {error}") from None
        fill_module(self.network, tensors, f"{path}, read as a student of improved MeanFlow,", assign=True)
        self.eval()
        licence = f"{path} is a student of improved MeanFlow (github.com/Lyy-iiis/imeanflow): MIT licence"
        warnings.warn(licence, RuntimeWarning, stacklevel=2)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """See `FlowMap.recognises`."""
        return any(_ours(name).startswith("u_heads.") for name in names_in(path))


def _latents(vae: str | None) -> StableDiffusionVae:
    """The decoder of the authors, of whitened latents."""
    mean, std = WHITENING
    bias = [-m / deviation for m, deviation in zip(mean, std, strict=True)]
    return StableDiffusionVae(vae=vae, scale=[1 / deviation for deviation in std], bias=bias)


def _published(depth: int, width: int) -> dict[str, Any]:
    """The arguments of `IMFTransformer` for a published size, whose last 8 blocks are the head."""
    return {
        "input_size": 32,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": width,
        "shared_depth": depth - 8,
        "head_depth": 8,
        "num_heads": width // 64,
        "mlp_size": int(8 / 3 * width),
        "num_classes": 1000,
    }


def _ours(name: str) -> str:
    """The name without what the authors' layers and wrapper put into it."""
    return re.sub(r"\._flax_(linear|embedding)\.", ".", name.removeprefix("module.").removeprefix("net."))


def _of_training(name: str) -> bool:
    return _ours(name).startswith(("v_heads.", "v_final_layer."))


def _arguments(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell of the arguments of `IMFTransformer`; where they are missing or odd, something possible."""

    def shape(name: str, *default: int) -> tuple[int, ...]:
        found = tuple(tensors[name].shape) if name in tensors else default
        return found if len(found) == len(default) and all(found) else default

    def depth(kind: str) -> int:
        return min(len({name.split(".")[1] for name in tensors if name.startswith(f"{kind}.")}), 200)

    width, channels, patch, _ = shape("x_embedder.proj.weight", 768, 4, 2, 2)
    (head,) = shape("shared_blocks.0.attn.q_norm.weight", 64)
    hidden, _ = shape("shared_blocks.0.mlp.w1.weight", 4 * width, width)
    rows, _ = shape("y_embedder.embedding_table.weight", 1001, width)
    counts = [shape(f"{name}_tokens", 1, width)[0] for name in ("class", "omega", "t_min", "time")]
    return {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": width,
        "shared_depth": depth("shared_blocks"),
        "head_depth": depth("u_heads"),
        "num_heads": max(width // head, 1),
        "mlp_size": hidden,
        "num_classes": rows - 1,
        "tokens": tuple(counts),
    }
