"""Value and derivative of a student in one pass, beside two passes and a plain evaluation, in units of its forward.

    python benchmarks/one_pass.py [sit|edm2|tiny] [--conditioning decoupled] [--bf16] [--batch 4] [--rounds 7]

Everything is timed in turns in one process, by the processor time of the process, so that other work on the machine
does not count. Kernels are operations that start one; memory is the most that a call has allocated. Prints a Markdown
table.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from flowdistill import Condition, Jump, differentiation
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import EDM2, SiT

NETWORKS: dict[str, Callable[[], SiT | EDM2]] = {
    "sit": lambda: SiT(input_size=32, hidden_size=384, depth=6, num_heads=6),
    "edm2": lambda: EDM2(32, model_channels=64, num_blocks=1),
    "tiny": lambda: SiT(input_size=8, in_channels=1, hidden_size=64, depth=3, num_heads=4, num_classes=10),
}
# Operations that start no kernel.
FREE = re.findall(
    r"\w+",
    """view _unsafe_view t transpose permute expand unsqueeze squeeze slice select split split_with_sizes unbind detach
    alias as_strided empty empty_like empty_strided new_empty _reshape_alias unfold diagonal""",
)


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that start one."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.count += func._overloadpacket.__name__ not in FREE
        return func(*args, **(kwargs or {}))


def in_turns(rounds: int, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Median processor seconds of each call, after one to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(rounds + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if repeat:
                times[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def most_bytes(call: Callable[[], object]) -> int:
    """The most that a call has allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    changes = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", nargs="?", default="sit", choices=NETWORKS)
    parser.add_argument("--conditioning", default="two_time", choices=["two_time", "decoupled"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    once, twice = (NetworkFlowMap(NETWORKS[given.network](), given.conditioning).train() for _ in range(2))
    for parameter in once.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    twice.load_state_dict(once.state_dict())
    differentiation._KEPT[twice] = None  # two passes
    x = torch.randn(given.batch, *once.sample_shape)
    jump = Jump(x, torch.ones(given.batch), torch.rand(given.batch), Condition(torch.arange(given.batch) % 10))

    def call(student: NetworkFlowMap, derivative: bool, backward: bool) -> None:
        with torch.set_grad_enabled(backward or derivative), torch.autocast("cpu", torch.bfloat16, given.bf16):
            average = student.average_velocity(*jump) if not derivative else None
            slope: Tensor | float = 0.0
            if average is None:
                average, slope = differentiation.jvp(student, jump, ds=1.0)
            loss = (average * (1 + slope)).square().mean()
        if backward:
            loss.backward()  # type: ignore[no-untyped-call]
            student.zero_grad(set_to_none=True)

    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: call(once, False, False),
        "forward and backward": lambda: call(once, False, True),
        "value and derivative, two passes": lambda: call(twice, True, False),
        "value and derivative, one pass": lambda: call(once, True, False),
        "the same and backward, two passes": lambda: call(twice, True, True),
        "the same and backward, one pass": lambda: call(once, True, True),
    }
    seconds = in_turns(given.rounds, calls)
    print(f"{given.network}, {given.conditioning}, batch {given.batch}, {'bfloat16' if given.bf16 else 'float32'}\n")
    print("| call | units | kernels | MiB |\n|---|---|---|---|")
    for name, each in calls.items():
        with Kernels() as kernels:  # type: ignore[no-untyped-call]
            each()
        units = seconds[name] / seconds["forward"]
        print(f"| {name} | {units:.2f} | {kernels.count} | {most_bytes(each) / 2**20:.0f} |")


if __name__ == "__main__":
    main()
