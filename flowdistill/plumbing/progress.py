"""How far a long phase is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import IO, Any, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flowdistill.plumbing.distributed import rank_and_world

_SHOWN: ContextVar[Progress | None] = ContextVar("shown", default=None)
_TICK = 0.2  # seconds between two looks at a bar
_PATIENCE = 10.0  # seconds before the first line, where no terminal shows a bar


class _Forgiving:
    """Standard error, where text that it does not take, being closed or full, is lost without an error."""

    def __init__(self) -> None:
        self._stream = sys.stderr or io.StringIO()

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def bars() -> Iterator[Progress]:
    """Bars on standard error, with a field ``note`` each; those that are shown already, where there are any.

    Inside, `rich.progress.Progress.add_task` adds a bar. No bar is visible where standard error is no terminal.

    Examples:
        >>> with bars() as outer, bars() as inner:
        ...     outer is inner
        True
    """
    if (shown := _SHOWN.get()) is not None:
        yield shown
        return
    console = Console(file=cast("IO[str]", _Forgiving()))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        token = _SHOWN.set(shown)
        try:
            yield shown
        finally:
            _SHOWN.reset(token)


class Phase:
    """What has been done of a phase.

    Attributes:
        completed: how much, in the unit of the phase's total.
    """

    def __init__(self) -> None:
        self.completed = 0.0

    def advance(self, amount: float) -> None:
        """Add to ``completed``."""
        self.completed += amount


@contextlib.contextmanager
def progress(
    what: str, total: float | None, done: Callable[[], float] | None = None, unit: str | None = None
) -> Iterator[Phase]:
    """Say what the body does and how far it is, without slowing it down: another thread looks now and then.

    A terminal shows a bar until the body ends. Elsewhere a line comes after ten seconds, and then ever more rarely: a
    line each ten seconds, or each tenth of the time so far where that is longer. Only rank 0 says anything.

    Args:
        what: the words for it, such as ``"sampling"``.
        total: all that is to be done, in any unit; None is unknown.
        done: how much has been done since the phase began, such as a counter of evaluations; None is what the body
            adds to `Phase.completed`.
        unit: say how many of these are done a second, as in ``"samples"``.

    Examples:
        >>> with progress("adding", total=3) as phase:
        ...     for _ in range(3):
        ...         phase.advance(1)
        >>> phase.completed
        3.0
    """
    phase = Phase()
    if rank_and_world()[0] != 0:
        yield phase
        return
    with bars() as shown:
        terminal = shown.console.is_terminal
        task = shown.add_task(what, total=total, note="")
        began, over = time.monotonic(), threading.Event()

        def watch() -> None:
            pause = _TICK if terminal else _PATIENCE
            while not over.wait(pause):
                elapsed = time.monotonic() - began
                completed = phase.completed if done is None else done()
                rate = f"{completed / elapsed:.3g} {unit}/s" if unit and completed else ""
                note = ", ".join(filter(None, (_note(completed, total), rate)))
                if terminal:
                    shown.update(task, completed=completed, note=note)
                else:
                    left = f"{elapsed * max(total / completed - 1, 0):.0f} s left" if total and completed else ""
                    said = ", ".join(filter(None, (note, f"{elapsed:.0f} s so far", left)))
                    shown.console.print(f"{what}: {said}", highlight=False, markup=False, soft_wrap=True)
                    pause = max(_PATIENCE, elapsed / 10)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield phase
        finally:
            over.set()
            watcher.join()
            shown.remove_task(task)


def _note(completed: float, total: float | None) -> str:
    if total:
        return f"{min(completed / total, 1):.0%}"
    return f"{completed:.0f} done" if completed else ""
