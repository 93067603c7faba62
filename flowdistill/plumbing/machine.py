"""What is behind a measurement, in words: the machine, and the code."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[2]


def machine() -> str:
    """The processor or GPU, its cores and threads, the versions of Python and torch, and `code`, in one phrase."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return (
        f"{device}, {_counted(os.cpu_count() or 1, 'core')}, {_counted(torch.get_num_threads(), 'thread')}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, {code()}"
    )


@functools.cache
def code() -> str:
    """The commit of the checkout that the package lies in, or its version if it is installed.

    The process reads it once: the code in memory does not follow a later commit.
    """
    # A repository further up is another project's.
    commit = _git("rev-parse", "--short=7", "HEAD") if (_ROOT / ".git").exists() else None
    if commit is None:
        return f"flowdistill {sys.modules['flowdistill'].__version__}"
    names = (_git("diff", "HEAD", "--name-only") or "").splitlines()
    return f"commit {commit}{' with changes' if any(name.endswith(('.py', '.gin')) for name in names) else ''}"


def _git(*command: str) -> str | None:
    """What git prints of the checkout; None where it cannot."""
    try:
        printed = subprocess.check_output(
            ["git", "-C", _ROOT, *command], stderr=subprocess.DEVNULL, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.strip()


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    names = re.findall(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()
