"""Checkpoints that are truncated, foreign, hostile, or cannot be written."""

import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from runs import RING, command, write

import flowdistill
from flowdistill import CheckpointError, CheckpointWriteError
from flowdistill.plumbing import files
from flowdistill.runs import checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    flowdistill.train(gin_file=write(folder / "ring.gin"), workdir=folder / "run")
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def last(run):
    return sorted((run / "checkpoints").glob("step_*"))[-1]


FILES = ["student.safetensors", "ema.safetensors", "online.safetensors", "optimizers.safetensors", "optimizers.json"]


def damage(path, kind):
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if kind == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("name", ["ema.safetensors", "meta.json"])
@pytest.mark.parametrize("kind", ["truncated", "altered", "missing"])
def test_loading_a_damaged_checkpoint_names_the_earlier_one(run, name, kind):
    newest, earlier = last(run), run / "checkpoints" / "step_00000008"
    damage(newest / name, kind)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for path in (run, newest):
        with pytest.raises(CheckpointError, match=rf"step_00000012.*{name}.*; name .*step_00000008, which is whole"):
            flowdistill.load_flow_map(path)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert flowdistill.sample(earlier, 2).shape == (2, 2)
    (earlier / "meta.json").unlink()
    with pytest.raises(CheckpointError, match="no earlier one beside it is whole"):
        flowdistill.load_flow_map(run)


def test_what_is_not_read_is_not_verified(run, finished):
    """The optimisers are most of a checkpoint."""
    for name in FILES:
        if name != "ema.safetensors":
            (last(run) / name).unlink()
    assert torch.equal(flowdistill.sample(run, 4), flowdistill.sample(finished, 4))
    with pytest.raises(CheckpointError, match=r"lacks student.safetensors; name .*step_00000008"):
        flowdistill.Run(run).tensors("student")


@pytest.mark.parametrize("name", ["student.safetensors", "optimizers.json", "meta.json"])
def test_training_continues_from_the_checkpoint_before_a_damaged_one(run, finished, name):
    damage(last(run) / name, "altered")
    with pytest.warns(RuntimeWarning, match=r"step_00000012.*called damaged_step_00000012.* from .*step_00000008"):
        flowdistill.train(gin_file=run / "config.gin", workdir=run)
    assert [p.name for p in checkpoints.checkpoint_paths(run)] == ["step_00000008", "step_00000012"]
    for file in FILES:
        assert (last(run) / file).read_bytes() == (last(finished) / file).read_bytes()
    assert (run / "checkpoints" / "damaged_step_00000012").is_dir()


def test_training_without_a_whole_checkpoint_is_refused_and_touches_nothing(run):
    for checkpoint in checkpoints.checkpoint_paths(run):
        damage(checkpoint / "student.safetensors", "truncated")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=r"step_00000012.*no earlier one is whole"):
        flowdistill.train(gin_file=run / "config.gin", gin_bindings=["train.steps = 20"], workdir=run)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}


DEEP = '{"format": 2, "x": ' + "[" * 100_000 + "]" * 100_000 + "}"


@pytest.mark.parametrize(
    "meta", [b"", b"[]", b"{}", b'{"format": 99}', b"\x00", b"\xff\xfe", DEEP.encode(), b"null", b"3"]
)
def test_meta_data_that_are_none(run, meta):
    (last(run) / "meta.json").write_bytes(meta)
    with pytest.raises(CheckpointError, match=r"meta\.json|format"):
        flowdistill.load_flow_map(run)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {"sha256": {}},
        {"sha256": None},
        {"sha256": {"student.safetensors": 3}},
        {"sha256": {"student.safetensors": "0"}},
        {"sha256": {"student.safetensors": "0" * 64, "../../../config.gin": "0" * 64}},
        {"sha256": {"student.safetensors": "0" * 64, "x" * 5000 + ".safetensors": "0" * 64}},
        {"step": 1e400},
        {"step": -12},
        {"step": "12"},
        {"step": True},
        {"step": 8},
        {"counters": {"teacher_evaluations": "many"}},
        {"counters": [1]},
        {"sums": {"loss": [1.0]}},
        {"sums": {"loss": "x"}},
        {"more": 1},
        {"sha256": {"student.safetensors": "0" * 64, "\ud800.safetensors": "0" * 64}},
    ],
)
def test_meta_data_of_another_form(run, change, signed):
    """Also where whoever changed them has brought the hash of meta.json up to date."""
    path = last(run) / "meta.json"
    meta = json.loads(path.read_text())
    own = meta.pop("meta_sha256")
    meta |= change
    path.write_text(json.dumps({**meta, "meta_sha256": files.json_fingerprint(meta) if signed else own}))
    with pytest.raises(CheckpointError, match=r"step_00000012") as error:
        flowdistill.load_flow_map(run)
    assert len(str(error.value)) < 1000


