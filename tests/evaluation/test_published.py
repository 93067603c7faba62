"""Statistics and arrays as others publish them, and hostile ones: each ends in one message, and nothing is executed."""

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

import flowdistill
from flowdistill import DataError
from flowdistill.evaluation import load_images
from flowdistill.evaluation.features import FeatureExtractor, Inception

MU = np.array([0.5, -1.0, 2.0])
SIGMA = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.25], [0.0, 0.25, 3.0]])
OTHER = {"mu": np.zeros(4), "sigma": np.eye(4)}


class Fake(FeatureExtractor):
    """Stands for Inception, whose weights are not at hand."""

    statistics = "fid"

    def forward(self, images):
        raise AssertionError("statistics need no features")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def edm2(protocol=4, columns=False, dtype="<f8", container=dict):
    sigma = np.asfortranarray(SIGMA) if columns else SIGMA
    fid = container({"mu": MU.astype(dtype), "sigma": sigma.astype(dtype, order="A")})
    return pickle.dumps(container({"num_images": 50, "fd_dinov2": OTHER, "fid": fid}), protocol)


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4"])
@pytest.mark.parametrize("container", [dict, OrderedDict])
def test_statistics_as_edm2_publishes_them(protocol, columns, dtype, container, tmp_path):
    (tmp_path / "img512.pkl").write_bytes(edm2(protocol, columns, dtype, container))
    mean, covariance = load_images(tmp_path / "img512.pkl", Fake()).moments
    assert torch.equal(mean, torch.from_numpy(MU))
    assert torch.equal(covariance, torch.from_numpy(SIGMA))
    assert mean.dtype == covariance.dtype == torch.float64


@pytest.mark.parametrize("core", [b"core", b"_core"])
def test_the_names_of_older_and_newer_versions_of_numpy(core, tmp_path):
    data = pickle.dumps({"mu": MU, "sigma": SIGMA}, 3)  # whose names are lines of text
    data = data.replace(b"numpy._core", b"numpy.core").replace(b"numpy.core", b"numpy." + core)
    (tmp_path / "x.pkl").write_bytes(data)
    assert torch.equal(load_images(tmp_path / "x.pkl", "digits").moments[0], torch.from_numpy(MU))


def test_statistics_belong_to_features(tmp_path):
    """Inception's are known; DINOv2 as EDM2 uses it sees images resized otherwise."""
    assert Inception.statistics == "fid"
    assert flowdistill.FEATURES.get("dinov2").statistics is None
    (tmp_path / "img512.pkl").write_bytes(edm2())
    for features in ("digits", "dinov2"):
        with pytest.raises(DataError, match="of 'fd_dinov2', 'fid', and none of the features of"):
            load_images(tmp_path / "img512.pkl", features)
    (tmp_path / "img512.pkl").write_bytes(pickle.dumps({"fd_dinov2": OTHER}))
    with pytest.raises(DataError, match="of 'fd_dinov2', and none"):
        load_images(tmp_path / "img512.pkl", Fake())


def npz(**arrays):
    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()


def npy(array, **options):
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


