"""pi-Flow's released students, from the folders of their authors."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from flowdistill.algorithms.piflow.flow_map import PolicyFlowMap
from flowdistill.algorithms.piflow.policies import GMFlowHead, Policy
from flowdistill.decoders import StableDiffusionVae
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import LabelEmbedding, Linear, ScalarEmbedding, SiT
from flowdistill.networks.embeddings import position_table
from flowdistill.networks.sit_files import arguments_of, built, classes_of
from flowdistill.paths import expand_time
from flowdistill.plumbing.dry import weights_unread
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import fill_module, load_tensors
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_flow_map, unknown_name
from flowdistill.runs.pretrained import locate

_FOLDERS = {"piflow_repa": "gmrepa", "piflow_fm": "gmdit"}
_TIME_FACTORS = {"piflow_repa": 1.0, "piflow_fm": 1000.0}
_SIZE = {"hidden_size": 1152, "depth": 28, "input_size": 32, "patch_size": 2}
_CLASS = "GMDiTTransformer2DModelV2"
_SUBSTEPS = 128
_WEIGHTS = "diffusion_pytorch_model.safetensors"
VARIANTS = [*_FOLDERS, *(f"{name}-xl/2-256" for name in _FOLDERS)]
"""Students of REPA and of a flow-matching teacher, of any size, and their published architecture."""

_NETWORK = "wide.network."
_BLOCK = _NETWORK + r"blocks.\1."
# The names of diffusers' transformer, and of `PolicyFlowMap`.
_NAMES = {
    r"pos_embed\.proj": f"{_NETWORK}x_embedder.proj",
    r"emb\.timestep_embedder\.linear_1": f"{_NETWORK}t_embedder.mlp.0",
    r"emb\.timestep_embedder\.linear_2": f"{_NETWORK}t_embedder.mlp.2",
    r"emb\.class_embedder\.embedding_table": f"{_NETWORK}y_embedder.embedding_table",
    r"transformer_blocks\.(\d+)\.norm1\.linear": f"{_BLOCK}adaLN_modulation.1",
    r"transformer_blocks\.(\d+)\.attn1\.to_qkv": f"{_BLOCK}attn.qkv",
    r"transformer_blocks\.(\d+)\.attn1\.to_out\.0": f"{_BLOCK}attn.proj",
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": f"{_BLOCK}mlp.fc1",
    r"transformer_blocks\.(\d+)\.ff\.net\.2": f"{_BLOCK}mlp.fc2",
    "proj_out_1": f"{_NETWORK}final_layer.adaLN_modulation.1",
    "proj_out": f"{_NETWORK}final_layer.linear",
    r"proj_out_logstds\.1": "head.log_std.0",
    r"proj_out_logstds\.3": "head.log_std.2",
}


class _Head(GMFlowHead):
    """The head of released students: its deviation is told of the time and the label as the blocks are."""

    def __init__(
        self,
        sample_shape: tuple[int, ...],
        num_classes: int | None,
        components: int,
        width: int,
        hidden: int,
        null_label: bool,
        time_factor: float,
    ) -> None:
        super().__init__(sample_shape, num_classes, components)
        self.time_embedding, self.time_factor = ScalarEmbedding(width), time_factor
        self.label_embedding = None if num_classes is None else LabelEmbedding(num_classes, width, null_label)
        self.log_std = nn.Sequential(Linear(width, hidden), nn.SiLU(), Linear(hidden, 1))


@register_flow_map("piflow_student", variants=VARIANTS)
class PiFlowStudent(PolicyFlowMap):
    """A released student of pi-Flow (Chen et al. 2025, arXiv 2510.14974): a mixture of Gaussians at each position.

    A folder of its authors holds ``config.json`` and ``diffusion_pytorch_model.safetensors``, as diffusers writes them.
    A jump from t to s takes ceil(128 (t - s)) Euler steps of the policy. A warning says the licence.

    Args:
        checkpoint: the folder, or a file in it, here; or ``hf://owner/repository/folder``.
        variant: as in ``load_flow_map("piflow_repa-xl/2-256", checkpoint=...)``: ``piflow_repa`` of the REPA teacher,
            ``piflow_fm`` of the flow-matching teacher, which counts times in thousandths; None is what the folder's
            name says.
        vae: the autoencoder of the decoder, see `StableDiffusionVae`.
        segments: the jumps from noise to data for which it was trained; None is what the folder's name says, or 1.

    Raises:
        CheckpointError: no such folder, or one that is damaged or of another network.
        ConfigError: the folder's name leaves the variant open.
    """

    suffixes = ("",)
    citation = bibtex("chen2025piflow")

    def __init__(
        self,
        checkpoint: str | Path,
        variant: str | None = None,
        vae: str | None = None,
        segments: int | None = None,
    ) -> None:
        # The folder, and what its name says.
        if variant is not None and variant not in VARIANTS:
            raise unknown_name("variant", variant, VARIANTS)
        if weights_unread():
            raise ConfigError("a plan reads no checkpoint, and pi-Flow's released students are known from theirs alone")
        folder = _folder(checkpoint)
        factor = _TIME_FACTORS[_told(folder) if variant is None else variant.partition("-")[0]]
        if segments is None:
            segments = 2 if "2step" in folder.name else 1

        # The network and the policy, at first without values.
        config = _config(folder)
        tensors = _named({name: v.float() for name, v in load_tensors(folder / _WEIGHTS).items()})
        network = _network(folder, tensors, config, factor)
        arguments, path = network.arguments, folder / _WEIGHTS
        wrong = [f"{k} {arguments[k]} in place of {v}" for k, v in _SIZE.items() if arguments[k] != v]
        if variant and "-" in variant and wrong:
            raise CheckpointError(f"{path} is not {variant}: it has {', '.join(wrong)}")
        for block in network.blocks.children():
            cast("Any", block).norm2.eps = 1e-5  # as diffusers has it, unlike the other norms
        components = max(_rows(tensors.pop("logweights", None)) // network.patch_size**2, 1)
        tensors["head.offset"] = torch.zeros(components, network.sample_shape[0], 1, 1)
        head = partial(
            _Head,
            components=components,
            width=network.embedding_size,
            hidden=max(_rows(tensors.get("head.log_std.0.bias")), 1),
            null_label=network.null_label,
            time_factor=factor,
        )
        decoder = StableDiffusionVae(vae=vae)
        with torch.device("meta"):
            super().__init__(NetworkFlowMap(network, "instantaneous", decoder=decoder), head, _SUBSTEPS, segments)
        fill_module(self, tensors, f"{path}, read as a student of pi-Flow,", assign=True)
        self.eval()
        warnings.warn(
            f"{folder} is a student of pi-Flow (github.com/Lakonik/piFlow): Apache-2.0 licence",
            RuntimeWarning,
            stacklevel=2,
        )

    def built_by(self) -> tuple[str, dict[str, Any]]:
        """Nothing: ConfigError."""
        raise ConfigError("a released student of pi-Flow is a folder already, that of its authors: share that one")

    def average(self, policy: Policy, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The average velocity of the policy's path from x at t to s, in more steps for longer jumps."""
        counts = (self.substeps * (t - s)).ceil().clamp_min(1)
        average = torch.zeros_like(x)
        for i in range(int(counts.max())):
            first, last = (i / counts).clamp_max(1), ((i + 1) / counts).clamp_max(1)
            velocity = policy.velocity(x - expand_time(t - s, x) * average, t - (t - s) * first)
            average = average + expand_time(last - first, x) * velocity
        return average


