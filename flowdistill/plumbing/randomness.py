"""Random numbers of a run: a generator for each (seed, step, stream)."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator

import torch


def stream_seed(seed: int, step: int, stream: str) -> int:
    """The seed of one purpose (``stream``) at one training step; it depends on nothing else."""
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def step_generator(seed: int, step: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one purpose (``stream``) at one training step.

    Since it depends on nothing else, a run continues after an interruption with the numbers that it would have drawn.
    """
    return torch.Generator(device).manual_seed(stream_seed(seed, step, stream))


def on_host(generator: torch.Generator) -> torch.Generator:
    """A generator whose draws the host can use without waiting for a device: the same one on a CPU.

    On a device it is a new one, which depends on the state of the given one, and the given one moves on.
    """
    if generator.device.type == "cpu":
        return generator
    digest = hashlib.blake2b(generator.get_state().numpy().tobytes(), digest_size=8).digest()
    torch.rand((), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


ONE_AT_A_TIME = threading.RLock()
"""Held by the thread that uses what a process has once: gin's configuration, and torch's own random generator."""


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """After the with statement torch's own generator is as it was before; other threads may use it meanwhile."""
    with ONE_AT_A_TIME:
        fork = torch.random.fork_rng()
        fork.__enter__()
    try:
        yield
    finally:
        with ONE_AT_A_TIME:
            fork.__exit__(None, None, None)
