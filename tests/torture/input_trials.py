"""Trials of inputs: mutated and hostile files, and values that nobody should write."""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from attempts import CANARY, Ended, attempt, cli, copied, library
from corpus import SHORT, Corpus
from edm2_hostile_files import HOSTILE

import flowdistill


def _outcome(ended: Ended) -> str:
    return ended.fault or ("worked" if ended.code == 0 else "refused")


# Configurations.

_TOKENS = (
    b"@", b"%", b"()", b"(", b")", b"[", b"{", b"'", b'"', b"=", b".", b"/", b"#", b"\\", b"\n", b"\r", b"\t", b"\0",
    b"\xff", b"\xe2\x80\xa8", b"None", b"True", b"1e999", b"-1", b"0", b"'x'", b"@mlp()", b"@ring()", b"%m",
    b"m = %m\n", b"include 'x.gin'\n", b"include 'ring.gin'\n", b"import os\n", b"import x.y\n",
    b"from os import path\n", b"a/b.c = 1\n", b"train.steps", b"a.b = @a.b()\n", b"(" * 3000, b"__import__('os')",
    b"open('" + CANARY.encode() + b"', 'w')",
)  # fmt: skip


def configuration(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A configuration with some mutated lines and characters, which is trained for two steps."""
    lines = chance.choice(corpus.configurations).splitlines(keepends=True)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
        match chance.randrange(7):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[other])
            case 2:
                lines[at], lines[other] = lines[other], lines[at]
            case 3:  # the value of another
                name, value = lines[at].partition(b"=")[0], lines[other].partition(b"=")[2]
                lines[at] = name + b"=" + value
            case 4:
                place = chance.randrange(len(lines[at]) + 1)
                lines[at] = lines[at][:place] + chance.choice(_TOKENS) + lines[at][place:]
            case 5:
                place = chance.randrange(len(lines[at]))
                lines[at] = lines[at][:place] + bytes([chance.randrange(256)]) + lines[at][place + 1 :]
            case 6:
                lines[at] = lines[at][: chance.randrange(len(lines[at]))]
        lines = lines or [b"\n"]
    (folder / "ring.gin").write_bytes(b"".join(lines))
    return _outcome(attempt(cli("train", "ring.gin", *SHORT, "--workdir", "run"), folder))


_VALUES = (
    "None", "True", "0", "-1", "1", "0.5", "-0.5", "2", "1000", "100000", "2147483648", "1" + "0" * 20, "1e308",
    "1e-308", "1e999", "-1e999", "float('nan')", "'0.5'", "''", "'x'", "'nothing.npz'", "()", "(0.5,)", "(1, 2)",
    "(0.9, 0.1)", "(1, 2, 3, 4)", "[]", "[None]", "{}", "{'a': 1}", "@mlp()", "@mlp", "@ring()", "@nobody()", "@AdamW",
    "%nobody", "@train()", "@finite_difference()", "@evaluation()", "b'x'", "1j", "(((((1,),),),),)",
    "'" + "x" * 5000 + "'",
)  # fmt: skip


_LONG = ("--gin.train.steps=100000", "--gin.train.accumulation=100000")  # which are right, and take long


def value(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A binding with a value of another type or range, which is trained for two steps."""
    text = chance.choice(corpus.configurations).decode()
    names = re.findall(r"^([\w./]+) = ", text, re.MULTILINE)
    (folder / "ring.gin").write_text(text)
    changed = _LONG[0]
    while changed in _LONG:
        changed = f"--gin.{chance.choice(names)}={chance.choice(_VALUES)}"
    (folder / ".what").write_text(changed)
    short = [s for s in SHORT if s.partition("=")[0] != changed.partition("=")[0]]
    return _outcome(attempt(cli("train", "ring.gin", *short, changed, "--workdir", "run"), folder))


# Files.


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Bytes with some of them changed, removed, repeated or put elsewhere."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 4, 16])):
        start = chance.randrange(len(changed) + 1)
        end = min(len(changed), start + chance.choice([1, 1, 4, 64, 1024]))
        match chance.randrange(6):
            case 0:
                changed[start:end] = chance.randbytes(end - start)
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[start:end]
            case 3:
                changed[start:end] = chance.choice([b"\0", b"\xff", b"9", b"-", b"e", b'"']) * (end - start)
            case 4 if start < len(changed):
                changed[start] ^= 1 << chance.randrange(8)
            case _:
                changed = changed[:start] if chance.random() < 0.2 else changed
    return bytes(changed)


def _mutate(chance: random.Random, path: Path) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    victim = chance.choice(files)
    victim.write_bytes(mutated(chance, victim.read_bytes()))


_MEASURE = ("--num_samples", 50, "--features", "digits", "--reference")
_USES: dict[str, Callable[[Path, Corpus], Callable[[], object]]] = {
    "sit": lambda path, _: library(functools.partial(flowdistill.load_teacher, path, num_heads=2)),
    "edm2": lambda path, _: library(functools.partial(flowdistill.load_teacher, path)),
    "model": lambda path, _: library(functools.partial(flowdistill.load_teacher, path)),
    "archive": lambda path, corpus: cli("evaluate", corpus.files["digits"], *_MEASURE, path),
    "moments": lambda path, corpus: cli("evaluate", corpus.files["digits"], *_MEASURE, path),
    "images": lambda path, corpus: cli("evaluate", corpus.files["digits"], *_MEASURE, path),
    "digits": lambda path, corpus: cli("evaluate", path, *_MEASURE, corpus.files["archive"]),
}


def file(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A mutated file of weights, of images or of a run, and what it is for."""
    kind = chance.choice(sorted(_USES))
    path = copied(corpus.files[kind], folder / corpus.files[kind].name)
    _mutate(chance, path)
    return _outcome(attempt(_USES[kind](path, corpus), folder))


def meta(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A run of which one text is mutated: the log, the configuration, or the JSON of a checkpoint."""
    run = copied(corpus.run, folder / "run")
    texts = [p for p in run.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl", ".gin")]
    path = chance.choice(sorted(texts))
    path.write_bytes(mutated(chance, path.read_bytes()))
    call = chance.choice([
        cli("train", corpus.ring, "--gin.train.steps=14", "--workdir", "run"),
        cli("sample", "run", "--num_samples", 2, "--out", "x.npz"),
        cli("cite", "run"),
    ])  # fmt: skip
    return _outcome(attempt(call, folder))


# Hostile files: what they hold would make the canary if it were executed.


class _Payload:
    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.reduced


def _payloads() -> list[object]:
    import os
    import subprocess

    touch = f"open({CANARY!r}, 'w').close()"
    return [
        _Payload(os.system, f"touch {CANARY}"),
        _Payload(exec, touch),
        _Payload(eval, touch),
        _Payload(open, CANARY, "w"),
        _Payload(subprocess.Popen, ["touch", CANARY]),
        _Payload(getattr, _Payload(__import__, "os"), "system"),
        _Payload(functools.partial, os.system, f"touch {CANARY}"),
        _Payload(map, os.system, [f"touch {CANARY}"]),
        _Payload(np.load, CANARY),
        _Payload(torch.load, CANARY),
    ]


def _containers(payload: object) -> dict[str, bytes]:
    """A payload in every format that is read, by the file's name."""
    weights = {"ema": {"pos_embed": payload}, "args": payload}
    modern, legacy, objects = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(weights, modern)
    torch.save(weights, legacy, _use_new_zipfile_serialization=False)
    array = np.empty(1, object)
    array[0] = payload
    np.savez(objects, arr_0=array, mu=array, sigma=array)
    alone = io.BytesIO()
    np.save(alone, array)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(weights))
        archive.writestr("arr_0.npy", alone.getvalue())
    return {
        "modern.pt": modern.getvalue(),
        "legacy.pt": legacy.getvalue(),
        "bare.pt": pickle.dumps(weights),
        "packed.pth": packed.getvalue(),
        "ema.pkl": pickle.dumps({"ema": payload, "encoder": payload, "fid": payload}),
        "objects.npz": objects.getvalue(),
        "objects.npy": alone.getvalue(),
        "images.zip": packed.getvalue(),
        "model/config.json": json.dumps({"format": 1, "network": "os.system", "arguments": {"x": 1}}).encode(),
        "model.gin": b"train.teacher = @os.system()\n" + f"x = __import__('os').system('touch {CANARY}')\n".encode(),
    }


def hostile(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A file that would execute code, given to everything that takes a path."""
    if chance.random() < 0.4:
        name, data = "hostile.pkl", HOSTILE[chance.choice(sorted(HOSTILE))][1]()
    else:
        found = _containers(chance.choice(_payloads()))
        name = chance.choice(sorted(found))
        data = found[name]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    if name.startswith("model/"):
        shutil.copy(corpus.files["model"] / "model.safetensors", path.parent)
        path = path.parent
    calls = [
        library(functools.partial(flowdistill.load_teacher, path)),
        cli("convert", path, "converted"),
        cli("evaluate", corpus.files["digits"], *_MEASURE, path),
        cli("sample", path, "--out", "x.npz"),
        cli("train", path, "--workdir", "run"),
    ]
    outcomes = [_outcome(attempt(call, folder)) for call in calls]
    return next((o for o in outcomes if o not in ("worked", "refused")), "refused")