def archive(**members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return data.getvalue()


def header(text):
    return b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text.encode()


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def statistics(mu=MU, sigma=SIGMA):
    return {"npz": npz(mu=mu, sigma=sigma), "pkl": pickle.dumps({"fid": {"mu": mu, "sigma": sigma}})}


IMAGES = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8, 1)
NESTED = pickle.MARK * 10_000 + pickle.EMPTY_TUPLE + pickle.TUPLE * 10_000 + pickle.STOP
STATISTICS = {
    "text": statistics(mu=np.array(["a", "b", "c"])),
    "text of numbers": statistics(sigma=np.array([["1"] * 3] * 3)),
    "objects": statistics(mu=np.array([Evil(), 1, 2])),
    "nan": statistics(sigma=np.where(SIGMA == 3, np.nan, SIGMA)),
    "infinite": statistics(mu=np.array([np.inf, 0, 0])),
    "complex": statistics(mu=MU + 1j),
    "another shape": statistics(sigma=np.eye(2)),
    "no shape": statistics(mu=np.array(1.0), sigma=np.array(1.0)),
    "empty": statistics(mu=np.zeros(0), sigma=np.zeros((0, 0))),
    "rows": statistics(mu=MU[None]),
    "not symmetric": statistics(sigma=np.arange(9.0).reshape(3, 3)),
    "a negative variance": statistics(sigma=np.diag([1.0, -1.0, 1.0])),
    "lists": {"pkl": pickle.dumps({"fid": {"mu": [0.0], "sigma": [[1.0]]}})},
    "None": {"pkl": pickle.dumps({"fid": None})},
    "no dictionary": {"pkl": pickle.dumps([MU, SIGMA])},
    "an object": {"pkl": pickle.dumps({"fid": {"mu": Evil(), "sigma": Evil()}})},
    "a bomb": {"pkl": NESTED},
    "truncated": {"pkl": edm2()[:-200], "npz": npz(mu=MU, sigma=SIGMA)[:-100]},
    "altered": {"npz": npz(mu=MU, sigma=SIGMA).replace(MU.tobytes(), MU[::-1].tobytes())},
    "nothing": {"pkl": b"", "npz": b"", "npy": b"", "zip": b""},
    "other bytes": {"pkl": b"no pickle", "npz": b"no archive", "npy": b"no array", "zip": b"no archive"},
    "pickles by other names": {name: pickle.dumps({"x": Evil()}) for name in ("npz", "npy", "zip")},
}
ARRAYS = {
    "floats": {"npz": npz(arr_0=IMAGES / 255), "npy": npy(IMAGES / 255)},
    "channels first": {"npz": npz(arr_0=IMAGES.transpose(0, 3, 1, 2)), "npy": npy(IMAGES.transpose(0, 3, 1, 2))},
    "no images": {"npz": npz(arr_0=IMAGES[:0]), "npy": npy(IMAGES[:0])},
    "images of nothing": {"npy": npy(IMAGES[:, :0])},
    "columns": {"npy": npy(np.asfortranarray(IMAGES))},
    "an object": {"npy": npy(np.array([Evil()]), allow_pickle=True), "npz": npz(arr_0=np.array([Evil()]))},
    "another name": {"npz": npz(images=IMAGES)},
    "truncated": {"npy": npy(IMAGES)[:-5], "npz": archive(arr_0=npy(IMAGES)[:-5])},
    "an unfinished header": {"npy": header("{'descr': '|u1', 'shape': (1, 8"), "npz": archive(arr_0=header("{'a': ("))},
    "no header": {"npy": header(""), "npz": archive(arr_0=b"")},
    "a header of other keys": {"npy": header("{'descr': '|u1'}")},
    "a negative size": {"npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, 8, 8, 1), }")},
    "a header of a call": {"npy": header("__import__('os').abort()")},
    "a nested header": {"npy": header("(" * 9000)},
    "too many images": {"npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8, 1), }")},
    "more images than bytes": {
        "npy": header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**12}, 8, 8, 1), }}")
    },
    "a huge image": {"npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (1, 999999, 999999, 1), }")},
}
HOSTILE = [
    pytest.param(suffix, content, id=f"{kind}, {suffix}")
    for kind, files in [*STATISTICS.items(), *ARRAYS.items()]
    for suffix, content in files.items()
]


@pytest.mark.parametrize(("suffix", "content"), HOSTILE)
@pytest.mark.filterwarnings("error")
def test_hostile_references_end_in_one_message(suffix, content, tmp_path, capsys):
    path = tmp_path / f"reference.{suffix}"
    path.write_bytes(content)
    features = Fake() if suffix == "pkl" else "digits"
    with pytest.raises(DataError) as refused:
        load_images(path, features)
    assert str(path) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1
    assert str(refused.value).isprintable()
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["npz", "pkl", "npy"])
def test_flipped_bytes_never_end_in_a_traceback(suffix, tmp_path):
    whole = {"npz": npz(mu=MU, sigma=SIGMA), "pkl": edm2(), "npy": npy(IMAGES)}[suffix]
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in generator.integers(0, min(len(whole), 300), 3):
            damaged[place] = generator.integers(256)
        (tmp_path / f"x.{suffix}").write_bytes(damaged)
        try:
            load_images(tmp_path / f"x.{suffix}", Fake() if suffix == "pkl" else "digits")
        except DataError:
            refused += 1
    assert refused > 75
