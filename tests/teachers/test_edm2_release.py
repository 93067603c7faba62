"""Files in EDM2's released format come back bit for bit; hostile ones end in one message and run nothing.

All files are made here: networks of a few small layers, pickled under the names that such files use.
"""

import io
import json
import math
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from contextlib import suppress

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from edm2_files import Call, writing
from edm2_hostile_files import (
    ARGUMENTS,
    COMMAND,
    HOSTILE,
    IMPORTS,
    INSTRUCTIONS,
    SYSTEM,
    call,
    framed,
    network,
    splice,
    storage,
    text,
    text_short,
    with_tensor,
    write,
)
from hypothesis import example, given, settings

from flowdistill.plumbing.errors import CheckpointError
from flowdistill.teachers.edm2.release import read_release

pytestmark = pytest.mark.filterwarnings("error:The given buffer is not writable")


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """No code of any file that a test reads has run: it would have left a file."""
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    yield path
    assert not path.exists()


def read(tmp_path, data):
    path = tmp_path / "network.pkl"
    path.write_bytes(data)
    return read_release(path)


# What is read.


@pytest.mark.parametrize("width", [4, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_tensors_and_arguments_come_back(tmp_path, dtype, width):
    """The wider network has tensors that pickle writes outside of its frames."""
    arguments, tensors = read(tmp_path, write(dtype=dtype, width=width))
    assert arguments == ARGUMENTS
    expected = network(width).to(dtype).state_dict()
    assert list(tensors) == list(expected)
    assert "unet.enc.8x8_conv.weight" in tensors
    assert "logvar_fourier.freqs" in tensors
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32
        if dtype != torch.float16 or not name.endswith("_gain"):
            assert torch.equal(tensor, expected[name].float()), name


def test_gains_in_half_precision(tmp_path):
    """As EDM2 computes them, with gain and quotient in float16; float32 would differ."""
    tensors = read(tmp_path, write())[1]
    expected = network(4).half().state_dict()
    weights = {
        "unet.out_gain": "unet.out_conv.weight",
        "unet.enc.8x8_block0.emb_gain": "unet.enc.8x8_block0.emb_linear.weight",
        "unet.dec.8x8_in0.emb_gain": "unet.dec.8x8_in0.emb_linear.weight",
    }
    for name, weight in weights.items():
        fan_in = expected[weight][0].numel()
        assert fan_in in (3, 36)
        quotient = expected[name] / np.sqrt(fan_in)
        assert quotient.dtype == torch.float16
        assert tensors[name].shape == ()
        torch.testing.assert_close(tensors[name] / math.sqrt(fan_in), quotient.float(), rtol=1e-6, atol=0)
    assert any(tensors[name] != expected[name].float() for name in weights)


def test_tensors_are_their_own(tmp_path):
    """They outlive the file and can be written to."""
    path = tmp_path / "network.pkl"
    path.write_bytes(write(dtype=torch.float32))
    _, tensors = read_release(str(path))
    path.write_bytes(b"")
    for tensor in tensors.values():
        tensor.zero_()


def test_files_of_older_writers(tmp_path):
    """Of numpy 1, and of PyTorch where it gives parameters a state."""
    weight = Call(torch._utils._rebuild_parameter_with_state, torch.ones(4, 4), False, OrderedDict(), {"note": 1})
    data = write(lambda net: net.unet.out_conv._parameters.update(weight=weight))
    old = data.replace(text_short("numpy._core.multiarray"), text_short("numpy.core.multiarray"))
    assert torch.equal(read(tmp_path, framed(old))[1]["unet.out_conv.weight"], torch.ones(4, 4))


def test_module_without_some_members(tmp_path):
    def change(net):
        net.unet.out_conv._parameters["bias"] = None
        net.unet._modules["emb_label"] = None

    assert list(read(tmp_path, write(change))[1]) == list(network(4).state_dict())


def test_what_hostile_files_are_made_of_is_harmless_by_itself(tmp_path):
    """So each of them is refused for what was done to it."""
    for data in (splice(b"N"), splice(b"(" * 50, b"t" * 50), splice(b"]" * 100_000, b"a" * 99_999), with_tensor()):
        assert read(tmp_path, data)[0] == ARGUMENTS
    assert torch.equal(read(tmp_path, with_tensor())[1]["unet.extra"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert read(tmp_path, with_tensor(offset=2, size=(1, 2)))[1]["unet.extra"].tolist() == [[3.0, 4.0]]


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_storages_are_written_as_pytorch_does():
    assert list(torch.load(io.BytesIO(storage()), weights_only=True)) == [1, 2, 3, 4]


# Hostile files.


CHILD = """
import json, os, resource, sys, time
from pathlib import Path
from flowdistill.plumbing.errors import CheckpointError
from flowdistill.teachers.edm2.release import read_release

canary, watched = Path(os.environ["CANARY"]), ("import", "exec", "compile", "pickle.find_class", "subprocess.Popen")
events = []
sys.addaudithook(lambda event, _: events.append(event) if event in watched or event.startswith("os.") else None)

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

for path in sys.argv[1:3]:  # what is imported at first use
    try:
        read_release(path)
    except CheckpointError:
        pass
start = memory("VmPeak")
limit = int((memory("VmSize") + 400) * 2**20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[3:]:
    print(json.dumps({"path": path}), flush=True)
    events.clear()
    begun = time.process_time()
    try:
        outcome = [str(type(read_release(path))), ""]
    except BaseException as error:
        outcome = [type(error).__name__, str(error)]
    seconds, ran = time.process_time() - begun, events + ["canary"] * canary.exists()
    row = {"outcome": outcome, "ran": ran, "seconds": seconds, "megabytes": memory("VmPeak") - start}
    print(json.dumps(row | {"path": path}), flush=True)
    canary.unlink(missing_ok=True)
"""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each hostile file in a process of little memory, by the file's name."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "good").write_bytes(write())
    (folder / "bad").write_bytes(b"bad")
    paths = {key: folder / f"{i}.pkl" for i, key in enumerate(HOSTILE)}
    for key, path in paths.items():
        path.write_bytes(HOSTILE[key][1]())
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, (folder / "good", folder / "bad", *paths.values()))],
        capture_output=True,
        text=True,
        env=os.environ | {"CANARY": str(folder / "canary")},
    )
    rows = {row["path"]: row for row in map(json.loads, done.stdout.splitlines())}
    return {key: rows.get(str(path), {"outcome": ["not reached", done.stderr]}) for key, path in paths.items()}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs the peak of a process's memory")
@pytest.mark.parametrize("key", HOSTILE)
def test_hostile_file_is_refused(outcomes, key):
    """With one message, which names the file and the reason; nothing runs, and little time and memory is needed."""
    row = outcomes[key]
    assert "outcome" in row, "the process died"
    kind, message = row["outcome"]
    assert (kind, row["ran"]) == ("CheckpointError", []), message
    assert message.startswith(f"{row['path']} is not a released EDM2 network: ")
    assert HOSTILE[key][0] in message
    assert "Memory" not in message
    assert "alloc" not in message
    assert len(message) < 1500
    assert message.isprintable()
    assert row["megabytes"] < 100
    assert row["seconds"] < 10


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "missing.pkl", tmp_path, tmp_path / "a" / "b", tmp_path / ("x" * 1000)):
        with pytest.raises(CheckpointError) as caught:
            read_release(path)
        assert str(path) in str(caught.value)