def test_an_average_that_meta_data_do_not_list_is_not_replaced_by_the_student(run):
    path = last(run) / "meta.json"
    meta = json.loads(path.read_text())
    del meta["sha256"]["ema.safetensors"]
    path.write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged"):
        flowdistill.load_flow_map(run)


def test_a_changed_counter_is_noticed(run):
    path = last(run) / "meta.json"
    path.write_text(path.read_text().replace('"teacher_evaluations": 192', '"teacher_evaluations": 193'))
    with pytest.raises(CheckpointError, match=r"meta\.json is damaged"):
        flowdistill.load_flow_map(run)


# Names.


def test_only_names_that_are_written_here_are_checkpoints(run, finished):
    folder = run / "checkpoints"
    own = ["step_00000008", "step_00000012"]
    others = [
        "step_best",
        "step_9",
        "step_00000008_backup",
        "step_00000012 (copy)",
        "step_000000012",
        "step_00000012\n",
    ]
    for name in others:
        shutil.copytree(folder / "step_00000008", folder / name)
    (folder / "step_notes.txt").write_text("")
    (folder / "step_00000099").write_text("a file")
    os.mkfifo(folder / "step_00000100")
    assert [p.name for p in checkpoints.checkpoint_paths(run)] == own
    assert torch.equal(flowdistill.sample(run, 4), flowdistill.sample(finished, 4))
    assert flowdistill.sample(folder / "step_best", 2).shape == (2, 2)
    flowdistill.train(gin_file=run / "config.gin", gin_bindings=["train.steps = 16"], workdir=run)
    kept = {p.name for p in folder.iterdir()}
    assert kept == {"step_00000012", "step_00000016", *others, "step_notes.txt", "step_00000099", "step_00000100"}


def test_checkpoints_are_ordered_by_their_steps(tmp_path):
    for step in (99_999_999, 100_000_000, 7):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    names = [p.name for p in checkpoints.checkpoint_paths(tmp_path)]
    assert names == ["step_00000007", "step_99999999", "step_100000000"]


def test_what_a_killed_save_has_left_goes_although_nothing_more_is_saved(run):
    folder = run / "checkpoints"
    left = shutil.copytree(folder / "step_00000008", folder / ".step_00000004.discarded")
    other = folder / ".step_notes.discarded"  # not ours
    other.mkdir()
    flowdistill.train(gin_file=run / "config.gin", workdir=run)
    assert not left.exists()
    assert other.exists()


def test_a_copy_under_the_name_of_another_step_is_not_that_step(run):
    shutil.copytree(run / "checkpoints" / "step_00000008", run / "checkpoints" / "step_00000099")
    with pytest.raises(CheckpointError, match=r"holds step 8; name .*step_00000012, which is whole"):
        flowdistill.load_flow_map(run)


def killed_in_a_save(run, point):
    """Save step 2 in the place of step 1 in another process, killed before a change of the disk; whether it ended.

    An empty folder has the name already.
    """
    left = point

    def kill(event, _):
        nonlocal left
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open", "shutil.rmtree"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    process = os.fork()
    if process == 0:
        try:
            save(run, 1, keep=1)
            (run / "checkpoints" / "step_00000002").mkdir()
            sys.addaudithook(kill)
            save(run, 2, keep=1)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


def test_a_name_means_a_whole_checkpoint_wherever_a_save_is_killed(tmp_path):
    for point in itertools.count(1):
        run = tmp_path / str(point)
        ended = killed_in_a_save(run, point)
        saved = checkpoints.checkpoint_paths(run)
        assert saved
        for checkpoint in saved if any(saved[-1].iterdir()) else saved[:-1]:
            checkpoints.verify_checkpoint(checkpoint)
        save(run, 3, keep=1)
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000003"]
        if ended:
            break
    assert point > 20


