"""Files are there whole or not at all, and are known by what is in them."""

import hashlib
import stat

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowdistill.plumbing import files


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_text(path, "new"),
        lambda path: files.write_json(path, {"new": 1}),
        lambda path: files.write_tensors(path, {"x": torch.ones(2), "y": None}),
    ],
)
def test_a_file_that_cannot_be_renamed_leaves_the_earlier_one(tmp_path, monkeypatch, write):
    path = tmp_path / "new" / "file"
    write(path)
    path.write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(files.os, "replace", fail)
        with pytest.raises(OSError, match="No space"):
            write(path)
    assert path.read_text() == "old"
    assert names(path.parent) == ["file"]
    write(path)
    assert path.read_bytes() != b"old"
    assert names(path.parent) == ["file"]


def test_tensors_that_do_not_fit_on_the_disk_are_an_error_of_the_file(tmp_path, monkeypatch):
    def full(*_):
        raise files.safetensors.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(files.safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"cannot write .*file: .*No space"):
        files.write_tensors(tmp_path / "file", {"x": torch.ones(2)})
    assert names(tmp_path) == []


def test_tensors_can_be_read_by_whoever_may_read_other_files(tmp_path):
    files.write_text(tmp_path / "text", "")
    files.write_tensors(tmp_path / "tensors", {"x": torch.ones(2)})
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("text", "tensors")}
    assert len(modes) == 1
    assert torch.equal(files.load_tensors(tmp_path / "tensors")["x"], torch.ones(2))


def test_a_folder_takes_the_place_of_the_earlier_one_whole(tmp_path):
    folder = tmp_path / "folder"
    for content in ("old", "new"):
        with files.replaced_folder(folder) as partial:
            (partial / content).write_text(content)
            assert not (folder / content).exists()
    assert names(folder) == ["new"]
    with pytest.raises(FileNotFoundError), files.replaced_folder(folder) as partial:
        (partial / "half" / "written").write_text("")
    assert names(tmp_path) == ["folder"]
    assert names(folder) == ["new"]


def test_what_a_killed_process_left_of_a_folder_is_not_a_part_of_it(tmp_path):
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / ".folder.partial" / "left").write_text("")
    with files.replaced_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("")
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["file"]


def test_the_files_of_a_folder_are_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    there = []
    monkeypatch.setattr(files.os, "fsync", lambda _: there.append((tmp_path / "folder").exists()))
    with files.replaced_folder(tmp_path / "folder") as partial:
        (partial / "a").write_text("a")
        (partial / "b").write_text("b")
    assert there == [False, False]


@given(st.binary(), st.integers(0, 50))
def test_a_fingerprint_is_the_sha_256_however_it_is_given(data, cut):
    wanted = hashlib.sha256(data).hexdigest()
    assert files.fingerprint(data) == files.fingerprint([data[:cut], data[cut:]]) == wanted


def test_fingerprints_of_files_json_and_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 7)
    (tmp_path / "file").write_text("more than one chunk")
    assert files.file_fingerprint(tmp_path / "file") == files.fingerprint("more than one chunk")
    assert files.json_fingerprint({"a": 1, "b": None}) == files.json_fingerprint({"b": None, "a": 1})
    assert files.json_fingerprint({"a": 1}) != files.json_fingerprint({"a": "1"})
    torch.manual_seed(0)
    linear, embedding = torch.nn.Linear(2, 2, bias=False), torch.nn.Embedding(2, 2)
    embedding.load_state_dict(linear.state_dict())
    assert files.module_fingerprint(linear) != files.module_fingerprint(embedding)  # the class is a part of it
    before = files.module_fingerprint(linear)
    assert files.module_fingerprint(linear.double()) != before  # and the precision
