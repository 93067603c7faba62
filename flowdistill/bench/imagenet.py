"""The systems of the tables for ImageNet at 256 and 512 pixels: what is published, and where it can be had.

Figures and numbers of parameters are their authors', and none of them has been measured here.
"""

from __future__ import annotations

from typing import Any

from flowdistill.bench.systems import System, SystemTable
from flowdistill.solvers import Edm, EulerMaruyama

_NC = "CC BY-NC-SA 4.0"
_REPA = ("sit_teacher.variant = 'sit-xl/2-repa-256'", "sit_teacher.checkpoint = 'last.pt'")
_DMF_512 = ("sit_teacher.variant = 'sit-xl/2-repa-512'", "sit_teacher.checkpoint = 'sit_repa_xl_2_512.pt'")
_512 = ("latents.sample_shape = (4, 64, 64)", "latents.folder = 'imagenet512_latents'")

# EDM2's networks by the lengths of their averages that its authors chose for the Frechet distance.
_S_UNGUIDED, _XXL_UNGUIDED = "edm2-img512-s-2147483-0.130.pkl", "edm2-img512-xxl-0939524-0.070.pkl"
_S_CFG, _XXL_CFG = "edm2-img512-s-2147483-0.025.pkl", "edm2-img512-xxl-0939524-0.015.pkl"
_S, _XXL = "edm2-img512-s-2147483-0.070.pkl", "edm2-img512-xxl-0939524-0.075.pkl"
_WEAK_S, _WEAK_XXL = "edm2-img512-xs-0134217-0.125.pkl", "edm2-img512-m-0268435-0.155.pkl"


def _edm2(name: str, size: str, file: str, fid: float, millions: float, **guided: Any) -> System:
    return System(
        name=name,
        kind="teacher",
        published={32: fid},
        protocol="edm2",
        parameters=millions,
        citation="karras2024edm2",
        loads=f"edm2-{size}-512",
        file=file,
        source="NVIDIA's EDM2 page",
        licence=_NC,
        autoencoder="mse",
        solver=Edm,
        **guided,
    )


def _autoguided(size: str, file: str, weak: str, guide: str, scale: float) -> tuple[str, ...]:
    """The bindings of an EDM2 teacher that a less trained network guides, in place of a SiT."""
    return (
        "guided.teacher = @edm2_teacher()",
        f"edm2_teacher.variant = 'edm2-{size}-512'",
        f"edm2_teacher.checkpoint = '{file}'",
        f"guided.scale = {scale}",
        "guided.guide = @weak/edm2_teacher()",
        f"weak/edm2_teacher.variant = 'edm2-{weak}-512'",
        f"weak/edm2_teacher.checkpoint = '{guide}'",
    )


_EDM2_S = _autoguided("s", _S, "xs", _WEAK_S, 2.1)
_EDM2_XXL = _autoguided("xxl", _XXL, "m", _WEAK_XXL, 2.05)

_TEACHERS_256 = (
    System(
        name="SiT-XL/2",
        kind="teacher",
        published={250: 2.06},
        protocol="sit",
        parameters=675,
        citation="ma2024sit",
        loads="sit-xl/2-256",
        file="SiT-XL-2-256x256.pt",
        source="willisma/SiT",
        licence="MIT",
        solver=EulerMaruyama,
        guided={"scale": 1.5, "channels": 3},
    ),
    System(
        name="SiT-XL/2 + REPA",
        kind="teacher",
        published={250: 1.42},
        protocol="repa",
        parameters=675,
        citation="yu2025repa",
        loads="sit-xl/2-repa-256",
        file="last.pt",
        source="sihyun-yu/REPA",
        licence="MIT",
        solver=EulerMaruyama,
        guided={"scale": 1.8, "interval": (0.0, 0.7)},
    ),
)

