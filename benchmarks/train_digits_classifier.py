"""Train the classifier whose features judge 8x8 digits; writes weights, reference features and a card into the package.

python benchmarks/train_digits_classifier.py
"""

from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from flowdistill.data import Digits
from flowdistill.evaluation.features import WEIGHTS, DigitsClassifier
from flowdistill.evaluation.metrics import frechet_distance, label_agreement
from flowdistill.evaluation.report import machine

SEED = 0
STEPS = 3000
HELD_OUT = 360
FLOOR = 2.1  # Frechet distance of two halves of the real digits, which fixes the unit of the features


def augment(images: Tensor) -> Tensor:
    """Shifts, zooms and rotations by a little, and noise."""
    unit = 2 * torch.rand(4, len(images)) - 1
    angle, zoom, dx, dy = unit * torch.tensor([[0.12], [0.08], [0.12], [0.12]])
    cos, sin = torch.cos(angle) * (1 + zoom), torch.sin(angle) * (1 + zoom)
    theta = torch.stack([torch.stack([cos, -sin, dx], -1), torch.stack([sin, cos, dy], -1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images + 1, grid, align_corners=False) - 1
    return moved + 0.1 * torch.rand(len(images), 1, 1, 1) * torch.randn_like(images)


def half_distance(features: Tensor) -> float:
    """Mean Frechet distance of random halves."""
    distances = []
    for _ in range(10):
        rows = torch.randperm(len(features))
        distances.append(frechet_distance(features[rows[:898]], features[rows[898:]]))
    return sum(distances) / len(distances)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    digits = Digits()
    order = torch.randperm(len(digits.images))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    network = DigitsClassifier()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS)
    for _ in range(STEPS):
        rows = train[torch.randint(len(train), (128,))]
        _, logits = network(augment(digits.images[rows]))
        loss = F.cross_entropy(logits, digits.labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)
    features, logits = network(digits.images)
    accuracy = label_agreement(logits[test], digits.labels[test])
    network.scale.mul_((FLOOR / half_distance(features)) ** 0.5)
    features, _ = network(digits.images)
    tensors = {**network.state_dict(), "reference": features.half(), "held_out": test}
    WEIGHTS.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, WEIGHTS / "digits.safetensors")
    card = f"""# The digits classifier

Three convolutions and a linear layer on scikit-learn's 8x8 digits; its 64 features and its labels judge generated
digits. Written by `python benchmarks/train_digits_classifier.py` (seed {SEED}, {STEPS} steps of 128 images; small
shifts, zooms, rotations and noise).

| | |
|---|---|
| accuracy on {HELD_OUT} held-out images | {accuracy:.4f} |
| Frechet distance of two random halves of the {len(features)} real images, mean of 10 | {half_distance(features):.3f} |

The second figure fixes the unit of the features. The file also holds the features of all real images (`reference`, half
precision), so that a model can be judged without the data set, and the rows of the held-out ones (`held_out`).

Made on: {machine()}.
"""
    (Path(WEIGHTS) / "digits.md").write_text(card)
    print(card)


if __name__ == "__main__":
    main()
