"""Hooks into a training, and the loggers that come with the library."""

import builtins
import json
import struct
import time

import pytest
from runs import command, write
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import flowdistill
from flowdistill import Callback, ConfigError, Logger, NonFiniteError
from flowdistill.runs.records import read_records

FEW = [
    "train.steps = 6", "train.batch_size = 8", "train.log_every = 2", "train.sample_every = 3",
    "train.checkpoint_every = 4", "evaluation.num_samples = 20", "evaluation.teacher_steps = (1,)",
]  # fmt: skip


class Recording(Callback):
    """Writes down what it is told."""

    def __init__(self):
        self.seen = []

    def on_start(self, loop, configuration):
        assert "train.steps = " in configuration
        self.seen.append(("start", loop.step))

    def on_step(self, loop):
        self.seen.append(("step", loop.step))

    def on_record(self, loop, record):
        assert record["learning_rate"] == pytest.approx(loop.trained.optimizer.param_groups[0]["lr"])
        self.seen.append(("record", loop.step))

    def on_picture(self, loop, path):
        assert path.read_bytes().startswith(b"\x89PNG")
        self.seen.append(("picture", loop.step))

    def on_checkpoint(self, loop, path):
        assert flowdistill.Run(path).meta.step <= loop.step
        self.seen.append(("checkpoint", path.name))

    def on_end(self, loop, figures):
        self.seen.append(("end", figures))

    def close(self):
        self.seen.append(("closed",))


def digits(workdir, *bindings, **kwargs):
    return flowdistill.train("freeflow", on="digits", gin_bindings=[*FEW, *bindings], workdir=workdir, **kwargs)


def test_hooks_are_called_in_order_and_may_change_when_a_run_is_continued(tmp_path):
    recording = Recording()
    result = digits(tmp_path, callbacks=[recording])
    *seen, (_, figures), closed = recording.seen
    assert closed == ("closed",)
    assert figures["fid"] == result.metrics["fid"] > 0
    saved = [("checkpoint", "step_00000004"), ("checkpoint", "step_00000006")]
    assert [each for each in seen if each[0] == "checkpoint"] == saved
    assert [each for each in seen if each[0] != "checkpoint"] == [
        ("start", 0), ("step", 1), ("step", 2), ("record", 2), ("step", 3), ("picture", 3),
        ("step", 4), ("record", 4), ("step", 5), ("step", 6), ("record", 6), ("picture", 6),
    ]  # fmt: skip
    again = Recording()
    digits(tmp_path, "train.steps = 7", "train.callbacks = []", callbacks=[again], report=False)
    assert [each for each in again.seen if each[0] in ("start", "step", "end")] == [
        ("start", 6), ("step", 7), ("end", {}),
    ]  # fmt: skip
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


class Broken(Callback):
    def on_step(self, loop):
        if loop.step == 3:
            raise LookupError("mine")


class BrokenLogger(Logger):
    def __init__(self, first):
        self.first, self.closed = first, False

    def on_start(self, loop, configuration):
        if self.first:
            raise OSError("no network")

    def on_record(self, loop, record):
        raise OSError("no network")

    def close(self):
        self.closed = True
        raise OSError("no network")


def test_errors_of_hooks_end_a_training_and_those_of_loggers_do_not(tmp_path):
    gin_file = write(tmp_path / "ring.gin")
    recording, broken = Recording(), BrokenLogger(False)
    with pytest.raises(LookupError, match="mine"):
        flowdistill.train(gin_file, workdir=tmp_path / "a", callbacks=[Broken(), recording], report=False)
    assert recording.seen[-1] == ("closed",)
    recording = Recording()
    with pytest.warns(RuntimeWarning) as caught:
        result = flowdistill.train(gin_file, workdir=tmp_path / "b", callbacks=[broken, recording], report=False)
    assert [str(each.message) for each in caught] == [
        "training goes on without BrokenLogger: no network", "BrokenLogger could not be closed: no network",
    ]  # fmt: skip
    assert (result.steps, broken.closed, recording.seen[-1]) == (12, True, ("closed",))
    recording, broken = Recording(), BrokenLogger(True)
    with pytest.raises(ConfigError, match="the logger BrokenLogger cannot start: no network"):
        flowdistill.train(gin_file, workdir=tmp_path / "c", callbacks=[recording, broken], report=False)
    assert (broken.closed, recording.seen[-1]) == (False, ("closed",))


def test_a_hook_may_end_a_training_as_the_library_does(tmp_path):
    class Stops(Logger):
        def on_start(self, loop, configuration):
            raise NonFiniteError("of its own")

    with pytest.raises(NonFiniteError, match="of its own"):
        flowdistill.train(write(tmp_path / "ring.gin"), workdir=tmp_path / "a", callbacks=[Stops()])


