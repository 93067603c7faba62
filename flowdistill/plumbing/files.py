"""Files: written whole or not at all, known by their fingerprints, and tensors in them.

Every file of the library is written beside its place and then renamed into it. So a process that is killed, or a full
disk, leaves the earlier file as it was.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from flowdistill.plumbing.errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_CHUNK = 1 << 20
_WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_MAX_PARTS, _SHOWN = 16, 200
_V = TypeVar("_V")

# Writing.


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A place beside ``path``: the file written there takes its place when the with statement ends without an error.

    Several processes may write the same file: each writes beside it under a name of its own, and the last one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replaced_folder(folder: Path, check: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """An empty folder beside ``folder``, which takes its place, on disk, when the with statement ends without an error.

    An empty folder that is there already is filled and not replaced: it may be a link, or where the user is. Only one
    process at a time may write a folder; the next one removes what a killed process has left.

    Args:
        folder: the folder.
        check: raises an error if what is now on disk, in the folder that it is given, must not take the place.
    """
    empty = folder.is_dir() and not any(folder.iterdir())
    partial = folder / ".partial" if empty else folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in filter(Path.is_file, partial.rglob("*")):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        if check is not None:
            check(partial)
        if empty:
            for path in list(partial.iterdir()):
                path.rename(folder / path.name)
            partial.rmdir()
        else:
            discard(folder)
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def discard(folder: Path) -> None:
    """Remove a folder, or the link to one, in one step: a process that is killed meanwhile leaves no half of it.

    It is renamed first, to a hidden name beside its own, which the next `discard` of the same name removes.
    """
    if not folder.is_dir():
        return
    hidden = folder.with_name(f".{folder.name}.discarded")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.is_symlink():
        folder.unlink()
    else:
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, which is there whole or not at all."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, which is there whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor | None], hashed: bool = False) -> None:
    """Write those tensors that are not None to a safetensors file, which is there whole or not at all.

    Args:
        path: the file.
        tensors: by name.
        hashed: store a hash of them as well, which `read_tensors` asks for.
    """
    present = {name: value for name, value in tensors.items() if value is not None}
    with replaced(path) as partial:
        stream_tensors(partial, present, {"sha256": _hash(present)} if hashed else None)


def stream_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file one tensor after another, each from its own memory, and return the file's SHA-256.

    A tensor on a GPU, or not contiguous, is copied while it is written. Tensors that share a memory are written once
    for each of their names. Those of larger elements come first, so that all are aligned, and then names are sorted.

    Raises:
        TypeError: a safetensors file cannot hold one of the tensors; nothing is written.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        kind, shape = stored_form(tensors[name])
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: memoryview) -> None:
            for i in range(0, len(data), _CHUNK):
                digest.update(data[i : i + _CHUNK])
                file.write(data[i : i + _CHUNK])

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for name in names:
            write(_bytes(tensors[name]))
    return digest.hexdigest()


def stored_form(tensor: Tensor) -> tuple[str, list[int]]:
    """The type and the shape that a safetensors file names for a tensor; TypeError if it cannot hold such a tensor.

    Examples:
        >>> stored_form(torch.ones(2, 3, dtype=torch.bfloat16))
        ('BF16', [2, 3])
    """
    if tensor.layout != torch.strided:
        raise TypeError(f"safetensors files hold no tensor of {tensor.layout}")
    kind, packed = _stored_type(tensor.dtype)
    return kind, [*tensor.shape[:-1], *(packed * size for size in tensor.shape[-1:])]


@functools.cache
def _stored_type(dtype: torch.dtype) -> tuple[str, int]:
    """The name of a type in safetensors files, and how many of their elements one of torch's holds."""
    try:
        data = safetensors.torch.save({"": torch.empty(1, dtype=dtype)})
    except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError):
        raise TypeError(f"safetensors files hold no tensor of {dtype}") from None
    entry = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[""]
    return entry["dtype"], entry["shape"][0]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own a folder, which is made, inside a with statement: no other process, on whatever machine, owns it meanwhile.

    The operating system releases the lock with the process, however that ends. The file ``.lock`` stays. A file system
    that has no locks is used without one, and a warning says so.

    Raises:
        ConfigError: another process owns it; names the process and its machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+b") as file:
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = re.fullmatch(rb"process \d{1,20} on [\w.-]{1,255}\n", file.read(500))
            who = owner[0].decode().strip() if owner else "another process"
            raise ConfigError(
                f"{who} is using {folder}: wait until it has ended, or choose another directory"
            ) from None
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked ({error}): make sure that no other process uses it",
                RuntimeWarning,
                stacklevel=4,
            )
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            file.flush()
        yield


# Fingerprints.


def fingerprint(data: str | bytes | Iterable[bytes | memoryview]) -> str:
    """The SHA-256 of a text, of bytes, or of bytes in several parts, as 64 hexadecimal digits.

    Examples:
        >>> fingerprint("ab") == fingerprint(b"ab") == fingerprint([b"a", b"b"])
        True
    """
    if isinstance(data, str):
        data = data.encode()
    digest = hashlib.sha256()
    for part in [data] if isinstance(data, bytes) else data:
        digest.update(part)
    return digest.hexdigest()


def file_fingerprint(path: Path) -> str:
    """The fingerprint of a file, which is never whole in memory."""
    return fingerprint(file_parts(path))


