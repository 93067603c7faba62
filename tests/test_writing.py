"""Samples in files: what ADM's evaluator and our own references read, and numbers for all else."""

import io
import os
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import command, write

import flowdistill
from flowdistill import ConfigError, NonFiniteError, Run
from flowdistill.decoders import Pixels, StableDiffusionVae
from flowdistill.evaluation import load_images, sample_set
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import EDM2
from flowdistill.runs import evaluating, writing
from flowdistill.runs.exporting import export
from flowdistill.runs.sampling import LABELS, make_condition, read_labels
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


def pictures(folder):
    """The pixels of all PNG files in a folder by their names in it."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    return {name: np.asarray(Image.open(folder / name)) for name in names}


def test_a_folder_of_pictures_has_one_for_each_class(digits, tmp_path):
    (tmp_path / "empty").mkdir()
    write_samples(digits, tmp_path / "empty", 12)
    write_samples(digits, tmp_path / "x.npz", 12)
    found = pictures(tmp_path / "empty")
    assert sorted(found, key=lambda name: name[2:]) == [f"{i % 10}/{i:06d}.png" for i in range(12)]
    pixels = np.stack([found[f"{i % 10}/{i:06d}.png"] for i in range(12)])
    np.testing.assert_array_equal(pixels[..., None], np.load(tmp_path / "x.npz")["arr_0"])
    with pytest.raises(ConfigError, match="no empty folder"):
        write_samples(digits, tmp_path / "empty", 12)
    assert len(pictures(tmp_path / "empty")) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "x.npz"]


def test_a_folder_without_classes_is_flat(tmp_path):
    network = EDM2(8, img_channels=1, label_dim=0, model_channels=8, channel_mult=(1,), num_blocks=1)
    student = NetworkFlowMap(network, "anchored")
    write_samples(student, tmp_path / "x", 3)
    assert list(pictures(tmp_path / "x")) == ["000000.png", "000001.png", "000002.png"]
    write_samples(student, tmp_path / "y", 3, shards=True)
    with tarfile.open(tmp_path / "y" / "00000.tar") as shard:
        assert shard.getnames() == ["000000.png", "000001.png", "000002.png"]


def test_shards_hold_the_same_pictures_and_their_classes(digits, tmp_path):
    write_samples(digits, tmp_path / "x", N, seed=2, labels="random")
    write_samples(digits, tmp_path / "y", N, seed=2, labels="random", shards=True)
    assert sorted(path.name for path in (tmp_path / "y").iterdir()) == ["00000.tar", "00001.tar"]
    found = {}
    for path in sorted((tmp_path / "y").iterdir()):
        with tarfile.open(path) as shard:
            entries = {name: shard.extractfile(name).read() for name in shard.getnames()}
        assert len(entries) == 2 * (500 if path.name == "00000.tar" else N - 500)
        for name in (name for name in entries if name.endswith(".png")):
            label = entries[name.replace(".png", ".cls")].decode()
            found[f"{label}/{name}"] = np.asarray(Image.open(io.BytesIO(entries[name])))
    wanted = pictures(tmp_path / "x")
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    # And each is the sample of its number, in the second block as well.
    write_samples(digits, tmp_path / "z.npz", N, seed=2, labels="random")
    with np.load(tmp_path / "z.npz") as arrays:
        for i in range(N):
            np.testing.assert_array_equal(wanted[f"{arrays['arr_1'][i]}/{i:06d}.png"], arrays["arr_0"][i, ..., 0])


def contents(path):
    """All files of a folder, or a file, as bytes; the arrays of an archive."""
    if path.suffix == ".npz":
        return {name: array.tobytes() for name, array in np.load(path).items()}
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


FORMS = [("x.npz", {}), ("x", {}), ("x", {"shards": True})]


@pytest.mark.parametrize(("name", "how"), FORMS)
def test_a_call_that_was_interrupted_is_continued(digits, tmp_path, monkeypatch, name, how):
    """By the same call alone, though one of its parts is damaged."""
    write_samples(digits, tmp_path / "whole" / name, 1100, **how)
    out, drawn, draw = tmp_path / "again" / name, [], writing.draw

    def interrupted(flow_map, n, condition, block, *rest, **kwargs):
        drawn.append(block)
        if block == 2 and len(drawn) == 3:
            raise KeyboardInterrupt
        return draw(flow_map, n, condition, block, *rest, **kwargs)

    monkeypatch.setattr(writing, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_samples(digits, out, 1100, **how)
    assert not out.exists()
    (parts,) = out.parent.iterdir()
    assert parts.name == f"{name}.parts"
    with pytest.raises(ConfigError, match=r"\.parts holds a part of other samples"):
        write_samples(digits, out, 1100, seed=1, **how)
    if name == "x.npz":
        first = parts / "00000.safetensors"
        first.write_bytes(first.read_bytes()[:-1])
    else:
        next(path for path in sorted(parts.rglob("*")) if path.suffix in (".png", ".tar")).unlink()
    write_samples(digits, out, 1100, **how)
    assert drawn == [0, 1, 2, 0, 2]
    assert [path.name for path in out.parent.iterdir()] == [name]
    assert contents(out) == contents(tmp_path / "whole" / name)


def test_an_interrupted_call_into_an_empty_folder_is_continued(digits, tmp_path, monkeypatch):
    draw = writing.draw
    monkeypatch.setattr(writing, "draw", lambda *args, **kwargs: exec("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        write_samples(digits, tmp_path, 5)
    monkeypatch.setattr(writing, "draw", draw)
    moved, rename = [], Path.rename

    def interrupted(path, target):
        moved.append(path)
        if len(moved) == 3:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_samples(digits, tmp_path, 5)
    monkeypatch.setattr(Path, "rename", rename)
    assert 0 < len(list(tmp_path.glob("*.png")) + list(tmp_path.glob("[0-9]"))) < 5
    write_samples(digits, tmp_path, 5)
    assert sorted(contents(tmp_path)) == [f"{i}/{i:06d}.png" for i in range(5)]
    assert not list(tmp_path.glob(".*"))


def test_a_place_that_is_taken_is_left_alone(digits, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    for name in ("link", "taken", "taken/mine.txt"):
        with pytest.raises(ConfigError, match="is there already"):
            write_samples(digits, tmp_path / name, 5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    write_samples(digits, tmp_path / "taken", 600)
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(("name", "how"), FORMS)
def test_processes_share_the_blocks_out(digits, tmp_path, monkeypatch, name, how):
    """The second one, which puts nothing together, and then the first, as torchrun starts them."""
    write_samples(digits, tmp_path / "one" / name, 1600, seed=4, **how)
    drawn, draw = [], writing.draw

    def counted(flow_map, n, condition, block, *rest, **kwargs):
        drawn.append(block)
        return draw(flow_map, n, condition, block, *rest, **kwargs)

    monkeypatch.setattr(writing, "draw", counted)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        write_samples(digits, tmp_path / "two" / name, 1600, seed=4, **how)
        assert (tmp_path / "two" / name).exists() == (rank == 0)
    assert drawn == [1, 3, 0, 2]
    assert contents(tmp_path / "two" / name) == contents(tmp_path / "one" / name)


def test_two_calls_at_once_do_not_mix(digits, tmp_path, monkeypatch):
    draw = writing.draw

    def meanwhile(*args, **kwargs):
        monkeypatch.setattr(writing, "draw", draw)
        for seed in (0, 1):
            with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* is using"):
                write_samples(digits, tmp_path / "x.npz", 5, seed=seed)
        return draw(*args, **kwargs)

    monkeypatch.setattr(writing, "draw", meanwhile)
    write_samples(digits, tmp_path / "x.npz", 5)
    assert len(np.load(tmp_path / "x.npz")["arr_0"]) == 5


def test_no_pictures_are_shards_of_a_file(digits, tmp_path):
    with pytest.raises(ConfigError, match="shards are files in a folder"):
        write_samples(digits, tmp_path / "x.npz", 5, shards=True)


def test_our_own_references_read_all_of_them(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_samples(digits, tmp_path / "x.npz", N)
    write_samples(digits, tmp_path / "x", N)
    pixels = torch.from_numpy(np.load(tmp_path / "x.npz")["arr_0"]).permute(0, 3, 1, 2)
    wanted = sample_set(pixels / 127.5 - 1, None, "digits").features
    torch.testing.assert_close(load_images(tmp_path / "x.npz", "digits").features, wanted)
    order = sorted(range(N), key=lambda i: (i % 10, i))  # a folder is read class by class
    torch.testing.assert_close(load_images(tmp_path / "x", "digits").features, wanted[order])
    write_samples(digits, tmp_path / "y", N, shards=True)
    torch.testing.assert_close(load_images(tmp_path / "y", "digits").features, wanted)


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


@given(st.sampled_from(LABELS), st.integers(1, 12), st.integers(1, 60), st.integers(0, 5), st.data())
def test_labels_of_the_first_samples_do_not_depend_on_their_number(how, num_classes, n, seed, data):
    few = data.draw(st.integers(1, n))
    labels = make_condition(num_classes, n, how, None, seed).labels
    assert torch.equal(make_condition(num_classes, few, how, None, seed).labels, labels[:few])
    assert labels.dtype == torch.int64
    assert bool(((labels >= 0) & (labels < num_classes)).all())
    if how != "random":
        counts = labels.bincount(minlength=num_classes)
        assert counts.max() - counts.min() <= 1


def test_random_labels_are_uniform_and_depend_on_the_seed():
    labels = make_condition(10, 20_000, "random", None, 3).labels
    counts = labels.bincount(minlength=10)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 27.9  # of chi-squared with 9 degrees, 1 in 1000
    assert not torch.equal(labels[:100], make_condition(10, 100, "random", None, 4).labels)
    balanced = make_condition(10, 100, "balanced", None, 3).labels
    assert not torch.equal(balanced, make_condition(10, 100, "in_turn", None).labels)


def test_the_same_labels_are_measured(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    seen, measure = [], evaluating.measure
    monkeypatch.setattr(evaluating, "measure", lambda names, *sets: seen.append(sets[0]) or measure(names, *sets))
    for labels in ("random", "balanced", 3, None):
        flowdistill.evaluate(digits, num_samples=30, labels=labels, noise_floor=False, features="digits")
        wanted = make_condition(10, 30, labels, None).labels
        assert torch.equal(seen[-1].labels, wanted)
    chosen = make_condition(10, 30, "random", None, 3).labels
    drawn = flowdistill.sample(digits, 30, labels="random", seed=3)
    assert torch.equal(drawn, flowdistill.sample(digits, 30, labels=chosen, seed=3))
    assert not torch.equal(drawn, flowdistill.sample(digits, 30, labels=chosen.flip(0), seed=3))
    with pytest.raises(ConfigError, match="in_turn, balanced, random, not 'ordered'"):
        flowdistill.evaluate(digits, num_samples=30, labels="ordered", features="digits")
    for labels in (10**20, [10**20] * 30, ["cat"] * 30, -1, object()):
        with pytest.raises(ConfigError, match=r"labels must be 30 integers \(or one\) in \[0, 10\)"):
            flowdistill.sample(digits, 30, labels=labels)


def test_scales_that_were_not_trained_are_told(tmp_path):
    few = ["train.steps = 1", "train.batch_size = 4", "train.evaluation = None", "from_teacher.guidance = 1.5"]
    scales = ["train.states = @prior()", "prior.guidance = (1.0, 2.5)"]
    flowdistill.train("freeflow", on="digits", gin_bindings=[*few, *scales], workdir=tmp_path / "run", report=False)
    export(tmp_path / "run", tmp_path / "student")
    for place in (tmp_path / "run", tmp_path / "student"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            flowdistill.sample(place, 2, guidance=2.5)
        for call in (flowdistill.sample, lambda *args, **more: write_samples(args[0], tmp_path / "x.npz", 2, **more)):
            with pytest.warns(RuntimeWarning, match=r"scales from 1 to 2\.5, not with 9"):
                call(place, 2, guidance=9.0)
            with pytest.raises(ConfigError, match="finite number, not nan"):
                call(place, 2, guidance=float("nan"))
        done = command("sample", place, "--num_samples", 2, "--guidance", 9, "--out", "x.png", cwd=tmp_path)
        assert (done.returncode, "scales from 1 to 2.5, not with 9" in done.stderr) == (0, True)


def test_files_of_labels(tmp_path):
    (tmp_path / "x.txt").write_text("3 1\n4\n")
    np.save(tmp_path / "x.npy", np.array([3, 1, 4], np.uint16))
    assert read_labels(tmp_path / "x.txt") == read_labels(tmp_path / "x.npy") == [3, 1, 4]
    (tmp_path / "words.txt").write_text("cat dog")
    np.save(tmp_path / "floats.npy", np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("words.txt", "floats.npy", "objects.npy", "empty.npy", "empty.txt", "."):
        with pytest.raises(ConfigError, match="holds no list of classes"):
            read_labels(tmp_path / name)
    with pytest.raises(ConfigError, match="there is no file"):
        read_labels(tmp_path / "radnom")


@pytest.mark.slow
def test_the_command(folder, tmp_path):
    (tmp_path / "classes.txt").write_text("7 7 2")
    for out, written in (("x.npz", True), ("y/", True), ("z.png", True), ("x.dat", False)):
        options = ["--labels", "classes.txt", "--device", "cpu", "--out", out]
        done = command("sample", folder / "digits", *options, cwd=tmp_path)
        assert (done.returncode == 0) == written, done.stderr
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (3, 8, 8, 1)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["arr_1"], [7, 7, 2])
    assert sorted(pictures(tmp_path / "y")) == ["2/000002.png", "7/000000.png", "7/000001.png"]
    for wrong in (["--labels", "1", "cat"], ["--labels", "radnom"], ["--shards"]):
        done = command("sample", folder / "digits", *wrong, cwd=tmp_path)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False)


@pytest.mark.slow
def test_real_processes_share_the_blocks_out(folder, tmp_path):
    """As torchrun starts them, in one go."""
    run, options = str(folder / "digits"), ["--num_samples", "1600", "--device", "cpu", "--shards", "--out"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "flowdistill", "sample", run, *options, "two/"],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    assert [process.communicate(timeout=300)[0] for process in processes] == ["two\n", ""]
    assert [process.returncode for process in processes] == [0, 0]
    done = command("sample", run, *options, "one/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
