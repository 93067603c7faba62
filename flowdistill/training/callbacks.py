"""Hooks into a training: what is told of it as it goes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowdistill.plumbing.errors import ConfigError, FlowDistillError, in_one_line

if TYPE_CHECKING:
    from flowdistill.training.loop import Loop


class Callback:
    """Hooks into a training, as ``train.callbacks`` names them; the methods of this base class do nothing.

    They are called between steps, in the first of several processes alone. ``loop.step`` is the number of steps done,
    and ``loop.student``, ``loop.result`` (with averaged weights), ``loop.teacher``, ``loop.objective`` and
    ``loop.workdir`` are what their names say. An error that a hook raises ends the training.

    Several processes share the networks: the first one has parts of their weights (DTensors), and cannot evaluate them.
    There ``flowdistill.Run(loop.workdir).student`` is the student of the last checkpoint, whole.

    Examples:
        >>> import flowdistill
        >>> class Printing(flowdistill.Callback):
        ...     def on_record(self, loop, record):
        ...         print(loop.step, sorted(record)[:2])
        >>> short = ["train.steps = 2", "train.log_every = 1", "train.evaluation = None"]
        >>> run = {"gin_bindings": short, "workdir": "runs/hooked", "report": False}
        >>> result = flowdistill.train("freeflow", on="plane", callbacks=[Printing()], **run)
        1 ['error', 'gradient_norm']
        2 ['error', 'gradient_norm']
    """

    def on_start(self, loop: Loop, configuration: str) -> None:
        """Before the first step of this process; ``configuration`` is the text of ``config.gin``."""

    def on_step(self, loop: Loop) -> None:
        """After each step."""

    def on_record(self, loop: Loop, record: Mapping[str, float]) -> None:
        """Each ``train.log_every`` steps, with the averages since the record before, as metrics.jsonl has them."""

    def on_picture(self, loop: Loop, path: Path) -> None:
        """Each ``train.sample_every`` steps, with a PNG file of samples; not where samples cannot be drawn."""

    def on_checkpoint(self, loop: Loop, path: Path) -> None:
        """Once a checkpoint is whole and on disk, a few steps after its own."""

    def on_end(self, loop: Loop, figures: Mapping[str, float]) -> None:
        """After the last step and the report, with the metrics of the evaluation; none if nothing was measured."""

    def close(self) -> None:
        """When the training has ended, however it did; called if `on_start` went well, and its errors are warnings."""


class Logger(Callback):
    """A callback that shows a training elsewhere. After `on_start` its errors are a warning and end no training."""


class Callbacks:
    """Callbacks as one; each hook of theirs is called in turn."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = callbacks
        # most have no hook for a step, and so cost nothing there
        self._steppers = [callback for callback in callbacks if type(callback).on_step is not Callback.on_step]
        self._failed: set[int] = set()
        self._started: list[Callback] = []

    @property
    def stepping(self) -> bool:
        """Whether any has a hook for steps."""
        return bool(self._steppers)

    def start(self, loop: Loop, configuration: str) -> None:
        """See `Callback.on_start`; ConfigError if a logger cannot start."""
        for callback in self._all:
            try:
                callback.on_start(loop, configuration)
            except Exception as error:
                if not isinstance(callback, Logger) or isinstance(error, FlowDistillError):
                    raise
                raise ConfigError(f"the logger {type(callback).__name__} cannot start: {in_one_line(error)}") from error
            self._started.append(callback)

    def step(self, loop: Loop) -> None:
        """See `Callback.on_step`."""
        for callback in self._steppers:
            self._call(callback, "on_step", loop)

    def tell(self, hook: str, *arguments: object) -> None:
        """Call a hook by its name."""
        for callback in self._all:
            self._call(callback, hook, *arguments)

    def close(self) -> None:
        """Close all that have started; what goes wrong there is a warning, since another error may have come before."""
        for callback in self._started:
            try:
                callback.close()
            except Exception as error:
                name = type(callback).__name__
                warnings.warn(f"{name} could not be closed: {in_one_line(error)}", RuntimeWarning, stacklevel=2)

    def _call(self, callback: Callback, hook: str, *arguments: object) -> None:
        try:
            getattr(callback, hook)(*arguments)
        except Exception as error:
            if not isinstance(callback, Logger):
                raise
            if id(callback) not in self._failed:
                self._failed.add(id(callback))
                name = type(callback).__name__
                warnings.warn(f"training goes on without {name}: {in_one_line(error)}", RuntimeWarning, stacklevel=3)