def outcome(path, data):
    """The tensors, or the error's message."""
    path.write_bytes(data)
    try:
        return read_release(path)[1]
    except CheckpointError as error:
        return str(error)


def refused(path, data):
    return str(path) in outcome(path, data)


def refused_or_whole(path, data):
    result = outcome(path, data)
    return str(path) in result or all(isinstance(tensor, torch.Tensor) for tensor in result.values())


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged") / "network.pkl", write()


@settings(max_examples=150)
@given(fraction=st.floats(0, 1, exclude_max=True))
@example(fraction=0.0)
def test_truncated_file(good, fraction):
    path, data = good
    assert refused(path, data[: int(fraction * len(data))])


@settings(max_examples=300)
@given(fraction=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_file_with_a_wrong_byte(good, fraction, flip):
    path, data = good
    place = int(fraction * len(data))
    assert refused_or_whole(path, data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])


@settings(max_examples=100)
@given(fraction=st.floats(0, 1, exclude_max=True), junk=st.binary(min_size=1, max_size=20), length=st.integers(0, 20))
def test_file_with_other_bytes_in_it(good, fraction, junk, length):
    path, data = good
    place = int(fraction * len(data))
    changed = data[:place] + junk + data[place + length :]
    assert refused_or_whole(path, framed(changed) if place > 11 else changed)


@given(data=st.binary(max_size=200))
def test_random_file(good, data):
    assert refused(good[0], data)
    assert refused(good[0], b"\x80\x04" + data + b".")


def test_the_canary_sings(canary):
    """Unpickled as usual, these files run what is in them."""
    storage_that_calls = storage(reference=b"c" + SYSTEM + b"\nsystem\n" + text(COMMAND) + b"\x85R")
    for data in (
        write(),
        b"\x80\x04" + INSTRUCTIONS["GLOBAL"] + b".",
        b"\x80\x04" + INSTRUCTIONS["INST"] + b".",
        b"\x80\x04" + call(*IMPORTS["eval"]) + b".",
        pickle.dumps(Call(torch.storage._load_from_bytes, storage_that_calls), 4),
    ):
        with writing(), suppress(Exception):
            pickle.loads(data)
        canary.unlink()
