"""Students as programs, for those who do not have this library: of `torch.export`, and ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowdistill.interfaces import Condition, FlowMap
from flowdistill.plumbing.errors import ConfigError


class _Jump(nn.Module):
    """The jump X(x, t, s) of a student as a function of tensors: labels of a conditional one, and guidance scales."""

    def __init__(self, student: FlowMap) -> None:
        super().__init__()
        self.student = student
        self.names = ["x", "t", "s"]
        self.names += [] if student.num_classes is None else ["labels"]
        self.names += [] if student.guidance is None else ["guidance"]

    def forward(self, x: Tensor, t: Tensor, s: Tensor, *rest: Tensor) -> Tensor:
        given = dict(zip(self.names[3:], rest, strict=True))
        result: Tensor = self.student(x, t, s, Condition(given.get("labels"), given.get("guidance")))
        return result

    def inputs(self) -> tuple[Tensor, ...]:
        """An example of two jumps."""
        like = next(self.student.parameters())
        ones = torch.ones(2, dtype=like.dtype, device=like.device)
        values = {
            "x": torch.zeros((2, *self.student.sample_shape), dtype=like.dtype, device=like.device),
            "t": ones,
            "s": 0 * ones,
            "labels": torch.zeros(2, dtype=torch.long, device=like.device),
            "guidance": ones * (self.student.guidance or 1.0),
        }
        return tuple(values[name] for name in self.names)


def _exported(student: FlowMap) -> tuple[torch.export.ExportedProgram, list[str]]:
    jump = _Jump(student)
    batch = torch.export.Dim("batch")
    rest = tuple({0: batch} for _ in jump.names[3:])
    sizes: Any = (*({0: batch} for _ in range(3)), *((rest,) if rest else ()))
    try:
        with torch.no_grad():
            return torch.export.export(jump, jump.inputs(), dynamic_shapes=sizes), jump.names
    except Exception as error:  # of whatever a network does
        reason = str(error).partition("\n")[0][:200]
        raise ConfigError(f"PyTorch cannot write {type(student).__name__} as a program: {reason}") from error


def _torch(student: FlowMap, folder: Path) -> None:
    program, _ = _exported(student)
    torch.export.save(program, folder / "student.pt2")


def _onnx(student: FlowMap, folder: Path) -> None:
    try:
        import onnxscript  # noqa: F401, which PyTorch's exporter needs
    except ImportError:
        raise ConfigError("writing ONNX needs onnxscript: pip install 'flowdistill[onnx]'") from None
    program, names = _exported(student)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        written: Any = torch.onnx.export(
            program, dynamo=True, input_names=names, output_names=["sample"], verbose=False
        )
        written.save(folder / "student.onnx")


PROGRAMS: Mapping[str, Callable[[FlowMap, Path], None]] = {"torch": _torch, "onnx": _onnx}
"""What writes a student's jump into a folder, in evaluation mode, for batches of any size."""
