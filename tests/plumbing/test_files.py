"""Files are there whole or not at all, and are known by what is in them."""

import contextlib
import hashlib
import json
import resource
import stat
import warnings

import pytest
import safetensors.torch
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


def test_tensors_that_do_not_fit_on_the_disk_are_an_error_of_the_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write_tensors(tmp_path / "file", {"x": torch.ones(20_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def storable():
    """The types of tensors that safetensors files can hold."""
    for dtype in {each for each in vars(torch).values() if isinstance(each, torch.dtype)}:
        with contextlib.suppress(KeyError), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that some types are of little use
            safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
            yield dtype


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_tensors_of_all_types_and_shapes_are_what_safetensors_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 7)
    tensors = {}
    for dtype in storable():
        for shape in [(), (0,), (0, 3), (3, 2)]:
            size = torch.Size(shape).numel() * dtype.itemsize
            drawn = torch.randint(2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
            tensors[f"{dtype} {shape}"] = drawn.view(dtype).reshape(shape)
    tensors = {name: v for name, v in tensors.items() if name != "torch.float4_e2m1fn_x2 ()"}  # half a pair
    assert len(tensors) > 60
    digest = files.stream_tensors(tmp_path / "file", tensors, {"of": "tests"})
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    found = safetensors.torch.load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert bits(found[name]) == bits(value)
    with safetensors.safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"of": "tests"}


def test_a_tensor_is_stored_as_it_looks_wherever_its_memory_is(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    number = torch.complex(x, 2 * x)
    tensors = {
        "x": x,
        "again": x,
        "part": x[1:],
        "transposed": x.T,
        "expanded": x[:1].expand(4, 3),
        "conjugate": number.conj(),
        "negative": number.conj().imag,
        "trained": torch.nn.Parameter(x),
    }
    files.stream_tensors(tmp_path / "file", tensors)
    found = safetensors.torch.load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value.resolve_conj())
    files.stream_tensors(tmp_path / "other", dict(reversed(tensors.items())))
    assert (tmp_path / "file").read_bytes() == (tmp_path / "other").read_bytes()


@given(st.lists(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.uint8]), max_size=6))
def test_tensors_are_aligned_in_their_file(tmp_path_factory, dtypes):
    """Also those after a tensor of an odd length."""
    path = tmp_path_factory.getbasetemp() / "aligned"
    files.stream_tensors(path, {str(i): torch.zeros(i + 1, dtype=dtype) for i, dtype in enumerate(dtypes)})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for entry in json.loads(data[8 : 8 + length]).values():
        size = dtypes[entry["shape"][0] - 1].itemsize
        assert entry["data_offsets"][0] % size == 0


@pytest.mark.parametrize(
    "value", [torch.ones(2, dtype=torch.complex128), torch.eye(2).to_sparse()], ids=["complex128", "sparse"]
)
def test_tensors_that_no_file_can_hold(tmp_path, value):
    with pytest.raises(TypeError, match=r"safetensors files hold no tensor of torch\.(complex128|sparse_coo)"):
        files.stream_tensors(tmp_path / "file", {"good": torch.ones(2), "bad": value})
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


def test_a_folder_that_a_check_refuses_does_not_take_the_place(tmp_path):
    with files.replaced_folder(tmp_path / "folder") as partial:
        (partial / "old").write_text("")
    seen = []

    def refuse(partial):
        seen.extend(names(partial))
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"), files.replaced_folder(tmp_path / "folder", refuse) as partial:
        (partial / "new").write_text("")
    assert seen == ["new"]
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["old"]


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
