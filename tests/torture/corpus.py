"""What is tortured: a run, configurations, weights, images, all small and made here."""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path

import attrs
import numpy as np
import torch
from attempts import attempt, cli
from edm2_hostile_files import write as edm2_file
from PIL import Image
from runs import write

from flowdistill.networks.sit import SiT
from flowdistill.plumbing.config import methods

SHORT = tuple(
    f"--gin.train.{binding}"
    for binding in ("steps=2", "batch_size=4", "accumulation=1", "evaluation=None", "sample_every=0")
)
_SIT = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 8, "depth": 2, "num_heads": 2}


@attrs.frozen
class Corpus:
    """The files, and what an undisturbed training makes."""

    folder: Path
    ring: Path
    """A gin file of 12 steps, with a checkpoint every 4."""
    run: Path
    """Its run."""
    samples: bytes
    """The samples of this run."""
    configurations: list[bytes]
    """What was in force in trainings of all methods, with every default."""
    files: dict[str, Path]
    """Inputs of each kind."""

    @classmethod
    def make(cls, folder: Path, jobs: int) -> Corpus:
        """Make everything in a folder, by some processes."""
        ring = write(folder / "ring.gin")
        run = folder / "run"
        assert attempt(cli("train", ring, "--workdir", run), folder).worked
        assert attempt(cli("sample", run, "--num_samples", 8, "--out", folder / "samples.npz"), folder).worked
        places = [(folder / "methods" / method, method) for method in methods()]
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            pool.starmap(_trained, places, chunksize=1)
        configurations = [(place / "config.gin").read_bytes() for place, _ in places]
        return cls(folder, ring, run, samples_in(folder / "samples.npz"), configurations, _inputs(folder))


def _trained(place: Path, method: str) -> None:
    """Train a method for two steps in the plane."""
    torch.set_num_threads(1)
    place.mkdir(parents=True)
    ended = attempt(cli("train", method, "--on", "plane", *SHORT, "--workdir", place), place)
    assert ended.worked, f"{method}: {ended.printed}"


def samples_in(path: Path) -> bytes:
    """The numbers in an archive of samples."""
    with np.load(path) as arrays:
        return b"".join(arrays[name].tobytes() for name in sorted(arrays))


def _inputs(folder: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    network = SiT(**_SIT, num_classes=5)
    files = {"sit": folder / "sit.pt", "edm2": folder / "edm2.pkl", "model": folder / "model"}
    options = argparse.Namespace(num_classes=5, path_type="Linear", prediction="velocity")
    torch.save({"ema": network.state_dict(), "args": options}, files["sit"])
    files["edm2"].write_bytes(edm2_file())
    assert attempt(cli("convert", files["sit"], files["model"], "--num_heads", 2), folder).worked
    pixels = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    files |= {"archive": folder / "images.npz", "moments": folder / "moments.npz", "images": folder / "images"}
    np.savez(files["archive"], pixels)
    np.savez(files["moments"], mu=np.zeros(64), sigma=np.eye(64))
    files["images"].mkdir()
    for number, image in enumerate(pixels[:20]):
        Image.fromarray(image[..., 0]).save(files["images"] / f"{number}.png")
    files["digits"] = folder / "digits_run"
    assert attempt(cli("train", "meanflow", "--on", "digits", *SHORT, "--workdir", files["digits"]), folder).worked
    measure = ("--num_samples", 50, "--features", "digits", "--reference", files["archive"])
    assert attempt(cli("evaluate", files["digits"], *measure), folder).worked
    return files
