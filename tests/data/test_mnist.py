"""MNIST and Fashion-MNIST from files made here: as published, damaged, missing, and downloaded from our own server."""

import gzip
import hashlib
import http.server
import struct
import threading

import numpy as np
import pytest
import torch
from runs import command

from flowdistill import DATASETS, DataError
from flowdistill.data import FashionMnist, Mnist
from flowdistill.plumbing import caches

both = pytest.mark.parametrize("kind", [Mnist, FashionMnist])
PARTS = ("train", "t10k")


def idx(array, kind=8):
    """An idx file: two zero bytes, the type, the rank, big-endian sizes, the values."""
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def digits(part, n=None):
    """Images and labels that differ in everything; of the training part there are more."""
    n = n or {"train": 7, "t10k": 3}[part]
    generator = np.random.default_rng(PARTS.index(part))
    return generator.integers(0, 256, (n, 28, 28)), generator.integers(0, 10, n)


def content():
    """The four files by their names."""
    files = {}
    for part in PARTS:
        images, labels = digits(part)
        files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"] = idx(images), idx(labels)
    return files


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, data in content().items():
        (folder / name).write_bytes(data)
    return folder


# Whole files.


@both
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_images_and_labels_of_both_parts(folder, compressed, part, kind):
    if compressed:
        for path in list(folder.iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    data = kind(folder, train=part == "train")
    images, labels = digits(part)
    assert data.sample_shape == (1, 28, 28)
    assert data.images.dtype == torch.float32
    torch.testing.assert_close(data.images[:, 0], torch.from_numpy(images).float() / 127.5 - 1)
    assert torch.equal(data.labels, torch.from_numpy(labels))
    assert data.labels.dtype == torch.int64
    assert data.num_classes == 10


def test_black_is_minus_one_and_white_is_one(folder):
    images = np.zeros((2, 28, 28))
    images[1] = 255
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(2)))
    assert Mnist(folder).images.flatten(1).unique(dim=1).tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize(("size", "before", "after"), [(32, 2, 2), (31, 1, 2)])
def test_padded_by_background(folder, size, before, after):
    plain, padded = Mnist(folder), Mnist(folder, size=size)
    assert padded.sample_shape == (1, size, size)
    middle = slice(before, size - after)
    assert torch.equal(padded.images[:, :, middle, middle], plain.images)
    padded.images[:, :, middle, middle] = -1
    assert (padded.images == -1).all()
    with pytest.raises(DataError, match=r"at least 28, not 27"):
        Mnist(folder, size=27)


@both
def test_batches_are_images_with_their_labels(folder, kind):
    data = DATASETS.build(kind.name, folder=str(folder))
    images, labels = data.sample(50, torch.Generator().manual_seed(0))
    assert images.shape == (50, 1, 28, 28)
    for image, label in zip(images, labels, strict=True):
        row = int((data.images == image).flatten(1).all(1).nonzero())
        assert label == data.labels[row]
    again, _ = data.sample(50, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)


# Files that are not.


def refused(folder, kind=Mnist, **kwargs):
    """The message, which says where the files can be had and where to put them."""
    with pytest.raises(DataError) as error:
        kind(folder, **kwargs)
    assert f"{kind.source}/train-images-idx3-ubyte.gz" in str(error.value)
    assert f" {kind.name}.folder is where they lie" in str(error.value)
    return str(error.value)


@both
@pytest.mark.parametrize("name", content())
def test_one_file_is_missing(folder, name, kind):
    (folder / name).unlink()
    message = refused(folder, kind, train=name.startswith("train"))
    assert message.startswith(f"{folder} holds no {name} or {name}.gz; ")
    kind(folder, train=not name.startswith("train"))  # the other part is whole


def test_there_is_no_such_folder(tmp_path):
    assert "nowhere holds no train-images-idx3-ubyte" in refused(tmp_path / "nowhere")
    assert "holds no t10k-images-idx3-ubyte" in refused(str(tmp_path / "nowhere"), train=False)


def damaged():
    whole = content()["train-images-idx3-ubyte"]
    yield "nothing", b""
    yield "half of the type", whole[:3]
    yield "half of the sizes", whole[:10]
    yield "the header alone", whole[:16]
    yield "a byte less", whole[:-1]
    yield "a byte more", whole + b"\0"
    yield "no zeros before it", b"\1" + whole[1:]
    yield "another type", idx(digits("train")[0], kind=9)
    yield "numbers in little-endian order", whole[:4] + struct.pack("<3I", 7, 28, 28) + whole[16:]
    yield "a product that overflows to what is there", b"\0\0\x08\3" + struct.pack(">3I", 2**31, 2**31, 4)
    yield "one number", b"\0\0\x08\0\1"
    yield "a page of the web", b"<html>not found</html>"


@pytest.mark.parametrize(("damage", "data"), [pytest.param(*item, id=item[0]) for item in damaged()])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_is_damaged(folder, damage, data, compressed):
    path = folder / "train-images-idx3-ubyte"
    path.unlink()
    path = path.with_name(f"{path.name}.gz") if compressed else path
    path.write_bytes(gzip.compress(data) if compressed else data)
    message = refused(folder)
    assert str(path) in message or "images of shape" in message


