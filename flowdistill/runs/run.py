"""A run: a trained model, its configuration and what belongs to it, by the directory that holds them."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from flowdistill.ema import PostHocEma
from flowdistill.flow_maps import build_flow_map
from flowdistill.interfaces import FlowMap, Objective, Teacher
from flowdistill.plumbing.caches import cached
from flowdistill.plumbing.config import Configuration, statements
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import (
    file_fingerprint,
    file_parts,
    fill_module,
    fingerprint,
    json_fingerprint,
    module_fingerprint,
)
from flowdistill.plumbing.randomness import ONE_AT_A_TIME
from flowdistill.plumbing.registry import STATE_SOURCES
from flowdistill.plumbing.statements import Reference
from flowdistill.runs.averages import post_hoc
from flowdistill.runs.checkpoints import (
    Meta,
    checkpoint_paths,
    earlier_whole,
    has_checkpoint_name,
    load_tensors_of,
    read_meta,
    verify_checkpoint,
)
from flowdistill.runs.student_folders import as_range, is_student, load_student, trained_scales

if TYPE_CHECKING:
    from flowdistill.evaluation.comparison import Evaluation

_M = TypeVar("_M", bound=nn.Module)
_PUPILS: ContextVar[tuple[Path, ...]] = ContextVar("_PUPILS", default=())  # the runs whose teachers are being built


class Run:
    """A run directory, or one checkpoint in it, as an object.

    Its parts are read when they are first asked for, and once: functions that take the same `Run` share them. So they
    are not to be changed. Models lie on the CPU.

    Args:
        path: a run directory, whose newest checkpoint is taken, or a checkpoint in it.
        allow_imports: whether the modules that its configuration imports may be imported, and so executed.
        ema: the relative width of the average of the student's weights, of a run with ``train.ema = @post_hoc_ema()``;
            None is the average that the run results in.

    Attributes:
        workdir: the run directory.
        ema: as it was given.

    Raises:
        CheckpointError: the path is neither.

    Examples:
        >>> run = flowdistill.Run("runs/ring")  # doctest: +SKIP
        >>> flowdistill.sample(run, 4).shape, flowdistill.evaluate(run, metrics=("w2",))  # doctest: +SKIP
        (torch.Size([4, 2]), {'w2': 0.09, 'w2_noise_floor': 0.05})
    """

    def __init__(self, path: str | Path, allow_imports: bool = False, ema: float | None = None) -> None:
        self._path, self._allow_imports, self.ema = Path(path), allow_imports, ema
        self._is_checkpoint = (self._path / "meta.json").is_file() or has_checkpoint_name(self._path)
        if not self._is_checkpoint and not (self._path / "config.gin").is_file():
            raise CheckpointError(f"{path} is neither a run directory nor a checkpoint in one")
        self.workdir = self._path.resolve().parent.parent if self._is_checkpoint else self._path

    def __repr__(self) -> str:
        """The class and the path."""
        return f"Run({str(self._path)!r})"

    @classmethod
    def of(cls, run: Run | FlowMap | str | Path) -> Run:
        """The run itself, the run of a path, or what stands for the run of a student, or its folder, that has none."""
        if isinstance(run, Run):
            return run
        if not isinstance(run, FlowMap):
            if not is_student(Path(run)):
                return cls(run)
            return _StudentAlone(load_student(run).requires_grad_(False), trained_scales(Path(run)))
        return _StudentAlone(run)

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the checkpoint; CheckpointError if nothing has been saved yet."""
        if self._is_checkpoint:
            return self._path
        saved = checkpoint_paths(self.workdir)
        if not saved:
            raise CheckpointError(f"{self.workdir} holds no checkpoint yet")
        return saved[-1]

    @cached_property
    def meta(self) -> Meta:
        """The checkpoint's step, counters and hashes.

        Raises:
            CheckpointError: they are missing or damaged; names the earlier checkpoint that is whole.
        """
        with self._earlier_named():
            return read_meta(self.checkpoint)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a network of the checkpoint, such as ``student``; none if it has no such network.

        Raises:
            CheckpointError: their file is missing, truncated or altered; names the earlier checkpoint that is whole.
        """
        if not self.meta.files(name):
            return {}
        with self._earlier_named():
            verify_checkpoint(self.checkpoint, name)
        return load_tensors_of(self.checkpoint, name)

    @contextlib.contextmanager
    def _earlier_named(self) -> Iterator[None]:
        """Inside, errors of the checkpoint name the one before that is whole."""
        try:
            yield
        except CheckpointError as error:
            earlier = earlier_whole(self.checkpoint)
            instead = (
                "no earlier one beside it is whole"
                if earlier is None
                else f"name {earlier}, which is whole, in its place"
            )
            raise CheckpointError(f"{error}; {instead}") from None

    @cached_property
    def config(self) -> Configuration:
        """The configuration that was trained."""
        return Configuration(self.workdir.absolute() / "config.gin", importing=self._allow_imports)

    @cached_property
    def teacher(self) -> Teacher | None:
        """The teacher of the training, as it was guided there, in evaluation mode; None if there was none."""
        with ONE_AT_A_TIME, torch.random.fork_rng(), self._not_its_own_teacher():
            teacher: Teacher | None = self.config.build("train.teacher")
        return None if teacher is None else teacher.eval().requires_grad_(False)

    @contextlib.contextmanager
    def _not_its_own_teacher(self) -> Iterator[None]:
        place, pupils = self.workdir.resolve(), _PUPILS.get()
        if place in pupils:
            raise ConfigError(f"{self.workdir} is its own teacher, directly or through other runs")
        token = _PUPILS.set((*pupils, place))
        try:
            yield
        finally:
            _PUPILS.reset(token)

    @cached_property
    def student(self) -> FlowMap:
        """The trained student in evaluation mode, with averaged weights where an average was kept.

        Raises:
            CheckpointError: the checkpoint, or an average, is missing, damaged, or of another architecture.
            ConfigError: the run keeps no averages for another width, or they do not make it up.
        """
        weights = self._averaged() if self.ema is not None else self.tensors("ema") or self.tensors("student")
        teacher = self.teacher
        with ONE_AT_A_TIME, torch.random.fork_rng(), self.config.in_force("train.flow_map"):
            student = build_flow_map(self.config.build("train.flow_map"), teacher)
        fill_module(student, weights, self.checkpoint)
        return student.eval().requires_grad_(False)

    def _averaged(self) -> dict[str, Tensor]:
        """The student's weights averaged over the width that was asked for."""
        averaging, width = self.config.build("train.ema"), self.ema
        if not isinstance(averaging, PostHocEma):
            raise ConfigError(f"{self.workdir} was trained without train.ema = @post_hoc_ema(): it has one average")
        if not (isinstance(width, (int, float)) and 0 < width < 0.28):
            raise ConfigError(f"the relative width of an average is between 0 and 0.28, not {width}")
        return post_hoc(self.workdir, averaging, width, self.meta.step)

    @cached_property
    def objective(self) -> Objective | None:
        """The objective of the training, not set up."""
        objective: Objective | None = self.config.build("train.objective")
        return objective

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """What was measured at the end of the run; None if nothing was."""
        evaluation: Evaluation | None = self.config.build("train.evaluation")
        return evaluation

    @cached_property
    def scales(self) -> tuple[float, float] | None:
        """The range of guidance scales that the training drew; None where it drew none, or nothing is known of it."""
        bindings = statements(self.workdir / "config.gin")
        sources, values = set(STATE_SOURCES.names()), {binding.part: binding.value for binding in bindings}
        for binding in bindings:
            if binding.parameter == "guidance" and binding.part in sources:
                value = binding.value
                while isinstance(value, Reference):  # a macro, which may stand for another one
                    value = values.pop(value.part, None)  # and never twice for the same
                return as_range(value)
        return None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The hashes of the weights and of the configuration: stored results are known by them."""
        averaged = {} if self.ema is None else {"ema": self.ema}
        return {"weights": self.meta.sha256, "config": file_fingerprint(self.workdir / "config.gin"), **averaged}

    def folder(self, kind: str, **settings: Any) -> Path:
        """The folder for what a job stores, in the run directory.

        Args:
            kind: of the job, such as ``evaluations``.
            **settings: whatever the results depend on beside the run's `identity`, as JSON can say it.
        """
        return self.workdir / kind / json_fingerprint({**self.identity, **self.autoencoder, **settings})[:16]

    @cached_property
    def autoencoder(self) -> dict[str, str]:
        """The hash of the autoencoder in a folder that decodes the student's latents; nothing where there is none."""
        decoder = self.student.decoder
        folder = None if decoder is None or decoder.vae is None else Path(decoder.vae)
        if folder is None or not folder.is_dir():
            return {}
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {"autoencoder": fingerprint(part for path in files for part in file_parts(path))}


