"""What a run tells while it runs: metrics.jsonl, TensorBoard events, and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flowdistill.plumbing.files import write_text
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
        self._console = Console(file=sys.stderr)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4g}"),
            TextColumn("{task.fields[rate]:.1f} steps/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._steps = steps
        self._task = self._bar.add_task(workdir.name, total=steps, completed=first_step, loss=float("nan"), rate=0.0)
        self._last_line = time.monotonic()

    def __enter__(self) -> RunLog:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
        self._file.close()
        self._board.close()

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=step)

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Log the averages of the steps since the last record."""
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._board.add_scalar(name, value, step)
        self._bar.update(self._task, loss=record["loss"], rate=record["steps_per_second"])
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line > 10 or step == self._steps):
            self._last_line = now
            left = (self._steps - step) / max(record["steps_per_second"], 1e-9)
            self.say(
                f"step {step}/{self._steps}  loss {record['loss']:.4g}  "
                f"{record['steps_per_second']:.1f} steps/s  {left:.0f} s left"
            )

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)