def test_a_compressed_file_is_torn_or_altered(folder):
    name = "train-labels-idx1-ubyte"
    whole = gzip.compress((folder / name).read_bytes())
    (folder / name).unlink()
    path = folder / f"{name}.gz"
    for size in (0, 1, 5, 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder)
    for place in range(10, len(whole)):  # after the header, whose time stamp does not matter
        altered = bytearray(whole)
        altered[place] ^= 0xFF
        path.write_bytes(bytes(altered))
        assert str(path) in refused(folder)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((7, 28, 28)), np.zeros(6)),
        (np.zeros((7, 28, 28)), np.zeros((7, 1))),
        (np.zeros((7, 784)), np.zeros(7)),
        (np.zeros((7, 27, 28)), np.zeros(7)),
        (np.zeros((7, 32, 32)), np.zeros(7)),
        (np.zeros((0, 28, 28)), np.zeros(0)),
        (np.zeros((7, 28, 28)), np.full(7, 10)),
    ],
)
def test_whole_files_of_something_else(folder, images, labels):
    (folder / "train-images-idx3-ubyte").write_bytes(idx(images))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    assert f"images of shape {images.shape} and labels of shape {labels.shape}" in refused(folder)


def test_the_command_line_says_how_to_get_the_data(tmp_path):
    binding = "--gin.mnist.folder='nowhere'"
    done = command("train", "--gin_file", "mnist/sit.gin", binding, "--workdir", "run", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("flowdistill: error: mnist: nowhere holds no train-images-idx3-ubyte")
    assert Mnist.source in done.stderr
    assert "mnist.folder: binding" in done.stderr  # where it was set
    assert list(tmp_path.iterdir()) == []


# Downloaded.


class Server(http.server.BaseHTTPRequestHandler):
    """Serves some files, and counts."""

    def do_GET(self):
        self.server.requests.append(self.path)
        data = self.server.files.get(self.path.rsplit("/", 1)[-1])
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"") + self.server.missing))
        self.end_headers()
        self.wfile.write(data or b"")

    def log_message(self, *_args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The source, whose files have the checksums that are expected, and an empty cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.requests, server.missing = [], 0
    server.files = {f"{name}.gz": gzip.compress(data) for name, data in content().items()}
    for kind in (Mnist, FashionMnist):
        monkeypatch.setattr(kind, "source", f"http://127.0.0.1:{server.server_port}/{kind.name}")
        checksums = {name: hashlib.sha256(data).hexdigest() for name, data in content().items()}
        monkeypatch.setattr(kind, "sha256", checksums)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.stop = lambda: (server.shutdown(), server.server_close(), thread.join())
    yield server
    server.stop()


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


@both
def test_downloaded_once_and_then_read_from_the_cache(server, tmp_path, folder, kind):
    first = kind()
    assert torch.equal(first.images, kind(folder).images)
    names = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    assert server.requests == [f"/{kind.name}/{name}" for name in names]
    assert kept(tmp_path) == names
    assert (tmp_path / "cache" / "flowdistill" / kind.name / names[0]).is_file()
    server.stop()
    again = kind()
    assert torch.equal(again.images, first.images)
    assert torch.equal(again.labels, first.labels)
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte.gz"):  # which was not downloaded
        kind(train=False)


def test_the_two_data_sets_never_take_each_others_files(server, tmp_path):
    Mnist()
    cache = tmp_path / "cache" / "flowdistill"
    server.files["train-images-idx3-ubyte.gz"] = gzip.compress(idx(np.zeros((7, 28, 28))))
    with pytest.raises(DataError, match=r"its SHA-256 differs"):  # so that it asked the server, not MNIST's cache
        FashionMnist()
    assert {path.parent.name for path in cache.rglob("*") if path.is_file()} == {"mnist"}


def test_another_file_than_expected_is_not_kept(server, tmp_path):
    server.files["train-images-idx3-ubyte.gz"] = gzip.compress(idx(np.zeros((7, 28, 28))))
    with pytest.raises(DataError, match=r"its SHA-256 differs; nothing was kept"):
        Mnist()
    assert kept(tmp_path) == []


def test_a_download_that_breaks_off_is_not_kept(server, tmp_path):
    server.missing = 100
    with pytest.raises(DataError, match=r"could not be downloaded from http.*put its four files into a folder"):
        Mnist()
    server.missing = 0
    server.files["train-images-idx3-ubyte.gz"] = b"<html>please log in</html>"
    with pytest.raises(DataError, match=r"could not be downloaded from http"):
        Mnist()
    altered = bytearray(gzip.compress(content()["train-images-idx3-ubyte"]))
    altered[20:40] = bytes(20)
    server.files["train-images-idx3-ubyte.gz"] = bytes(altered)
    with pytest.raises(DataError, match=r"could not be downloaded from http|SHA-256"):
        Mnist()
    assert kept(tmp_path) == []


def test_no_server_and_no_such_file(server, tmp_path):
    del server.files["train-images-idx3-ubyte.gz"]
    with pytest.raises(DataError, match=r"404.*mnist.folder"):
        Mnist()
    server.stop()
    with pytest.raises(DataError, match=r"could not be downloaded from http.*mnist.folder"):
        Mnist()
    assert kept(tmp_path) == []


def test_a_cache_that_is_damaged_or_cannot_be_written(server, tmp_path, monkeypatch):
    first = Mnist()
    path = tmp_path / "cache" / "flowdistill" / "mnist" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"delete it, and it is downloaded again"):
        Mnist()
    path.unlink()
    Mnist()
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()
    path.parent.write_text("in the way")
    monkeypatch.setattr(caches, "_TEMPORARY", [])
    with pytest.warns(RuntimeWarning, match=r"mnist cannot be written .*set XDG_CACHE_HOME"):
        assert len(Mnist().images) == len(first.images)
