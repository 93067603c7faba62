"""Students of others that are SiTs with a second time: a table of families, and the reading of their files."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from flowdistill.decoders import Rounding, StableDiffusionVae
from flowdistill.flow_maps import Conditioning, GuidanceInput, NetworkFlowMap
from flowdistill.networks.sit import SIZES, SiT
from flowdistill.networks.sit_files import (
    HEADS,
    SiTFile,
    arguments_of,
    built,
    check_square,
    classes_of,
    heads_of,
    read_sit,
)
from flowdistill.plumbing.dry import weights_unread
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import fill_module
from flowdistill.plumbing.references import bibtex
from flowdistill.plumbing.registry import register_flow_map, unknown_name
from flowdistill.runs.pretrained import locate
from flowdistill.students.pickled import read_pickled_sit

_NO_LICENCE = "its repository states no licence: ask its authors before you use or share it"


@attrs.frozen(kw_only=True, eq=False)
class Family:
    """How the students of one paper are stored, and what their numbers mean."""

    title: str
    """Whose students they are, for messages."""
    licence: str
    """The licence of the files, as their authors state it."""
    sizes: tuple[str, ...]
    """The published architectures, such as ``xl/2-256``."""
    conditioning: Conditioning
    """How the network is told of the second time, see `NetworkFlowMap`."""
    noise_time: Literal[0, 1]
    """The authors' time of the noise; 0 also means that their network gives data - noise."""
    names: Mapping[str, str] = attrs.field(factory=dict)
    """The authors' names of modules, and those of `NetworkFlowMap` or `SiT` for the same."""
    optional: Set[str] = frozenset()
    """Those of ``names`` that not all files have."""
    dropped: Set[str] = frozenset()
    """Modules that only training needs."""
    mean_of_times: bool = False
    """Whether the embeddings of the two times are averaged, and not added."""
    guidance: float | None = None
    """The guidance scale of samples that name none."""
    guidance_range: tuple[float, float] = (0.0, 1.0)
    """The range of scales that is brought to (0, 1) before it is embedded."""
    early_blocks: int | None = None
    """The blocks that see the first time, of the published depth."""
    network: Mapping[str, Any] = attrs.field(factory=dict)
    """Further arguments of `SiT`."""
    published: Mapping[str, Any] = attrs.field(factory=dict)
    """Arguments of the published architectures in place of SiT's."""
    guidance_input: GuidanceInput = "scale"
    """The number that is embedded of the guidance scale, where a module embeds it."""
    scales_output: bool = False
    """Whether the output is multiplied by the guidance scale, unless the file says that it is not."""
    start: float = 1.0
    """The first time of samples."""
    scale: float = 0.18215
    """The scale of the latents."""
    whitening: Mapping[int, tuple[Sequence[float], Sequence[float]]] = attrs.field(factory=dict)
    """In its place the mean and the deviation of raw latents in each channel, by the width of the images in pixels; the
    first also for other widths."""
    statistics: tuple[str, str] | None = None
    """The tensors that hold the mean and the variance of the latents at each position, in place of ``scale``."""
    rounding: Rounding = "down"
    """The rounding of pixels to bytes."""
    shift: Mapping[int, float] = attrs.field(factory=dict)
    """The shift of the times of several steps, by the width of the images in pixels."""
    class_name: str = ""
    """The class of the network, where the files are pickles of it."""
    file_name: str = ""
    """A part of the files' names that tells the family, where nothing in the files does."""


WHITENING = ((0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003))
_IMM = Family(
    title="inductive moment matching (github.com/lumalabs/imm)",
    licence="CC BY-NC-SA 4.0, a licence for use that is not commercial",
    sizes=("xl/2-256",),
    conditioning="two_time",
    noise_time=1,
    names={"s_embedder": "duration_embedding"},
    guidance=1.5,
    network={"time_factor": 1000.0, "unit_input": True},
    start=0.994,
    whitening={256: WHITENING},
    class_name="IMMPrecond",
    file_name="_ts_",
)

