"""Trials of environments: the command line as users start it, where something is missing or odd."""

from __future__ import annotations

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

from attempts import Ended
from corpus import Corpus

_ENVIRONMENTS: dict[str, tuple[dict[str, str | None], str]] = {
    "no HOME": ({"HOME": None}, "{}"),
    "HOME is no folder": ({"HOME": "/dev/null"}, "{}"),
    "HOME is /proc": ({"HOME": "/proc", "XDG_CACHE_HOME": None}, "{}"),
    "no TMPDIR": ({"TMPDIR": "/nowhere"}, "{}"),
    "LC_ALL=C": ({"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "{}"),
    "latin letters": ({"PYTHONIOENCODING": "latin-1"}, "{}"),
    "ascii letters": ({"PYTHONIOENCODING": "ascii:strict"}, "{}"),
    "optimised": ({"PYTHONOPTIMIZE": "2"}, "{}"),
    "warnings are errors": ({"PYTHONWARNINGS": "error::RuntimeWarning"}, "{}"),
    "one column": ({"COLUMNS": "1"}, "{}"),
    "a dumb terminal": ({"TERM": "dumb"}, "{}"),
    "a bad time zone": ({"TZ": "Nowhere/Nothing"}, "{}"),
    "another hash seed": ({"PYTHONHASHSEED": "7"}, "{}"),
    "standard input closed": ({}, "{} <&-"),
    "standard output closed": ({}, "{} >&-"),
    "standard error closed": ({}, "{} 2>&-"),
    "a full standard output": ({}, "{} >/dev/full"),
    "a full standard error": ({}, "{} 2>/dev/full"),
    "a reader who leaves": ({}, "{} | true"),
    "few handles": ({}, "ulimit -n 40; {}"),
    "a strict mask": ({}, "umask 077; {}"),
    "no hang-up": ({}, "nohup {}"),
    "WORLD_SIZE alone": ({"WORLD_SIZE": "8"}, "{}"),
    "RANK alone": ({"RANK": "1"}, "{}"),
}
_PLACES = ("run", "a run", "läuf", "日本", "🙂", "a[b]*?", "it's", 'say "x"', "-x", "%s", "{x}", "~", "$HOME", "a\tb")


def environment(chance: random.Random, folder: Path, corpus: Corpus) -> str:
    """A training in an odd environment, into a directory of an odd name; then it is sampled."""
    name = chance.choice(sorted(_ENVIRONMENTS))
    changes, line = _ENVIRONMENTS[name]
    place = f"./{chance.choice(_PLACES)}"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **{k: v for k, v in changes.items() if v is not None}}
    variables = {k: v for k, v in variables.items() if changes.get(k, "") is not None}
    for arguments in (
        ("train", str(corpus.ring), "--workdir", place),
        ("sample", place, "--num_samples", "2", "--out", f"{place}/x.npz"),
    ):
        command = line.format(shlex.join([sys.executable, "-m", "flowdistill", *arguments]))
        try:
            done = subprocess.run(["bash", "-c", command], cwd=folder, env=variables, capture_output=True, timeout=120)
        except subprocess.TimeoutExpired:
            return "hung"
        ended = Ended(done.returncode, (done.stdout + done.stderr).decode(errors="replace"))
        unheard = "standard error" in name and ended.code in (1, 2)
        if ended.fault and not unheard:
            (folder / ".printed").write_text(f"{name}: {command}\n{ended.code}\n{ended.printed}")
            return ended.fault
        if ended.code:
            return "refused"
    return "worked"
