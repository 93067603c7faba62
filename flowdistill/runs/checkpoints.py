"""Checkpoints: folders of tensors, written atomically, verified, and read without running anything in them.

A checkpoint ``step_00000100/`` holds safetensors files (``student``, ``ema``, the auxiliary networks and
``optimizers``), ``optimizers.json``, and ``meta.json`` with the step and the SHA-256 of every file. It is written
beside its place, read back, and renamed into it, and renamed away before it is deleted, so that one that has its name
is complete.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import attrs
from attrs.validators import and_, deep_mapping, matches_re, max_len
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flowdistill.plumbing.errors import CheckpointError, CheckpointWriteError, ConfigError
from flowdistill.plumbing.fields import at_least, of_type, short
from flowdistill.plumbing.files import (
    discard,
    file_fingerprint,
    fingerprint,
    json_fingerprint,
    load_tensors,
    replaced_folder,
    stored_form,
    stream_tensors,
)
from flowdistill.plumbing.threads import in_thread
from flowdistill.runs.optimizer_states import pack, unpack

_FORMAT = 2
_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
_LEFT = re.compile(rf"\.{_NAME.pattern}\.(partial|discarded)")
_OPTIMIZERS = ("optimizers.safetensors", "optimizers.json")


def _sum(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
    of_type(list)(instance, field, value)
    if len(value) != 2:
        raise ValueError(f"{field.name} must be pairs, not {short(value)}")
    for number in value:
        of_type(int, float)(instance, field, number)


def _has_student(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if "student.safetensors" not in value:
        raise ValueError("it does not list student.safetensors")


_word = and_(of_type(str), max_len(200))
_file = and_(_word, matches_re(r"[\w .-]+\.(safetensors|json)"))
_hash = and_(of_type(str), matches_re("[0-9a-f]{64}"))


@attrs.frozen(kw_only=True)
class Meta:
    """The contents of ``meta.json``."""

    step: int = attrs.field(validator=at_least(0))
    """The training steps done."""
    counters: dict[str, int] = attrs.field(validator=deep_mapping(_word, at_least(0), of_type(dict)))
    """The evaluations of each model so far."""
    sums: dict[str, list[float]] = attrs.field(validator=deep_mapping(_word, _sum, of_type(dict)))
    """The sum of each metric since the last record, and the number of its values."""
    sha256: dict[str, str] = attrs.field(validator=[deep_mapping(_file, _hash, of_type(dict)), _has_student])
    """The SHA-256 of each file."""


def checkpoint_paths(workdir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: the folders with exactly the names that this module gives."""
    return checkpoints_in(workdir / "checkpoints")


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders of steps in a folder, oldest first."""
    found = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def checkpoint_path(workdir: Path, step: int) -> Path:
    """The place of the checkpoint of a step."""
    return workdir / "checkpoints" / f"step_{step:08d}"


def has_checkpoint_name(path: Path) -> bool:
    """Whether a folder is named as checkpoints are."""
    return path.is_dir() and _NAME.fullmatch(path.name) is not None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def save_checkpoint(
    workdir: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Any],
    counters: Mapping[str, int],
    keep: int,
    sums: Mapping[str, list[float]] | None = None,
) -> Future[Path]:
    """Write a checkpoint; another thread then verifies it, gives it its name, and deletes all but the newest ``keep``.

    The modules and optimisers may change as soon as this returns. The next save must wait for the result.

    Returns:
        The checkpoint, once it has its name, or the same error.

    Raises:
        CheckpointWriteError: the disk refused, gave back something else, or an optimiser holds what cannot be stored;
            earlier checkpoints are untouched and nothing half-written is left.
    """
    final = checkpoint_path(workdir, step)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_saying_what_is_safe(workdir, final))
        if final.is_dir() and not any(final.iterdir()):  # which would be filled file by file
            discard(final)
        partial = stack.enter_context(replaced_folder(final, verify_checkpoint))
        hashes = {
            f"{name}.safetensors": stream_tensors(partial / f"{name}.safetensors", module.state_dict())
            for name, module in modules.items()
        }
        tensors: dict[str, Tensor] = {}
        layout = json.dumps(pack(dict(optimizers), tensors)).encode()
        hashes[_OPTIMIZERS[0]] = stream_tensors(partial / _OPTIMIZERS[0], tensors)
        hashes[_OPTIMIZERS[1]] = fingerprint(layout)
        (partial / _OPTIMIZERS[1]).write_bytes(layout)
        meta = Meta(step=step, counters=dict(counters), sums=dict(sums or {}), sha256=hashes)
        contents = {"format": _FORMAT, **attrs.asdict(meta)}
        contents["meta_sha256"] = json_fingerprint(contents)
        (partial / "meta.json").write_text(json.dumps(contents, indent=1))
        written = stack.pop_all()

    def finish() -> Path:
        written.close()
        for old in checkpoint_paths(workdir)[:-keep]:
            discard(old)
        remove_left(workdir)
        return final

    return in_thread(finish)


@contextlib.contextmanager
def _saying_what_is_safe(workdir: Path, final: Path) -> Iterator[None]:
    """Inside, what keeps a checkpoint from its place is a CheckpointWriteError."""
    try:
        yield
    except (OSError, TypeError, CheckpointError) as error:
        earlier = [path for path in checkpoint_paths(workdir) if path != final]
        safe = f"the last one, {earlier[-1]}, is untouched" if earlier else "there is none from before"
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointWriteError(f"cannot save checkpoint {final}: {reason}; {safe}") from error


def remove_left(workdir: Path) -> None:
    """Remove what a process left among the checkpoints that was killed while it wrote or deleted one."""
    folder = workdir / "checkpoints"
    for left in folder.iterdir() if folder.is_dir() else ():
        if _LEFT.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True)


def check_kept(module: nn.Module) -> None:
    """Raise ConfigError unless the module can be copied and its state be stored; names what is in the way."""
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name} of the network is no tensor: checkpoints keep parameters and buffers alone")
        if is_lazy(value):
            raise ConfigError(f"{name} of the network has no shape yet: evaluate lazy modules once in its __init__")
        try:
            stored_form(value)
        except TypeError:
            raise ConfigError(
                f"{name} of the network is of a kind that checkpoints cannot keep ({value.dtype}, {value.layout}): "
                "register it with persistent=False, or store it as another"
            ) from None
    for name, part in module.named_modules():
        for key, value in vars(part).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ConfigError(
                    f"{key} of {name} ({type(part).__name__}) is computed from parameters, and cannot be copied: "
                    "compute it in forward, as torch.nn.utils.parametrizations do"
                )


def read_meta(checkpoint: Path) -> Meta:
    """The step, counters and hashes of a checkpoint; CheckpointError if it is not one, or not of its name's step."""
    path = checkpoint / "meta.json"
    if not path.is_file():
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no meta.json")
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != _FORMAT:
            raise CheckpointError(f"{checkpoint} has format {short(found['format'])}, this version reads {_FORMAT}")
        own = found.pop("meta_sha256")
        if found.keys() != {"format", *(field.name for field in attrs.fields(Meta))}:
            raise ValueError("its entries are others")
        meta = Meta(**{name: value for name, value in found.items() if name != "format"})
        if json_fingerprint(found) != own:
            raise ValueError("its own SHA-256 is another one")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {_reason(error)}") from None
    if has_checkpoint_name(checkpoint) and _step(checkpoint) != meta.step:
        raise CheckpointError(f"{checkpoint} is not what its name says: it holds step {meta.step}")
    return meta


