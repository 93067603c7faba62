"""Folders of what is kept between processes: of this library, of torch.hub and of matplotlib."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from pathlib import Path

_TEMPORARY: list[Path] = []


def refusal(folder: Path) -> OSError | None:
    """Why a folder, which is made, cannot be written; None where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def usable(folder: Path) -> Path:
    """The folder, which is made; where it cannot be written, one that is removed at the end of the process.

    A warning says so, once. A ``~`` at the beginning of the folder is the user's home, where there is one.
    """
    place = Path(os.path.expanduser(folder))
    error = OSError("there is no home directory") if place.parts[0] == "~" else refusal(place)
    if error is None:
        return place
    if not _TEMPORARY:
        _TEMPORARY.append(Path(tempfile.mkdtemp(prefix="flowdistill-")))
        atexit.register(shutil.rmtree, _TEMPORARY[0], ignore_errors=True)
        warnings.warn(
            f"{folder} cannot be written ({error}): nothing is kept for later processes; set XDG_CACHE_HOME to a "
            "folder that can be",
            RuntimeWarning,
            stacklevel=2,
        )
    instead = _TEMPORARY[0] / folder.name
    instead.mkdir(exist_ok=True)
    return instead


def cached(name: str) -> Path:
    """The place of a file of the cache, ``$XDG_CACHE_HOME/flowdistill/NAME``, by default ``~/.cache/...``.

    It is `usable` where the file is not there yet.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "flowdistill", name)
    there = Path(os.path.expanduser(path))
    return there if os.path.isfile(there) else usable(path.parent) / path.name


def prepare_matplotlib() -> None:
    """Give matplotlib, before it is imported, a folder where its own cannot be written: it would warn, or fail."""
    own = [(os.environ.get(f"XDG_{kind.upper()}_HOME") or f"~/.{kind}") for kind in ("config", "cache")]
    folders = [Path(os.path.expanduser(folder), "matplotlib") for folder in own]
    if "MPLCONFIGDIR" not in os.environ and any(f.parts[0] == "~" or refusal(f) is not None for f in folders):
        os.environ["MPLCONFIGDIR"] = str(cached("matplotlib/fonts").parent)
