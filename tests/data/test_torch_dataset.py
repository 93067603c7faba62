"""Data sets of torch.utils.data as ours: what an item may be, that draws are repeatable, and what workers do."""

import os
import random
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from runs import command, write

from flowdistill import DataError
from flowdistill.data import TorchDataset


class Items(torch.utils.data.Dataset):
    """Items of any kind, made of their number."""

    def __init__(self, make, count=12):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        return self.make(number)


def constant(number):
    return torch.full((3, 4, 4), number / 20 - 0.1), number % 3


def noisy(number):
    """As random transforms draw: of all three generators."""
    return torch.stack([torch.rand(2), torch.from_numpy(np.random.rand(2)), torch.full((2,), random.random())]), number


def deadly(number):
    if number == 5 and os.getpid() != PARENT:
        os.kill(os.getpid(), signal.SIGKILL)
    return constant(number)


def broken(number):
    if number > 8:
        raise OSError("of a damaged file")
    return constant(number)


PARENT = os.getpid()


def draws(data, seeds=(0, 1, 2), ahead=False):
    found = []
    for here, later in zip(seeds, [*seeds[1:], None], strict=True):
        if ahead and later is not None:
            data.prefetch(6, torch.Generator().manual_seed(later))
        found.append(data.sample(6, torch.Generator().manual_seed(here)))
    return found


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda number: torch.full((1, 2, 2), number, dtype=torch.uint8), lambda n: n / 127.5 - 1),
        (lambda number: np.full((1, 2, 2), number / 12), lambda n: n / 12),
        (lambda number: Image.new("L", (2, 2), number), lambda n: n / 127.5 - 1),
        (lambda number: (torch.full((1, 2, 2), -number / 12), torch.tensor(number)), lambda n: -n / 12),
        (lambda number: [np.full((1, 2, 2), -number / 12), number, "more"], lambda n: -n / 12),
        (lambda number: (torch.full((1, 2, 2), -number / 12),), lambda n: -n / 12),
    ],
)
def test_an_item_may_be(make, wanted):
    shifted = Items(lambda number: make(number))
    if isinstance(make(0), np.ndarray):  # which lie above black alone
        shifted = Items(lambda number: make(number) - 1e-6)
    data = TorchDataset(shifted)
    assert data.sample_shape == (1, 2, 2)
    samples, labels = data.sample(300, torch.Generator().manual_seed(0))
    assert samples.dtype == torch.float32
    assert labels is None
    assert sorted({round(float(v), 4) for v in samples[:, 0, 0, 0]}) == sorted(round(wanted(n), 4) for n in range(12))


def test_colours_and_classes():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    samples, labels = TorchDataset(Items(lambda n: (Image.fromarray(pixels), n % 3)), 3).sample(9, torch.Generator())
    torch.testing.assert_close(samples[0], torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1)
    assert labels.dtype == torch.int64
    with pytest.raises(DataError, match="classes that are not in 0 to 1"):
        TorchDataset(Items(lambda n: (Image.fromarray(pixels), n % 3)), 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_draws_are_repeatable_with_workers_and_ahead(workers):
    """And random transforms draw what they would have drawn without."""
    plain = draws(TorchDataset(Items(noisy), num_classes=12))
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    for ahead in (False, True):
        again = draws(TorchDataset(Items(noisy), num_classes=12, workers=workers), ahead=ahead)
        for (x, y), (other, labels) in zip(plain, again, strict=True):
            assert torch.equal(x, other)
            assert torch.equal(y, labels)
    # The generators of the process are left alone.
    after = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert after == (torch.rand(1), np.random.rand(), random.random())
    # Two draws of one item differ.
    x, y = (torch.cat(parts) for parts in zip(*plain, strict=True))
    twice = [x[y == label] for label in y.unique() if (y == label).sum() > 1]
    assert twice
    assert all(not torch.equal(rows[0], rows[1]) for rows in twice)


def test_what_cannot_be_read_is_told():
    with pytest.raises(DataError, match="item 9 of Items cannot be read: of a damaged file"):
        TorchDataset(Items(broken)).sample(100, torch.Generator())
    with pytest.raises(DataError, match="of a damaged file"):
        TorchDataset(Items(broken), workers=1).sample(100, torch.Generator())
    with pytest.raises(DataError, match="a worker that reads items was killed"):
        TorchDataset(Items(deadly), workers=1).sample(100, torch.Generator())
    with pytest.raises(DataError, match="has no items"):
        TorchDataset(Items(constant, count=0))
    with pytest.raises(DataError, match="several shapes"):
        TorchDataset(Items(lambda number: torch.zeros(number + 1)))
    with pytest.raises(DataError, match="is no map-style data set"):
        TorchDataset(iter([torch.zeros(1)]))
    with pytest.raises(DataError, match="0 is not black"):
        TorchDataset(Items(lambda number: torch.full((3, 4, 4), 0.5)))
    with pytest.raises(DataError, match="at least 0"):
        TorchDataset(Items(constant), workers=-1)


@pytest.mark.slow
def test_a_training_on_it(tmp_path):
    """By a gin file, and to the same bits with workers and without."""
    (tmp_path / "mine.py").write_text(
        "import gin, torch\n"
        "@gin.register\n"
        "class Spots(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 100\n"
        "    def __getitem__(self, number):\n"
        "        return torch.rand(2) + number % 2, number % 2\n"
    )
    weights = []
    for workers in (0, 2):
        gin_file = write(
            tmp_path / f"{workers}.gin",
            "import mine\ninclude 'settings/plane.gin'\ninclude 'meanflow/meanflow.gin'\n"
            "train.states = @noised_data()\nnoised_data.dataset = @torch_dataset()\n"
            f"torch_dataset.dataset = @Spots()\ntorch_dataset.workers = {workers}\n"
            "train.evaluation = None\n",
            steps=5,
        )
        done = command("train", gin_file, "--workdir", f"run{workers}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        (checkpoint,) = (tmp_path / f"run{workers}" / "checkpoints").iterdir()
        weights.append((checkpoint / "student.safetensors").read_bytes())
    assert weights[0] == weights[1]
