"""Loggers: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from attrs.validators import optional

from flowdistill.plumbing import config
from flowdistill.plumbing.errors import ConfigError, in_one_line
from flowdistill.plumbing.fields import of_type
from flowdistill.plumbing.files import write_text
from flowdistill.plumbing.registry import register_callback
from flowdistill.training.callbacks import Logger

if TYPE_CHECKING:
    from flowdistill.training.loop import Loop


@register_callback("tensorboard")
class TensorBoard(Logger):
    """Events in ``tensorboard/`` of the run directory: records, pictures of samples, the configuration, the figures.

    The file is opened for each event, since TensorBoard's own writer dies with its file. TensorBoard hides what files
    of earlier processes say of the steps that are taken again.

    Examples:
        >>> TensorBoard()  # doctest: +ELLIPSIS
        <flowdistill.training.loggers.TensorBoard object at ...>
    """

    def on_start(self, loop: Loop, configuration: str) -> None:
        """Choose the file, and the step from which earlier files are hidden."""
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._path, self._purge_step = loop.workdir / "tensorboard" / name, loop.step + 1
        self._text = configuration

    def on_record(self, loop: Loop, record: Mapping[str, float]) -> None:
        """Write the record as scalars."""
        self._write(loop.step, _scalars(record))

    def on_picture(self, loop: Loop, path: Path) -> None:
        """Write the picture as the image ``samples``."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = path.read_bytes()
        width, height = struct.unpack(">II", data[16:24])  # of a PNG file
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=data)
        self._write(loop.step, [Summary.Value(tag="samples", image=image)])

    def on_end(self, loop: Loop, figures: Mapping[str, float]) -> None:
        """Write the figures as scalars ``evaluation/...``."""
        self._write(loop.step, _scalars({f"evaluation/{name}": value for name, value in figures.items()}))

    def _write(self, step: int, values: Iterable[Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        now = time.time()
        events = [Event(wall_time=now, step=step, summary=Summary(value=[value])) for value in values]
        if not self._path.exists():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            start = SessionLog(status=SessionLog.START)
            events = [
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=self._purge_step, session_log=start),
                Event(wall_time=now, step=0, summary=Summary(value=[_text("config.gin", self._text)])),
                *events,
            ]
        with self._path.open("ab") as file:
            writer = RecordWriter(file)
            for event in events:
                writer.write(event.SerializeToString())


def _scalars(record: Mapping[str, float]) -> list[Any]:
    from tensorboard.compat.proto.summary_pb2 import Summary

    return [Summary.Value(tag=name, simple_value=value) for name, value in record.items()]


def _text(tag: str, text: str) -> Any:
    """A value that TensorBoard shows as text; four blanks before each line keep it as it is in Markdown."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    lines = "".join(f"    {line}\n" for line in text.splitlines())
    plugin = SummaryMetadata.PluginData(plugin_name="text")
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype="DT_STRING", string_val=[lines.encode()], tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)


@register_callback("wandb")
@attrs.define(kw_only=True, eq=False)
class WandB(Logger):
    """A run of Weights & Biases: records, pictures of samples, the configuration, and the figures as its summary.

    A training that is continued continues the same run, whose identity is in ``wandb.id`` in the run directory. W&B's
    own environment variables hold, such as ``WANDB_MODE=offline``. It needs ``pip install 'flowdistill[wandb]'``.

    Examples:
        >>> WandB(project="one-step").project
        'one-step'
    """

    project: str = attrs.field(default="flowdistill", validator=of_type(str))
    """The project that the run belongs to."""
    entity: str | None = attrs.field(default=None, validator=optional(of_type(str)))
    """The user or team; None is the default of the account."""
    name: str | None = attrs.field(default=None, validator=optional(of_type(str)))
    """The name of the run; None is that of the run directory."""

    _run: Any = attrs.field(default=None, init=False)

    def on_start(self, loop: Loop, configuration: str) -> None:
        """Begin or continue the run; ConfigError if W&B is not installed."""
        try:
            import wandb
        except ModuleNotFoundError:
            raise ConfigError("the logger wandb needs W&B: pip install 'flowdistill[wandb]'") from None
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or loop.workdir.resolve().name,
            dir=str(loop.workdir),
            id=_identity(loop.workdir / "wandb.id") or None,
            resume="allow",
            config=_bindings(configuration),
        )
        write_text(loop.workdir / "wandb.id", f"{self._run.id}\n")
        self._run.define_metric("*", step_metric="step")  # a resumed training may take steps again

    def on_record(self, loop: Loop, record: Mapping[str, float]) -> None:
        """Log the record over its step."""
        self._run.log({"step": loop.step, **record})

    def on_picture(self, loop: Loop, path: Path) -> None:
        """Log the picture as ``samples``."""
        import wandb

        self._run.log({"step": loop.step, "samples": wandb.Image(str(path))})

    def on_end(self, loop: Loop, figures: Mapping[str, float]) -> None:
        """Put the figures into the summary as ``evaluation/...``."""
        self._run.summary.update({f"evaluation/{name}": value for name, value in figures.items()})

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


@register_callback("mlflow")
@attrs.define(kw_only=True, eq=False)
class MLflow(Logger):
    """A run of MLflow: records, pictures of samples, the configuration, and the figures.

    A training that is continued continues the same run, whose identity is in ``mlflow.id`` in the run directory.
    MLflow's own environment variables hold. It needs ``pip install 'flowdistill[mlflow]'``.

    Examples:
        >>> MLflow(experiment="one-step").experiment
        'one-step'
    """

    experiment: str = attrs.field(default="flowdistill", validator=of_type(str))
    """The experiment that the run belongs to."""
    tracking_uri: str | None = attrs.field(default=None, validator=optional(of_type(str)))
    """The server, or a database such as ``sqlite:///mlflow.db``; None is ``MLFLOW_TRACKING_URI`` or MLflow's own."""

    _client: Any = attrs.field(default=None, init=False)
    _id: str = attrs.field(default="", init=False)

    def on_start(self, loop: Loop, configuration: str) -> None:
        """Begin or continue the run; ConfigError if MLflow is not installed."""
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError:
            raise ConfigError("the logger mlflow needs MLflow: pip install 'flowdistill[mlflow]'") from None
        self._client = MlflowClient(self.tracking_uri)
        self._id = _identity(loop.workdir / "mlflow.id")
        if self._id:
            try:
                self._client.update_run(self._id, status="RUNNING")
            except Exception as error:
                raise ConfigError(
                    f"the run of {loop.workdir / 'mlflow.id'} cannot be continued ({in_one_line(error)}): remove the "
                    "file to begin another one"
                ) from error
        else:
            found = self._client.get_experiment_by_name(self.experiment)
            experiment = self._client.create_experiment(self.experiment) if found is None else found.experiment_id
            self._id = self._client.create_run(experiment, run_name=loop.workdir.resolve().name).info.run_id
            write_text(loop.workdir / "mlflow.id", f"{self._id}\n")
            self._client.log_text(self._id, configuration, "config.gin")
            for name, value in _bindings(configuration).items():
                self._client.log_param(self._id, name, value[:_LONGEST])

    def on_record(self, loop: Loop, record: Mapping[str, float]) -> None:
        """Log the record, without waiting for the server."""
        for name, value in record.items():
            self._client.log_metric(self._id, name, value, step=loop.step, synchronous=False)

    def on_picture(self, loop: Loop, path: Path) -> None:
        """Log the picture as an artifact in ``samples``."""
        self._client.log_artifact(self._id, str(path), "samples")

    def on_end(self, loop: Loop, figures: Mapping[str, float]) -> None:
        """Log the figures as ``evaluation/...``, and end the run."""
        for name, value in figures.items():
            self._client.log_metric(self._id, f"evaluation/{name}", value, step=loop.step)
        self._client.set_terminated(self._id)
        self._client = None

    def close(self) -> None:
        """End the run as killed if the training did not come to its end."""
        if self._client is not None:  # the training did not come to its end
            self._client.set_terminated(self._id, "KILLED")


_LONGEST = 500  # letters of a parameter in MLflow


def _identity(path: Path) -> str:
    """The identity of a run at a service, as an earlier process kept it; empty if there is none."""
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _bindings(configuration: str) -> dict[str, str]:
    """The values of all bindings of a configuration by their names."""
    return {binding.name: str(binding.value) for binding in config.statements_of(configuration, "config.gin")}