FAMILIES = {
    "dmf": Family(
        title="Decoupled MeanFlow (github.com/kyungmnlee/dmf)",
        licence=_NO_LICENCE,
        sizes=("xl/2-256", "xl/2-512"),
        conditioning="decoupled",
        noise_time=1,
        dropped={"logvar_linear"},
        early_blocks=20,
        shift={512: 1.5},
    ),
    "meanflow": Family(
        title="MeanFlow in PyTorch (github.com/zhuyu-cs/MeanFlow)",
        licence="MIT licence",
        sizes=("b/4-256", "b/2-256", "l/2-256", "xl/2-256"),
        conditioning="two_time",
        noise_time=1,
        names={"r_embedder": "duration_embedding"},
        scale=0.18125,  # in training and in evaluation alike
    ),
    "secant": Family(
        title="secant expectation, SDEI, STEI, SDEE or STEE (github.com/poppuppy/secant_expectation)",
        licence=_NO_LICENCE,
        sizes=("xl/2-256",),
        conditioning="end_time",
        noise_time=0,
        names={"s_embedder": "duration_embedding", "cfg_embedder": "guidance_embedding"},
        optional={"cfg_embedder"},
        mean_of_times=True,
        guidance=1.0,
        guidance_range=(1.0, 2.5),
        rounding="nearest",
    ),
    "alphaflow": Family(
        title="alpha-Flow or its MeanFlow (github.com/snap-research/alphaflow)",
        licence="Snap's licence, for research that is not commercial",
        sizes=("b/2-256", "xl/2-256"),
        conditioning="two_time",
        noise_time=1,
        names={"noise_labels_embedder": "t_embedder", "noise_labels_next_embedder": "duration_embedding"},
        statistics=("autoencoder_mean", "autoencoder_var"),
    ),
    "freeflow": Family(
        title="FreeFlow (github.com/ShangyuanTong/FreeFlow)",
        licence="MIT licence",
        sizes=("xl/2-256", "xl/2-512"),
        conditioning="anchored",
        noise_time=0,
        names={"duration_embedder": "duration_embedding", "guidance_embedder": "guidance_embedding"},
        guidance=1.5,
    ),
    "imm_ts": _IMM,
    "imm_s": attrs.evolve(_IMM, conditioning="end_time", file_name="_s_"),
    "tvm": Family(
        title="terminal velocity matching (github.com/lumalabs/tvm)",
        licence="CC BY-NC-SA 4.0, a licence for use that is not commercial",
        sizes=("xl/2-256", "xl/2-512"),
        conditioning="two_time",
        noise_time=1,
        names={"s_embedder": "duration_embedding", "guidance_embedder": "guidance_embedding"},
        network={"rms_norm": True},
        published={"num_heads": 18, "qk_norm": "rms"},
        guidance_input="inverse",
        scales_output=True,
        whitening={256: WHITENING, 512: ((1.56, -0.695, 0.483, 0.729), (5.27, 5.91, 4.21, 4.31))},
        class_name="TVMWrapper",
    ),
}
"""The families by their names; of FreeFlow's files the names of tensors are not known."""

_OF_SIT = {"x_embedder", "t_embedder", "y_embedder", "pos_embed", "blocks", "final_layer"}
_OF_TRAINING = {"projectors"}
_BLOCKS = 28
VARIANTS = [*FAMILIES, *(f"{name}-{size}" for name, family in FAMILIES.items() for size in family.sizes)]
"""The families, of any size, and their published architectures: ``dmf``, ..., ``dmf-xl/2-256``, ..."""


