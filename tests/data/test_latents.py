"""Latents in shards: what is drawn, what is read, and what is said of wrong folders."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import flowdistill
from flowdistill import DataError
from flowdistill.data import Latents

SHAPE = (2, 3, 3)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shards(folder, posterior=False):
    """Two shards of 3 and 5 latents, each filled with its number; its label is that number as well."""
    for name, numbers in (("00000", range(3)), ("00001", range(3, 8))):
        labels = torch.tensor(list(numbers))
        values = labels.float()[:, None, None, None].expand(-1, *SHAPE).contiguous()
        tensors = {"mean": values, "std": 0.1 * values} if posterior else {"latents": values}
        save_file({**tensors, "labels": labels}, folder / f"{name}.safetensors")
    return Latents(folder, SHAPE, num_classes=8)


def as_archives(folder):
    """The same in archives of NumPy, one with names and one without, in other kinds of numbers."""
    for name, numbers in (("a", range(3)), ("b", range(3, 8))):
        labels = np.array(numbers, dtype=np.int16)
        latents = np.broadcast_to(labels[:, None, None, None], (len(labels), *SHAPE)).astype(np.float16)
        arrays = {"samples": latents, "labels": labels} if name == "a" else {"arr_0": latents, "arr_1": labels}
        np.savez(folder / f"{name}.npz", **arrays)
    return Latents(folder, SHAPE, num_classes=8)


def as_arrays(folder):
    """The same in files of an array each, of another machine's order of bytes."""
    for name, numbers in (("_1", range(3)), ("_2", range(3, 8))):
        labels = np.array(numbers, dtype=">i4")
        latents = np.broadcast_to(labels[:, None, None, None], (len(labels), *SHAPE)).astype(">f4")
        np.save(folder / f"latents{name}.npy", latents)
        np.save(folder / f"labels{name}.npy", labels)
    return Latents(folder, SHAPE, num_classes=8)


@pytest.mark.parametrize("written", [shards, as_archives, as_arrays])
def test_rows_of_all_shards_are_drawn_with_their_labels(written, tmp_path):
    latents, labels = written(tmp_path).sample(500, generator())
    assert latents.shape == (500, *SHAPE)
    assert latents.dtype == torch.float32
    assert torch.equal(latents, labels.float()[:, None, None, None].expand_as(latents))
    counts = torch.bincount(labels, minlength=8)
    assert counts.min() > 35
    assert counts.max() < 95