_SCRATCH_256 = (
    System(
        name="Shortcut models, XL/2",
        kind="from scratch",
        published={1: 10.6, 4: 7.8, 128: 3.8},
        parameters=675,
        citation="frans2024shortcut",
        source="kvfrans/shortcut-models, pickles of Flax that no reader takes",
        licence="MIT",
        recipe="shortcut/imagenet.gin",
    ),
    *(
        System(
            name=f"IMM, XL/2, guidance {scale}",
            kind="from scratch",
            published=published,
            parameters=675,
            citation="zhou2025inductive",
            loads="imm_ts-xl/2-256",
            file="imagenet256_ts_a2.pkl",
            source="hf://lumaai/imm",
            licence=_NC,
            arguments={"guidance": scale},
            recipe="imm/imagenet.gin",
        )
        for scale, published in ((1.25, {1: 7.77, 2: 5.33}), (1.5, {1: 8.05, 2: 3.99, 4: 2.51, 8: 1.99}))
    ),
    System(
        name="MeanFlow, XL/2",
        kind="from scratch",
        published={1: 3.43, 2: 2.93},
        parameters=676,
        citation="geng2025meanflow",
        source="not released by its authors in this size",
        recipe="meanflow/imagenet.gin",
    ),
    *(
        System(
            name=f"MeanFlow in PyTorch, {size}",
            kind="from scratch",
            published=published,
            protocol="meanflow_pytorch",
            citation="geng2025meanflow",
            loads=f"meanflow-{size.lower()}-256",
            file=f"meanflow-{size.lower().replace('/', '-')}.pt",
            source="zhuyu-cs/MeanFlow, in Google Drive",
            licence="MIT",
        )
        for size, published in (("L/2", {1: 4.12}), ("XL/2", {1: 3.56}))
    ),
    *(
        System(
            name=f"alpha-Flow, {name}",
            kind="from scratch",
            published=published,
            times={} if name == "XL/2+" else {2: (1.0, 0.55, 0.0)},
            renoise=True,
            parameters=676,
            citation="zhang2026alphaflow",
            loads="alphaflow-xl/2-256",
            file=file,
            source="hf://snap-research/alphaflow",
            licence="Snap's, not commercial",
            recipe="alphaflow/imagenet.gin",
        )
        for name, published, file in (
            ("XL/2", {1: 2.95, 2: 2.34}, "alphaflow-XL-2-cfg.pt"),
            ("XL/2+", {1: 2.58, 2: 2.15}, "alphaflow-XL-2-plus-cfg.pt"),
        )
    ),
    System(
        name="Terminal velocity matching, XL/2",
        kind="from scratch",
        published={1: 3.29, 4: 1.99},
        parameters=678,
        citation="zhou2025tvm",
        loads="tvm-xl/2-256",
        file="im256_w2.pkl",
        source="hf://lumaai/tvm",
        licence=_NC,
        recipe="tvm/imagenet.gin",
    ),
    *(
        System(
            name=f"Improved MeanFlow, {size}/2{words}",
            kind="from scratch",
            published=published,
            protocol="imf",
            citation="geng2025imeanflow",
            loads=f"imf-{size.lower()}/2-256",
            file=f"iMF-{size}-2.pth",
            source="hf://Lyy0725/iMF",
            licence="MIT",
            autoencoder="mse",
            arguments=arguments,
            recipe="imeanflow/imagenet.gin" if size == "B" else None,
        )
        for size, words, published, arguments in (
            ("B", "", {1: 3.32}, {}),
            ("M", "", {1: 2.26}, {}),
            ("L", "", {1: 1.83}, {}),
            ("XL", "", {1: 1.72}, {}),
            ("XL", ", guided for 2 steps", {2: 1.54}, {"guidance": 4.0, "interval": (0.36, 0.64)}),
        )
    ),
)

