"""Networks with tensors that training changes and that are not parameters."""

import json
import os
import sys

import pytest
import torch
from runs import write
from test_distributed import finish, torchrun
from torch import nn

import flowdistill
from flowdistill import ConfigError
from flowdistill.ema import AveragedModel, Ema
from flowdistill.networks import MLP
from flowdistill.plumbing.files import load_tensors
from flowdistill.runs import pretrained
from flowdistill.wrapped_teachers import NetworkTeacher

GIN = """
train.flow_map = @network()
network.network = @normalized()
train.objective = @flow_matching()
train.states = @noised_data()
noised_data.dataset = @exact_samples()
exact_samples.teacher = @ring()
train.optimizer = @AdamW
AdamW.lr = 1e-2
train.steps = 6
train.batch_size = 16
train.log_every = 2
train.sample_every = 0
train.checkpoint_every = 3
train.keep_checkpoints = 10
"""


@flowdistill.register_network("normalized")
class Normalized(MLP):
    """With running statistics, weights that are shared, a table of indices, and a buffer that no file holds."""

    def __init__(self):
        super().__init__(dim=2, hidden_size=8, depth=1)
        self.norm, self.first, self.second = nn.BatchNorm1d(2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.register_buffer("order", torch.tensor([1, 0]))
        self.register_buffer("scale", torch.full((2,), 0.5), persistent=False)

    def velocity(self, x, t, *rest):
        x = self.norm(self.second(self.first(x)) * self.scale)
        return super().velocity(x[:, self.order], t, *rest)


AVERAGES = {"ema": "train.ema = @ema()", "power": "train.ema = @power_ema()", "none": "train.ema = None"}


@pytest.mark.parametrize("average", AVERAGES)
def test_the_averaged_student_has_the_present_buffers(average, tmp_path):
    """In the result, in every checkpoint and in the run's student; a run that goes on continues bit for bit."""
    gin_file = write(tmp_path / "a.gin", GIN + AVERAGES[average])
    whole = flowdistill.train(gin_file=gin_file, workdir=tmp_path / "whole", report=False)
    flowdistill.train(gin_file=gin_file, gin_bindings=["train.steps = 3"], workdir=tmp_path / "parts", report=False)
    parts = flowdistill.train(gin_file=gin_file, workdir=tmp_path / "parts", report=False)
    states = [r.flow_map.state_dict() for r in (whole, parts)] + [
        flowdistill.Run(tmp_path / "parts").student.state_dict()
    ]
    for state in states[1:]:
        torch.testing.assert_close(state, states[0], rtol=0, atol=0)
    for step in (3, 6):
        folder = tmp_path / "whole" / "checkpoints" / f"step_{step:08d}"
        student = load_tensors(folder / "student.safetensors")
        assert int(student["network.norm.num_batches_tracked"]) == step
        assert student["network.norm.running_mean"].any()
        if average != "none":
            averaged = load_tensors(folder / "ema.safetensors")
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                assert torch.equal(averaged[f"network.norm.{name}"], student[f"network.norm.{name}"])


def test_buffers_that_are_replaced_or_shared_follow():
    module = nn.Module()
    module.register_buffer("replaced", torch.zeros(2))
    module.register_buffer("later", None)
    module.register_buffer("repeated", torch.zeros(1).expand(3))
    module.register_buffer("mask", torch.tensor([True, False]))
    module.weight = nn.Parameter(torch.zeros(2))
    average = AveragedModel(module, Ema())
    module.replaced, module.later = torch.ones(3), torch.ones(1)
    module.repeated, module.mask = torch.ones(1).expand(3), ~module.mask
    average.update(0)
    module.replaced += 1  # after the update
    wanted = {"replaced": torch.ones(3), "later": torch.ones(1), "repeated": torch.ones(3)}
    wanted |= {"mask": torch.tensor([False, True])}
    assert dict(average.module.named_buffers()).keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(average.module.get_buffer(name), value), name


class Late(nn.Linear):
    """Makes a buffer when it is first evaluated."""

    def forward(self, x):
        if not hasattr(self, "made"):
            self.register_buffer("made", torch.ones(2))
        return super().forward(x) * self.made


class Stateful(nn.Linear):
    """Has state that is no tensor."""

    def get_extra_state(self):
        return {"calls": 1}


class Wide(nn.Linear):
    """Has a buffer of a kind that safetensors files do not have."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("table", torch.zeros(2, dtype=torch.complex128))


class Sparse(nn.Linear):
    """Has a sparse buffer."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("table", torch.eye(2).to_sparse())


@flowdistill.register_network("around")
class Around(MLP):
    """A network with a layer that somebody brings."""

    layer = nn.Linear

    def __init__(self):
        super().__init__(dim=2, hidden_size=8, depth=1)
        self.brought = self.layer(2, 2)

    def velocity(self, x, *rest):
        return super().velocity(self.brought(x), *rest)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (Late, "network.brought.made of the student was made by its first evaluation"),
        (Stateful, "network.brought._extra_state of the network is no tensor"),
        (Wide, r"network.brought.table of the network is of a kind .* \(torch.complex128"),
        (Sparse, r"network.brought.table of the network is of a kind .* torch.sparse_coo"),
        (lambda *sizes: nn.LazyLinear(2), "network.brought.weight of the network has no shape yet"),
        (lambda *sizes: nn.utils.weight_norm(nn.Linear(*sizes)), r"weight of network.brought \(Linear\) is computed"),
    ],
    ids=["late", "stateful", "wide", "sparse", "lazy", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:Lazy modules")
def test_state_that_checkpoints_cannot_keep_is_refused_by_name(layer, words, tmp_path, monkeypatch):
    monkeypatch.setattr(Around, "layer", staticmethod(layer))
    gin_file = write(tmp_path / "a.gin", GIN.replace("@normalized", "@around"))
    with pytest.raises(ConfigError, match=words):
        flowdistill.train(gin_file=gin_file, workdir=tmp_path / "run", report=False)


def test_model_folders_keep_every_tensor(tmp_path):
    """Shared weights stay shared, whole numbers stay whole numbers, and what is not stored is made anew."""
    torch.manual_seed(0)
    teacher = NetworkTeacher(Normalized().eval())
    teacher.network.norm.num_batches_tracked += 70000  # more than float16 holds
    again = pretrained.load_model(pretrained.save_model(teacher, tmp_path / "model", dtype="float16")).eval()
    assert again.network.first.weight is again.network.second.weight
    assert int(again.network.norm.num_batches_tracked) == 70000
    x, t = torch.randn(3, 2), torch.rand(3)
    torch.testing.assert_close(again.velocity(x, t), teacher.velocity(x, t), rtol=1e-2, atol=1e-2)


PROCESSES = """
import sys, flowdistill
from test_buffers import Normalized
seen, velocity = [], Normalized.velocity
def watched(self, *arguments):
    if self.training:
        seen.append(self.norm.running_mean.tolist())
    return velocity(self, *arguments)
Normalized.velocity = watched
flowdistill.train(gin_file=sys.argv[1], workdir=sys.argv[2], device="cpu", report=False)
print(f"{seen}\\n", end="")
"""


def test_all_processes_begin_a_step_with_the_buffers_of_the_first(tmp_path, monkeypatch):
    (tmp_path / "processes.py").write_text(PROCESSES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    gin_file = write(tmp_path / "a.gin", GIN, accumulation=2)
    out, _ = finish(torchrun(tmp_path / "processes.py", gin_file, tmp_path / "run"))
    first, second = out.splitlines()
    assert first == second
    assert len(set(map(tuple, json.loads(first)))) == 6
