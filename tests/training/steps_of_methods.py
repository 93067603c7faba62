"""Three steps of trainings in one process or several: ``steps_of_methods.py FOLDER JSON``, by torchrun or alone.

JSON maps a name to a method, a setting and bindings; of each the first process leaves the weights and the losses.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import by_each, process_group, rank_and_world, whole
from flowdistill.plumbing.dry import without_files
from flowdistill.training.loop import configured_loop

torch.set_num_threads(1)
CPU = torch.device("cpu")


def configured(files, bindings, folder):
    first = rank_and_world()[0] == 0
    with config.parsed(files, bindings), contextlib.nullcontext() if first else without_files(data=True):
        return configured_loop(folder, CPU)


def steps(name, method, setting, bindings, folder):
    files = config.chosen(method, setting) if setting else config.chosen(gin_file=method)
    loop = by_each(lambda: configured(files, bindings, folder / "none"))
    if rank_and_world()[1] > 1:
        with config.parsed(files, bindings):
            loop.share_out()
    losses = []
    for _ in range(3):
        loop.train_step()
        losses.append(loop.record()["loss"])
    weights = {f"{k}/{key}": whole(v.detach()) for k, m in loop._modules().items() for key, v in m.state_dict().items()}
    if rank_and_world()[0] == 0:
        save_file(
            {key: v.clone().reshape(v.shape or (1,)) for key, v in weights.items()}, folder / f"{name}.safetensors"
        )
        (folder / f"{name}.json").write_text(json.dumps(losses))


folder, trainings = Path(sys.argv[1]), json.loads(sys.argv[2])
folder.mkdir(exist_ok=True)
with process_group(CPU, timeout=60):
    for name, (method, setting, bindings) in trainings.items():
        steps(name, method, setting, bindings, folder)
