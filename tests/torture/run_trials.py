"""Trials of runs: kills, full disks, damaged files, second writers, signals."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from attempts import Ended, attempt, cli, copied
from corpus import Corpus, samples_in

from flowdistill.runs.checkpoints import checkpoint_paths, verify_checkpoint
from flowdistill.runs.records import read_records

_CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_WEIGHTS = ("student.safetensors", "ema.safetensors", "optimizers.safetensors", "optimizers.json")


def _train(corpus: Corpus) -> Callable[[], object]:
    return cli("train", corpus.ring, "--workdir", "run")


def _same_weights(run: Path, other: Path) -> bool:
    """Whether two runs have ended with the same bits."""
    newest = [checkpoint_paths(place)[-1] for place in (run, other)]
    return all((newest[0] / name).read_bytes() == (newest[1] / name).read_bytes() for name in _WEIGHTS)


def _same_records(run: Path, other: Path) -> bool:
    """Whether two runs have the same records, but for the speeds."""
    first, second = ([{**r, "steps_per_second": 0} for r in read_records(place)] for place in (run, other))
    return first == second


def _continued(corpus: Corpus, folder: Path, before: list[Ended], records: bool = True) -> str:
    """The outcome of a training that was disturbed, once nothing disturbs it.

    Args:
        corpus: the undisturbed one.
        folder: where.
        before: how what was disturbed has ended.
        records: whether it must have all records.
    """
    run, last = folder / "run", attempt(_train(corpus), folder)
    faults = [ended.fault for ended in (*before, last) if ended.fault]
    if faults:
        return faults[0]
    same = last.worked and _same_weights(run, corpus.run) and (not records or _same_records(run, corpus.run))
    whole = same and sorted((run / "checkpoints").iterdir()) == checkpoint_paths(run)
    return "continued" if whole else "lost"


def _checkpoints_whole(folder: Path) -> bool:
    return all(verify_checkpoint(path) for path in checkpoint_paths(folder / "run"))


def kill(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """SIGKILL at random moments of up to three trainings, then to the end."""
    for _ in range(chance.randint(1, 3)):
        attempt(_train(corpus), folder, kill_after=chance.uniform(0.0, 0.8))
        if not _checkpoints_whole(folder):
            return "lost"
    return _continued(corpus, folder, [])


def _at_change(number: int, folder: Path, do: Callable[[], None]) -> None:
    """From now on, do something before the given change of files below a folder, and before each one after."""
    seen, place = 0, str(folder)

    def changes(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in _CHANGES or not isinstance(arguments[0], (str, Path)):
            return
        if os.path.isabs(arguments[0]) and not str(arguments[0]).startswith(place):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & _WRITING):
            return
        seen += 1
        if seen >= number:
            do()

    sys.addaudithook(changes)
    sync = os.fsync

    def synced(file: int) -> None:
        nonlocal seen
        seen += 1
        if seen >= number:
            do()
        sync(file)

    os.fsync = synced


def kill_at_a_change(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """SIGKILL before one of the changes that a training makes to files, then to the end."""
    number = chance.randint(1, 130)

    def training() -> None:
        _at_change(number, folder, lambda: os.kill(os.getpid(), signal.SIGKILL))
        _train(corpus)()

    attempt(training, folder)
    return _continued(corpus, folder, []) if _checkpoints_whole(folder) else "lost"


def full_disk(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """No room from some change of files on, then to the end with more room."""
    number = chance.randint(1, 130)

    def refuse() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def training() -> None:
        _at_change(number, folder, refuse)
        _train(corpus)()

    ended = attempt(training, folder)
    if not _checkpoints_whole(folder):
        return "lost"
    return _continued(corpus, folder, [ended], records="training goes on without" not in ended.printed)


def two_writers(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A second training into the same directory, at some moment of the first."""
    (folder / "first").mkdir()
    first = os.fork()
    if first == 0:
        attempt(cli("train", corpus.ring, "--workdir", folder / "run"), folder / "first")
        os._exit(0)
    time.sleep(chance.uniform(0.0, 0.6))
    second = attempt(_train(corpus), folder)
    os.waitpid(first, 0)
    return _continued(corpus, folder, [second])


def stop(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A signal at a random moment, then to the end."""
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    number = getattr(signal, chance.choice(names))
    ended = attempt(_train(corpus), folder, signals=((chance.uniform(0.1, 0.8), number),))
    if ended.code == -number:  # before the training had begun, or after its end, where signals do what they always do
        ended = Ended(0, "")
    return _continued(corpus, folder, [ended])


def _flip(chance: random.Random, path: Path) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def _instead(make: Callable[[Path], object]) -> Callable[[random.Random, Path], None]:
    def damage(chance: random.Random, path: Path) -> None:
        path.unlink()
        make(path)

    return damage


_DAMAGES: dict[str, Callable[[random.Random, Path], object]] = {
    "a flipped bit": _flip,
    "truncated": lambda chance, path: os.truncate(path, chance.randrange(path.stat().st_size + 1)),
    "zeros": lambda chance, path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda chance, path: path.write_bytes(chance.randbytes(path.stat().st_size)),
    "more": lambda chance, path: path.write_bytes(path.read_bytes() + chance.randbytes(9)),
    "nothing": _instead(lambda path: None),
    "a folder": _instead(lambda path: path.mkdir()),
    "a pipe": _instead(os.mkfifo),
    "a link to nowhere": _instead(lambda path: path.symlink_to("nowhere")),
    "a link to itself": _instead(lambda path: path.symlink_to(path.name)),
}


def damage(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A damaged file of a run, which is then sampled, measured, cited or trained on."""
    run = copied(corpus.run, folder / "run")
    victim = chance.choice(sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock"))
    _DAMAGES[chance.choice(sorted(_DAMAGES))](chance, victim)
    deed = chance.choice(["sample", "evaluate", "cite", "train", "further"])
    if deed == "train":
        ended = attempt(_train(corpus), folder)
    elif deed == "further":
        ended = attempt(cli("train", corpus.ring, "--gin.train.steps=14", "--workdir", "run"), folder)
    elif deed == "sample":
        ended = attempt(cli("sample", "run", "--num_samples", 8, "--out", "samples.npz"), folder)
        if ended.worked and samples_in(folder / "samples.npz") != corpus.samples:
            return "lost"
    elif deed == "evaluate":
        ended = attempt(cli("evaluate", "run", "--metrics", "w2", "--num_samples", 20), folder)
    else:
        ended = attempt(cli("cite", "run"), folder)
    if deed == "train" and ended.worked and not _same_weights(run, corpus.run):
        return "lost"
    return ended.fault or ("worked" if ended.code == 0 else "refused")


def stray(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A stray file or folder among the checkpoints, then a training beyond the end."""
    run = copied(corpus.run, folder / "run")
    names = [
        "step_best", "step_00000012 (copy)", "step_9", "step_notes.txt", "step_00000099.tar", ".step_1.partial",
        "step_00000014", "step_-0000001", "step_000000010", "STEP_00000013", "step_00000013\n", "latest",
    ]  # fmt: skip
    path = run / "checkpoints" / chance.choice(names)
    make: list[Callable[[], object]] = [
        path.mkdir,
        path.touch,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(checkpoint_paths(run)[0].name),
        lambda: shutil.copytree(checkpoint_paths(run)[0], path),
    ]
    chance.choice(make)()
    ended = attempt(cli("train", corpus.ring, "--gin.train.steps=14", "--workdir", "run"), folder)
    if ended.worked and checkpoint_paths(run)[-1].name != "step_00000014":
        return "lost"
    return ended.fault or ("worked" if ended.code == 0 else "refused")
