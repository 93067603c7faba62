"""Train the classifiers whose features judge small images; write weights, reference features and a card.

python benchmarks/train_classifiers.py digits
python benchmarks/train_classifiers.py mnist|fashion_mnist [--folder FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import attrs
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.data import Digits, FashionMnist, IdxImages, Mnist
from flowdistill.evaluation.features import WEIGHTS, SmallClassifier
from flowdistill.evaluation.metrics import frechet_distance, label_agreement
from flowdistill.plumbing.machine import machine

SEED = 0
STEPS = 3000


@attrs.frozen
class Data:
    """Images for training and for the test, and what the features are compared with."""

    train: tuple[Tensor, Tensor]
    """The images and labels of the training."""
    test: tuple[Tensor, Tensor]
    """The images and labels of the test."""
    reference: Tensor
    """The images whose features are stored as the truth."""
    floor: float
    """The value that ``distance`` shall have, which fixes the unit of the features."""
    distance: Callable[[Callable[[Tensor], Tensor]], float]
    """The Frechet distance of two sets of real images, by a function that gives features."""
    extra: dict[str, Tensor]
    """Further tensors to store."""
    described: tuple[str, str, str]
    """The words of the card for the data, for the two sets, and for what else the file holds."""


def digits() -> Data:
    """Scikit-learn's 8x8 digits, of which 360 are held out."""
    data = Digits()
    order = torch.randperm(len(data.images))
    test, train = order[:360], order[360:]
    assert data.labels is not None

    def distance(features: Callable[[Tensor], Tensor]) -> float:
        every, distances = features(data.images), []
        for _ in range(10):
            rows = torch.randperm(len(every))
            distances.append(frechet_distance(every[rows[:898]], every[rows[898:]]))
        return sum(distances) / len(distances)

    return Data(
        (data.images[train], data.labels[train]),
        (data.images[test], data.labels[test]),
        data.images,
        2.1,
        distance,
        {"held_out": test},
        (
            "scikit-learn's 8x8 digits",
            "two random halves of the 1797 real images",
            "The file also holds the features of all real images (`reference`, half precision), so that a model can\n"
            "be judged without the data set, and the rows of the held-out ones (`held_out`).",
        ),
    )


def idx_images(kind: type[IdxImages], folder: str | None) -> Data:
    """MNIST or Fashion-MNIST; the truth is its test part."""
    train, test = kind(folder), kind(folder, train=False)
    assert train.labels is not None
    assert test.labels is not None

    def distance(features: Callable[[Tensor], Tensor]) -> float:
        truth, distances = features(test.images), []
        for _ in range(10):
            rows = torch.randperm(len(train.images))[:2000]
            distances.append(frechet_distance(features(train.images[rows]), truth))
        return sum(distances) / len(distances)

    return Data(
        (train.images, train.labels),
        (test.images, test.labels),
        test.images,
        0.12,
        distance,
        {},
        (
            kind.title,
            "2000 training images to the 10 000 test images",
            "The file also holds the features of all test images (`reference`, half precision), so that a model can\n"
            "be judged without the data set.",
        ),
    )


def augment(images: Tensor) -> Tensor:
    """Shifts, zooms and rotations by a little, and noise."""
    unit = 2 * torch.rand(4, len(images)) - 1
    angle, zoom, dx, dy = unit * torch.tensor([[0.12], [0.08], [0.12], [0.12]])
    cos, sin = torch.cos(angle) * (1 + zoom), torch.sin(angle) * (1 + zoom)
    theta = torch.stack([torch.stack([cos, -sin, dx], -1), torch.stack([sin, cos, dy], -1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved + 0.1 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


def main() -> None:
    """Train a classifier and write its files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["digits", "mnist", "fashion_mnist"])
    parser.add_argument("--folder", help="where the files of the data set are; by default they are downloaded")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    kinds = {"mnist": Mnist, "fashion_mnist": FashionMnist}
    data = digits() if options.name == "digits" else idx_images(kinds[options.name], options.folder)
    network = SmallClassifier(data.reference.shape[-1])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    images, labels = data.train
    for _ in range(STEPS):
        rows = torch.randint(len(images), (128,))
        _, logits = network(augment(images[rows]))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)

    def features(images: Tensor) -> Tensor:
        return torch.cat([network(part)[0] for part in torch.split(images, 1000)])

    images, labels = data.test
    accuracy = label_agreement(torch.cat([network(part)[1] for part in torch.split(images, 1000)]), labels)
    network.scale.mul_((data.floor / data.distance(features)) ** 0.5)
    tensors = {**network.state_dict(), "reference": features(data.reference).half(), **data.extra}
    WEIGHTS.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, WEIGHTS / f"{options.name}.safetensors")
    source, sets, stored = data.described
    card = f"""# The {options.name} classifier

Three convolutions and a linear layer on {source}; its 64 features and its labels judge generated images.
Written by `python benchmarks/train_classifiers.py {options.name}` (seed {SEED}, {STEPS} steps of 128 images; small
shifts, zooms, rotations and noise).

| | |
|---|---|
| accuracy on {len(labels)} held-out images | {accuracy:.4f} |
| Frechet distance of {sets}, mean of 10 | {data.distance(features):.3f} |

The second figure fixes the unit of the features. {stored}

Made on: {machine()}.
"""
    (Path(WEIGHTS) / f"{options.name}.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
