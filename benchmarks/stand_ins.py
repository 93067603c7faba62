"""Tiny stand-ins of every family of released files, in their authors' formats, and the table that measures them.

    python benchmarks/stand_ins.py FOLDER
    flowdistill bench benchmarks/stand_ins.py --files FOLDER --out benchmarks/results/stand_ins

Weights are random, so figures mean nothing: the table shows that files are found, read, sampled, decoded and measured.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from flowdistill import FEATURES, register_features
from flowdistill.bench import System, SystemTable
from flowdistill.evaluation import FeatureExtractor, Protocol
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import EDM2, SiT
from flowdistill.plumbing.torch_fidelity import torch_fidelity
from flowdistill.solvers import Edm, EulerMaruyama

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from edm2_files import released  # type: ignore[import-not-found]
from student_files import ARGUMENTS, written  # type: ignore[import-not-found]

_SIT: dict[str, Any] = {
    "input_size": 8,
    "patch_size": 2,
    "hidden_size": 48,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}
_EDM2: dict[str, Any] = {
    "img_resolution": 8,
    "img_channels": 4,
    "label_dim": 10,
    "channel_mult": [1, 2],
    "num_blocks": 1,
}


class Means(FeatureExtractor):
    """The mean and a corner of each channel."""

    quantized = True

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Features (B, 6) of images (B, 3, H, W)."""
        return torch.cat([images.mean((2, 3)), images[:, :, 0, 0]], dim=1), None


if "means_of_stand_ins" not in FEATURES:  # which is so the first time that this file is run
    register_features("means_of_stand_ins")(Means)


def _student(family: str, steps: Sequence[int], name: str | None = None, **more: Any) -> System:
    file = {"imm_ts": "imagenet256_ts_a1.pkl", "imm_s": "imagenet256_s_a1.pkl", "tvm": "im256_w1p75.pkl"}
    file |= {
        "facm": "3ep-stg2.pt",
        "imf": "iMF-tiny-2.pth",
        "piflow_repa": "gmrepa_k6_2step",
        "piflow_fm": "gmdit_k6_1step",
    }
    name = name or family
    return System(
        name=f"stand-in of {name}",
        kind="distilled",
        published=dict.fromkeys(steps),
        loads=family,
        file=file.get(name, f"{name}.pt"),
        arguments=ARGUMENTS.get(name, {}),
        **more,
    )


TABLE = SystemTable(
    protocol=Protocol(
        metrics=("fid", "precision", "recall"),
        features="means_of_stand_ins",
        reference="reference.npz",
        num_samples=60,
        labels="random",
        rounding="down",
    ),
    systems=(
        System(
            name="stand-in of SiT",
            kind="teacher",
            published={5: None},
            loads="sit_teacher",
            file="sit.pt",
            arguments={"num_heads": 4},
            solver=EulerMaruyama,
            guided={"scale": 1.5, "channels": 3},
        ),
        System(
            name="stand-in of EDM2, autoguided",
            kind="teacher",
            published={4: None},
            loads="edm2_teacher",
            file="edm2.pkl",
            autoencoder="mse",
            solver=Edm,
            guided={"scale": 2.0},
            guide=("edm2_teacher", "weak.pkl"),
        ),
        _student("dmf", (1, 2)),
        _student("dmf", (1,), "dmf512"),
        _student("meanflow", (1,)),
        _student("secant", (4,)),
        _student("secant", (2,), "stee", guidance=None),
        _student("alphaflow", (1,)),
        _student("imm_ts", (1, 2)),
        _student("imm_s", (1,)),
        _student("tvm", (1,)),
        _student("imf", (1,)),
        _student("facm", (1, 2), beside={"statistics": "latents_stats.pt", "vae": "vavae"}),
        _student("piflow_repa", (2,)),
        _student("piflow_fm", (1,)),
        System(
            name="stand-in of FreeFlow",
            kind="distilled",
            published={1: None},
            loads="freeflow",
            file="freeflow.pt",
            arguments={"num_heads": 4, "num_classes": 10},
            guidance=2.0,
        ),
        System(
            name="a system without a file",
            kind="distilled",
            published={1: None},
            file="not_there.pt",
            source="nowhere",
            licence="none",
            recipe="freeflow/imagenet.gin",
            bindings=("train.batch_size = 128",),
        ),
    ),
)


def write(folder: Path) -> None:
    """Write all files of the table, an autoencoder and images to compare with."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dmf", "dmf512", "meanflow", "secant", "stee", "alphaflow", "imm_ts", "imm_s", "tvm", "imf", "facm"):
        written(name, folder)
    for name in ("piflow_repa", "piflow_fm"):
        written(name, folder)

    # Teachers and FreeFlow, of which no tensors of their authors' code are at hand.
    torch.manual_seed(0)
    sit = _random(SiT(**_SIT))
    torch.save({"ema": sit.state_dict(), "args": argparse.Namespace(num_classes=10)}, folder / "sit.pt")
    for name, channels in (("edm2", 8), ("weak", 4)):
        network = EDM2(**_EDM2, model_channels=channels, attn_resolutions=(4,), channels_per_head=4)
        (folder / f"{name}.pkl").write_bytes(released(_random(network)))
    freeflow = _random(NetworkFlowMap(SiT(**_SIT, learn_sigma=False), "anchored", guidance=1.5))
    names = {"network.": "", "duration_embedding": "duration_embedder", "guidance_embedding": "guidance_embedder"}
    tensors = {}
    for key, value in freeflow.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        tensors[key] = value
    torch.save(tensors, folder / "freeflow.pt")

    # What decodes and what is compared with.
    torch_fidelity("version")  # makes diffusers importable beside any torchvision
    diffusers: Any = importlib.import_module("diffusers")
    for kind in ("ema", "mse"):
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
        vae.save_pretrained(folder / f"sd-vae-ft-{kind}")
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=16)
    vae.save_pretrained(folder / "vavae")
    torch.save({"mean": torch.zeros(1, 16, 1, 1), "std": torch.ones(1, 16, 1, 1)}, folder / "latents_stats.pt")
    images = np.random.default_rng(0).integers(0, 255, (200, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)


_M = TypeVar("_M", bound=torch.nn.Module)


@torch.no_grad()
def _random(module: _M) -> _M:
    """The module with weights of which none is zero."""
    for name, parameter in module.named_parameters():
        if not name.endswith("pos_embed"):
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return module


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    write(parser.parse_args().folder)
