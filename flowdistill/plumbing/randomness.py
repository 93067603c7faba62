"""Random numbers of a run: a generator for each (seed, step, stream)."""

import hashlib

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