def file_parts(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte at a time."""
    with path.open("rb") as file:
        while part := file.read(_CHUNK):
            yield part


def json_fingerprint(value: Any) -> str:
    """The fingerprint of what JSON can say; the order of keys does not matter."""
    return fingerprint(json.dumps(value, sort_keys=True))


def module_fingerprint(module: nn.Module) -> str:
    """The fingerprint of a module's class, parameters and buffers."""

    def parts() -> Iterator[bytes | memoryview]:
        yield type(module).__qualname__.encode()
        for name, value in module.state_dict().items():
            yield name.encode()
            yield _bytes(value)

    return fingerprint(parts())


def _hash(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of tensors with their names, kinds and shapes."""
    kinds = {name: f"{name} {value.dtype} {tuple(value.shape)} " for name, value in tensors.items()}
    return fingerprint(part for name in sorted(kinds) for part in (kinds[name].encode(), _bytes(tensors[name])))


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, which are those of its own memory where that is possible."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    data: memoryview = plain.reshape(-1).view(torch.uint8).numpy().data
    return data


# Tensors.


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors that were written to a file with their hash; None where there is no such file, or it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            return tensors if (file.metadata() or {}).get("sha256") == _hash(tensors) else None
    except (OSError, safetensors.SafetensorError):
        return None


def warn_if_damaged(path: Path) -> None:
    """Warn that a file, from which nothing could be read, is there all the same."""
    if os.path.exists(path):
        warnings.warn(f"{path} is damaged: what it held is computed again", RuntimeWarning, stacklevel=3)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


@contextlib.contextmanager
def opened_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file mapped to memory: what is used of its tensors is read, until it is closed.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def unwrapped(tensors: Mapping[str, _V], needed: Set[str]) -> tuple[dict[str, _V], str]:
    """The tensors without what the wrappers of a network put before or into their names.

    Such wrappers are `torch.compile`, data-parallel training, averages and Lightning's modules, in any order. What lies
    beside the network, such as a wrapper's counter, is left out.

    Args:
        tensors: by name; those of a network without a wrapper are returned as they are.
        needed: names that the network has.

    Returns:
        The tensors, and a phrase that says what was taken away, to follow the file in messages; empty if nothing was.

    Raises:
        ValueError: there are several such networks, and not one of them is an average.
    """
    if needed <= tensors.keys():
        return dict(tensors), ""
    counts: Counter[str] = Counter()  # of needed names behind each prefix
    for name in tensors:
        parts = name.split(".", _MAX_PARTS)
        counts.update(".".join(parts[:i]) for i in range(len(parts)) if _unwrapped(".".join(parts[i:])) in needed)
    most = max(counts.values(), default=0)
    best = sorted(f"{prefix}." if prefix else "" for prefix, count in counts.items() if count == most)
    inmost = [p for i, p in enumerate(best) if not any(following.startswith(p) for following in best[i + 1 : i + 2])]
    if len(inmost) > 1 and len(averages := [p for p in inmost if "ema" in re.split(r"[._]", p)]) == 1:
        inmost = averages
    if len(inmost) > 1 and most < len(needed):  # of another kind, without a wrapper that could be told
        return dict(tensors), ""
    if len(inmost) > 1:
        raise ValueError(f"it holds several such networks, under {' and '.join(inmost[:3])}: save one alone")
    prefix = inmost[0] if inmost else ""
    inside = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    found = {_unwrapped(name): v for name, v in inside.items()}
    if len(found) < len(inside):
        raise ValueError("without what wrappers add, some of its tensors have the same name")
    wrappers = sorted(_WRAPPERS & {part for name in inside for part in name.split(".")})
    taken = [*filter(None, [prefix]), *(f"{part}." for part in wrappers)]
    return found, f" (read without {' and '.join(taken)} in its names)" if taken else ""


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str, assign: bool = False) -> None:
    """Put tensors into a module that has just these names and shapes.

    Args:
        module: the module.
        tensors: by name.
        source: the file they come from, for messages.
        assign: use the tensors themselves, as for a module that was built on the meta device.

    Raises:
        CheckpointError: they are of another architecture; names the first tensors that are missing, that are too many,
            and that have another shape.
    """
    check_tensors(module, tensors, source)
    module.load_state_dict(tensors, assign=assign)


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Raise CheckpointError unless the tensors have the names and shapes of a module's, see `fill_module`."""
    check_shapes(shapes_of(module.state_dict()), shapes_of(tensors), source)


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, or of whatever has one."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(own: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], source: Path | str) -> None:
    """Raise CheckpointError unless the names and shapes of a file are those of a model, see `fill_module`."""
    if own != theirs:
        missing, extra = sorted(own.keys() - theirs.keys()), sorted(theirs.keys() - own.keys())
        changed = sorted(name for name in own.keys() & theirs.keys() if own[name] != theirs[name])
        named = missing[:2] + extra[:2] + changed[:2]
        lines = []
        for name in named:
            shown = name[:_SHOWN].encode("unicode_escape").decode()
            lines.append(f"{shown}: {theirs.get(name, 'absent')} in the file, {own.get(name, 'absent')} in the model")
        rest = len(missing) + len(extra) + len(changed) - len(named)
        more = f"\n... and {rest} more" if rest else ""
        raise CheckpointError(f"{source} is of another architecture:\n" + "\n".join(lines) + more)
