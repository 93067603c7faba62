"""``flowdistill doctor``: what is installed, and what of it works."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
from importlib import metadata

import torch

# After which torchvision, which some of them import, does not fail for want of an operator.
_DOOR = "from flowdistill.plumbing.torch_fidelity import torch_fidelity; torch_fidelity('version')"
# What is imported for each extra, in a process of its own, since a broken build may end it.
_EXTRAS = {
    "vae": ("diffusers", f"{_DOOR}; from diffusers import AutoencoderKL"),
    "hub": ("huggingface_hub", "import huggingface_hub"),
    "clip": ("transformers", "from transformers import CLIPModel"),
    "onnx": ("onnxscript", "import onnxscript"),
    "wandb": ("wandb", "import wandb"),
    "mlflow": ("mlflow-skinny", "import mlflow"),
}


def doctor_command(options: argparse.Namespace) -> None:
    """Print versions and devices, and for each optional part whether it works or how to get it."""
    from flowdistill import __version__

    _say("flowdistill", __version__)
    _say("Python", f"{platform.python_version()} on {platform.system()}")
    _say("torch", torch.__version__)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    _say("GPUs", ", ".join(gpus) or "none that PyTorch sees: models run on the CPU")
    _say("torchvision", _state("torchvision", "import torchvision", _TORCHVISION))
    for extra, (package, code) in _EXTRAS.items():
        _say(f"[{extra}]", _state(package, code, f"pip install 'flowdistill[{extra}]'"))


def _say(what: str, state: str) -> None:
    print(f"{what:<12} {state}", flush=True)


def _state(package: str, code: str, remedy: str) -> str:
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return f"not installed: {remedy}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return f"{package} {version} works"
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return f"{package} {version} does not work ({last}): {remedy}"


_TORCHVISION = "this library does without, other code cannot: install it from where torch came from"
