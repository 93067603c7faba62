"""What several processes exchange in a step, and the memory that a machine needs to start them.

    python benchmarks/processes.py traffic [--checkout FOLDER]
    python benchmarks/processes.py memory [--depth 28]

``traffic`` counts the collectives of FreeFlow's step on the digits in four processes, by a mode of PyTorch; with
``--checkout`` also those of another version of the library. ``memory`` builds FreeFlow of SiT-XL/2 with made-up weights
in one, two and eight processes on this machine's CPUs, of so many of its 28 blocks, and takes the most memory that all
had together, pages that they share counted once. Tables go to benchmarks/results/traffic.md and host_memory.md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from flowdistill.bench.tables import markdown_table
from flowdistill.networks import SiT
from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import by_each, process_group, rank_and_world
from flowdistill.plumbing.files import write_tensors, write_text
from flowdistill.plumbing.machine import machine
from flowdistill.training.loop import Loop, configured_loop

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
SETTINGS: dict[str, list[str]] = {
    "sharded": [],
    "sharded, weights kept for the step": ["parallel.reshard_after_forward = False"],
    "two copies": ["parallel.shard = 2"],
    "a copy each": ["parallel.shard = 1"],
    "sharded, training in bf16": ["train.precision = 'bf16'"],
}


def shared(files: list[str | Path], bindings: list[str]) -> Loop:
    """A loop that all processes have shared out, where the version of the library does that."""
    first = rank_and_world()[0] == 0

    def built() -> Loop:
        with config.parsed(files, bindings), contextlib.ExitStack() as stack:
            if not first and hasattr(Loop, "share_out"):
                from flowdistill.plumbing.dry import without_files

                stack.enter_context(without_files(data=True))
            return configured_loop(tempfile.gettempdir(), CPU)

    loop = by_each(built)
    if rank_and_world()[1] > 1 and hasattr(loop, "share_out"):
        with config.parsed(files, bindings):
            loop.share_out()
    return loop


def count(bindings: list[str]) -> None:
    """In each process: take steps, and let the first one print what it exchanged in the last."""
    spec = importlib.util.spec_from_file_location("collectives", ROOT / "flowdistill" / "plumbing" / "collectives.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with process_group(CPU, timeout=300):
        loop = shared(
            config.chosen("freeflow", "digits"),
            ["train.accumulation = 4", "freeflow.correction_start = 0.0", *bindings],
        )
        for _ in range(2):
            loop.train_step()
        with module.Collectives() as traffic:
            loop.train_step()
        if rank_and_world()[0] == 0:
            models = {"teacher": loop.teacher, "student": loop.student, **loop.objective.modules()}
            sizes = {name: 4 * sum(p.numel() for p in model.parameters()) for name, model in models.items() if model}
            print(json.dumps({"counts": traffic.counts, "bytes": traffic.bytes, "sizes": sizes}), flush=True)


def build(checkpoint: str, depth: int) -> None:
    """In each process: build FreeFlow of SiT-XL/2 and share it out."""
    bindings = [f"sit_teacher.checkpoint = '{checkpoint}'", "train.accumulation = 8"]
    if depth != 28:
        bindings.append("sit_teacher.variant = None")
    with process_group(CPU, timeout=300):
        shared(["freeflow/imagenet.gin"], bindings)


def started(processes: int, *arguments: str, checkout: Path = ROOT) -> subprocess.Popen[str]:
    """This script in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    return subprocess.Popen([*command, __file__, *arguments], env=environment, stdout=subprocess.PIPE, text=True)


def traffic(checkout: Path | None) -> None:
    """The table of what a step exchanges."""
    world, kinds = 4, ("all_gather", "reduce_scatter", "all_reduce", "broadcast")
    rows = [["", "collectives", "gathered (MB)", "added and cut (MB)", "added up (MB)", "broadcast (MB)", "sent (MB)"]]
    measured: list[tuple[str, list[str], Path]] = [(name, bindings, ROOT) for name, bindings in SETTINGS.items()]
    if checkout is not None:
        commit = subprocess.check_output(["git", "-C", checkout, "rev-parse", "--short=7", "HEAD"], text=True).strip()
        measured.insert(0, (f"commit {commit}", [], checkout))
    for name, bindings, place in measured:
        printed, _ = started(world, "count", *bindings, checkout=place).communicate()
        found: dict[str, Any] = json.loads(printed.splitlines()[-1])
        moved = {kind: found["bytes"].get(kind, 0) / 1e6 for kind in kinds}
        shard = {"two copies": 2, "a copy each": 1}.get(name, world if place == ROOT else 1)
        sent = (moved["all_gather"] + moved["reduce_scatter"]) * (1 - 1 / shard)
        sent += 2 * moved["all_reduce"] * (1 - shard / world)
        numbers = [*(moved[kind] for kind in kinds), sent]
        rows.append([name, str(sum(found["counts"].values())), *(f"{number:.3g}" for number in numbers)])
        sizes = found["sizes"]
    networks = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
    text = (
        "FreeFlow on the digits in four processes, the third step, prediction and correction; bytes are those of the "
        f"first process: of whole tensors, and what it sends in a ring. Networks in float32: {networks}. {machine()}."
    )
    write_text(RESULTS / "traffic.md", "\n".join([markdown_table(rows), "", text, ""]))


def together(pid: int) -> int:
    """The bytes of memory of a process and all below it, shared pages once."""
    total, stack = 0, [pid]
    while stack:
        process = stack.pop()
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                total += 1024 * int(line.split()[1]) if line.startswith("Pss:") else 0
            for task in Path(f"/proc/{process}/task").iterdir():
                stack += map(int, (task / "children").read_text().split())
    return total


def memory(depth: int) -> None:
    """The table of what it takes to start."""
    rows = [["processes", "most memory of all together (GB)", "until they could train (s)"]]
    with tempfile.TemporaryDirectory() as folder:
        network = SiT(depth=depth)
        whole = sum(v.nbytes for v in network.state_dict().values())
        write_tensors(Path(folder, "sit.safetensors"), network.state_dict())
        del network
        for processes in (1, 2, 8):
            starting, most, begun = (
                started(processes, "build", f"{folder}/sit.safetensors", str(depth)),
                0,
                time.monotonic(),
            )
            while starting.poll() is None:
                most = max(most, together(starting.pid))
                time.sleep(0.1)
            assert starting.returncode == 0
            rows.append([str(processes), f"{most / 1e9:.2f}", f"{time.monotonic() - begun:.0f}"])
    text = (
        f"FreeFlow of SiT-XL/2 with {depth} of its 28 blocks: teacher, student, online network and average of "
        f"{whole / 1e9:.2f} GB each, {4 * whole / 1e9:.2f} GB together, in float32 on CPUs, where the shards lie in "
        f"the same memory. {machine()}."
    )
    write_text(RESULTS / "host_memory.md", "\n".join([markdown_table(rows), "", text, ""]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["count"]:
        count(sys.argv[2:])
    elif sys.argv[1:2] == ["build"]:
        build(sys.argv[2], int(sys.argv[3]))
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        commands = parser.add_subparsers(dest="command", required=True)
        commands.add_parser("traffic").add_argument("--checkout", type=Path, help="another version of the library")
        commands.add_parser("memory").add_argument("--depth", type=int, default=28, help="blocks of SiT-XL/2")
        options = parser.parse_args()
        if options.command == "traffic":
            traffic(options.checkout)
        else:
            memory(options.depth)
