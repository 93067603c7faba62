"""The machine behind a measurement, in words."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch


def machine() -> str:
    """The processor or GPU, its cores and threads, and the versions of Python and torch, in one phrase."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return (
        f"{device}, {_counted(os.cpu_count() or 1, 'core')}, {_counted(torch.get_num_threads(), 'thread')}, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def _counted(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.is_file() else []
    return names[0] if names else platform.processor() or platform.machine()
