"""Calls in processes of their own, and how they end."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import attrs

from flowdistill import FlowDistillError
from flowdistill.cli import main

CANARY = "executed"  # the file that what is executed makes, in the working directory
_MEMORY = 8 * 2**30
_ENDED = "flowdistill: "


@attrs.frozen
class Ended:
    """How a call has ended."""

    code: int  # the exit code, or a signal's number below zero
    printed: str
    hung: bool = False
    executed: bool = False

    @property
    def worked(self) -> bool:
        """Whether it ended well."""
        return self.code == 0 and not self.fault

    @property
    def fault(self) -> str | None:
        """What no user should see: a hang, code that was executed, a dead process, a traceback, or no message."""
        if self.executed:
            return "executed"
        if self.hung:
            return "hung"
        well = self.code == 0 or (self.code in (1, 2, 130) and _ENDED in self.printed)
        return None if well and "Traceback" not in self.printed else "crashed"


def attempt(
    call: Callable[[], object],
    folder: Path,
    seconds: float = 60.0,
    kill_after: float | None = None,
    signals: tuple[tuple[float, int], ...] = (),
) -> Ended:
    """Call in a child process whose working directory is ``folder``.

    Args:
        call: what the child does; it may exit.
        folder: where.
        seconds: after which the call hangs.
        kill_after: the seconds after which the child is killed without notice.
        signals: pairs of seconds and signals to send.
    """
    log, canary = folder / ".printed", folder / CANARY
    canary.unlink(missing_ok=True)
    events = sorted([*signals, (seconds, signal.SIGKILL), *([(kill_after, signal.SIGKILL)] if kill_after else [])])
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(call, folder, log)
    ended = 0
    while not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended and events and time.monotonic() - began > events[0][0]:
            _, number = events.pop(0)
            os.kill(child, number)
        time.sleep(0 if ended else 0.002)
    hung = not events
    printed = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return Ended(os.waitstatus_to_exitcode(status), printed, hung, canary.exists())


def _become(call: Callable[[], object], folder: Path, log: Path) -> None:
    """What the child does, and never returns from."""
    code = 0
    try:
        file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(folder)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        call()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 70
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def cli(*arguments: object) -> Callable[[], object]:
    """The command line."""
    return lambda: main([str(a) for a in arguments])


def library(call: Callable[[], object]) -> Callable[[], object]:
    """A function of the library, of which errors on purpose are printed as the command line does."""

    def wrapped() -> None:
        try:
            call()
        except FlowDistillError as error:
            print(f"{_ENDED}error: {error}")
            sys.exit(error.exit_code)

    return wrapped


def copied(source: Path, target: Path) -> Path:
    """A copy of a file or a folder."""
    if source.is_dir():
        return Path(shutil.copytree(source, target, symlinks=True))
    return Path(shutil.copy(source, target))