_DISTILLED_256 = (
    System(
        name="MeanFlow in PyTorch, from SiT-XL/2",
        kind="distilled",
        published={1: 4.52, 2: 2.6},
        protocol="meanflow_pytorch",
        parameters=676,
        citation="geng2025meanflow",
        loads="meanflow-xl/2-256",
        file="meanflow-xl-2-from-sit.pt",
        source="zhuyu-cs/MeanFlow, in Google Drive",
        licence="MIT",
        recipe="meanflow/meanflow_distillation_imagenet.gin",
    ),
    *(
        System(
            name=f"{name}, XL/2 from SiT-XL/2",
            kind="distilled",
            published=published,
            protocol="secant",
            citation="liu2025secant",
            loads="secant-xl/2-256",
            file=f"{name.lower()}.pt",
            source="hf://poppuppy/secant-expectation",
            licence="none stated",
            recipe=f"secant/{name.lower()}_imagenet.gin",
        )
        for name, published in (("STEI", {1: 7.12, 4: 2.78}), ("SDEI", {8: 2.46}), ("STEE", {8: 2.33}))
    ),
    *(
        System(
            name=f"pi-Flow from {teacher}",
            kind="distilled",
            published=published,
            protocol="piflow",
            citation="chen2025piflow",
            loads=f"piflow_{name}-xl/2-256",
            file=file,
            source="hf://Lakonik/pi-Flow-ImageNet",
            licence="Apache-2.0",
            recipe=recipe,
        )
        for teacher, name, file, published, recipe in (
            ("flow matching", "fm", "gmdit_k32_imagenet_piid_1step", {1: 3.34}, None),
            ("REPA, 1 step", "repa", "gmrepa_k32_imagenet_piid_1step", {1: 2.85}, "piflow/imagenet.gin"),
            ("REPA, 2 steps", "repa", "gmrepa_k32_imagenet_piid_2step", {2: 1.97}, None),
        )
    ),
    System(
        name="Decoupled MeanFlow, XL/2+",
        kind="distilled",
        published={1: 2.16, 2: 1.64, 4: 1.51},
        protocol="dmf",
        parameters=675,
        citation="lee2025dmf",
        loads="dmf-xl/2-256",
        file="dmf_xl_2_256.pt",
        source="hf://kyungmnlee/DMF",
        licence="none stated",
        recipe="dmf/imagenet.gin",
    ),
    *(
        System(
            name=f"FACM, LightningDiT-XL, {epochs} epochs",
            kind="distilled",
            published=published,
            protocol="facm",
            parameters=675,
            citation="peng2026facm",
            loads="facm-xl/1-256",
            file=f"{epochs}ep-stg2.pt",
            beside={"statistics": "latents_stats.pt", "vae": "vavae-imagenet256-f16d32"},
            source="hf://Peterande/FACM; its autoencoder VA-VAE in the form of diffusers",
            licence="Apache-2.0",
            recipe="facm/imagenet.gin" if epochs == 100 else None,
        )
        for epochs, published in ((100, {2: 1.32}), (400, {1: 1.70}))
    ),
    System(
        name="FreeFlow from SiT-XL/2",
        kind="distilled",
        published={1: 1.69},
        parameters=678,
        citation="tong2025freeflow",
        loads="freeflow-xl/2-256",
        file="freeflow-sit-256.pt",
        source="hf://nyu-visionx/FreeFlow",
        licence="MIT",
        recipe="freeflow/imagenet.gin",
    ),
    System(
        name="FreeFlow from SiT-XL/2 + REPA",
        kind="distilled",
        published={1: 1.45},
        parameters=678,
        citation="tong2025freeflow",
        loads="freeflow-xl/2-256",
        file="freeflow-repa-256.pt",
        source="hf://nyu-visionx/FreeFlow",
        licence="MIT",
        recipe="freeflow/imagenet.gin",
        bindings=_REPA,
    ),
)

_TEACHERS_512 = (
    _edm2("EDM2-S", "s", _S_UNGUIDED, 2.56, 280),
    _edm2(
        "EDM2-S, guided",
        "s",
        _S_CFG,
        2.23,
        280,
        guided={"scale": 1.4},
        guide=("edm2-xs-512-uncond", "edm2-img512-xs-uncond-2147483-0.025.pkl"),
    ),
    _edm2("EDM2-S, autoguided", "s", _S, 1.34, 280, guided={"scale": 2.1}, guide=("edm2-xs-512", _WEAK_S)),
    _edm2("EDM2-XXL", "xxl", _XXL_UNGUIDED, 1.91, 1523),
    _edm2(
        "EDM2-XXL, guided",
        "xxl",
        _XXL_CFG,
        1.81,
        1523,
        guided={"scale": 1.2},
        guide=("edm2-xs-512-uncond", "edm2-img512-xs-uncond-2147483-0.015.pkl"),
    ),
    _edm2("EDM2-XXL, autoguided", "xxl", _XXL, 1.25, 1523, guided={"scale": 2.05}, guide=("edm2-m-512", _WEAK_XXL)),
)

