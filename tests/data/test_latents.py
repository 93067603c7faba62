"""Latents in shards: what is drawn, what is read, and what is said of wrong folders."""

import pytest
import torch
from safetensors.torch import save_file

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


def test_rows_of_all_shards_are_drawn_with_their_labels(tmp_path):
    latents, labels = shards(tmp_path).sample(500, generator())
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