@register_flow_map("sit_student", variants=VARIANTS)
class SiTStudent(NetworkFlowMap):
    """A released student that is a SiT with a second time, as those of DMF and MeanFlow are: see ``FAMILIES``.

    The files are bare state dictionaries, training checkpoints of which the average is taken, or pickles with source
    code, as of IMM and TVM; they are read as data, and nothing in them is executed. A warning says the licence. The
    page "Published students" has what each family is.

    Args:
        checkpoint: a ``.pt``, ``.pth``, ``.safetensors`` or ``.pkl`` file, or where HuggingFace has it, see `locate`.
        variant: the family and perhaps the architecture that the file must have, as in
            ``load_flow_map("dmf-xl/2-256", checkpoint=...)``; None takes what the tensors' names say.
        vae: the autoencoder of the decoder, see `StableDiffusionVae`.
        num_heads: attention heads, which few shapes tell; None is what the file says, or that of a published width.
        num_classes: the number of classes; None is what the file says, or 1000 of 1000 or 1001 labels.
        early_blocks: blocks that see the first time, of decoupled students; None is 20 where there are 28.
        guidance: the guidance scale of samples that name none. Where the student embeds none, one that is given guides
            by the null label, with two evaluations a step. None is the family's.
        guidance_range: the range of scales that the student was trained with, where it embeds its place in there; None
            is the family's.
        noise_time: the authors' time of the noise; None is the family's.
        names: for files with other names, parts of theirs between dots, and the family's in their place.

    Raises:
        CheckpointError: no such file, or one that is damaged, hostile, or of another architecture.
        ConfigError: the file leaves the family, ``num_heads``, ``num_classes`` or ``early_blocks`` open.
    """

    suffixes = (".pt", ".pth", ".safetensors", ".pkl")
    citation = bibtex(
        "lee2025dmf",
        "geng2025meanflow",
        "liu2025secant",
        "zhang2026alphaflow",
        "tong2025freeflow",
        "zhou2025inductive",
        "zhou2025tvm",
    )

    def __init__(
        self,
        checkpoint: str | Path,
        variant: str | None = None,
        vae: str | None = None,
        num_heads: int | None = None,
        num_classes: int | None = None,
        early_blocks: int | None = None,
        guidance: float | None = None,
        guidance_range: tuple[float, float] | None = None,
        noise_time: Literal[0, 1] | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        name, size = _parts(variant)
        told: dict[str, Any] = {"vae": vae, "early_blocks": early_blocks}
        told |= {"guidance": guidance, "guidance_range": guidance_range}
        if weights_unread():
            if name is None or size is None:
                raise ConfigError("a plan reads no checkpoint: give sit_student.variant, such as dmf-xl/2-256")
            family = FAMILIES[name]
            arguments = {**_arguments(family, size), **family.network}
            network = SiT(**arguments, learn_sigma=False, noise_time=family.noise_time)
            self._start(family, network, **told)
            return

        # The file, its family, and its tensors under the names of this class.
        path = locate(checkpoint)
        file, class_name = read_pickled_sit(path) if path.suffix == ".pkl" else (read_sit(path, names), "")
        name = name or _recognised(file, class_name)
        family = FAMILIES[name]
        if class_name and class_name != family.class_name:
            raise CheckpointError(
                f"{path} has a network of the class {class_name}, and is no student of {family.title}"
            )
        tensors = _named(file, name, family)

        # The network and the flow map, whose weights have no values before the file's are put in.
        noise_time = family.noise_time if noise_time is None else noise_time
        network = _network(file, tensors, num_heads, num_classes, noise_time=noise_time, **family.network)
        _check_size(path, name, family, size, network)
        if family.early_blocks is not None and early_blocks is None and len(network.blocks) != _BLOCKS:
            raise ConfigError(
                f"{path} has {len(network.blocks)} blocks: give early_blocks, those that see the first time"
            )
        if guidance is None and family.scales_output:
            told["guidance"] = _guidance_of(path)
        with torch.device("meta"):
            self._start(
                family,
                network,
                **told,
                statistics=_statistics(file, family, network),
                embeds_guidance="guidance_embedding.mlp.0.weight" in tensors,
                scales_output=bool(file.options.get("do_scale_param", True)),
            )
        fill_module(self, tensors, f"{file.source}, read as a student of {family.title},", assign=True)
        warnings.warn(f"{path} is a student of {family.title}: {family.licence}", RuntimeWarning, stacklevel=2)

    def _start(
        self,
        family: Family,
        network: SiT,
        *,
        vae: str | None,
        early_blocks: int | None,
        guidance: float | None,
        guidance_range: tuple[float, float] | None,
        statistics: Mapping[str, Any] | None = None,
        embeds_guidance: bool = True,
        scales_output: bool = True,
    ) -> None:
        """Become the flow map of a family."""
        pixels = 8 * network.sample_shape[-1]
        latents: Mapping[str, Any] = {"scale": family.scale}
        if family.whitening:
            mean, std = family.whitening.get(pixels) or next(iter(family.whitening.values()))
            bias = [-m / deviation for m, deviation in zip(mean, std, strict=True)]
            latents = {"scale": [1 / deviation for deviation in std], "bias": bias}
        embeds_guidance = embeds_guidance and "guidance_embedding" in family.names.values()
        super().__init__(
            network,
            family.conditioning,
            guidance=family.guidance if guidance is None else guidance,
            early_blocks=family.early_blocks if early_blocks is None else early_blocks,
            decoder=StableDiffusionVae(vae=vae, rounding=family.rounding, **statistics or latents),
            guidance_input=family.guidance_input if embeds_guidance else "null_label",
            guidance_range=family.guidance_range if guidance_range is None else guidance_range,
            guidance_output=family.scales_output and scales_output,
            start=family.start,
            shift=family.shift.get(pixels, 1.0),
        )
        self.eval()


def _parts(variant: str | None) -> tuple[str | None, str | None]:
    """The family and the architecture that a variant names."""
    if variant is None:
        return None, None
    if variant not in VARIANTS:
        raise unknown_name("variant", variant, VARIANTS)
    name, _, size = variant.partition("-")
    return name, size or None


def _arguments(family: Family, size: str) -> dict[str, Any]:
    """The arguments of `SiT` for a published architecture of a family, such as xl/2-256."""
    letters, patch, pixels = re.split("[/-]", size)
    return {"input_size": int(pixels) // 8, "patch_size": int(patch), **SIZES[letters], **family.published}


def _modules(tensors: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in tensors}


def _recognised(file: SiTFile, class_name: str) -> str:
    """The family whose modules, class, and perhaps name a file has."""
    modules = _modules(file.tensors)
    for name, family in FAMILIES.items():
        own = (family.names.keys() | family.dropped) - family.optional
        if own and own <= modules and family.class_name == class_name and family.file_name in file.path.name:
            return name
    others = ", ".join(sorted(modules - _OF_SIT - _OF_TRAINING)) or "nothing"
    raise ConfigError(
        f"{file.path} does not tell whose student it is, for beside a SiT it has {_shown(others)}: say which, as in "
        f"load_flow_map({next(iter(FAMILIES))!r}, checkpoint=...); known: {', '.join(FAMILIES)}"
    )


def _named(file: SiTFile, name: str, family: Family) -> dict[str, Tensor]:
    """The tensors of a file under the names of `NetworkFlowMap`.

    Raises:
        CheckpointError: a module is missing, or there are others; names both, and how to rename them.
    """
    modules = _modules(file.tensors)
    expected = (_OF_SIT - set(family.names.values())) | family.names.keys()
    missing = expected - modules - family.optional
    others = modules - expected - family.dropped - _OF_TRAINING
    if missing or others:
        lacks, has = (_shown(", ".join(sorted(names))) or "nothing" for names in (missing, others))
        raise CheckpointError(
            f"{file.source} is no student of {family.title}, as far as its names tell: it lacks {lacks}, and has {has} "
            f"that is not known; if these are the same modules under other names, load it by "
            f"load_flow_map({name!r}, checkpoint=..., names={{'THEIRS': 'OURS', ...}})"
        )
    tensors = {}
    for key, value in file.tensors.items():
        module, _, rest = key.partition(".")
        if module in family.dropped | _OF_TRAINING:
            continue
        ours = family.names.get(module, module)
        if family.network.get("rms_norm"):  # whose authors name the scales of queries and keys as layer norms are named
            rest = re.sub(r"_norm\.weight$", "_norm.scale", rest)
        averaged = family.mean_of_times and ours in ("t_embedder", "duration_embedding") and rest.startswith("mlp.2.")
        place = ours if ours in ("duration_embedding", "guidance_embedding") else f"network.{ours}"
        tensors[f"{place}.{rest}".removesuffix(".")] = value / 2 if averaged else value
    return tensors


def _shown(text: str) -> str:
    """A text from a file, such that it can be printed and is not long."""
    return text[:300].encode("unicode_escape").decode()


def _network(
    file: SiTFile,
    tensors: Mapping[str, Tensor],
    num_heads: int | None,
    num_classes: int | None,
    **given: Any,
) -> SiT:
    """The SiT that the tensors and the options beside them describe, without values."""
    own = {name.removeprefix("network."): v for name, v in tensors.items() if name.startswith("network.")}
    arguments = arguments_of(own)
    width, rows = arguments["hidden_size"], arguments["num_classes"] + 1
    if width % 4:
        raise CheckpointError(f"{file.path} is {width} wide, and a SiT's width is divisible by 4")
    check_square(file.path, own["pos_embed"])
    heads = num_heads or file.options.get("num_heads") or heads_of(own) or HEADS.get(width)
    if heads is None:
        raise ConfigError(f"{file.path} is {width} wide, which no published SiT is: give num_heads")
    if rows in (1000, 1001) and num_classes is None:
        num_classes = 1000
    arguments |= classes_of(file.path, rows, num_classes, file.options)
    return built(file.path, **arguments, num_heads=heads, **given)


def _check_size(path: Path, name: str, family: Family, size: str | None, network: SiT) -> None:
    expected = {} if size is None else _arguments(family, size)
    found = network.arguments
    wrong = [f"{key} {found[key]} in place of {value}" for key, value in expected.items() if found[key] != value]
    if wrong:
        raise CheckpointError(f"{path} is not {name}-{size}: it has {', '.join(wrong)}")


def _guidance_of(path: Path) -> float:
    """The guidance scale that the name of a file says, such as 1.75 of im256_w1p75.pkl."""
    found = re.search(r"_w(\d{1,3})(?:p(\d{1,6}))?(?!\w)", path.name)
    if found is None:
        raise ConfigError(f"{path} does not tell the guidance scale that its student is trained for: give guidance")
    return float(f"{found[1]}.{found[2] or 0}")


def _statistics(file: SiTFile, family: Family, network: SiT) -> dict[str, Any] | None:
    """The scale and the bias of the latents at each position, as arguments of the decoder, where the file has them."""
    if family.statistics is None:
        return None
    found = [file.stored.get(name, torch.empty(0)).double() for name in family.statistics]
    mean, variance = found
    possible = all(v.shape == (1, *network.sample_shape) and bool(v.isfinite().all()) for v in found)
    if not possible or bool((variance <= 0).any()):
        raise CheckpointError(
            f"{file.path} lacks {' and '.join(family.statistics)}, the statistics of the latents at each position"
        )
    scale = variance[0].rsqrt()
    return {"scale": scale.tolist(), "bias": (-mean[0] * scale).tolist()}
