"""Files of torch.save are read as data: ordinary tensors come back bit for bit, and nothing of a file runs."""

import argparse
import collections
import datetime
import enum
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowdistill.plumbing.pickles import as_dictionary
from flowdistill.plumbing.torch_files import TorchFile

FORMATS = [
    {},
    {"_use_new_zipfile_serialization": False},
    {"pickle_protocol": 3},
    {"pickle_protocol": 4},
    {"pickle_protocol": 5},
]


def with_attribute():
    tensor = torch.ones(2)
    tensor.float = "x"
    return tensor


TENSORS = {
    "plain": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).t(),
    "strided": torch.arange(100.0)[10:40:3],
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "a number": torch.tensor(3.5),
    "of no elements": torch.empty(0, 3),
    "a parameter": torch.nn.Parameter(torch.randn(3)),
    "a buffer": torch.nn.Buffer(torch.randn(3)),
    "with an attribute": with_attribute(),
    **{str(d): torch.tensor([0, 1, 1]).to(d) for d in (torch.float16, torch.bfloat16, torch.float64, torch.bool)},
    **{str(d): torch.tensor([0, 1, 7]).to(d) for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)},
}
SHARED = torch.arange(10.0)
TENSORS |= {"first half": SHARED[:5], "second half": SHARED[5:]}


@pytest.mark.parametrize("form", FORMATS)
def test_ordinary_tensors_come_back(tmp_path, form):
    torch.save({"weights": TENSORS}, tmp_path / "x.pt", **form)
    file = TorchFile(tmp_path / "x.pt")
    found = file.tensors(file.content["weights"])
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor.detach()), name
        assert type(found[name]) is torch.Tensor
    found["first half"].zero_()
    assert torch.equal(found["second half"], SHARED[5:])


class Color(enum.Enum):
    RED = 1


class Config(dict):
    """A dictionary of a class of its own."""


HARMLESS = {
    "namespace": argparse.Namespace(lr=1e-4, ckpt=None, path=pathlib.PurePosixPath("/x")),
    "simple namespace": types.SimpleNamespace(a=1),
    "numpy": [np.float64(3.5), np.int64(3), np.arange(3), np.dtype("f4"), np.array(["a"]), np.random.default_rng(0)],
    "times": [datetime.datetime(2024, 1, 2), datetime.timedelta(3), datetime.timezone.utc],
    "paths": [pathlib.Path("x"), pathlib.PurePosixPath("y")],
    "collections": [collections.OrderedDict(a=1), collections.defaultdict(list, b=[2]), collections.Counter("abc")],
    "a deque": collections.deque([1, 2]),
    "sets": [{1, 2}, frozenset({3}), set()],
    "bytes": [b"abc", bytearray(b"abc")],
    "numbers": [1j, 2**70, -1, 1e300, True, None, 3 + 0j, range(3), slice(1, 2)],
    "an enumeration": Color.RED,
    "a dictionary of its own": Config(a=1),
    "a module": torch.nn.Linear(2, 2),
    "tensors": [torch.zeros(3).to_sparse(), torch.zeros(3, dtype=torch.complex64), torch.Size([1]), torch.float16],
    "keys": {(1, "a"): 1, 2: 3, None: 4, 2.5: 5, Color.RED: 6},
    "losses": [float(i) for i in range(20_000)],
}


@pytest.mark.parametrize("form", [form for form in FORMATS if form.get("_use_new_zipfile_serialization", True)])
@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_things_beside_the_weights_are_no_obstacle(tmp_path, kind, form):
    torch.save({"weights": {"a": SHARED}, "beside": HARMLESS[kind], "last": 7}, tmp_path / "x.pt", **form)
    file = TorchFile(tmp_path / "x.pt")
    assert torch.equal(file.tensors(file.content["weights"])["a"], SHARED)
    assert file.content["last"] == 7


def test_the_records_of_namespaces_and_dictionaries_are_readable(tmp_path):
    dictionaries = [Config(a=1), collections.OrderedDict(a=1), {"a": 1}]
    torch.save([*dictionaries, argparse.Namespace(a=1), types.SimpleNamespace(a=1)], tmp_path / "x.pt")
    *found, namespace, simple = TorchFile(tmp_path / "x.pt").content
    assert [as_dictionary(value) for value in found] == [{"a": 1}] * 3
    assert namespace.state == simple.state == {"a": 1}


