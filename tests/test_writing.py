"""Samples in files: what ADM's evaluator and our own references read, and numbers for all else."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs import command, write

import flowdistill
from flowdistill import ConfigError, NonFiniteError, Run
from flowdistill.decoders import Pixels, StableDiffusionVae
from flowdistill.evaluation import load_images, sample_set
from flowdistill.runs import evaluating
from flowdistill.runs.writing import write_samples

N = 620


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    flowdistill.train(gin_file=write(folder / "ring.gin"), workdir=folder / "ring")
    few = ["train.steps = 2", "train.sample_every = 0", "train.evaluation = None"]
    flowdistill.train(gin_file="digits/train.gin", gin_bindings=few, workdir=folder / "digits")
    return folder


@pytest.fixture
def digits(folder):
    """A run of its own for each test, since some change its student."""
    return Run(folder / "digits")


def bytes_of(samples):
    """Grey images in [-1, 1] as bytes (N, H, W, 1), to the nearest."""
    return (127.5 * (samples + 1)).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_an_archive_as_adms_evaluator_reads_it(digits, tmp_path):
    write_samples(digits, tmp_path / "x.npz", N, labels=None, seed=3, batch_size=64)
    with np.load(tmp_path / "x.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
        assert set(arrays) == {"arr_0", "arr_1"}
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, np.arange(N) % 10)
    wanted = bytes_of(flowdistill.sample(digits, N, seed=3, batch_size=64))
    assert images.shape == wanted.shape == (N, 8, 8, 1)
    assert np.abs(images.astype(int) - wanted).max() <= 1  # halves, which round up or to even
    assert (images != wanted).mean() < 1e-3
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


def test_a_folder_of_pictures(digits, tmp_path):
    (tmp_path / "empty").mkdir()
    write_samples(digits, tmp_path / "empty", 12, labels=4)
    write_samples(digits, tmp_path / "x.npz", 12, labels=4)
    names = sorted(path.name for path in (tmp_path / "empty").iterdir())
    assert names == [f"{i:06d}.png" for i in range(12)]
    pixels = np.stack([np.asarray(Image.open(tmp_path / "empty" / name)) for name in names])
    np.testing.assert_array_equal(pixels[..., None], np.load(tmp_path / "x.npz")["arr_0"])
    with pytest.raises(ConfigError, match="no empty folder"):
        write_samples(digits, tmp_path / "empty", 12)
    assert len(list((tmp_path / "empty").iterdir())) == 12


def test_our_own_references_read_both(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_samples(digits, tmp_path / "x.npz", N)
    write_samples(digits, tmp_path / "x", N)
    pixels = torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).permute(0, 3, 1, 2)
    wanted = sample_set(pixels / 127.5 - 1, None, "digits").features
    for source in (tmp_path / "x.npz", tmp_path / "x"):
        torch.testing.assert_close(load_images(source, "digits").features, wanted)


def test_colours_are_decoded_as_the_models_authors_round(digits, tmp_path):
    """Here by a decoder that takes a margin off and rounds down."""
    digits.student.decoder = Pixels(scale=0.5, crop=6, rounding="down")
    write_samples(digits, tmp_path / "x.npz", 5)
    samples = flowdistill.sample(digits, 5)[:, :, 1:7, 1:7]
    wanted = (127.5 * (0.5 * samples + 1)).clamp(0, 255).floor().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.abs(np.load(tmp_path / "x.npz")["arr_0"].astype(int) - wanted).max() <= 1
    assert (np.load(tmp_path / "x.npz")["arr_0"] == wanted).mean() > 0.99


def test_latents_and_points_stay_numbers(digits, folder, tmp_path):
    write_samples(folder / "ring", tmp_path / "points.npz", 20, seed=1)
    with np.load(tmp_path / "points.npz") as arrays:
        assert set(arrays) == {"samples"}
        np.testing.assert_array_equal(arrays["samples"], flowdistill.sample(folder / "ring", 20, seed=1).numpy())
    with pytest.raises(ConfigError, match=r"\(2,\) are no images"):
        write_samples(folder / "ring", tmp_path / "points")
    digits.student.decoder = StableDiffusionVae()
    with pytest.raises(ConfigError, match="latents, and the run knows no autoencoder"):
        write_samples(digits, tmp_path / "x.npz", 20)
    write_samples(digits, tmp_path / "x.npz", 20, raw=True)
    with np.load(tmp_path / "x.npz") as arrays:
        np.testing.assert_array_equal(arrays["samples"], flowdistill.sample(digits, 20).numpy())
        np.testing.assert_array_equal(arrays["labels"], np.arange(20) % 10)


def test_a_file_is_there_whole_or_not_at_all(digits, tmp_path):
    write_samples(digits, tmp_path / "x.npz", 5)
    before = (tmp_path / "x.npz").read_bytes()
    with torch.no_grad():
        next(digits.student.parameters()).fill_(float("nan"))
    for out in ("x.npz", "y"):
        with pytest.raises(NonFiniteError, match="nothing is written"):
            write_samples(digits, tmp_path / out, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    assert (tmp_path / "x.npz").read_bytes() == before


def test_the_first_samples_are_the_same_however_many_there_are(digits, folder, monkeypatch):
    """And `evaluate` measures just these."""
    many = flowdistill.sample(digits, N, seed=5)
    torch.testing.assert_close(flowdistill.sample(digits, 7, seed=5), many[:7])
    seen, measure = [], evaluating.measure
    monkeypatch.setattr(evaluating, "measure", lambda names, *sets: seen.append(sets[0]) or measure(names, *sets))
    ring = {"num_samples": N, "seed": 5, "device": "cpu"}
    flowdistill.evaluate(folder / "ring", metrics=("sliced_w2",), noise_floor=False, **ring)
    torch.testing.assert_close(seen[0].features, flowdistill.sample(folder / "ring", **ring))


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    for out, written in (("x.npz", True), ("y/", True), ("z.png", True), ("x.dat", False)):
        done = command("sample", folder / "digits", "--num_samples", 3, "--device", "cpu", "--out", out, cwd=tmp_path)
        assert (done.returncode == 0) == written, done.stderr
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (3, 8, 8, 1)
    assert len(list((tmp_path / "y").iterdir())) == 3