class _StudentAlone(Run):
    """A student without a run, such as a released one: nothing is known of its training."""

    def __init__(self, student: FlowMap, scales: tuple[float, float] | None = None) -> None:
        self.student, self.scales = student, scales
        self.teacher = self.objective = self.evaluation = self.ema = None
        self.workdir = Path()

    def __repr__(self) -> str:
        return f"Run.of({type(self.student).__name__})"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The hashes of the weights, and of all numbers and words that modules have beside them."""
        settings = {
            f"{name}.{key}": repr(value)
            for name, module in self.student.named_modules()
            for key, value in vars(module).items()
            if not key.startswith("_") and key != "training" and isinstance(value, _SETTINGS)
        }
        return {
            "weights": module_fingerprint(self.student),
            "settings": settings,
            "decoder": repr(self.student.decoder),
        }

    def folder(self, kind: str, **settings: Any) -> Path:
        """The folder for what a job stores, in the cache of the library."""
        return cached(
            f"students/{kind}/{json_fingerprint({**self.identity, **self.autoencoder, **settings})[:16]}/blocks"
        ).parent


_SETTINGS = (bool, int, float, str, tuple, list, NoneType)


def on_device(model: _M, device: torch.device) -> _M:
    """A model of a run where it is to be evaluated: itself if it lies there, else a copy, so that the run's own stays.

    A model without parameters and buffers lies everywhere.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    return model if all(v.device == device for v in tensors) else copy.deepcopy(model).to(device)
