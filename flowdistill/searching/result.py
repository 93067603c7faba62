"""What a search has found, in memory and in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from flowdistill.evaluation.pictures import save_picture
from flowdistill.plumbing.files import read_tensors, write_json, write_tensors


@attrs.frozen(eq=False, kw_only=True)
class SearchResult:
    """The noises that a search has chosen, and what they have cost. Results can be sliced, and joined by `join`."""

    noise: Tensor
    """The noises, ``(N, *sample_shape)``."""
    samples: Tensor
    """The teacher's samples of them, of the same shape."""
    scores: Tensor
    """The verifier's scores of the images of these samples, (N,)."""
    labels: Tensor | None
    """The classes (N,), where there are any."""
    student_evaluations: Tensor
    """The evaluations of the student's network for each sample, as counted, float64 (N,)."""
    teacher_evaluations: Tensor
    """The evaluations of the teacher's network for each sample, as counted, float64 (N,)."""
    cost: Tensor
    """The cost of each sample, in evaluations of the teacher's network, float64 (N,)."""
    folder: Path | None = None
    """The folder of the files of the result, if they have been written."""

    def __len__(self) -> int:
        """N."""
        return len(self.noise)

    def __getitem__(self, rows: slice) -> SearchResult:
        """The result of some samples."""
        columns: dict[str, Any] = {name: None if v is None else v[rows] for name, v in self._tensors().items()}
        return SearchResult(**columns)

    def _tensors(self) -> dict[str, Any]:
        return {name: v for name, v in attrs.asdict(self, recurse=False).items() if name != "folder"}

    @classmethod
    def join(cls, parts: Sequence[SearchResult]) -> SearchResult:
        """The result of all samples of some parts."""
        columns = {name: [part._tensors()[name] for part in parts] for name in parts[0]._tensors()}
        joined: dict[str, Any] = {name: None if v[0] is None else torch.cat(v) for name, v in columns.items()}
        return cls(**joined)

    def save(self, path: Path) -> None:
        """Write to a safetensors file, which is there whole or not at all."""
        write_tensors(path, self._tensors(), hashed=True)

    @classmethod
    def load(cls, path: Path) -> SearchResult | None:
        """What `save` has written to a file; None where there is no such file, or it is damaged."""
        tensors: Any = read_tensors(path)
        return None if tensors is None else cls(**{"labels": None, **tensors})

    @property
    def figures(self) -> dict[str, float]:
        """Number of samples, mean score with its deviation over the samples, and means of what they have cost."""
        return {
            "num_samples": len(self),
            "score": float(self.scores.mean()),
            "score_std": float(self.scores.std()) if len(self) > 1 else 0.0,
            "student_evaluations": float(self.student_evaluations.double().mean()),
            "teacher_evaluations": float(self.teacher_evaluations.double().mean()),
            "cost": float(self.cost.mean()),
        }

    def write(self, folder: Path, images: Tensor, settings: Mapping[str, Any]) -> SearchResult:
        """Write ``result.safetensors``, ``figures.json`` with the settings of the search, and a picture of images."""
        self.save(folder / "result.safetensors")
        write_json(folder / "figures.json", {**self.figures, "settings": settings})
        save_picture(images, folder / "images.png")
        return attrs.evolve(self, folder=folder)