def _folder(checkpoint: str | Path) -> Path:
    """The folder here, whose files are fetched where it lies on HuggingFace."""
    if str(checkpoint).startswith("hf://"):
        locate(f"{checkpoint}/config.json")
        return locate(f"{checkpoint}/{_WEIGHTS}").parent
    path = Path(checkpoint)
    if not path.exists():
        raise CheckpointError(f"there is no folder {path}")
    folder = path.parent if path.is_file() else path
    return folder if folder.name else folder.resolve()


def _told(folder: Path) -> str:
    found = [name for name, start in _FOLDERS.items() if folder.name.startswith(start)]
    if not found:
        raise ConfigError(
            f"{folder} does not tell which teacher its student has: say so, as in "
            "load_flow_map('piflow_repa', checkpoint=...) or 'piflow_fm'"
        )
    return found[0]


def _config(folder: Path) -> dict[str, Any]:
    """The numbers of a folder's ``config.json``; CheckpointError if it is of something else."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict) or config.get("_class_name") != _CLASS:
        raise CheckpointError(f"{path} does not describe a {_CLASS}, as pi-Flow's do")
    needed = ("num_attention_heads", "sample_size", "num_embeds_ada_norm")
    numbers = {name: config.get(name) for name in needed}
    wrong = [name for name, value in numbers.items() if type(value) is not int or not 0 < value < 100_000]
    if wrong:
        raise CheckpointError(f"{path} does not say {', '.join(wrong)}")
    return numbers


def _named(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of `PolicyFlowMap`, and ``logweights``, whose rows tell the components.

    Queries, keys and values become one layer, as do the means and the weights of the mixture; the embeddings stand in
    the head once more.
    """
    tensors = dict(stored)
    for kind in ("weight", "bias"):
        for name in [key for key in tensors if key.endswith(f".attn1.to_q.{kind}")]:
            _join(tensors, [name.replace("to_q", f"to_{letter}") for letter in "qkv"], name.replace("to_q", "to_qkv"))
        patch = tensors.get("pos_embed.proj.weight", torch.empty(0)).shape[-1:]
        parts = [f"proj_out_{what}.{kind}" for what in ("means", "logweights")]
        if parts[1] in tensors:
            tensors["logweights"] = tensors[parts[1]]
        _join(tensors, parts, f"proj_out.{kind}", math.prod(patch) ** 2)

    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        module, _, kind = name.rpartition(".")
        ours = module
        for theirs, new in _NAMES.items():
            if re.fullmatch(theirs, module):
                ours = re.sub(theirs, new, module)
        found[f"{ours}.{kind}".removeprefix(".")] = value
    for ours, copied in (("t_embedder", "time_embedding"), ("y_embedder", "label_embedding")):
        inner = f"{_NETWORK}{ours}."
        found |= {f"head.{copied}.{k.removeprefix(inner)}": v.clone() for k, v in found.items() if k.startswith(inner)}
    return found


