"""Checkpoints that are truncated, foreign, hostile, or cannot be written."""

import json
import pickle
import resource
import shutil
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


FILES = ["student.safetensors", "ema.safetensors", "online.safetensors", "optimizers.pt"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_files(run, name, damage):
    path = last(run) / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=name):
        flowdistill.load_flow_map(run)
    with pytest.raises(CheckpointError, match=name):
        flowdistill.train(gin_file=run / "config.gin", gin_bindings=["train.steps = 20"], workdir=run)
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert before.keys() == after.keys()
    assert all(before[p] == after[p] for p in before if p.name != "config.gin")
    earlier = sorted((run / "checkpoints").glob("step_*"))[0]
    assert flowdistill.sample(earlier, 2).shape == (2, 2)


@pytest.mark.parametrize("meta", ["", "[]", "{}", '{"format": 99}', "\x00"])
def test_damaged_meta_data(run, meta):
    (last(run) / "meta.json").write_text(meta)
    with pytest.raises(CheckpointError, match=r"meta\.json|format"):
        flowdistill.load_flow_map(run)


def test_names_in_meta_data_do_not_leave_the_checkpoint(run):
    meta = json.loads((last(run) / "meta.json").read_text())
    meta["sha256"]["../../../config.gin"] = "0"
    (last(run) / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="lacks"):
        flowdistill.load_flow_map(run)


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

    path = last(run) / "optimizers.pt"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        checkpoints.load_optimizers(path)
    with pytest.raises(CheckpointError):
        files.load_tensors(path)
    assert not marker.exists()


def module():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 4)


def save(workdir, step, keep=2):
    return checkpoints.save_checkpoint(workdir, step, {"student": module()}, {}, {}, keep)


def test_the_newest_is_verified_before_an_older_one_is_deleted(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    verified = []

    def refuse(path):
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
