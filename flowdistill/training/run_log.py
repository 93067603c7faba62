"""What a run tells while it runs: metrics.jsonl, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from flowdistill.plumbing.files import replaced
from flowdistill.plumbing.progress import bars
from flowdistill.runs.records import record_lines, record_of

_REJECTED = "metrics.rejected"


class RunLog:
    """Writes the records of a run, and shows the latest.

    On a terminal there is a live bar with the error, the learning rate, steps per second and time left; elsewhere a
    line with the same now and then. Where the objective records no ``error`` its loss is shown. Nothing here ends a
    training: records that cannot be written are lost, and a warning says so once.

    Args:
        workdir: the run directory.
        first_step: step at which this process starts; records at later steps, left by a process that was killed after
            its last checkpoint, are removed. Lines that are no records are moved to ``metrics.rejected``.
        steps: the last step.
    """

    def __init__(self, workdir: Path, first_step: int, steps: int) -> None:
        self._workdir, self._path = workdir, workdir / "metrics.jsonl"
        self._name, self._first_step, self._steps = workdir.name, first_step, steps
        self._latest, self._last_line = "", time.monotonic()
        self._open = contextlib.ExitStack()
        self._lost: set[str] = set()
        with self.tolerating("metrics.jsonl"):
            self._clean()

    def _clean(self) -> None:
        """Leave those records that the training continues from."""
        records = {line: record_of(line) for line in record_lines(self._workdir)}
        rejected = [line for line, record in records.items() if record is None]
        if rejected:
            with (self._workdir / _REJECTED).open("ab") as file:
                file.writelines(line + b"\n" for line in rejected)
            warnings.warn(
                f"{len(rejected)} lines of {self._path} are no records: they are now in {_REJECTED}",
                RuntimeWarning,
                stacklevel=2,
            )
        with replaced(self._path) as partial, partial.open("wb") as file:
            kept = (line for line, record in records.items() if record and record["step"] <= self._first_step)
            file.writelines(line + b"\n" for line in kept)

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

    @contextlib.contextmanager
    def tolerating(self, what: str) -> Iterator[None]:
        """Inside, a file that cannot be written is a warning, and only once; the directory is made if it is gone."""
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            if what not in self._lost:
                self._lost.add(what)
                warnings.warn(f"training goes on without {what}: {error}", RuntimeWarning, stacklevel=4)

    def advance(self, step: int) -> None:
        """Move the bar."""
        self._bars.update(self._bar, completed=step, note=f"{step}/{self._steps}  {self._latest}")

    def write(self, step: int, record: Mapping[str, float]) -> None:
        """Log the averages of the steps since the last record."""
        with self.tolerating("metrics.jsonl"), self._path.open("a") as file:
            file.write(json.dumps({"step": step, **record}) + "\n")
        name = "error" if "error" in record else "loss"
        figures = f"{name} {record[name]:.4g}  lr {record['learning_rate']:.3g}"
        self._latest = f"{figures}  {record['steps_per_second']:.1f} steps/s"
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._last_line > 10 or step == self._steps):
            self._last_line = now
            left = (self._steps - step) / max(record["steps_per_second"], 1e-9)
            self.say(f"step {step}/{self._steps}  {self._latest}  {left:.0f} s left")

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)
