"""Signals that ask a training to stop."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from flowdistill.plumbing.distributed import Vote, rank_and_world

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
_ECHO = 5.0  # seconds in which a launcher of several processes, and the scheduler above it, send the same signal


class StopSignals:
    """Inside a with statement, the first signal is noted and the next one does what it did before.

    These are the signals of schedulers, of Ctrl-C and of a terminal that closes. One that is ignored, as nohup does, is
    still ignored. Only the main thread may receive signals: in any other nothing changes. Several processes each get
    a signal once from torchrun, and perhaps again from what started it: within five seconds it counts once.
    """

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._received: tuple[str, float] | None = None
        self._vote = Vote()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # None is what C has installed, which nothing can put back
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received = signal.Signals(number).name, time.monotonic()
            if rank_and_world()[1] == 1:
                self._restore()
        elif time.monotonic() - self._received[1] > _ECHO:
            self._restore()
            signal.raise_signal(number)

    @property
    def name(self) -> str:
        """The signal that came, or the words for one that came to another process."""
        return "a signal" if self._received is None else self._received[0]

    def asked_at_last(self) -> bool:
        """The same for once after the last step, with what came during it."""
        return self._vote.close() or (rank_and_world()[1] == 1 and self._received is not None)

    def asked(self) -> bool:
        """Whether the training is to stop after this step; all processes learn it at the same one, the next."""
        return self._vote.any_yes(self._received is not None)
