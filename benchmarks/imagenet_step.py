"""What a training step on ImageNet costs on a GPU, beside what `flowdistill plan` says; weights are fresh.

    python benchmarks/imagenet_step.py [STATES]

Takes the recipes of the SiT-XL/2 teacher that need no data, at STATES of a backward pass (default 32), with a
checkpoint of random weights in place of the authors'. Prints a Markdown table and writes it to
benchmarks/results/imagenet_step.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from reports import report
from safetensors.torch import save_file

import flowdistill
from flowdistill.networks.sit import SiT
from flowdistill.plumbing import config
from flowdistill.plumbing.gin_errors import errors_located
from flowdistill.training.loop import Loop
from flowdistill.training.trainer import configured_loop

BACKWARD = ("freeflow_prediction.estimator = @finite_difference()", "finite_difference.scheme = 'backward'")
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "FreeFlow, exact derivatives": ("freeflow/imagenet.gin", ()),
    "FreeFlow, backward differences": ("freeflow/imagenet.gin", BACKWARD),
    "FreeFlow, pseudo velocities": ("freeflow/freeflow_pseudo_imagenet.gin", ()),
}
HEAD = ("recipe", "evaluations of a state", "TFLOP a step", "seconds a step", "states a second", "TFLOP/s", "GiB")
STEPS = 5


def measured(loop: Loop) -> tuple[float, float]:
    """Seconds of a late step, the mean of STEPS after two to warm up, and the most GiB of the device's memory."""
    loop.step = loop.training.steps - STEPS - 2
    torch.cuda.reset_peak_memory_stats()
    for number in range(STEPS + 2):
        if number == 2:
            torch.cuda.synchronize()
            start = time.perf_counter()
        loop.train_step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / STEPS
    loop.check_finite()
    return seconds, torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    states = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    rows = [[*HEAD, "GiB by the plan"]]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "fresh.safetensors"
        with torch.device("cuda"):
            network = SiT()
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        save_file(network.state_dict(), checkpoint)
        del network
        for name, (recipe, changes) in ROWS.items():
            bindings = [*changes, f"train.batch_size = {states}", "train.accumulation = 1"]
            planned = flowdistill.plan(recipe, gin_bindings=bindings)
            bindings.append(f"sit_teacher.checkpoint = {str(checkpoint)!r}")
            with config.parsed([recipe], bindings), errors_located():
                loop = configured_loop(folder, "cuda")
            seconds, memory = measured(loop)
            del loop
            torch.cuda.empty_cache()
            operations, predicted = planned.flops / 1e12, sum(planned.memory.values()) / 2**30
            figures = [f"{sum(planned.evaluations.values()):.3g}", f"{operations:.3g}", f"{seconds:.3g}"]
            figures += [f"{states / seconds:.3g}", f"{operations / seconds:.0f}", f"{memory:.1f}", f"{predicted:.1f}"]
            rows.append([name, *figures])
            print(*rows[-1], flush=True)
    note = f"SiT-XL/2 at 256 pixels, {states} states a step, the means of {STEPS} late steps."
    report("imagenet_step", [rows], note)


if __name__ == "__main__":
    main()
