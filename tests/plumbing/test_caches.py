"""Users without a home, and folders that cannot be written: all works, nothing is kept, and one warning says so."""

import os
import pwd
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from runs import command, write

import flowdistill
from flowdistill.evaluation import features, load_images
from flowdistill.plumbing import caches
from flowdistill.plumbing.caches import cached, refusal, usable


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a process that has had no trouble yet."""
    monkeypatch.setattr(caches, "_TEMPORARY", [])
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=["no home", "a home that is a file system of processes", "a cache below a file"])
def homeless(request, monkeypatch, tmp_path):
    if request.param == "no home":
        monkeypatch.delenv("HOME")

        def unknown(uid):
            raise KeyError(f"getpwuid(): uid not found: {uid}")

        monkeypatch.setattr(pwd, "getpwuid", unknown)
    elif request.param == "a cache below a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("HOME", "/proc")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_references_are_kept_for_the_process_alone(homeless, monkeypatch):
    with pytest.warns(RuntimeWarning, match="cannot be written .*set XDG_CACHE_HOME") as warned:
        first = load_images("digits", "digits")
    assert len(warned) == 1
    monkeypatch.setattr("flowdistill.evaluation.references.sample_set", None)  # not needed again
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(first.features, load_images("digits", "digits").features)
    assert not (homeless / "~").exists()


def test_weights_are_downloaded_all_the_same(homeless, monkeypatch):
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda address, path, **options: asked.append(Path(path)))
    with pytest.warns(RuntimeWarning, match="set XDG_CACHE_HOME"):
        path = features._download("https://example.org/weights-0123.pth")
    assert path == asked[0]
    assert refusal(path.parent) is None
    assert not (homeless / "~").exists()


def test_matplotlib_is_given_a_folder(homeless, monkeypatch):
    with pytest.warns(RuntimeWarning, match="set XDG_CACHE_HOME"):
        caches.prepare_matplotlib()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached("other/file")
    assert refusal(Path(os.environ["MPLCONFIGDIR"])) is None
    monkeypatch.delenv("MPLCONFIGDIR")


def test_what_works_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached("a/b") == tmp_path / ".cache" / "flowdistill" / "a" / "b"
        assert usable(tmp_path / "x") == tmp_path / "x"
        caches.prepare_matplotlib()
        assert "MPLCONFIGDIR" not in os.environ
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "y"))
        assert cached("a/b") == tmp_path / "y" / "flowdistill" / "a" / "b"


def test_a_cache_that_can_only_be_read_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached("a/b").write_text("")
    monkeypatch.setattr(caches, "refusal", lambda folder: OSError(30, "Read-only file system"))
    assert cached("a/b") == tmp_path / "flowdistill" / "a" / "b"
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        assert cached("a/c").parent != tmp_path / "flowdistill" / "a"


def test_the_temporary_folder_is_removed_at_the_end():
    code = "from flowdistill.plumbing.caches import cached; print(cached('a/b'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "HOME": "/proc"}, capture_output=True, text=True, timeout=60
    )
    place = Path(done.stdout.strip())
    assert place.parts[1] != "proc"
    assert not place.parent.parent.exists()


@pytest.mark.slow
def test_the_commands_say_it_once(tmp_path):
    """The whole way, with matplotlib and a reference."""
    flowdistill.train(gin_file=write(tmp_path / "ring.gin", steps=2), workdir=tmp_path / "ring")
    few = ["train.steps = 2", "train.sample_every = 0", "train.evaluation = None"]
    flowdistill.train(gin_file="digits/train.gin", gin_bindings=few, workdir=tmp_path / "run")
    env = {"HOME": "/proc"}
    drawn = command("sample", "ring", "--num_samples", 4, cwd=tmp_path, env=env)
    assert drawn.returncode == 0, drawn.stderr
    assert len(drawn.stderr.splitlines()) == 1
    assert "set XDG_CACHE_HOME" in drawn.stderr
    arguments = ("--features", "digits", "--reference", "digits", "--num_samples", 20)
    done = command("evaluate", "run", *arguments, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fid: ")
    assert done.stderr.count("XDG_CACHE_HOME") == 1
