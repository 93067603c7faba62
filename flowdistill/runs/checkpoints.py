"""Checkpoints: folders of tensors, written atomically, verified, and read without running anything in them.

A checkpoint ``step_00000100/`` holds safetensors files (``student``, ``ema``, the auxiliary networks and
``optimizers``), ``optimizers.json``, and ``meta.json`` with the step and the SHA-256 of every file. Several processes
write a file each in place of one, see `flowdistill.runs.tensor_files`. The folder is written beside its place, read
back, and renamed into it, and renamed away before it is deleted, so that one that has its name is complete.
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
from typing import TYPE_CHECKING, Any

import attrs
import torch
from attrs.validators import and_, deep_mapping, matches_re, max_len
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flowdistill.plumbing.errors import CheckpointError, CheckpointWriteError, ConfigError
from flowdistill.plumbing.fields import at_least, of_type, short
from flowdistill.plumbing.files import (
    check_shapes,
    discard,
    file_fingerprint,
    fingerprint,
    json_fingerprint,
    replaced_folder,
    shapes_of,
    stored_form,
)
from flowdistill.plumbing.threads import in_thread
from flowdistill.runs.optimizer_states import pack, tensors_in, unpack
from flowdistill.runs.tensor_files import (
    Part,
    Stored,
    files_of,
    fill_whole,
    is_sharded,
    staged,
    stored_tensors,
    whole_tensors,
    write_files,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_WHOLE, _IN_PARTS = 2, 3  # the formats
_NAME = re.compile(r"step_([0-9]{8}|[1-9][0-9]{8,})")
_LEFT = re.compile(rf"\.{_NAME.pattern}\.(partial|discarded)")
_OPTIMIZERS, _LAYOUT = "optimizers", "optimizers.json"


def _sum(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
    of_type(list)(instance, field, value)
    if len(value) != 2:
        raise ValueError(f"{field.name} must be pairs, not {short(value)}")
    for number in value:
        of_type(int, float)(instance, field, number)


def _has_student(instance: Any, field: attrs.Attribute[Any], value: Any) -> None:
    if not files_of("student", value):
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

    def files(self, name: str) -> list[str]:
        """The files that hold a network, or ``optimizers``; none if the checkpoint has no such network."""
        return files_of(name, self.sha256)


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
    states: Mapping[str, Mapping[str, Tensor]],
    optimizers: Mapping[str, Any],
    counters: Mapping[str, int],
    keep: int,
    sums: Mapping[str, list[float]] | None = None,
    group: ProcessGroup | None = None,
) -> Future[Path]:
    """Copy what this process holds to the host; another thread then writes, verifies and names the checkpoint.

    The tensors may change as soon as this returns. The thread also deletes all but the newest ``keep`` checkpoints. The
    next save must wait for the result. Several processes call it at once, all with the same names: each writes what it
    holds of DTensors, and other tensors, which must be equal in all, are shared out. One process writes whole tensors.

    Args:
        workdir: the run directory, which all processes see.
        step: the training steps done.
        states: the tensors of each network by name; ``student`` is one of them.
        optimizers: the state of each optimiser, see `pack`; but for values of tensors, the same in all processes.
        counters: see `Meta`; of the first process, as ``keep`` and ``sums`` are.
        keep: how many checkpoints stay.
        sums: see `Meta`.
        group: of all processes, by Gloo, with which nothing else exchanges meanwhile; None of a process that is alone.

    Returns:
        The checkpoint, once it has its name in all processes. Instead all have a `CheckpointWriteError` if the disk of
        any one refused, or gave back something else, or an optimiser holds what cannot be stored. Then earlier
        checkpoints are untouched and nothing half-written is left.
    """
    final = checkpoint_path(workdir, step)
    about: dict[str, Any] = {"step": step, "counters": dict(counters), "sums": dict(sums or {})}
    # An error here is told in the thread, where the other processes learn it.
    held: dict[str, dict[str, Part]] = {}
    failure: Exception | None = None
    try:
        tensors: dict[str, Tensor] = {}
        layout = json.dumps(pack(dict(optimizers), tensors)).encode()
        held = staged({**states, _OPTIMIZERS: tensors})
    except Exception as error:
        failure = error

    def ready() -> dict[str, dict[str, Part]]:
        if failure is not None:
            raise failure
        return held

    @contextlib.contextmanager
    def place() -> Iterator[Path]:
        if final.is_dir() and not any(final.iterdir()):  # which would be filled file by file
            discard(final)
        with replaced_folder(final, lambda partial: verify_checkpoint(partial, _LAYOUT)) as partial:
            yield partial
        for old in checkpoint_paths(workdir)[:-keep]:
            discard(old)
        remove_left(workdir)

    def commit(partial: Path, hashes: dict[str, str]) -> None:
        (partial / _LAYOUT).write_bytes(layout)
        hashes[_LAYOUT] = fingerprint(layout)
        contents: dict[str, Any] = {"format": _WHOLE if "student.safetensors" in hashes else _IN_PARTS}
        contents |= attrs.asdict(Meta(**about, sha256=hashes))
        contents["meta_sha256"] = json_fingerprint(contents)
        (partial / "meta.json").write_text(json.dumps(contents, indent=1))

    def write() -> Path:
        try:
            with _saying_what_is_safe(workdir, final):
                if group is not None:
                    parts.save_parts(ready, place, commit, group)
                else:
                    with place() as partial:
                        commit(partial, write_files(partial, ready(), 0, 1))
        finally:  # a process that ends while a thread of it frees tensors is aborted
            for own in held.values():
                own.clear()
        return final

    if group is not None:
        from flowdistill.runs import parts  # which takes a while to import, and one process needs nothing of it
    return in_thread(write)


@contextlib.contextmanager
def _saying_what_is_safe(workdir: Path, final: Path) -> Iterator[None]:
    """Inside, what keeps a checkpoint from its place is a CheckpointWriteError."""
    try:
        yield
    except (OSError, TypeError, RuntimeError, CheckpointError) as error:
        earlier = [path for path in checkpoint_paths(workdir) if path != final]
        safe = f"the last one, {earlier[-1]}, is untouched" if earlier else "there is none from before"
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
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
        if found["format"] not in (_WHOLE, _IN_PARTS):
            known = f"{_WHOLE} and {_IN_PARTS}"
            raise CheckpointError(f"{checkpoint} has format {short(found['format'])}, this version reads {known}")
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
    """Read files back and compare their hashes; returns the meta data.

    Args:
        checkpoint: the folder.
        names: networks, all of whose files are read, or files; all files where none is named.

    Raises:
        CheckpointError: a file is missing, truncated or altered.
    """
    meta = read_meta(checkpoint)
    named = [file for name in names for file in meta.files(name) or [name]]
    for name in named or meta.sha256:
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{checkpoint} lacks {name}")
        if file_fingerprint(path) != meta.sha256.get(name):
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


def load_tensors_of(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a network of a checkpoint, such as ``student``, each whole, however many processes wrote them.

    Raises:
        CheckpointError: the checkpoint has no such network, or a file is missing or damaged; hashes are not compared.
    """
    return whole_tensors(_paths(checkpoint, name))


