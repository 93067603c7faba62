"""Checkpoints that several processes write together, and any other number of them reads."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import write
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import flowdistill
from flowdistill import CheckpointError, CheckpointWriteError
from flowdistill.plumbing import files
from flowdistill.runs import parts
from flowdistill.runs.averages import keep_averages
from flowdistill.runs.checkpoints import (
    checkpoint_path,
    checkpoint_paths,
    fill,
    load_optimizers,
    load_tensors_of,
    read_meta,
    remove_left,
    save_checkpoint,
    verify_checkpoint,
)
from flowdistill.runs.optimizer_states import restore
from flowdistill.runs.tensor_files import stored_tensors, whole_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forks")
LAYOUTS = {"1": (1, 1), "2": (1, 2), "4": (1, 4), "2x2": (2, 2)}  # replicas, and shards of each


def begun(world, do, *arguments):
    """So many processes that have met and call a function; their numbers."""
    place, processes = Path(tempfile.mkdtemp()) / "meeting", []
    for rank in range(world):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multi-threaded", category=DeprecationWarning)
            process = os.fork()
        if process == 0:
            try:
                torch.set_num_threads(1)
                meeting = dist.FileStore(str(place), world)
                limit = timedelta(seconds=60)
                dist.init_process_group("gloo", store=meeting, rank=rank, world_size=world, timeout=limit)
                do(*arguments)
                dist.destroy_process_group()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(1)
        processes.append(process)
    return processes


def ended(processes):
    """Wait for processes; their exit codes, or the signals that ended them, as negative numbers."""
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def together(world, do, *arguments):
    """Call a function in so many processes, in each of which it must succeed."""
    assert ended(begun(world, do, *arguments)) == [0] * world


def mesh(layout):
    return init_device_mesh("cpu", LAYOUTS[layout], mesh_dim_names=("replicate", "shard"))


def shard(value, over):
    """What this process holds of a tensor whose rows are shared out."""
    count, number = over.size(1), over.get_local_rank(1)
    own = value.chunk(count)[number] if number < len(value.chunk(count)) else value[:0]
    placed = [Replicate(), Shard(0)]
    return DTensor.from_local(own.clone(), over, placed, run_check=False, shape=value.shape, stride=value.stride())


PLAIN = {"count", "steps", "norm"}


def state(seed=0):
    """Tensors whose rows are no multiple of the processes, or fewer, of all kinds."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(7, 3, generator=draw),
        "few": torch.randn(2, 5, generator=draw),
        "one": torch.randn(1, generator=draw),
        "long": torch.randn(33, 2, 2, generator=draw, dtype=torch.float64),
        "low": torch.randn(9, 4, generator=draw).bfloat16(),
        "flags": torch.randn(6, generator=draw) > 0,
        "none": torch.zeros(0, 3),
        "count": torch.randint(9, (5,), generator=draw),
        "steps": torch.randint(9, (), generator=draw),
        "norm": torch.randn((), generator=draw),
    }


def placed(tensors, over):
    return {name: value.clone() if name in PLAIN else shard(value, over) for name, value in tensors.items()}


