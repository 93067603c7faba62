"""Samples of runs in files that others read: archives of NumPy, folders of pictures, shards of such folders."""

from __future__ import annotations

import contextlib
import functools
import io
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import attrs
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowdistill.decoders import as_bytes
from flowdistill.interfaces import Condition, Decoder, FlowMap, Jumps
from flowdistill.plumbing.distributed import find_device, rank_and_world
from flowdistill.plumbing.errors import ConfigError, NonFiniteError
from flowdistill.plumbing.files import (
    discard,
    json_fingerprint,
    locked,
    read_tensors,
    replaced,
    write_tensors,
    write_text,
)
from flowdistill.plumbing.progress import Phase, progress
from flowdistill.runs.blocks import BLOCK, block_sizes, wait_for
from flowdistill.runs.run import Run, on_device
from flowdistill.runs.sampling import (
    Labels,
    Steps,
    check_counts,
    check_guidance,
    default_batch_size,
    draw,
    labels_as_json,
    make_condition,
)


def write_samples(
    run: Run | FlowMap | str | Path,
    out: str | Path,
    num_samples: int = 64,
    *,
    raw: bool = False,
    shards: bool = False,
    steps: Steps = 1,
    labels: Labels = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    renoise: bool | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Write samples of a run's student to an ``.npz`` file or a folder, which is there whole or not at all.

    The file holds images ``arr_0`` (N, H, W, C), uint8, and of a conditional student their classes ``arr_1`` (N,),
    int64, as ADM's evaluator reads them. A folder holds ``000000.png``, ``000001.png``, ..., those of a conditional
    student in a folder for each class. Shards ``00000.tar``, ... hold 500 such files each, and beside each picture its
    class in a file that ends in ``.cls``, as WebDataset reads them. Samples that are not images, such as points in the
    plane, are ``samples`` (N, ...), float32, and ``labels`` (N,) in the file.

    Samples are drawn in blocks of 500, which lie beside ``out`` in a folder ``OUT.parts`` until all are there, or in
    ``out`` if that is a folder already. So they are never in memory together, and the same call continues one that was
    interrupted. Under torchrun the ranks share the blocks out, and the first puts them together.

    Args:
        run: a run directory, a checkpoint in it, or a `Run`; or a student, as `load_flow_map` gives it.
        out: a file that ends in ``.npz``, which is replaced; any other name is that of a new or an empty folder.
        num_samples: how many.
        raw: write the samples as the model makes them, such as latents, to ``samples`` and ``labels``.
        shards: write a folder's pictures into tar files.
        steps: see `flowdistill.sample`, as for all that follow. None of them changes with the number of processes.
        labels: of all samples, of each, or how they are chosen.
        guidance: the scale.
        seed: of the noise.
        batch_size: samples at a time.
        renoise: jump to data at every step.
        device: where they are computed.

    Raises:
        CheckpointError: the run cannot be read.
        ConfigError: arguments that do not fit the student, latents that nothing decodes, samples that are no images for
            a folder, a folder that is not empty, another process that writes to the same place, or parts of other
            samples there.
        DataError: another rank gave no sign for an hour.
        NonFiniteError: samples are NaN or infinite.
    """
    # What is drawn, and into what.
    check_counts(num_samples=num_samples, batch_size=batch_size)
    path, (rank, world) = Path(out), rank_and_world()
    archive = path.suffix == ".npz" and not path.is_dir()
    if archive and shards:
        raise ConfigError(f"shards are files in a folder, and {path} names a file")
    parts = path / _PARTS if path.is_dir() else path.with_name(path.name + _PARTS)
    if not archive and not _is_free(path, parts):
        if rank > 0:  # the first tells
            return
        raise ConfigError(f"{path} is there already, and is no empty folder: name another one")
    run = Run.of(run)
    check_guidance(run, guidance)
    student = on_device(run.student, find_device(device))
    convert = _floats if raw else _converter(student.decoder)
    blank = convert(torch.zeros((1, *student.sample_shape), device=next(student.parameters()).device))
    images = blank.dtype == torch.uint8
    if not (images or archive):
        raise ConfigError(f"samples of shape {tuple(blank.shape[1:])} are no images: write them to an .npz file")
    condition = make_condition(student.num_classes, num_samples, labels, guidance, seed)
    again = student.jumps is Jumps.TO_DATA if renoise is None else renoise

    # How its parts are written.
    job = {
        **run.identity,
        **run.autoencoder,
        "form": [num_samples, raw, shards],
        "drawn": [steps, labels_as_json(labels), guidance, seed, again],
    }
    form: _Form
    if archive:
        form = _Archive(parts, names=("arr_0", "arr_1") if images else ("samples", "labels"))
    else:
        form = _Shards(parts) if shards else _Pictures(parts, num_classes=student.num_classes)

    # This rank draws its share of the blocks, and the first puts all together.
    blocks = [_Block(number, condition[number * BLOCK :][:n], n) for number, n in enumerate(block_sizes(num_samples))]
    size = batch_size or default_batch_size(next(student.parameters()).device)
    with locked(parts) if rank == 0 else contextlib.nullcontext():
        _claim(parts, json_fingerprint(job))
        if form.settling:  # when an earlier call was interrupted
            if rank == 0:
                form.settle(path)
            return
        missing = [block for block in blocks[rank::world] if not form.has(block)]
        with progress("drawing samples", sum(block.size for block in missing), unit="samples") as phase:
            for block in missing:
                drawn = draw(
                    student, block.size, block.condition, block.number, size, phase,
                    steps=steps, seed=seed, renoise=again,
                )  # fmt: skip
                try:
                    form.keep(block, torch.cat([convert(_finite(samples)) for samples in drawn]))
                except NonFiniteError:
                    discard(parts)
                    raise
        if rank == 0:
            with progress(f"writing {path}", num_samples) as phase:
                form.finish(path, blocks, phase)


_PARTS, _JOB, _SETTLING = ".parts", ".job", ".settling"


def _is_free(path: Path, parts: Path) -> bool:
    """Whether a folder can be written at a path, which may be empty but for the parts of an interrupted call."""
    if not path.is_dir():
        return not (path.exists() or path.is_symlink())
    return (parts / _SETTLING).is_file() or all(child == parts for child in path.iterdir())


def _claim(parts: Path, job: str) -> None:
    """Make a folder that of the parts of a job; ConfigError if it holds those of another one."""
    path = parts / _JOB
    if not path.is_file():
        write_text(path, job)
    elif path.read_text(encoding="utf-8", errors="replace") != job:
        raise ConfigError(
            f"{parts} holds a part of other samples, whose command was interrupted: give that command again to "
            "continue it, remove the folder, or name another --out"
        )


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


@attrs.frozen(eq=False)
class _Block:
    """Samples that are drawn together."""

    number: int
    condition: Condition
    size: int

    def rows(self) -> Iterator[tuple[int, int | None]]:
        """The number of each sample among all, and its class."""
        labels = self.condition.labels
        for i in range(self.size):
            yield self.number * BLOCK + i, None if labels is None else int(labels[i])


@attrs.frozen
class _Form(ABC):
    """How blocks of samples become files."""

    parts: Path
    """The folder for them until all are there."""

    @abstractmethod
    def has(self, block: _Block) -> bool:
        """Whether the block is there whole."""

    @abstractmethod
    def keep(self, block: _Block, values: Tensor) -> None:
        """Write a block: bytes (n, H, W, C) or floats (n, ...)."""

    def finish(self, path: Path, blocks: Sequence[_Block], phase: Phase) -> None:
        """Wait for all blocks, and put them together at a path."""
        for block in blocks:
            wait_for(block.number, self.parts, lambda block=block: self.has(block) or None)  # type: ignore[misc]
            phase.advance(block.size)
        (self.parts / _SETTLING).touch()
        self.settle(path)

    @property
    def settling(self) -> bool:
        """Whether all blocks were there, and have begun to move to their place."""
        return (self.parts / _SETTLING).is_file()

    def settle(self, path: Path) -> None:
        """Move all files to their place; what says whose they are goes last."""
        for left in [p for p in self.parts.glob("*/.*") if p.is_file()]:  # by processes that were killed
            left.unlink()
        if path.is_dir():
            for child in [child for child in self.parts.iterdir() if not child.name.startswith(".")]:
                child.rename(path / child.name)
            discard(self.parts)
        else:
            self.parts.rename(path)
            for left in [child for child in path.iterdir() if child.name.startswith(".")]:
                left.unlink()


@attrs.frozen
class _Archive(_Form):
    """An archive of NumPy: the samples, and their classes."""

    names: tuple[str, str]

    def has(self, block: _Block) -> bool:
        return self._read(block) is not None

    def keep(self, block: _Block, values: Tensor) -> None:
        write_tensors(self._path(block), {"values": values}, hashed=True)

    def finish(self, path: Path, blocks: Sequence[_Block], phase: Phase) -> None:
        """Write the file as `numpy.savez` would, the samples part by part."""
        with replaced(path) as partial, zipfile.ZipFile(partial, "w") as archive:
            with archive.open(f"{self.names[0]}.npy", "w", force_zip64=True) as file:
                for block in blocks:
                    array = wait_for(block.number, self.parts, functools.partial(self._read, block)).numpy()
                    if block.number == 0:
                        shape = (sum(block.size for block in blocks), *array.shape[1:])
                        descr = np.lib.format.dtype_to_descr(array.dtype)
                        header = {"descr": descr, "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(array.tobytes())
                    phase.advance(block.size)
            labels = [block.condition.labels for block in blocks if block.condition.labels is not None]
            if labels:
                with archive.open(f"{self.names[1]}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, torch.cat(labels).numpy())
        discard(self.parts)

    def _path(self, block: _Block) -> Path:
        return self.parts / f"{block.number:05d}.safetensors"

    def _read(self, block: _Block) -> Tensor | None:
        return (read_tensors(self._path(block)) or {}).get("values")


@attrs.frozen
class _Pictures(_Form):
    """PNG files, in a folder for each class if there are classes."""

    num_classes: int | None

    def has(self, block: _Block) -> bool:
        return all(self._path(*row).is_file() for row in block.rows())

    def keep(self, block: _Block, values: Tensor) -> None:
        for row, pixels in zip(block.rows(), values, strict=True):
            with replaced(self._path(*row)) as partial:
                partial.write_bytes(_png(pixels))

    def _path(self, number: int, label: int | None) -> Path:
        digits = len(str((self.num_classes or 1) - 1))
        return self.parts / ("" if label is None else f"{label:0{digits}d}") / f"{number:06d}.png"


@attrs.frozen
class _Shards(_Form):
    """Tar files, one for each block, of PNG files and classes."""

    def has(self, block: _Block) -> bool:
        return self._path(block).is_file()

    def keep(self, block: _Block, values: Tensor) -> None:
        with replaced(self._path(block)) as partial, tarfile.open(partial, "w") as shard:
            for (number, label), pixels in zip(block.rows(), values, strict=True):
                files = {"png": _png(pixels)} | ({} if label is None else {"cls": str(label).encode()})
                for kind, data in files.items():
                    entry = tarfile.TarInfo(f"{number:06d}.{kind}")
                    entry.size = len(data)
                    shard.addfile(entry, io.BytesIO(data))

    def _path(self, block: _Block) -> Path:
        return self.parts / f"{block.number:05d}.tar"


def _png(pixels: Tensor) -> bytes:
    """An image (H, W, C) as a PNG file."""
    array, file = pixels.numpy(), io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(file, "PNG")
    return file.getvalue()