@pytest.mark.parametrize("value", ["3", "[3]", "@tensorboard()", "[@tensorboard]", "'tensorboard'"])
def test_what_is_no_callback_is_refused(tmp_path, value):
    gin_file = write(tmp_path / "ring.gin", callbacks=value)
    with pytest.raises(ConfigError, match="callbacks must be a list of"):
        flowdistill.train(gin_file, workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_callbacks_of_ones_own_by_a_gin_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import flowdistill\n"
        "@flowdistill.register_callback('telling')\n"
        "class Telling(flowdistill.Callback):\n"
        "    def __init__(self, word='saved'): self.word = word\n"
        "    def on_checkpoint(self, loop, path):\n"
        "        print(self.word, path.name, flush=True)\n"
    )
    gin = (tmp_path / "ring.gin").write_text
    text = write(tmp_path / "ring.gin", callbacks="[@telling()]").read_text()
    gin(f"import mine\n{text}telling.word = 'kept'\n")
    done = command("train", "ring.gin", "--workdir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*(f"kept step_{i:08d}" for i in (4, 8, 12)), "run/report.md"]
    # And the run goes on without it.
    flowdistill.train(
        write(tmp_path / "ring.gin"), gin_bindings=["train.steps = 13"], workdir=tmp_path / "run", report=False
    )


# The loggers.


def test_tensorboard_has_pictures_the_configuration_and_the_figures(tmp_path):
    result = digits(tmp_path)
    board = EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "tensors": 0, "scalars": 0}).Reload()
    for name in ("loss", "error", "learning_rate"):
        wanted = [(r["step"], pytest.approx(r[name], rel=1e-5)) for r in read_records(tmp_path) if name in r]
        assert [(event.step, event.value) for event in board.Scalars(name)] == wanted
    assert [event.step for event in board.Images("samples")] == [3, 6]
    pictures = [(tmp_path / "samples" / f"step_{i:08d}.png").read_bytes() for i in (3, 6)]
    assert [event.encoded_image_string for event in board.Images("samples")] == pictures
    (text,) = board.Tensors("config.gin")
    shown = text.tensor_proto.string_val[0].decode()
    assert [line[4:] for line in shown.splitlines()] == (tmp_path / "config.gin").read_text().splitlines()
    (fid,) = board.Scalars("evaluation/fid")
    assert (fid.step, fid.value) == (6, pytest.approx(result.metrics["fid"], rel=1e-5))


def offline_records(folder):
    """All records in the files that W&B keeps without a network."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        data, place, parts = path.read_bytes(), 7, b""
        while place + 7 <= len(data):  # the log format of LevelDB: blocks of 32 KiB, no header across two of them
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            parts += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                found.append(Record.FromString(parts))
                parts = b""
    return found


def test_a_run_of_wandb_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    bindings = ["train.callbacks = [@wandb()]", "wandb.project = 'one-step'"]
    result = digits(tmp_path, *bindings)
    digits(tmp_path, *bindings, "train.steps = 8", report=False)
    for _ in range(300):  # another process of W&B's writes them
        found = offline_records(tmp_path / "wandb")
        if sum(record.HasField("exit") for record in found) == 2:
            break
        time.sleep(0.1)
    runs = [record.run for record in found if record.HasField("run")]
    assert {run.run_id for run in runs} == {(tmp_path / "wandb.id").read_text().strip()}
    assert {(run.project, run.display_name) for run in runs} == {("one-step", tmp_path.name)}
    configured = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    assert configured["train.batch_size"] == "8"
    logged = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for record in found if record.HasField("history")
    ]  # fmt: skip
    records = read_records(tmp_path)
    assert [row["step"] for row in logged if "loss" in row] == [2, 4, 6, 8]
    assert [row["loss"] for row in logged if "loss" in row] == pytest.approx([r["loss"] for r in records])
    assert [row["step"] for row in logged if "samples" in row] == [3, 6, 8]
    summary = {item.key or item.nested_key[0]: item.value_json for r in found for item in r.summary.update}
    assert json.loads(summary["evaluation/fid"]) == pytest.approx(result.metrics["fid"])


@pytest.mark.slow
def test_a_run_of_mlflow_in_a_database(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    place, run = "sqlite:///mlflow.db", tmp_path / "run"
    bindings = ["train.callbacks = [@mlflow()]", f"mlflow.tracking_uri = '{place}'"]
    result = digits(run, *bindings)
    digits(run, *bindings, "train.steps = 8", report=False)
    client = mlflow.MlflowClient(place)
    (found,) = client.search_runs([client.get_experiment_by_name("flowdistill").experiment_id])
    assert found.info.run_id == (run / "mlflow.id").read_text().strip()
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["train.batch_size"] == "8"
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(r["step"], r["loss"]) for r in read_records(run)]
    assert found.data.metrics["evaluation/fid"] == pytest.approx(result.metrics["fid"])
    names = {file.path for file in client.list_artifacts(found.info.run_id, "samples")}
    assert names == {f"samples/step_{i:08d}.png" for i in (3, 6, 8)}

    class Stops(Callback):
        def on_step(self, loop):
            raise LookupError

    with pytest.raises(LookupError):
        digits(run, *bindings, "train.steps = 9", report=False, callbacks=[Stops()])
    assert client.get_run(found.info.run_id).info.status == "KILLED"
    (tmp_path / "mlflow.db").unlink()
    with pytest.raises(ConfigError, match=r"mlflow\.id cannot be continued .* remove the file"):
        digits(run, *bindings, "train.steps = 10", report=False)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch, name):
    whole = builtins.__import__

    def without(module, *rest):
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(module)
        return whole(module, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    gin_file = write(tmp_path / "ring.gin", callbacks=f"[@{name}()]")
    with pytest.raises(ConfigError, match=rf"pip install 'flowdistill\[{name}\]'"):
        flowdistill.train(gin_file, workdir=tmp_path / "run")
