"""What processes exchange in the last step of trainings: ``exchanges.py JSON``, by torchrun.

JSON maps a name to a method, a setting and bindings. The first process prints, by these names, the number and the bytes
of all-gathers, reduce-scatters and all-reduces between copies that FSDP2 asked for, and the bytes that it holds.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import local, process_group, rank_and_world
from flowdistill.training.loop import configured_loop

torch.set_num_threads(1)
CPU = torch.device("cpu")
COUNTS = {}


def count(kind, tensor):
    number, size = COUNTS.get(kind, (0, 0))
    COUNTS[kind] = (number + 1, size + tensor.nbytes)


def watch(kind, cls, whole):
    plain = cls.__call__

    def call(self, output_tensor, input_tensor, *args, **kwargs):
        count(kind, output_tensor if whole == "output" else input_tensor)
        return plain(self, output_tensor, input_tensor, *args, **kwargs)

    cls.__call__ = call


def watch_copies(loop):
    if "replicate" not in loop._sharding.mesh.mesh_dim_names:
        return dist.all_reduce
    plain, copies = dist.all_reduce, loop._sharding.mesh.get_group("replicate")

    def all_reduce(tensor, *args, **kwargs):
        if kwargs.get("group") is copies and sys._getframe(1).f_code.co_filename == collectives.__file__:
            count("averagings", tensor)
        return plain(tensor, *args, **kwargs)

    dist.all_reduce = all_reduce
    return plain


def held(loop):
    modules = {"student": loop.student, "teacher": loop.teacher, **loop.objective.modules()}
    modules["average"] = loop.averages["ema"].module
    for part in (part for module in modules.values() for part in module.modules() if hasattr(part, "reshard")):
        part.reshard()  # weights that stay gathered
    sizes = {name: sum(local(v).nbytes for v in (*m.parameters(), *m.buffers())) for name, m in modules.items()}
    states = [state for t in loop._all_trained().values() for state in t.optimizer.state.values()]
    kept = [local(v).nbytes for state in states for v in state.values() if torch.is_tensor(v) and v.ndim]
    return {**sizes, "optimisers": sum(kept)}


watch("gathers", collectives.DefaultAllGather, "output")
watch("reductions", collectives.DefaultReduceScatter, "input")
found = {}
with process_group(CPU, timeout=60):
    for name, (method, setting, bindings) in json.loads(sys.argv[1]).items():
        with config.parsed(config.chosen(method, setting), bindings):
            loop = configured_loop("none", CPU)
            loop.share_out()
        plain = watch_copies(loop)
        loop.step = loop.training.steps - 2
        loop.train_step()  # after which the teacher's weights may stay
        COUNTS.clear()
        loop.train_step()
        dist.all_reduce = plain
        found[name] = {"exchanged": dict(COUNTS), "held": held(loop)}
if rank_and_world()[0] == 0:
    print(json.dumps(found))