_SCRATCH_512 = (
    System(
        name="sCT, EDM2-XXL",
        kind="from scratch",
        published={1: 4.29, 2: 3.76},
        parameters=1523,
        citation="lu2025scm",
        source="not released",
        recipe="consistency/sct_imagenet.gin",
        bindings=("edm2_teacher.variant = 'edm2-xxl-512'", f"edm2_teacher.checkpoint = '{_XXL_CFG}'"),
    ),
    System(
        name="Terminal velocity matching, XL/2",
        kind="from scratch",
        published={1: 4.32},
        parameters=678,
        citation="zhou2025tvm",
        loads="tvm-xl/2-512",
        file="im512_w2p5.pkl",
        source="hf://lumaai/tvm",
        licence=_NC,
        recipe="tvm/imagenet.gin",
        bindings=(*_512, "sit.input_size = 64"),
    ),
)

_DISTILLED_512 = (
    System(
        name="Decoupled MeanFlow, XL/2+",
        kind="distilled",
        published={1: 2.12, 2: 1.75, 4: 1.68},
        protocol="dmf",
        parameters=675,
        citation="lee2025dmf",
        loads="dmf-xl/2-512",
        file="dmf_xl_2_512.pt",
        source="hf://kyungmnlee/DMF",
        licence="none stated",
        recipe="dmf/imagenet.gin",
        bindings=(*_DMF_512, *_512),
    ),
    System(
        name="FreeFlow from SiT-XL/2 + REPA",
        kind="distilled",
        published={1: 1.49},
        parameters=678,
        citation="tong2025freeflow",
        loads="freeflow-xl/2-512",
        file="freeflow-repa-512.pt",
        source="hf://nyu-visionx/FreeFlow",
        licence="MIT",
        recipe="freeflow/imagenet.gin",
        bindings=_DMF_512,
    ),
    *(
        System(
            name=f"FreeFlow from EDM2-{size}, autoguided",
            kind="distilled",
            parameters=millions,
            citation="tong2025freeflow",
            source="not released",
            recipe="freeflow/imagenet.gin",
            bindings=bindings,
        )
        for size, millions, bindings in (("S", 280, _EDM2_S), ("XXL", 1523, _EDM2_XXL))
    ),
    *(
        System(
            name=f"{name} from EDM2-S, autoguided",
            kind="distilled",
            parameters=280,
            citation=citation,
            source="not released",
            recipe=recipe,
            bindings=bindings,
        )
        for name, citation, recipe, bindings in (
            ("SDEI", "liu2025secant", "secant/sdei_imagenet.gin", (*_512, *_EDM2_S)),
            ("FACM", "peng2026facm", "facm/imagenet.gin", (*_512, *_EDM2_S)),
            ("pi-Flow", "chen2025piflow", "piflow/imagenet.gin", _EDM2_S),
        )
    ),
    System(
        name="AYF-S",
        kind="distilled",
        published={4: 1.70},
        parameters=280,
        citation="sabour2025ayf",
        source="not released",
        recipe="ayf/ayf_emd_imagenet.gin",
    ),
    *(
        System(
            name=f"{name}-{size}",
            kind="distilled",
            published=published,
            parameters=millions,
            citation="lu2025scm",
            source="not released",
            recipe=f"consistency/{recipe}_imagenet.gin",
            bindings=()
            if size == "S"
            else ("edm2_teacher.variant = 'edm2-xxl-512'", f"edm2_teacher.checkpoint = '{_XXL_CFG}'"),
        )
        for name, size, millions, published, recipe in (
            ("sCD", "S", 280, {1: 3.07, 2: 2.50}, "scd"),
            ("sCD", "XXL", 1523, {1: 2.28, 2: 1.88}, "scd"),
            ("sCD + VSD", "S", 280, {1: 3.37, 2: 2.70}, "scd_vsd"),
            ("sCD + VSD", "XXL", 1523, {1: 2.16, 2: 1.89}, "scd_vsd"),
        )
    ),
)

TABLES = {
    "imagenet256": SystemTable(systems=(*_TEACHERS_256, *_SCRATCH_256, *_DISTILLED_256), protocol="adm"),
    "imagenet512": SystemTable(systems=(*_TEACHERS_512, *_SCRATCH_512, *_DISTILLED_512), protocol="edm2"),
}
"""The tables by the names that ``flowdistill bench`` takes."""
