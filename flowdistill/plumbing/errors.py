"""The exceptions that flowdistill raises on purpose.

Each carries the exit code with which the command line ends: 2 for a user's mistake, 1 for a failure.
"""

from typing import ClassVar


class FlowDistillError(Exception):
    """Base class of all errors of this library."""

    exit_code: ClassVar[int] = 2
    told: bool = False
    """Whether it is the command line of another process that tells it."""


class ConfigError(FlowDistillError):
    """A setting that cannot work: an unknown name, a wrong type or range, a binding nothing uses."""


class CheckpointError(FlowDistillError):
    """A checkpoint that cannot be read: missing, truncated, foreign, or of another architecture."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint that could not be written; earlier checkpoints are untouched."""

    exit_code = 1


class DataError(FlowDistillError):
    """A data set that is missing or not what it should be."""


class NonFiniteError(FlowDistillError):
    """A loss, a gradient, a weight or a sample became NaN or infinite."""

    exit_code = 1


class TrainingInterrupted(KeyboardInterrupt):
    """A signal stopped a training, which was saved: the same call continues it.

    It is a `KeyboardInterrupt`, so that a script of several trainings stops as well.
    """


class RunsFailedError(FlowDistillError):
    """Some trainings of a suite failed; the results of the others have been written."""

    exit_code = 1


class DistributedError(FlowDistillError):
    """Another process has ended, or has not answered in time."""

    exit_code = 1

    def __init__(self, message: str, told: bool = False) -> None:
        super().__init__(message)
        self.told = told


def in_one_line(error: BaseException) -> str:
    r"""What an error says, or else its kind, in one line that can be printed and is not long.

    Examples:
        >>> in_one_line(ValueError("no\nway")), in_one_line(KeyError())
        ('no', 'KeyError')
    """
    said = str(error).strip().splitlines()[:1] or [type(error).__name__]
    return "".join(c if c.isprintable() else "?" for c in said[0][:200])
