"""Samples of runs in files that others read: archives of NumPy, folders of pictures."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowdistill.decoders import as_bytes
from flowdistill.interfaces import Decoder, FlowMap
from flowdistill.plumbing.distributed import find_device
from flowdistill.plumbing.errors import ConfigError, NonFiniteError
from flowdistill.plumbing.files import replaced, replaced_folder
from flowdistill.runs.run import Run, on_device
from flowdistill.runs.sampling import batches, check_counts, make_condition


def write_samples(
    run: Run | FlowMap | str | Path,
    out: str | Path,
    num_samples: int = 64,
    *,
    raw: bool = False,
    steps: int = 1,
    labels: int | Sequence[int] | Tensor | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    renoise: bool | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Write samples of a run's student to an ``.npz`` file or a folder, which is there whole or not at all.

    The file holds images ``arr_0`` (N, H, W, C), uint8, and of a conditional student their classes ``arr_1`` (N,),
    int64, as ADM's evaluator reads them. A folder holds ``000000.png``, ``000001.png``, ... Samples that are not
    images, such as points in the plane, are ``samples`` (N, ...), float32, and ``labels`` (N,) in the file. They are
    drawn and written batch by batch.

    Args:
        run: a run directory, a checkpoint in it, or a `Run`; or a student, as `load_flow_map` gives it.
        out: a file that ends in ``.npz``, which is replaced; any other name is that of a new or an empty folder.
        num_samples: how many.
        raw: write the samples as the model makes them, such as latents, to ``samples`` and ``labels``.
        steps: see `flowdistill.sample`, as for all that follow.
        labels: of all samples or of each.
        guidance: the scale.
        seed: of the noise.
        batch_size: samples at a time.
        renoise: jump to data at every step.
        device: where they are computed.

    Raises:
        CheckpointError: the run cannot be read.
        ConfigError: arguments that do not fit the student, latents that nothing decodes, samples that are no images for
            a folder, or a folder that is not empty.
        NonFiniteError: samples are NaN or infinite.
    """
    check_counts(num_samples=num_samples, batch_size=batch_size)
    path = Path(out)
    archive = path.suffix == ".npz" and not path.is_dir()
    if not archive and (path.is_file() or (path.is_dir() and any(path.iterdir()))):
        raise ConfigError(f"{path} is there already, and is no empty folder: name another one")
    student = on_device(Run.of(run).student, find_device(device))
    convert = _floats if raw else _converter(student.decoder)
    blank = convert(torch.zeros((1, *student.sample_shape), device=next(student.parameters()).device))
    images = blank.dtype == torch.uint8
    if not (images or archive):
        raise ConfigError(f"samples of shape {tuple(blank.shape[1:])} are no images: write them to an .npz file")
    condition = make_condition(student.num_classes, num_samples, labels, guidance)
    drawn = batches(student, condition, num_samples, batch_size, steps=steps, seed=seed, renoise=renoise)
    parts = (convert(_finite(samples)) for samples in drawn)
    with contextlib.closing(drawn):
        if not archive:
            _write_folder(path, parts)
        else:
            names = ("arr_0", "arr_1") if images else ("samples", "labels")
            _write_archive(path, names, (num_samples, *blank.shape[1:]), parts, condition.labels)


def _converter(decoder: Decoder | None) -> Callable[[Tensor], Tensor]:
    """Samples to bytes if they are images, else to floats."""
    if decoder is not None and not decoder.ready:
        raise ConfigError(
            "the samples are latents, and the run knows no autoencoder: bind its teacher's vae (of a released student, "
            "give its vae), or write them raw"
        )

    def convert(samples: Tensor) -> Tensor:
        pixels = as_bytes(samples, decoder)
        return _floats(samples) if pixels is None else pixels

    return convert


def _floats(samples: Tensor) -> Tensor:
    return samples.float().cpu()


def _finite(samples: Tensor) -> Tensor:
    if not bool(torch.isfinite(samples).all()):
        raise NonFiniteError("some samples are NaN or infinite: nothing is written")
    return samples


def _write_archive(
    path: Path, names: tuple[str, str], shape: tuple[int, ...], parts: Iterator[Tensor], labels: Tensor | None
) -> None:
    """Write arrays to a file as `numpy.savez` would, the first one part by part."""
    with replaced(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open(f"{names[0]}.npy", "w", force_zip64=True) as file:
            for number, part in enumerate(parts):
                array = part.numpy()
                if number == 0:
                    descr = np.lib.format.dtype_to_descr(array.dtype)
                    header = {"descr": descr, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(array.tobytes())
        if labels is not None:
            with archive.open(f"{names[1]}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, labels.numpy())


def _write_folder(folder: Path, parts: Iterator[Tensor]) -> None:
    with replaced_folder(folder) as partial:
        for number, pixels in enumerate(image for part in parts for image in part.numpy()):
            Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(partial / f"{number:06d}.png")
