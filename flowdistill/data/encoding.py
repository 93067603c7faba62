"""Latents of images, as the data set ``latents`` reads them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowdistill.data.image_files import ImageFiles
from flowdistill.data.image_folder import centre_crop
from flowdistill.decoders import StableDiffusionVae
from flowdistill.plumbing.distributed import find_device, rank_and_world
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.files import json_fingerprint, module_fingerprint, write_json, write_tensors
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.randomness import step_generator

_SHARD = 1000  # images in a file
_SETTINGS = "encoding.json"


def encode(
    images: str | Path,
    folder: str | Path,
    decoder: StableDiffusionVae,
    *,
    size: int = 256,
    flips: bool = False,
    draw: bool = False,
    seed: int = 0,
    dtype: Literal["float32", "float16"] = "float32",
    batch_size: int | None = None,
    device: str | torch.device | None = None,
) -> int:
    """Write the latents of images as shards ``00000.safetensors``, ..., which the data set ``latents`` reads.

    A shard holds the labels (n,) of 1000 images, and mean and standard deviation (n, C, H, W) of the autoencoder's
    posterior, on the scale of the samples of the decoder's teacher. It has a hash of its tensors. Images are cut and
    scaled to squares as `flowdistill.data.ImageFolder` does; without classes all labels are 0. The same call continues
    after an interruption, and under torchrun the ranks share the shards out.

    Args:
        images: a folder or an archive, see `flowdistill.data.image_files.ImageFiles`.
        folder: for the shards, and for ``encoding.json``, which says how they were made.
        decoder: has the autoencoder, and the scale of its latents.
        size: height and width of the images, in pixels.
        flips: encode the mirror images as well, which follow after all images.
        draw: store one ``latents`` (n, C, H, W), drawn from the posterior, in place of mean and standard deviation.
        seed: of these draws.
        dtype: of what is stored.
        batch_size: images at a time; None is 4 on a CPU, else 32.
        device: where they are encoded; by default the first GPU (of each rank its own), else the CPU.

    Returns:
        How many latents there are.

    Raises:
        ConfigError: the folder holds something else, or the autoencoder cannot be loaded.
        DataError: the images cannot be read.

    Examples:
        >>> decoder = StableDiffusionVae(vae="stabilityai/sd-vae-ft-ema")
        >>> encode("imagenet/train", "imagenet_latents", decoder)  # doctest: +SKIP
        1281167
    """
    # The images, and what the folder must hold.
    files, place, out = ImageFiles(Path(images)), find_device(device), Path(folder)
    if Path(images).resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(f"{out} lies in {images}, whose images are read: name another folder")
    smallest = 2 ** (len(decoder.autoencoder().config.block_out_channels) - 1)  # pixels of a latent
    if size < smallest or size % smallest:
        raise ConfigError(f"the size of images is a multiple of {smallest} for this autoencoder, not {size}")
    labels = torch.tensor(files.labels or [0] * len(files))
    total = len(files) * (2 if flips else 1)
    shape = decoder.encode(torch.zeros(1, 3, size, size, device=place))[0].shape[1:]
    settings: dict[str, Any] = {
        "images": len(files),
        "names": json_fingerprint([files.names, labels.tolist()]),
        "size": size,
        "flips": flips,
        "draw": seed if draw else None,
        "dtype": dtype,
        "autoencoder": module_fingerprint(decoder.autoencoder()),
        "scale": json.loads(json.dumps([decoder.scale, decoder.bias, decoder.pixel_range])),
        "sample_shape": list(shape),
        "num_classes": int(labels.max()) + 1,
    }
    _claim(out, settings)

    # The shards of this process that are not there yet.
    rank, world = rank_and_world()
    starts = range(0, total, _SHARD)
    paths = {start: out / f"{number:05d}.safetensors" for number, start in enumerate(starts)}
    missing = [start for start in starts[rank::world] if not paths[start].is_file()]
    batch = batch_size or (4 if place.type == "cpu" else 32)
    with (
        ThreadPoolExecutor() as threads,
        progress("encoding images", sum(min(_SHARD, total - start) for start in missing), unit="images") as phase,
    ):
        for start in missing:
            rows = torch.arange(start, min(start + _SHARD, total))

            def read(row: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
                pixels = np.asarray(centre_crop(files.read(row % len(files), 3), size))
                return pixels[:, ::-1] if row >= len(files) else pixels

            pixels = threads.map(read, rows.tolist())  # which runs ahead of the autoencoder
            means, stds = [], []
            for part in torch.split(rows, batch):
                mean, std = decoder.encode(_images([next(pixels) for _ in part], place))
                means.append(mean.cpu())
                stds.append(std.cpu())
                phase.advance(len(part))
            mean, std = torch.cat(means), torch.cat(stds)
            stored = {"mean": mean, "std": std}
            if draw:
                noise = torch.randn(mean.shape, generator=step_generator(seed, start, "latents"))
                stored = {"latents": mean + std * noise}
            kept: dict[str, Tensor | None] = {name: v.to(getattr(torch, dtype)) for name, v in stored.items()}
            write_tensors(paths[start], {**kept, "labels": labels[rows % len(files)]}, hashed=True)
    return total


def _images(pixels: list[np.ndarray[Any, np.dtype[np.uint8]]], device: torch.device) -> Tensor:
    """Images of bytes (H, W, 3) as a batch (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pixels)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write how the shards are made; ConfigError if the folder holds anything that was not made so."""
    path = folder / _SETTINGS
    others = folder.is_dir() and any(p.name[0] != "." and p != path for p in folder.iterdir())
    if path.is_file():  # asked after the others, since another process may write both
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            found = {}
        differing = [name for name in settings if not isinstance(found, dict) or found.get(name) != settings[name]]
        if differing:
            raise ConfigError(
                f"{folder} holds latents that were made otherwise ({', '.join(differing)} differ): name another folder"
            )
    elif others:
        raise ConfigError(f"{folder} is there already, and holds no latents of this command: name another folder")
    else:
        write_json(path, settings)