def _paths(checkpoint: Path, name: str) -> list[Path]:
    files = read_meta(checkpoint).files(name)
    if not files:
        raise CheckpointError(f"{checkpoint} lacks {name}.safetensors, which meta.json does not list")
    return [checkpoint / file for file in files]


def fill(checkpoint: Path, states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put networks of a checkpoint into tensors in place, however many processes wrote it, and however many read it.

    Each process reads what it holds, and asks no other: an error is its own.

    Args:
        checkpoint: the folder, whose files have been verified.
        states: the tensors of each network by name, on any device; DTensors may have any placement.

    Raises:
        CheckpointError: a network is missing or of another architecture, and nothing has changed; or a file is damaged.
    """
    found: dict[str, dict[str, Stored]] = {}
    for network, tensors in states.items():
        paths = _paths(checkpoint, network)
        found[network] = stored_tensors(paths)
        check_shapes(shapes_of(tensors), shapes_of(found[network]), paths[0])
    for network, tensors in states.items():
        if any(map(is_sharded, tensors.values())):
            from flowdistill.runs.parts import load_parts

            load_parts(found[network], tensors)
        else:
            fill_whole(found[network], tensors)


def load_optimizers(checkpoint: Path, optimizers: Mapping[str, torch.optim.Optimizer] | None = None) -> dict[str, Any]:
    """The optimiser states of a checkpoint by name.

    Args:
        checkpoint: the folder.
        optimizers: those that are to have the states. A tensor of the state of a DTensor, where it has its shape, is
            then a DTensor placed like it, of which this process reads what it holds. Others are plain and on the CPU.

    Raises:
        CheckpointError: they are not what `save_checkpoint` writes.
    """
    path = checkpoint / _LAYOUT
    stored = stored_tensors(_paths(checkpoint, _OPTIMIZERS))
    try:
        layout = json.loads(path.read_bytes())
        targets = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in stored.items()}
        for name, like in _placed_like(layout, optimizers or {}):
            if stored[name].shape == tuple(like.shape):
                targets[name] = torch.empty_like(like, dtype=stored[name].dtype, requires_grad=False)
        states = unpack(layout, targets)
        if not isinstance(states, dict):
            raise ValueError("they have no names")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {_reason(error)}") from None
    fill(checkpoint, {_OPTIMIZERS: targets})
    return states


def _placed_like(layout: Any, optimizers: Mapping[str, torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """The names of tensors in packed states of optimisers, with the DTensor whose state each belongs to."""
    packed = dict(layout["dict"])
    for name in optimizers.keys() & packed.keys():
        states = dict(dict(packed[name]["dict"])["state"]["dict"])
        parameters = (parameter for group in optimizers[name].param_groups for parameter in group["params"])
        for number, parameter in enumerate(parameters):
            if is_sharded(parameter):
                yield from ((tensor, parameter) for tensor in tensors_in(states.get(number)))
