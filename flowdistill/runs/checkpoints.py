"""Checkpoints: folders of tensors, written atomically, verified, and read without running anything in them.

A checkpoint ``step_00000100/`` holds safetensors files (``student``, ``ema`` and the auxiliary networks),
``optimizers.pt``, and ``meta.json`` with the step and the SHA-256 of every file. It is written beside its place and
renamed into it, so that a checkpoint that has its name is complete.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from flowdistill.plumbing.errors import CheckpointError, CheckpointWriteError
from flowdistill.plumbing.files import file_fingerprint, fingerprint, replaced_folder

_FORMAT = 1


def checkpoint_paths(workdir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = workdir / "checkpoints"
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def save_checkpoint(
    workdir: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Any],
    counters: Mapping[str, int],
    keep: int,
) -> Path:
    """Write a checkpoint, verify it, then delete all but the newest ``keep``.

    Raises:
        CheckpointWriteError: the disk refused; earlier checkpoints are untouched and nothing half-written is left.
    """
    final = workdir / "checkpoints" / f"step_{step:08d}"
    try:
        with replaced_folder(final) as partial:
            contents = {f"{name}.safetensors": _module_bytes(module) for name, module in modules.items()}
            buffer = io.BytesIO()
            torch.save(dict(optimizers), buffer)
            contents["optimizers.pt"] = buffer.getvalue()
            hashes = {name: fingerprint(data) for name, data in contents.items()}
            meta = {"format": _FORMAT, "step": step, "counters": dict(counters), "sha256": hashes}
            contents["meta.json"] = json.dumps(meta, indent=1).encode()
            for name, data in contents.items():
                (partial / name).write_bytes(data)
    except OSError as error:
        earlier = checkpoint_paths(workdir)
        safe = f"the last one, {earlier[-1]}, is untouched" if earlier else "there is none from before"
        raise CheckpointWriteError(f"cannot save checkpoint {final}: {error.strerror}; {safe}") from error
    verify_checkpoint(final)
    for old in checkpoint_paths(workdir)[:-keep]:
        shutil.rmtree(old)
    return final


def _module_bytes(module: nn.Module) -> bytes:
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in module.state_dict().items():
        place = value.untyped_storage().data_ptr()
        value = value.contiguous()
        tensors[name] = value.clone() if place in places else value  # weights may be shared
        places.add(place)
    return safetensors.torch.save(tensors)


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The step, counters and hashes of a checkpoint; CheckpointError if it is not one."""
    try:
        meta = json.loads((checkpoint / "meta.json").read_text())
        if meta["format"] != _FORMAT:
            raise CheckpointError(f"{checkpoint} has format {meta['format']}, this version reads {_FORMAT}")
        return {"step": int(meta["step"]), "counters": dict(meta["counters"]), "sha256": dict(meta["sha256"])}
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no meta.json") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}/meta.json is damaged: {error!r}") from None


def verify_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Read every file back and compare its hash; returns the meta data.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    meta = read_meta(checkpoint)
    for name, expected in meta["sha256"].items():
        path = checkpoint / Path(name).name
        if not path.is_file():
            raise CheckpointError(f"{checkpoint} lacks {name}")
        if file_fingerprint(path) != expected:
            raise CheckpointError(f"{path} is truncated or altered: its SHA-256 is not the one in meta.json")
    return meta


def load_optimizers(path: Path) -> dict[str, Any]:
    """The optimiser states of a checkpoint, read as data."""
    try:
        states: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    return states