def _reason(error: Exception) -> str:
    """An error in one line; those of attrs have further arguments."""
    text = str(error.args[0]) if error.args else type(error).__name__
    text = f"{text} is missing" if isinstance(error, KeyError) else text
    return text if len(text) < 200 else f"{text[:200]} ..."


def verify_checkpoint(checkpoint: Path, *names: str) -> Meta:
    """Read the named files back, or all, and compare their hashes; returns the meta data.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    meta = read_meta(checkpoint)
    for name in names or meta.sha256:
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{checkpoint} lacks {name}")
        if file_fingerprint(path) != meta.sha256[name]:
            raise CheckpointError(f"{path} is truncated or altered: its SHA-256 is not the one in meta.json")
    return meta


def earlier_whole(checkpoint: Path) -> Path | None:
    """The newest checkpoint before this one, in the same folder, that is whole; None if there is none."""
    if not has_checkpoint_name(checkpoint):
        return None
    for path in reversed(checkpoints_in(checkpoint.parent)):
        if _step(path) < _step(checkpoint):
            with contextlib.suppress(CheckpointError):
                verify_checkpoint(path)
                return path
    return None


def newest_whole(workdir: Path) -> Path | None:
    """The newest checkpoint of a run, from which it continues; None if it has none yet.

    Where the newest is damaged it is the one before. The damaged ones get other names, and a warning says so.

    Raises:
        CheckpointError: all are damaged.
    """
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoint_paths(workdir)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            damaged[path] = str(error)
            continue
        for bad, reason in damaged.items():
            aside = bad.with_name(f"damaged_{bad.name}")
            discard(aside)
            bad.rename(aside)
            warnings.warn(
                f"{reason}; it is now called {aside.name}, and training continues from {path}",
                RuntimeWarning,
                stacklevel=2,
            )
        return path
    if damaged:
        raise CheckpointError(
            f"{next(iter(damaged.values()))}; no earlier one is whole: restore one, or start in another directory"
        )
    return None


def load_optimizers(checkpoint: Path) -> dict[str, Any]:
    """The optimiser states of a checkpoint by name; CheckpointError if they are not what `save_checkpoint` writes."""
    tensors, layout = (checkpoint / name for name in _OPTIMIZERS)
    try:
        states = unpack(json.loads(layout.read_bytes()), load_tensors(tensors))
        if not isinstance(states, dict):
            raise ValueError("they have no names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{layout} is damaged: {_reason(error)}") from None
    return states
