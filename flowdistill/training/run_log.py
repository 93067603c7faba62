"""What a run tells while it runs: metrics.jsonl, TensorBoard events, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from flowdistill.plumbing.files import write_text
from flowdistill.plumbing.progress import bars
from flowdistill.runs.records import read_records


class RunLog:
    """Writes the records of a run, and shows the latest.

    On a terminal there is a live bar with loss, steps per second and time left; elsewhere a line now and then.

    Args:
        workdir: the run directory.
        first_step: step at which this process starts; records at later steps, left by a process that was killed after
            its last checkpoint, are removed.
        steps: the last step.
    """

    def __init__(self, workdir: Path, first_step: int, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = workdir / "metrics.jsonl"
        kept = [json.dumps(record) + "\n" for record in read_records(workdir) if record["step"] <= first_step]
        write_text(self._path, "".join(kept))
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        self._name, self._first_step, self._steps = workdir.name, first_step, steps
        self._speed, self._last_line = "", time.monotonic()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> RunLog:
        self._bars = self._open.enter_context(bars())
        self._console = self._bars.console
        self._bar = self._bars.add_task(self._name, total=self._steps, completed=self._first_step, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()
        self._file.close()
        self._board.close()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bars.update(self._bar, completed=step, note=f"{step}/{self._steps}  {self._speed}")

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Log the averages of the steps since the last record."""
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._board.add_scalar(name, value, step)
        self._speed = f"loss {record['loss']:.4g}  {record['steps_per_second']:.1f} steps/s"
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line > 10 or step == self._steps):
            self._last_line = now
            left = (self._steps - step) / max(record["steps_per_second"], 1e-9)
            self.say(f"step {step}/{self._steps}  {self._speed}  {left:.0f} s left")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)