def test_draws_depend_on_the_generator_alone(tmp_path):
    data = shards(tmp_path)
    (a, p), (b, q), (c, _) = (data.sample(20, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert torch.equal(p, q)
    assert not torch.equal(a, c)


def test_a_posterior_is_drawn_from_anew(tmp_path):
    latents, labels = shards(tmp_path, posterior=True).sample(2000, generator())
    deviations = (latents - labels.float()[:, None, None, None]).flatten(1)
    for number in range(8):
        assert float(deviations[labels == number].std()) == pytest.approx(0.1 * number, rel=0.06)


def test_half_precision_is_read_as_float32(tmp_path):
    save_file({"latents": torch.ones(2, *SHAPE).half(), "labels": torch.zeros(2)}, tmp_path / "a.safetensors")
    latents, labels = Latents(tmp_path, SHAPE).sample(4, generator())
    assert latents.dtype == torch.float32
    assert labels.dtype == torch.int64


def test_one_file_and_posteriors_in_arrays(tmp_path):
    as_arrays(tmp_path)
    assert Latents(tmp_path / "latents_2.npy", SHAPE, num_classes=8).sample(50, generator())[1].min() == 3
    (tmp_path / "x").mkdir()
    np.save(tmp_path / "x" / "mean.npy", np.ones((2, *SHAPE)))
    np.save(tmp_path / "x" / "std.npy", np.full((2, *SHAPE), 0.1))
    np.save(tmp_path / "x" / "labels.npy", np.zeros(2, int))
    latents, _ = Latents(tmp_path / "x", SHAPE).sample(2000, generator())
    assert float(latents.mean()) == pytest.approx(1, abs=0.01)
    assert float(latents.std()) == pytest.approx(0.1, rel=0.06)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


WRONG = {
    "no labels": ({"latents": np.zeros((2, *SHAPE))}, "lacks 'labels'"),
    "objects": ({"latents": np.array([Evil()]), "labels": np.zeros(1, int)}, "not a shard"),
    "text": ({"latents": np.zeros((2, *SHAPE)), "labels": np.array(["0", "1"])}, "not of numbers"),
    "halves": ({"latents": np.zeros((2, *SHAPE)), "labels": np.array([0, 0.5])}, "not in 0 to"),
    "nan": ({"latents": np.zeros((2, *SHAPE)), "labels": np.array([0, np.nan])}, "not in 0 to"),
    "one hot": ({"latents": np.zeros((2, *SHAPE)), "labels": np.eye(2)}, "sample_shape"),
    "none": ({"latents": np.zeros((0, *SHAPE)), "labels": np.zeros(0, int)}, "without latents"),
    "one number": ({"latents": np.zeros((2, *SHAPE)), "labels": np.zeros(())}, "not a shard"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arrays_are_refused(kind, tmp_path, capsys):
    arrays, match = WRONG[kind]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=match):
        Latents(tmp_path, SHAPE).sample(2, generator())
    assert capsys.readouterr().out == ""


def test_damaged_arrays_are_refused(tmp_path):
    np.save(tmp_path / "latents.npy", np.zeros((2, *SHAPE)))
    with pytest.raises(DataError, match=r"labels\.npy"):
        Latents(tmp_path, SHAPE).sample(2, generator())
    np.save(tmp_path / "labels.npy", np.zeros(2, int))
    whole = (tmp_path / "latents.npy").read_bytes()
    for damaged in (
        whole[:-1],
        whole[:20],
        whole.replace(b"descr", b"\0escr"),
        whole.replace(b"(2,", b"(-2"),
        b"",
        b"x",
    ):
        (tmp_path / "latents.npy").write_bytes(damaged)
        with pytest.raises(DataError, match=r"latents\.npy (is not a shard|holds)"):
            Latents(tmp_path, SHAPE).sample(2, generator())


def test_nothing_is_read_before_the_first_sample(tmp_path):
    data = Latents(tmp_path / "nowhere", SHAPE, num_classes=10)
    assert data.sample_shape == SHAPE
    assert data.num_classes == 10
    with pytest.raises(DataError, match=r"nowhere holds no shards .*save_file"):
        data.sample(2, generator())


def test_wrong_shards_are_named(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"no shard")
    with pytest.raises(DataError, match=r"a\.safetensors is not a shard"):
        Latents(tmp_path, SHAPE).sample(2, generator())
    save_file({"latents": torch.zeros(2, *SHAPE)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match=r"a\.safetensors is not a shard .*labels"):
        Latents(tmp_path, SHAPE).sample(2, generator())
    save_file({"latents": torch.zeros(2, *SHAPE), "labels": torch.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="for 3 labels"):
        Latents(tmp_path, SHAPE).sample(2, generator())
    save_file({"latents": torch.zeros(2, *SHAPE), "labels": torch.full((2,), 7)}, tmp_path / "a.safetensors")
    with pytest.raises(DataError, match="not in 0 to 3"):
        Latents(tmp_path, SHAPE, num_classes=4).sample(2, generator())
    with pytest.raises(DataError, match=r"sample_shape"):
        Latents(tmp_path, (4, 8, 8)).sample(2, generator())


def drawn(data, seeds, ahead=()):
    """What is drawn by some seeds, each after the data of another were asked for ahead."""
    results = []
    for i, seed in enumerate(seeds):
        if i < len(ahead):
            data.prefetch(9, generator(ahead[i]))
        results.append(data.sample(9, generator(seed)))
    return results


@pytest.mark.parametrize("ahead", [(1, 2, 3), (2, 2, 9)])
@pytest.mark.parametrize("posterior", [False, True])
def test_what_is_read_ahead_changes_nothing(posterior, ahead, tmp_path):
    plain = drawn(shards(tmp_path, posterior), (1, 2, 3))
    early = drawn(Latents(tmp_path, SHAPE, 8), (1, 2, 3), ahead)
    for (x, y), (other, others) in zip(plain, early, strict=True):
        assert torch.equal(x, other)
        assert torch.equal(y, others)


def test_what_is_read_ahead_is_read_once(tmp_path, monkeypatch):
    data, read = shards(tmp_path), []
    once = data._read
    monkeypatch.setattr(data, "_read", lambda rows: read.append(len(rows)) or once(rows))
    drawn(data, (1, 2), ahead=(1, 2))
    data.prefetch(9, generator(3))
    data.sample(7, generator(4))  # as for a further update of the same step
    data.sample(9, generator(3))
    assert sorted(read) == [7, 9, 9, 9]


def test_little_is_kept_of_what_was_read_in_vain(tmp_path):
    data = shards(tmp_path)
    for seed in range(5):
        data.prefetch(9, generator(seed))
    assert len(data._ahead) == 2


def test_training_reads_the_next_batch_ahead(tmp_path, monkeypatch):
    shards(tmp_path)
    asked, drawn = [], []
    prefetch, sample = Latents.prefetch, Latents.sample
    note = lambda place: lambda data, n, g: place.append(g.initial_seed())  # noqa: E731
    monkeypatch.setattr(Latents, "prefetch", lambda *a: (note(asked)(*a), prefetch(*a))[1])
    monkeypatch.setattr(Latents, "sample", lambda *a: (note(drawn)(*a), sample(*a))[1])
    bindings = [
        "train.teacher = None", "train.flow_map = @network()", "network.network = @sit()",
        "sit.input_size = 3", "sit.patch_size = 3", "sit.in_channels = 2", "sit.hidden_size = 8", "sit.depth = 1",
        "sit.num_heads = 1", "sit.num_classes = 8", "sit.learn_sigma = False", "train.optimizer = @AdamW",
        "train.objective = @meanflow()", "train.states = @noised_data()", "noised_data.dataset = @latents()",
        f"latents.folder = {str(tmp_path)!r}", f"latents.sample_shape = {SHAPE}", "latents.num_classes = 8",
        "train.steps = 3", "train.batch_size = 2", "train.accumulation = 2", "train.sample_every = 0",
    ]  # fmt: skip
    flowdistill.train(gin_bindings=bindings, workdir=tmp_path / "run", device="cpu")
    assert len(drawn) == 6
    assert asked[:-1] == drawn[1:]