def test_weights_in_a_dictionary_of_its_own(tmp_path):
    torch.save(Config(a=SHARED), tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    assert torch.equal(file.tensors(as_dictionary(file.content))["a"], SHARED)


def test_what_is_no_tensor_is_left_out(tmp_path):
    torch.save({"a": SHARED, "step": 3, "args": argparse.Namespace(), "none": None, 5: "x"}, tmp_path / "x.pt")
    assert read(tmp_path / "x.pt").keys() == {"a"}


# Refused.


def read(path):
    file = TorchFile(path)
    return file.tensors(file.content)


def refused(path):
    """The message about a file whose tensors cannot be read; it is one line."""
    with pytest.raises(Exception) as error:  # noqa: PT011  (the callers wrap any)
        read(path)
    assert not isinstance(error.value, (RecursionError, MemoryError))
    assert "\n" not in str(error.value)
    return str(error.value)


ODD = {
    "sparse": (torch.zeros(3).to_sparse, "_rebuild_sparse_tensor"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "_rebuild_qtensor"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "_rebuild_nested_tensor"),
    "jagged": (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "NestedTensor"),
    "without memory": (lambda: torch.zeros(3, device="meta"), "_rebuild_meta_tensor"),
    "complex": (lambda: torch.zeros(3, dtype=torch.complex64), "ComplexFloatStorage"),
    "in eight bits": (lambda: torch.zeros(3, dtype=torch.float8_e4m3fn), "_rebuild_tensor_v3"),
    "negated": (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "_rebuild_tensor_v2"),
    "repeated": (lambda: torch.zeros(1).expand(5), "more numbers than the file"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_odd_tensors_are_named(tmp_path, kind):
    make, reason = ODD[kind]
    torch.save({"layer.weight": make()}, tmp_path / "x.pt")
    assert reason in refused(tmp_path / "x.pt")


def test_a_huge_tensor_made_of_many_small_ones(tmp_path):
    one = torch.zeros(10_000)
    torch.save({f"a{i}": one for i in range(100)}, tmp_path / "x.pt")
    assert "larger than the file" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["a" * 5000, "a\x1b[31m", "decoder_blocks." + "9" * 5000])
def test_names_that_cannot_be_shown(tmp_path, name):
    torch.save({name: SHARED}, tmp_path / "x.pt")
    assert "cannot be one" in refused(tmp_path / "x.pt")


def rezipped(path, change=lambda name, content: content, **how):
    """The same archive, with the contents of members changed, written in another way."""
    with zipfile.ZipFile(path) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w", **how) as archive:
        for name, content in members:
            if (changed := change(name, content)) is not None:
                archive.writestr(name, changed)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_archives(tmp_path, method):
    """However large the numbers are, of which the file holds only a short description."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(4_000_000)}, path)
    rezipped(path, compression=method)
    assert path.stat().st_size < 100_000
    assert "compressed" in refused(path)
    assert "save its state dictionary again" in refused(path)


def test_damaged_archives(tmp_path):
    path = tmp_path / "x.pt"

    def message(change=lambda name, content: content, **how):
        torch.save({"a": SHARED}, path)
        rezipped(path, change, **how)
        return refused(path)

    torch.save({"a": SHARED}, path)
    rezipped(path)
    assert torch.equal(read(path)["a"], SHARED)
    assert "lacks its part data/0" in message(lambda name, v: None if name.endswith("/data/0") else v)
    assert "not of torch.save" in message(lambda name, v: None if name.endswith("data.pkl") else v)
    assert "not all in the file" in message(lambda name, v: v[:-4] if name.endswith("/data/0") else v)
    assert "another machine" in message(lambda name, v: b"big" if name.endswith("byteorder") else v)
    torch.save({"a": SHARED}, path)
    numbers = SHARED.numpy().tobytes()
    data = path.read_bytes()
    assert data.count(numbers) == 1
    path.write_bytes(data.replace(numbers, numbers[::-1]))
    assert "checksum" in refused(path)


def test_archives_without_checksums(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": SHARED}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert torch.equal(read(tmp_path / "x.pt")["a"], SHARED)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_files(tmp_path):
    path = tmp_path / "x.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert "not of torch.save" in refused(path)
    for content in (b"", b"\x80", b"<html>404</html>", b"version https://git-lfs", pickle.dumps({"a": 1}), bytes(1000)):
        path.write_bytes(content)
        refused(path)


def archive(path, instructions):
    """A file whose pickle is these instructions."""
    torch.save({"a": SHARED}, path)
    rezipped(path, lambda name, content: instructions if name.endswith("data.pkl") else content)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tuples(count):
    return b")" + b"\x85" * count


DEEP = {
    "a million nested tuples as a key": b"}" + tuples(10**6) + b"Ns",
    "a million nested tuples": b"}" + text("a") + tuples(10**6) + b"s",
    "nested tuples as a key": b"}" + tuples(200_000) + b"Ns",
    "nested sets as a key": b"}(" + b"(" * 90 + b"\x91" * 91 + b"Ns",
    "a tuple of nested tuples as a key": b"}" + b"K\x01" + tuples(200_000) + b"\x86Ns",
    "a million nested lists": b"}" + text("a") + b"]" * 10**6 + b"a" * (10**6 - 1) + b"s",
    "a million marks": b"(" * 10**6,
    "digits": b"I" + b"9" * 100_000 + b"\n",
    "a long number": b"\x8b" + struct.pack("<i", 10**6) + b"\xff" * 10**6,
    "a string of 4 GiB": b"X" + b"\xff" * 4,
    "bytes of 2^62": b"\x8e" + struct.pack("<Q", 2**62),
    "a frame of 2^62": b"\x95" + struct.pack("<Q", 2**62),
}

CHILD = """
import resource, sys, torch
from pathlib import Path
from flowdistill.plumbing.torch_files import TorchFile
torch.save({}, sys.argv[1] + ".good"); TorchFile(Path(sys.argv[1] + ".good"))
size = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) * 1024
resource.setrlimit(resource.RLIMIT_AS, (size + 400 * 2**20, size + 400 * 2**20))
for path in sys.argv[1:]:
    try:
        TorchFile(Path(path))
        print("read")
    except Exception as error:
        print(type(error).__name__, str(error)[:100])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="limits the memory of a process")