def _join(tensors: dict[str, Tensor], parts: list[str], name: str, groups: int = 1) -> None:
    """Join the rows of some tensors, in each of so many groups of them, into one; nothing if they do not fit."""
    present = [tensors[part] for part in parts if part in tensors]
    fit = len(present) == len(parts) and len({v.shape[1:] for v in present}) == 1
    if fit and groups and all(v.ndim and len(v) % groups == 0 for v in present):
        joined = torch.cat([v.reshape(groups, -1, *v.shape[1:]) for v in present], dim=1)
        tensors[name] = joined.flatten(0, 1)
        for part in parts:
            del tensors[part]


def _rows(tensor: Tensor | None) -> int:
    return len(tensor) if tensor is not None and tensor.ndim else 0


def _network(folder: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], time_factor: float) -> SiT:
    """The SiT that the tensors describe, without values; its fixed table of positions is added to them."""
    own = {k.removeprefix(_NETWORK): v for k, v in tensors.items() if k.startswith(_NETWORK)}
    own.pop("final_layer.linear.weight", None)
    arguments = arguments_of(own)
    patch, width, rows = arguments["patch_size"], arguments["hidden_size"], arguments["num_classes"] + 1
    path, size, heads = folder / _WEIGHTS, config["sample_size"], config["num_attention_heads"]
    if size % patch or size > 1024 or width % 4 or width % heads:
        raise CheckpointError(f"{path} and its config.json do not fit each other")
    arguments["input_size"] = size
    arguments |= classes_of(path, rows, None, {"num_classes": config["num_embeds_ada_norm"]})
    tensors[f"{_NETWORK}pos_embed"] = position_table(size // patch, width)
    return built(path, **arguments, num_heads=heads, noise_time=1, time_factor=time_factor)
