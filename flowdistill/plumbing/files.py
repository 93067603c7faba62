"""Files: written whole or not at all, known by their fingerprints, and tensors in them.

Every file of the library is written beside its place and then renamed into it. So a process that is killed, or a full
disk, leaves the earlier file as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from flowdistill.plumbing.errors import CheckpointError, ConfigError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_CHUNK = 1 << 20

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
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, which takes its place, on disk, when the with statement ends without an error.

    An empty folder that is there already is filled and not replaced: it may be a link, or where the user is. Only one
    process at a time may write a folder; the next one removes what a killed process has left.
    """
    empty = folder.is_dir() and not any(folder.iterdir())
    partial = folder / ".partial" if empty else folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in partial.iterdir():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor | None]) -> None:
    """Write those tensors that are not None to a safetensors file, which is there whole or not at all."""
    with replaced(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            safetensors.torch.save_file({name: v.contiguous() for name, v in tensors.items() if v is not None}, partial)
        except safetensors.SafetensorError as error:  # a full disk, among others
            raise OSError(f"cannot write {path}: {error}") from None
        partial.chmod(mode)  # safetensors lets its owner alone read it


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


def fingerprint(data: str | bytes | Iterable[bytes]) -> str:
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

    def parts() -> Iterator[bytes]:
        yield type(module).__qualname__.encode()
        for name, value in module.state_dict().items():
            yield name.encode()
            yield value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return fingerprint(parts())


# Tensors.


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a safetensors file; None where there is no such file, or it is damaged."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; CheckpointError if it is missing or damaged."""
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def load_module(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module whose tensors have just these names and shapes.

    Raises:
        CheckpointError: the file is damaged, or of another architecture; lists the first tensors that differ.
    """
    fill_module(module, load_tensors(path), path)


def fill_module(module: nn.Module, tensors: Mapping[str, Tensor], source: Path, assign: bool = False) -> None:
    """Put tensors into a module that has just these names and shapes.

    Args:
        module: the module.
        tensors: by name.
        source: the file they come from, for messages.
        assign: use the tensors themselves, as for a module that was built on the meta device.

    Raises:
        CheckpointError: they are of another architecture; lists the first tensors that differ.
    """
    own = {name: tuple(v.shape) for name, v in module.state_dict().items()}
    theirs = {name: tuple(v.shape) for name, v in tensors.items()}
    if own != theirs:
        names = [name for name in sorted(own.keys() | theirs.keys()) if own.get(name) != theirs.get(name)]
        lines = [
            f"{name}: {theirs.get(name, 'absent')} in the file, {own.get(name, 'absent')} in the model"
            for name in names[:5]
        ]
        more = f"\n... and {len(names) - 5} more" if len(names) > 5 else ""
        raise CheckpointError(f"{source} is of another architecture:\n" + "\n".join(lines) + more)
    module.load_state_dict(tensors, assign=assign)
