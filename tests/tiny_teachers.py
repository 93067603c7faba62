"""Small teachers of every family, their checkpoint files, and fresh processes that load them."""

import argparse
import functools
import os
import subprocess
import sys

import torch

from flowdistill import Condition
from flowdistill.decoders import Pixels, StableDiffusionVae
from flowdistill.networks import EDM2, MLP, SiT
from flowdistill.wrapped_teachers import NetworkTeacher

SIT = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 2,
    "hidden_size": 8,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
}
UNET = {
    "img_resolution": 4,
    "img_channels": 2,
    "label_dim": 3,
    "model_channels": 4,
    "channel_mult": [1, 2],
    "num_blocks": 1,
}
VAE = StableDiffusionVae(scale=(0.2, 0.4), bias=(0.1, -0.3), pixel_range=(0.0, 1.0), rounding="down")
NETWORKS = {
    "sit": (functools.partial(SiT, **SIT), Pixels(scale=0.5, crop=2)),
    "repa": (functools.partial(SiT, **SIT, learn_sigma=False, qk_norm=True, noise_time=1), VAE),
    "edm2": (functools.partial(EDM2, **UNET, attn_resolutions=(2,), channels_per_head=4), VAE),
    "unconditional": (functools.partial(EDM2, **{**UNET, "label_dim": 0}), None),
    "mlp": (functools.partial(MLP, dim=2, hidden_size=8, depth=1, num_classes=3), None),
}


def teacher_of(kind="sit", seed=0):
    """A teacher whose velocity depends on everything."""
    build, decoder = NETWORKS[kind]
    torch.manual_seed(seed)
    network = build()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name != "pos_embed":
                parameter.copy_(0.5 * torch.randn_like(parameter))
    return NetworkTeacher(network, decoder)


def velocity(teacher):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *teacher.sample_shape, generator=generator)
    labels = None if teacher.num_classes is None else torch.tensor([0, 1, 2, -1])
    return teacher.velocity(x, torch.tensor([0.1, 0.5, 0.9, 1.0]), Condition(labels))


def checkpoint(path):
    """A training checkpoint of a SiT, as its authors write it."""
    teacher = teacher_of()
    args = argparse.Namespace(num_classes=teacher.num_classes)
    torch.save({"ema": teacher.network.state_dict(), "args": args}, path)
    return teacher


def python(code, cwd, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **{name: str(v) for name, v in env.items()}},
        capture_output=True,
        text=True,
        timeout=300,
    )