def own(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def same(found, expected):
    """Bit for bit, and of the same kind."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert own(found[name]).dtype == value.dtype, name
        assert torch.equal(own(found[name]), own(value)), name


def adamw(tensors):
    return torch.optim.AdamW(tensors, lr=0.1)


def optimized(over=None, steps=2):
    """AdamW after some steps on floating-point tensors, whole or as shards."""
    values = [value for name, value in state(3).items() if value.is_floating_point() and name != "none"]
    parts_of = values if over is None else [shard(v, over) if v.dim() else v.clone() for v in values]
    optimizer = adamw([torch.nn.Parameter(part.clone()) for part in parts_of])
    for step in range(steps):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = (parameter * (step + 1)).detach()
        optimizer.step()
    return optimizer


def save_all(workdir, layouts):
    group = dist.new_group(backend="gloo")
    for layout in layouts:
        over = mesh(layout)
        states, optimizer = {"student": placed(state(1), over), "ema": placed(state(2), over)}, optimized(over)
        counters, optimizers = {"n": 3}, {"student": optimizer.state_dict()}
        saving = save_checkpoint(workdir / layout, 5, states, optimizers, counters, 2, {"loss": [0.5, 2]}, group)
        counters["n"] = 4
        for tensor in (*states["student"].values(), *(p for g in optimizer.param_groups for p in g["params"])):
            own(tensor.detach()).zero_()  # as a training that goes on
        for value in optimizer.state.values():
            own(value["exp_avg"]).zero_()
        assert saving.result(60) == checkpoint_path(workdir / layout, 5)
        verify_checkpoint(saving.result())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of each layout, and one of a process alone."""
    folder = tmp_path_factory.mktemp("saved")
    together(1, save_all, folder, ["1"])
    together(2, save_all, folder, ["2"])
    together(4, save_all, folder, ["4", "2x2"])
    states = {"student": state(1), "ema": state(2)}
    optimizers = {"student": optimized().state_dict()}
    save_checkpoint(folder / "alone", 5, states, optimizers, {"n": 3}, 2, {"loss": [0.5, 2]}).result()
    return {layout: checkpoint_path(folder / layout, 5) for layout in (*LAYOUTS, "alone")}


def load_all(checkpoints, layout):
    over, read = mesh(layout), []
    read_data = parts._Reader.read_data

    def counted(reader, plan, planner):
        read.extend(item.lengths.numel() for item in plan.items)
        return read_data(reader, plan, planner)

    parts._Reader.read_data = counted
    for checkpoint in checkpoints.values():
        targets = {
            name: placed({k: torch.zeros_like(v) for k, v in state().items()}, over) for name in ("student", "ema")
        }
        read.clear()
        fill(checkpoint, targets)
        assert sum(read) == sum(own(v).numel() for t in targets.values() for v in t.values())
        same(targets["student"], placed(state(1), over))
        same(targets["ema"], placed(state(2), over))
        # The optimiser: its state is placed as its parameters are, and is read in slices too.
        optimizer, expected = optimized(over, steps=0), optimized(over)
        read.clear()
        states = load_optimizers(checkpoint, {"student": optimizer})
        assert sum(read) == sum(own(v).numel() for s in expected.state.values() for v in s.values())
        restore(optimizer, states["student"], adamw, checkpoint)
        found, wanted = optimizer.state_dict(), expected.state_dict()
        assert found["param_groups"] == wanted["param_groups"]
        assert found["state"].keys() == wanted["state"].keys()
        for number, values in wanted["state"].items():
            same(found["state"][number], values)
            for key, value in values.items():
                assert getattr(found["state"][number][key], "placements", None) == getattr(value, "placements", None)


def keep_types(workdir):
    low, moment = shard(torch.ones(3, 2).bfloat16(), mesh("2")), shard(torch.rand(3, 2), mesh("2"))
    optimizer = torch.optim.SGD([torch.nn.Parameter(low)])
    states = {"student": {"state": {0: {"moment": moment}}, "param_groups": []}}
    saving = save_checkpoint(workdir, 1, {"student": {"x": low}}, states, {}, 1, group=dist.new_group(backend="gloo"))
    found = load_optimizers(saving.result(60), {"student": optimizer})["student"]["state"][0]["moment"]
    assert found.dtype == torch.float32
    same({"moment": found}, {"moment": moment})


def test_the_state_of_an_optimiser_keeps_its_type_where_parameters_have_another(tmp_path):
    together(2, keep_types, tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_any_number_of_processes_saved_any_other_number_loads_bit_for_bit(saved, layout):
    together(LAYOUTS[layout][0] * LAYOUTS[layout][1], load_all, saved, layout)


@pytest.mark.parametrize("layout", [*LAYOUTS, "alone"])
def test_one_process_without_a_group_reads_whole_tensors(saved, layout):
    checkpoint = saved[layout]
    same(load_tensors_of(checkpoint, "student"), state(1))
    targets = {name: torch.zeros_like(value) for name, value in state().items()}
    fill(checkpoint, {"ema": targets})
    same(targets, state(2))
    expected = optimized().state_dict()
    for states in (load_optimizers(checkpoint), load_optimizers(checkpoint, {"student": optimized()})):
        assert states["student"]["param_groups"] == expected["param_groups"]
        for number, values in expected["state"].items():
            same(states["student"]["state"][number], values)
    meta = read_meta(checkpoint)
    assert (meta.step, meta.counters, meta.sums) == (5, {"n": 3}, {"loss": [0.5, 2]})


def test_one_process_writes_whole_files_and_several_one_each(saved):
    alone, group = ({p.name: p.read_bytes() for p in saved[name].iterdir()} for name in ("alone", "1"))
    assert alone == group
    assert alone.keys() == {
        "student.safetensors", "ema.safetensors", "optimizers.safetensors", "optimizers.json", "meta.json"
    }  # fmt: skip
    assert json.loads(alone["meta.json"])["format"] == 2
    assert json.loads((saved["4"] / "meta.json").read_bytes())["format"] == 3
    assert {p.name for p in saved["4"].iterdir()} == {"optimizers.json", "meta.json"} | {
        f"{name}.0000{rank}-of-00004.safetensors" for name in ("student", "ema", "optimizers") for rank in (1, 2, 3, 4)
    }
    assert (saved["4"] / "optimizers.json").read_bytes() == alone["optimizers.json"]


@pytest.mark.parametrize("layout", ["2", "4", "2x2"])
def test_every_element_is_written_once_and_by_all(saved, layout):
    paths = sorted(saved[layout].glob("student.*"))
    found = [files.load_tensors(path) for path in paths]
    assert all(value.numel() or name == "none" for tensors in found for name, value in tensors.items())
    sizes = [sum(value.numel() * value.element_size() for value in tensors.values()) for tensors in found]
    whole = sum(value.numel() * value.element_size() for value in state().values())
    assert sum(sizes) == whole
    assert min(sizes) > 0
    assert layout == "2x2" or max(sizes) < 1.5 * whole / len(paths)


def test_meta_data_name_what_several_processes_wrote(saved):
    meta = read_meta(saved["2"])
    assert meta.files("ema") == ["ema.00001-of-00002.safetensors", "ema.00002-of-00002.safetensors"]
    assert meta.files("em") == meta.files("online") == []
    with pytest.raises(CheckpointError, match=r"lacks online\.safetensors, which meta\.json does not list"):
        fill(saved["2"], {"online": {}})


def test_views_of_one_memory_stay_what_they_are(tmp_path):
    x, number = torch.randn(3, 3), torch.randn(3, dtype=torch.complex64)
    views = {
        "x": x,
        "again": x,
        "transposed": x.T,
        "other": x.view(torch.int32),
        "number": number,
        "conjugate": number.conj(),
        "imaginary": number.imag,
        "negative": number.conj().imag,
    }
    checkpoint = save_checkpoint(tmp_path, 1, {"student": views}, {}, {}, 1).result()
    targets = {name: torch.nn.Parameter(torch.zeros_like(v), v.dtype != torch.int32) for name, v in views.items()}
    fill(checkpoint, {"student": targets})
    for name, value in views.items():
        assert torch.equal(targets[name], value), name


# Damage.


@pytest.mark.parametrize("kind", ["altered", "truncated", "missing"])
def test_a_part_that_is_damaged_is_named(saved, tmp_path, kind):
    checkpoint = shutil.copytree(saved["4"], tmp_path / "step_00000005")
    path = checkpoint / "ema.00003-of-00004.safetensors"
    data = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes(data[: len(data) // 2] if kind == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    for names in ((), ("ema",)):
        with pytest.raises(CheckpointError, match=r"ema\.00003-of-00004\.safetensors"):
            verify_checkpoint(checkpoint, *names)
    verify_checkpoint(checkpoint, "student")
    if kind != "altered":
        with pytest.raises(CheckpointError, match=r"ema\.00003-of-00004\.safetensors"):
            load_tensors_of(checkpoint, "ema")


@pytest.mark.parametrize("layout", ["4", "alone"])
def test_another_architecture_is_told_before_anything_changes(saved, layout):
    targets = {name: torch.zeros_like(value) for name, value in state().items()}
    other = {name: torch.zeros(7, 4) if name == "weight" else torch.zeros_like(v) for name, v in state().items()}
    with pytest.raises(CheckpointError, match=r"another architecture:\nweight: \(7, 3\) in the file, \(7, 4\) in the"):
        fill(saved[layout], {"student": targets, "ema": other})
    assert not any(value.any() for value in targets.values())


def test_parts_that_do_not_make_up_a_tensor_are_refused(saved, tmp_path):
    paths = sorted(saved["4"].glob("student.*"))
    with pytest.raises(CheckpointError, match="does not hold all parts of "):
        whole_tensors(paths[:-1])
    with pytest.raises(CheckpointError, match=r"00002.*does not fit the others"):
        whole_tensors([*paths, paths[1]])
    part, places = tmp_path / "part.safetensors", {"x": {"offsets": [0, 0], "shape": [4, 2]}}
    for bad in (
        {"offsets": [3, 0], "shape": [4, 2]},
        {"offsets": [-1, 0], "shape": [4, 2]},
        {"offsets": [0], "shape": [4, 2]},
        {"offsets": [0, 0], "shape": [4]},
        {"offsets": [0, 0]},
        {"offsets": ["x", 0], "shape": [4, 2]},
        [],
        3,
    ):
        files.stream_tensors(part, {"x": torch.zeros(2, 2)}, {"parts": json.dumps({"x": bad})})
        with pytest.raises(CheckpointError, match=r"part\.safetensors is damaged"):
            stored_tensors([part])
    files.stream_tensors(part, {"x": torch.zeros(4, 2)}, {"parts": json.dumps(places)})
    assert stored_tensors([part])["x"].shape == (4, 2)


# Errors while saving.


def one_fails(workdir, deed):
    """Save step 1, and then step 2 while the second of the processes has trouble."""
    over, rank = mesh(str(dist.get_world_size())), dist.get_rank()
    states, optimizers = {"student": placed(state(), over)}, {"student": optimized(over).state_dict()}
    save_checkpoint(workdir, 1, states, optimizers, {}, 1, group=dist.group.WORLD).result(60)
    if rank == 1 and deed == "full":

        def refuse(_):
            raise OSError(28, "No space left on device")

        os.fsync = refuse
    if rank == 1 and deed == "altered":
        sync = os.fsync

        def alter(file):
            sync(file)
            os.pwrite(file, b"\0\0", os.fstat(file).st_size - 2)

        os.fsync = alter
    if rank == 1 and deed == "odd":
        optimizers = {"student": {"state": {0, 1}}}
    if rank == 1 and deed == "dead":
        os.kill(os.getpid(), signal.SIGKILL)
    reasons = {
        "full": r"No space left on device \(process 1 of 2\)",
        "altered": r".*student\.00002-of-00002\.safetensors is truncated or altered.* \(process 1 of 2\)",
        "odd": r"an optimiser holds a set.* \(process 1 of 2\)",
        "dead": ".*",
    }
    before = checkpoint_path(workdir, 1)
    with pytest.raises(CheckpointWriteError, match=rf"step_00000002: {reasons[deed]}; the last one, {before}, is"):
        save_checkpoint(workdir, 2, states, optimizers, {}, 1, group=dist.group.WORLD).result(60)
    if deed == "dead":
        os._exit(0)  # at once, since there is nobody to take leave of
    dist.barrier()
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("deed", ["full", "altered", "odd"])
def test_an_error_in_one_process_is_the_error_of_all_and_loses_nothing(tmp_path, deed):
    together(2, one_fails, tmp_path, deed)
    verify_checkpoint(checkpoint_path(tmp_path, 1))


def test_the_death_of_one_process_is_an_error_of_the_others(tmp_path):
    assert ended(begun(2, one_fails, tmp_path, "dead")) == [0, -signal.SIGKILL]
    remove_left(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    verify_checkpoint(checkpoint_path(tmp_path, 1))


def save_alone(workdir):
    states = {"student": {"weight": shard(torch.ones(4), mesh("2"))}}
    with pytest.raises(CheckpointWriteError, match=r"a part of weight of student: all of them must save, with a group"):
        save_checkpoint(workdir / str(dist.get_rank()), 1, states, {}, {}, 1).result(60)
    assert checkpoint_paths(workdir / str(dist.get_rank())) == []


def test_one_of_several_processes_cannot_save_what_it_does_not_hold(tmp_path):
    together(2, save_alone, tmp_path)


def copies():
    """How many tensors of an odd shape there are."""
    gc.collect()
    return sum(type(thing) is torch.Tensor and thing.shape[:1] == (1237,) for thing in gc.get_objects())


def hold_nothing(workdir, group):
    value = torch.ones(1237, 2)
    for step, worked in ((1, True), (2, False)):
        if not worked:
            (workdir / "checkpoints" / ".step_00000002.partial").write_text("a file in the way")
        saving = save_checkpoint(workdir, step, {"student": {"x": value}}, {"a": {"x": value}}, {}, 1, group=group)
        error = saving.exception(60)
        assert (error is None) is worked
        assert copies() == 1
        assert saving.done()


def hold_nothing_together(workdir):
    hold_nothing(workdir, dist.new_group(backend="gloo"))


def test_a_save_that_has_ended_holds_no_copies(tmp_path):
    """Nor does its error; a thread that freed them later might meet the end of the process."""
    hold_nothing(tmp_path / "alone", None)
    together(2, hold_nothing_together, tmp_path / "together")


# Death at any moment.


def save_for_ever(workdir, first, saved):
    over = mesh("2")
    for step in range(first, first + 10_000):
        value = torch.full((400, 500), float(step))
        optimizers = {"student": {"x": shard(value, over)}}
        save_checkpoint(
            workdir, step, {"student": {"x": shard(value, over)}}, optimizers, {}, 1, group=dist.group.WORLD
        ).result(60)
        if step == first and dist.get_rank() == 0:
            os.write(saved, b".")


def killed(workdir, first, delay):
    """Save in two processes, from a step on, and kill both a moment after the first save."""
    reads, writes = os.pipe()
    processes = begun(2, save_for_ever, workdir, first, writes)
    assert os.read(reads, 1) == b"."
    time.sleep(delay)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    assert ended(processes) == [-signal.SIGKILL] * 2
    os.close(reads)
    os.close(writes)


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_processes_that_are_killed_at_any_moment_lose_nothing(tmp_path, times):
    chance, step, interrupted = random.Random(times), 1, 0
    for _ in range(times):
        killed(tmp_path, step, chance.uniform(0, 0.15))
        interrupted += any(path.name.startswith(".") for path in (tmp_path / "checkpoints").iterdir())
        for checkpoint in checkpoint_paths(tmp_path):
            verify_checkpoint(checkpoint)
        newest = checkpoint_paths(tmp_path)[-1]
        number = read_meta(newest).step
        assert number >= step
        assert torch.equal(load_tensors_of(newest, "student")["x"], torch.full((400, 500), float(number)))
        assert torch.equal(load_optimizers(newest)["student"]["x"], torch.full((400, 500), float(number)))
        remove_left(tmp_path)
        assert [p for p in (tmp_path / "checkpoints").iterdir() if p.name.startswith(".")] == []
        step = number + 1
    assert interrupted > times / 3  # or the moments were no moments of saves


# Memory.


def peak():
    """The most memory that this process has had, in KiB."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def save_much(workdir):
    over = mesh("2")
    values = {str(number): shard(torch.ones(1000, 2500), over) for number in range(20)}
    settle = save_checkpoint(
        workdir, 1, {"student": {"x": shard(torch.ones(4), over)}}, {}, {}, 1, group=dist.group.WORLD
    )
    settle.result(60)
    before = peak()
    save_checkpoint(workdir, 2, {"student": values}, {}, {}, 1, group=dist.group.WORLD).result(60)
    kibibytes = peak() - before
    assert 80_000 < kibibytes < 125_000, kibibytes


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says it")
def test_each_process_takes_a_copy_of_its_shards_and_nothing_as_bytes(tmp_path):
    """Which are 100 MB each, of processes whose parent has had little memory, as this one may not."""
    call = f"together(2, save_much, pathlib.Path({str(tmp_path)!r}))"
    script = f"import pathlib, sys; sys.path[:0] = {sys.path!r}; from {Path(__file__).stem} import *; {call}"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert sum(path.stat().st_size for path in checkpoint_path(tmp_path, 2).iterdir()) > 200_000_000
    shutil.rmtree(tmp_path / "checkpoints")


# Runs.


def share_out(run, other):
    """Save what a run's checkpoint holds as two processes would."""
    checkpoint, over = checkpoint_paths(run)[-1], mesh("2")
    meta = read_meta(checkpoint)
    states = {
        name: {k: shard(v, over) if v.dim() else v for k, v in load_tensors_of(checkpoint, name).items()}
        for name in ("student", "ema", "online")
    }
    save_checkpoint(
        other, meta.step, states, load_optimizers(checkpoint), meta.counters, 1, meta.sums, dist.group.WORLD
    ).result(60)


def test_a_run_in_parts_is_sampled_continued_and_its_averages_are_kept(tmp_path):
    gin_file, run = write(tmp_path / "ring.gin", steps=8), tmp_path / "run"
    flowdistill.train(gin_file, workdir=run, report=False)
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints"))
    together(2, share_out, run, other)
    (checkpoint,) = checkpoint_paths(other)
    assert len(read_meta(checkpoint).files("ema")) == 2
    assert torch.equal(flowdistill.sample(other, 4), flowdistill.sample(run, 4))
    keep_averages(checkpoint, 1)
    same(load_tensors_of(other / "averages" / checkpoint.name, "ema"), flowdistill.Run(run).tensors("ema"))
    assert not list((other / "averages" / checkpoint.name).glob("student*"))
    for workdir in (run, other):
        flowdistill.train(gin_file, gin_bindings=["train.steps = 12"], workdir=workdir, report=False)
    for path in checkpoint_paths(run)[-1].glob("*.safetensors"):
        assert path.read_bytes() == (checkpoint_paths(other)[-1] / path.name).read_bytes()
    for path in checkpoint.glob("ema.*"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ema\.00001-of-00002\.safetensors is truncated or altered"):
        flowdistill.load_flow_map(checkpoint)


# FSDP2.


def fsdp(seed, layout):
    """A network whose blocks PyTorch shards, with rows that are no multiple of the processes, and its optimiser."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(torch.nn.Linear(3, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 3))
    over = mesh(layout)
    for block in network:
        fully_shard(block, mesh=over)
    fully_shard(network, mesh=over)
    return network, adamw(network.parameters())


def train(network, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        network(torch.randn(6, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save_and_continue(workdir, layout):
    network, optimizer = fsdp(0, layout)
    train(network, optimizer, range(2))
    optimizers, group = {"student": optimizer.state_dict()}, dist.new_group(backend="gloo")
    saving = save_checkpoint(workdir, 2, {"student": network.state_dict()}, optimizers, {}, 1, group=group)
    train(network, optimizer, range(2, 4))
    checkpoint = saving.result(60)
    again, optimizer = fsdp(1, layout)
    fill(checkpoint, {"student": again.state_dict()})
    restore(optimizer, load_optimizers(checkpoint, {"student": optimizer})["student"], adamw, checkpoint)
    train(again, optimizer, range(2, 4))
    same(again.state_dict(), network.state_dict())


@pytest.mark.parametrize("layout", ["2", "2x2"])
def test_a_network_of_fsdp_continues_bit_for_bit(tmp_path, layout):
    together(LAYOUTS[layout][0] * LAYOUTS[layout][1], save_and_continue, tmp_path, layout)