def test_deep_and_huge_files_are_refused(tmp_path):
    """In a process of little memory, which lives on."""
    paths = []
    for number, instructions in enumerate(DEEP.values()):
        paths.append(tmp_path / f"{number}.pt")
        archive(paths[-1], b"\x80\x04" + instructions + b".")
    done = subprocess.run([sys.executable, "-c", CHILD, *map(str, paths)], capture_output=True, text=True)
    outcomes = dict(zip(DEEP, done.stdout.splitlines(), strict=False))
    assert outcomes.keys() == DEEP.keys(), done.stderr
    assert all(v.startswith(("ValueError", "UnicodeDecodeError")) for v in outcomes.values()), outcomes


COMMANDS = [
    "os.system",
    "posix.system",
    "nt.system",
    "subprocess.Popen",
    "builtins.eval",
    "__builtin__.exec",
    "sys.exit",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_named(tmp_path, name):
    module, function = name.split(".")
    archive(tmp_path / "x.pt", b"\x80\x02}" + text("a") + f"c{module}\n{function}\n".encode() + text("x") + b"\x85Rs.")
    assert f"wants to run {name}" in refused(tmp_path / "x.pt")


def test_calls_are_records(tmp_path, monkeypatch):
    """Also of what nobody has thought of."""
    called = []
    monkeypatch.setattr(sys.modules[__name__], "danger", called.append, raising=False)
    call = f"c{__name__}\ndanger\n".encode() + text("x") + b"\x85R"
    archive(tmp_path / "x.pt", b"\x80\x02}" + text("a") + call + b"s.")
    with zipfile.ZipFile(tmp_path / "x.pt") as zipped:
        pickle.loads(zipped.read("x/data.pkl"))
    assert called == ["x"]
    record = TorchFile(tmp_path / "x.pt").content["a"]
    assert (record.name, record.arguments) == (f"{__name__}.danger", ("x",))
    assert called == ["x"]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data(), new=st.booleans())
def test_altered_files_are_read_or_refused(tmp_path, data, new):
    buffer = io.BytesIO()
    torch.save({"a": SHARED, "b": TENSORS["transposed"]}, buffer, _use_new_zipfile_serialization=new)
    altered = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.pt"
    path.write_bytes(bytes(altered))
    try:
        file = TorchFile(path)
        tensors = file.tensors(as_dictionary(file.content))
    except Exception as error:
        assert not isinstance(error, (MemoryError, RecursionError))  # noqa: PT017
    else:
        assert all(type(v) is torch.Tensor for v in tensors.values())
