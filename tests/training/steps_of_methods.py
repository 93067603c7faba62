"""Steps of trainings in one process or several: ``steps_of_methods.py FOLDER FILE``, by torchrun or alone.

The JSON file maps names to dictionaries: a method, a setting, bindings, and a checkpoint to go on from, if any. Each
training leaves a checkpoint, its losses, what this process holds, and the traffic of its last step.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

from flowdistill.plumbing import config
from flowdistill.plumbing.collectives import Collectives
from flowdistill.plumbing.distributed import by_each, local, process_group, rank_and_world
from flowdistill.plumbing.dry import without_files
from flowdistill.plumbing.files import write_json
from flowdistill.training.loop import configured_loop

torch.set_num_threads(1)
CPU = torch.device("cpu")
STEPS = 3


def configured(files, bindings, folder):
    first = rank_and_world()[0] == 0
    with config.parsed(files, bindings), contextlib.nullcontext() if first else without_files(data=True):
        return configured_loop(folder, CPU)


def sizes(loop):
    """The bytes that this process holds of the student."""
    parameters, state = loop.trained.parameters, loop.trained.optimizer.state
    return {
        "parameters": sum(local(p).nbytes for p in parameters),
        "gradients": sum(local(p.grad).nbytes for p in parameters if p.grad is not None),
        "optimizer": sum(local(v).nbytes for own in state.values() for v in own.values() if v.numel() > 1),
        "dtypes": sorted({str(p.dtype) for p in (loop.teacher or loop.student).parameters()}),
    }


def take(name, method, setting, bindings, start, folder):
    files = config.chosen(method, setting) if setting else config.chosen(gin_file=method)
    loop = by_each(lambda: configured(files, bindings, folder / name))
    if rank_and_world()[1] > 1:
        with config.parsed(files, bindings):
            loop.share_out()
    if start:
        loop.load(Path(start))
    zero_grad, losses, held = loop.trained.optimizer.zero_grad, [], {}
    loop.trained.optimizer.zero_grad = lambda **kwargs: (held.update(sizes(loop)), zero_grad(**kwargs))
    for _ in range(STEPS):
        with Collectives() as traffic:
            loop.train_step()
        losses.append(loop.record()["loss"])
    loop.save(1)
    loop.finish_saving()
    rank, world = rank_and_world()
    told = {"losses": losses, "held": held, "counts": traffic.counts, "bytes": traffic.bytes, "world": world}
    write_json(folder / f"{name}.{rank}.json", told)


folder, trainings = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
folder.mkdir(exist_ok=True)
with process_group(CPU, timeout=60):
    for name, training in trainings.items():
        take(name, training["method"], training.get("setting"), training["bindings"], training.get("start"), folder)
