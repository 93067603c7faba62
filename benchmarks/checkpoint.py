"""What a save of SiT-XL/2 costs one, two and four processes: student, average and AdamW in float32, 10.8 GB.

    python benchmarks/checkpoint.py
    python benchmarks/checkpoint.py --scale 0.25

Weights are made up, and all processes run on this machine's CPUs and write to its one disk. ``--scale`` keeps that part
of the blocks. The table goes to benchmarks/results/checkpoint.md: how long training waits while the shards are copied,
how long until the checkpoint has its name, and the most memory that all processes had beyond what they held before.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.multiprocessing.spawn import spawn

from flowdistill.bench.tables import cell, markdown_table
from flowdistill.networks import SiT
from flowdistill.plumbing.files import write_text
from flowdistill.plumbing.machine import machine
from flowdistill.runs.checkpoints import save_checkpoint

RESULT = Path(__file__).parent / "results" / "checkpoint.md"
BLOCKS, SAVES = 28, 3


def shapes(scale: float) -> dict[str, torch.Size]:
    """Of the tensors of SiT-XL/2, with a part of its blocks."""
    with torch.device("meta"):
        return {name: value.shape for name, value in SiT(depth=max(1, round(BLOCKS * scale))).state_dict().items()}


def held(shape: torch.Size, over: DeviceMesh) -> Tensor:
    """A tensor of which this process holds its rows."""
    whole, own = torch.empty(shape, device="meta"), torch.empty(0, *shape[1:])
    for number, part in enumerate(whole.chunk(over.size())):
        if number == over.get_local_rank():
            own = torch.rand(part.shape)
    return DTensor.from_local(own, over, [Shard(0)], run_check=False, shape=shape, stride=whole.stride())


def peak() -> int:
    """The most memory that this process has had, in bytes."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def process(rank: int, world: int, folder: Path, scale: float) -> None:
    """Hold the shards of one process, and save them; the first one writes down what it took."""
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", meeting, rank=rank, world_size=world, timeout=timedelta(hours=1))
    group, over = dist.new_group(backend="gloo"), init_device_mesh("cpu", (world,))
    states = {name: {k: held(shape, over) for k, shape in shapes(scale).items()} for name in ("student", "ema")}
    moments = {
        number: {"step": torch.ones(()), "exp_avg": held(shape, over), "exp_avg_sq": held(shape, over)}
        for number, shape in enumerate(shapes(scale).values())
    }
    optimizers = {"student": {"state": moments, "param_groups": [{"params": list(moments)}]}}
    before = peak()
    taken: dict[str, list[float]] = {"waits": [], "saves": []}
    for step in range(SAVES):
        dist.barrier()
        start = time.perf_counter()
        saving = save_checkpoint(folder, step, states, optimizers, {}, 1, group=group if world > 1 else None)
        taken["waits"].append(time.perf_counter() - start)
        path = saving.result()
        taken["saves"].append(time.perf_counter() - start)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, (taken, peak() - before))
    if rank == 0:
        size = sum(file.stat().st_size for file in path.iterdir())
        waits, saves = (
            [max(times) for times in zip(*(t[key] for t, _ in everyone), strict=True)] for key in ("waits", "saves")
        )
        memory = sum(more for _, more in everyone)
        row = [str(world), f"{size / 1e9:.3g}", cell(waits), cell(saves), f"{memory / 1e9:.3g}", f"{memory / size:.2f}"]
        (folder / "row").write_text("\n".join(row))
    dist.destroy_process_group()


def main() -> None:
    """Save with each number of processes, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="the part of the blocks, in (0, 1]")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    head = ["processes", "GB on disk", "training waits (s)", "on disk after (s)", "memory (GB)", "memory / GB on disk"]
    rows = [head]
    for world in options.processes:
        folder = Path(tempfile.mkdtemp(dir=Path.cwd()))
        try:
            spawn(process, (world, folder, options.scale), nprocs=world)  # type: ignore[no-untyped-call]
            rows.append((folder / "row").read_text().split("\n"))
        finally:
            shutil.rmtree(folder)
    blocks = max(1, round(BLOCKS * options.scale))
    note = (
        f"Student, average and AdamW of SiT-XL/2 with {blocks} of its {BLOCKS} blocks, in float32 on CPUs; "
        f"mean ± standard deviation over {SAVES} saves, of the slowest process; memory is what all processes had at "
        f"most beyond their shards. {machine()}."
    )
    write_text(options.out, f"{markdown_table(rows)}\n\n{note}\n")


if __name__ == "__main__":
    main()
