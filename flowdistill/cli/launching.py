"""``flowdistill launch``: a command in several processes, by torchrun, with its messages and exit codes made plain."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from flowdistill.plumbing.errors import ConfigError, DistributedError

LAUNCHED = "FLOWDISTILL_LAUNCHED"
"""The variable that names the folder in which each process says that it has stopped as it was asked to."""
COMMANDS = ("train", "sample", "evaluate", "search", "encode", "bench")
"""The commands that several processes share."""
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_PATIENCE = 600  # seconds that processes have to save, if nobody says otherwise; a scheduler often gives less


def launch_command(options: argparse.Namespace) -> None:
    """Start the processes, and exit as they did: 0 where they have saved on a signal.

    Raises:
        ConfigError: no command follows the options.
        DistributedError: a process was killed.
    """
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = torchrun.parse_args(options.arguments or [""])  # type: ignore[no-untyped-call]
    if arguments.training_script not in COMMANDS:
        raise ConfigError(
            "launch takes torchrun's options and then a command, as in flowdistill launch --nproc_per_node 8 train "
            f"freeflow/imagenet.gin: after them comes one of {', '.join(COMMANDS)}, not {arguments.training_script!r}"
        )
    arguments.training_script_args = [arguments.training_script, *arguments.training_script_args]
    arguments.module, arguments.training_script = True, "flowdistill"
    chosen = any(a.replace("-", "_").startswith("__nproc_per_node") for a in options.arguments)
    if not chosen and "PET_NPROC_PER_NODE" not in os.environ and torch.cuda.is_available():
        arguments.nproc_per_node = "gpu"
    arguments.signals_to_handle = _SIGNALS
    if arguments.shutdown_timeout is None and "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:
        arguments.shutdown_timeout = _PATIENCE
    if arguments.nnodes != "1":
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # no restart finds what another has left
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.ERROR)  # the processes tell what happens to them
    with tempfile.TemporaryDirectory() as folder:
        os.environ[LAUNCHED] = folder
        try:
            torchrun.run(arguments)  # type: ignore[no-untyped-call]
        except SignalException as error:
            if any(Path(folder).iterdir()):
                sys.exit(0)
            name = signal.Signals(error.sigval).name
            raise DistributedError(
                f"{name} stopped the processes where nothing was to be saved: run the same command again to continue"
            ) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode > 0:  # it has said why
                sys.exit(failure.exitcode)
            raise DistributedError(
                f"process {rank} was ended by {failure.signal_name()}: the same command continues from the last "
                "checkpoint"
            ) from None


def tell_launcher() -> None:
    """Let the launcher of this process, if there is one, know that it has stopped as it was asked to."""
    if folder := os.environ.get(LAUNCHED):
        Path(folder, str(os.getpid())).touch()
