"""Flow-anchored consistency models' released students, whose network is LightningDiT."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdistill.decoders import StableDiffusionVae
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks.lightning_dit import LightningDiT
from flowdistill.networks.sit_files import arguments_of, classes_of, heads_of, names_in, read_state, unreadable
from flowdistill.plumbing.dry import weights_unread
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import fill_module, unwrapped
from flowdistill.plumbing.pickles import as_dictionary
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_flow_map, unknown_name
from flowdistill.plumbing.torch_files import TorchFile, is_tensor
from flowdistill.runs.pretrained import locate

VARIANTS = ["facm", "facm-xl/1-256"]
"""The family, of any size, and its published architecture."""

_NEEDED = {"pos_embed", "x_embedder.proj.weight", "blocks.0.mlp.w12.weight", "final_layer.linear.weight"}
_AVERAGE = "ema_models.1.ema_model."  # of several, that of the relative width 0.2


@register_flow_map("facm_student", variants=VARIANTS)
class FACMStudent(NetworkFlowMap):
    """A released student of flow-anchored consistency models (Peng et al. 2025, arXiv 2507.03738).

    It is a LightningDiT that jumps from all times to data. Its authors' network sees the time a of a jump, where a is 0
    at noise, and 2 - a of a velocity. Several steps jump to data and noise again.

    Args:
        checkpoint: a file such as ``400ep-stg2.pt``, or where HuggingFace has it, see `locate`.
        variant: as in ``load_flow_map("facm-xl/1-256", checkpoint=...)``; None is for files with several averages,
            since others may be of a teacher.
        vae: the autoencoder VA-VAE f16d32 in the form of diffusers, a folder; None decodes nothing.
        statistics: the authors' file ``latents_stats.pt``, the mean and the deviation of each channel of its latents;
            decoding needs it.
        num_classes: the number of classes; None is 1000 of 1001 labels.
        guidance: guides by the null label, with two evaluations a step; None does not.

    Raises:
        CheckpointError: no such file, or one that is damaged, hostile, or of another architecture.
        ConfigError: an unknown variant, or an autoencoder without the statistics of its latents.
    """

    suffixes = (".pt", ".pth", ".safetensors")
    citation = bibtex("peng2026facm")

    def __init__(
        self,
        checkpoint: str | Path,
        variant: str | None = None,
        vae: str | None = None,
        statistics: str | Path | None = None,
        num_classes: int | None = None,
        guidance: float | None = None,
    ) -> None:
        if variant is not None and variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        if vae is not None and statistics is None:
            raise ConfigError("FACM's latents are standardised: give statistics, its authors' latents_stats.pt")
        if weights_unread():
            super().__init__(LightningDiT(expanded=True), "expanded", guidance, guidance_input="null_label")
            self.eval()
            return

        path = locate(checkpoint)
        if variant is None and not _average(path):
            raise ConfigError(
                f"{path} may be of FACM's student or of a teacher, which is no flow map: of a student say so, as in "
                "load_flow_map('facm', checkpoint=...)"
            )
        try:
            stored, said = _state(path)
            named, wrappers = unwrapped(stored, _NEEDED)
        except Exception as error:
            raise unreadable(path, "a student of FACM", error) from None
        tensors = {name: v.float() for name, v in named.items() if not name.startswith("feat_rope.")}
        arguments = _arguments(tensors)
        size = (arguments["hidden_size"], arguments["depth"], arguments["patch_size"])
        if variant == VARIANTS[1] and size != (1152, 28, 1):
            raise CheckpointError(f"{path} is not {variant}: it has {size[1]} blocks of the width {size[0]}")
        arguments |= classes_of(path, arguments["num_classes"] + 1, num_classes, said)
        latents = {} if statistics is None else _latents(statistics, arguments["in_channels"])
        decoder = None if statistics is None else StableDiffusionVae(vae=vae, rounding="down", **latents)
        try:
            with torch.device("meta"):
                network = LightningDiT(**arguments, expanded=True)
                super().__init__(network, "expanded", guidance, decoder=decoder, guidance_input="null_label")
        except RuntimeError as error:
            raise CheckpointError(f"{path} describes no student of FACM: {error}") from None
        fill_module(network, tensors, f"{path}{wrappers}, read as a student of FACM,", assign=True)
        self.eval()
        licence = f"{path} is a student of FACM (github.com/ali-vilab/FACM): Apache-2.0 licence"
        warnings.warn(licence, RuntimeWarning, stacklevel=2)

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """See `FlowMap.recognises`."""
        return bool(_average(path)) or any(name.endswith(".mlp.w12.weight") for name in names_in(path))


def _state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, of the average where it has one, and what it says beside them."""
    if found := _average(path):
        return TorchFile(path).tensors(found), {}
    return read_state(path)


def _average(path: Path) -> dict[str, Any]:
    """The records of the tensors of one of several averages in a file of ``torch.save``; none of any other file."""
    if path.suffix == ".safetensors":
        return {}
    try:
        several = as_dictionary(as_dictionary(TorchFile(path).content).get("emas"))
    except Exception:  # which `read_state` tells
        return {}
    named = {str(name): value for name, value in several.items() if is_tensor(value)}
    return {name.removeprefix(_AVERAGE): value for name, value in named.items() if name.startswith(_AVERAGE)}


def _arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes tell of the arguments of `LightningDiT`."""
    found = arguments_of(tensors)
    width = found["hidden_size"]
    perceptron = tensors.get("blocks.0.mlp.w3.weight", torch.empty(width, 8 * width // 3))
    hidden = perceptron.shape[-1] if perceptron.ndim else 1
    kept = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_classes")
    return {
        **{name: found[name] for name in kept},
        "num_heads": heads_of(tensors) or 16,
        "mlp_ratio": 1.5 * (hidden + 0.5) / width,
    }


def _latents(file: str | Path, channels: int) -> dict[str, Any]:
    """The scale and the bias of the latents, as arguments of the decoder, from their statistics.

    Raises:
        CheckpointError: the file cannot be read, or holds anything else.
    """
    path = locate(file)
    try:
        tensors, _ = read_state(path)
        mean, std = (tensors[name].double().flatten() for name in ("mean", "std"))
        if (
            len(mean) != channels
            or mean.shape != std.shape
            or not bool((torch.isfinite(mean) & torch.isfinite(std) & (std > 0)).all())
        ):
            raise ValueError(f"its mean and std are not those of {channels} channels")
    except Exception as error:
        raise unreadable(path, "the statistics of latents", error) from None
    return {"scale": (1 / std).tolist(), "bias": (-mean / std).tolist()}
