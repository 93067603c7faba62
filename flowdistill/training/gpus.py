"""GPUs by their makers' data sheets, and how fast a training step is expected to be on them."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from flowdistill.plumbing.errors import ConfigError

SPEEDS = {"h200": 1.5e14}
"""FLOP/s of FreeFlow's step on SiT-XL/2 in bfloat16, with exact derivatives: benchmarks/results/imagenet_step.md."""

MACHINE = 8
"""The GPUs of a machine."""
NETWORK = 50e9
"""Bytes a second that each GPU can send to other machines: an assumption, of one adapter of 400 Gb/s for each."""


@attrs.frozen(kw_only=True)
class Gpu:
    """What a data sheet says of a GPU."""

    memory: float
    """Bytes. A GB is 10^9 of them, so that the rest of the memory is left to the driver."""
    peak: float
    """FLOP/s of dense matrix products in bfloat16."""
    link: float
    """Bytes a second that it can send to the other GPUs of its machine, in one direction."""


GPUS: Mapping[str, Gpu] = {
    "a100-80": Gpu(memory=80e9, peak=312e12, link=300e9),
    "h100-80": Gpu(memory=80e9, peak=989e12, link=450e9),
    "h200": Gpu(memory=141e9, peak=989e12, link=450e9),
}
"""The GPUs that a plan knows, in their versions with NVLink (SXM): NVIDIA's data sheets of A100, H100 and H200."""


def speed(gpu: str) -> tuple[float, str]:
    """FLOP/s of a training step on a GPU, and in words where the number is from.

    A GPU that has run no step is taken to reach the part of its peak that the measured one reached.

    Raises:
        ConfigError: nothing is known of the GPU.

    Examples:
        >>> speed("h200")
        (150000000000000.0, 'as measured on one H200')
        >>> f"{speed('a100-80')[0]:.2g}"
        '4.7e+13'
    """
    name = gpu.lower()
    if name in SPEEDS:
        return SPEEDS[name], f"as measured on one {name.upper()}"
    if name not in GPUS:
        raise ConfigError(
            f"the speed of {gpu} has not been measured, only that of {', '.join(SPEEDS)}, from which a plan computes "
            f"that of {', '.join(sorted(GPUS.keys() - SPEEDS))}: measure it by flowdistill bench speed, and give it as "
            "--flops"
        )
    (measured, flops_per_second), *_ = SPEEDS.items()
    share = flops_per_second / GPUS[measured].peak
    return share * GPUS[name].peak, f"computed from that of the {measured.upper()}: no {name.upper()} has run it"