def test_a_checkpoint_of_another_architecture(run):
    config = (run / "config.gin").read_text().replace("mlp.hidden_size = 16", "mlp.hidden_size = 24")
    (run / "config.gin").write_text(config)
    with pytest.raises(CheckpointError, match=r"another architecture:\n.*\(16.*in the file.*\(24"):
        flowdistill.load_flow_map(run)


def test_a_foreign_file_runs_nothing(run, tmp_path):
    """A pickle that would run a command is refused as data that are not."""
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    for name in ("optimizers.safetensors", "optimizers.json"):
        path = last(run) / name
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            checkpoints.load_optimizers(last(run))
        with pytest.raises(CheckpointError):
            files.load_tensors(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "[]",
        "{}",
        '{"tensor": "99999"}',
        '{"tensor": []}',
        '{"dict": 3}',
        '{"dict": [[[], 1]]}',
        '{"a": 1, "b": 2}',
        "[" * 100_000,
    ],
)
def test_optimisers_that_are_none(run, text):
    (last(run) / "optimizers.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"optimizers\.json is damaged"):
        checkpoints.load_optimizers(last(run))


def module():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 4)


def save(workdir, step, keep=2):
    return checkpoints.save_checkpoint(workdir, step, {"student": module().state_dict()}, {}, {}, keep).result()


def test_the_newest_is_verified_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    verified = []

    def refuse(path, *names):
        verified.append(path)
        raise CheckpointError("the disk lied")

    monkeypatch.setattr(checkpoints, "verify_checkpoint", refuse)
    with pytest.raises(CheckpointError, match="lied"):
        save(tmp_path, 2, keep=1)
    assert verified
    assert (tmp_path / "checkpoints" / "step_00000001").is_dir()


@pytest.mark.parametrize("when", ["write", "rename"])
def test_an_interrupted_save_leaves_the_earlier_checkpoints(tmp_path, monkeypatch, when):
    save(tmp_path, 1)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if when == "write":
        monkeypatch.setattr(files.os, "fsync", fail)
    else:
        monkeypatch.setattr(files.Path, "rename", fail)
    with pytest.raises(CheckpointWriteError, match=r"No space left on device; .*step_00000001, is untouched"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    checkpoints.verify_checkpoint(tmp_path / "checkpoints" / "step_00000001")


LARGE = """
from pathlib import Path
import torch
from flowdistill.runs.checkpoints import save_checkpoint
torch.set_num_threads(1)
module = torch.nn.Module()
for i in range(8):
    module.register_buffer(f"own_{i}", torch.ones(1000, 2500))
for i in range(5):
    module.register_buffer(f"transposed_{i}", module.own_0.T)
    module.register_buffer(f"shared_{i}", module.own_1)
states = {"student": {i: torch.ones(1000, 2500) for i in range(6)}}
def peak():  # unlike ru_maxrss without that of the process that has begun this one
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
before = peak()
path = save_checkpoint(Path(), 1, {"student": module.state_dict()}, states, {}, 1).result()
print(sum(file.stat().st_size for file in path.iterdir()))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says it")
def test_a_save_takes_a_copy_of_the_tensors_and_nothing_as_bytes(tmp_path):
    """Of 24 tensors of 10 MB here nine share a copy with another one, as tied weights do."""
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=tmp_path, capture_output=True, text=True, check=True)
    shutil.rmtree(tmp_path / "checkpoints")
    size, kibibytes = map(int, done.stdout.split())
    assert size > 240_000_000
    assert 140_000 < kibibytes < 170_000


def limit_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk(tmp_path):
    """A process whose files may not grow: exit code 1, one line that says what is safe, the earlier run intact."""
    config = write(tmp_path / "ring.gin", RING + "mlp.hidden_size = 64\n", checkpoint_every=6)
    done = command(
        "train", "--gin_file", config, "--gin.train.steps=12", "--workdir", "run", cwd=tmp_path, preexec_fn=limit_files
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("flowdistill: error: cannot save checkpoint")
    assert "there is none from before" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    again = command("train", "--gin_file", config, "--workdir", "run", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert sys.platform != "win32"
