"""Random numbers of a run: a generator for each (seed, step, stream)."""

import hashlib

import torch


def step_generator(seed: int, step: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of one purpose (``stream``) at one training step.

    Since it depends on nothing else, a run continues after an interruption with the numbers that it would have drawn.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
