"""Tables of systems that others have trained: released files measured by one protocol, beside what was published."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch

from flowdistill.bench.tables import Cells, markdown_table
from flowdistill.evaluation.comparison import Sampler, in_words
from flowdistill.evaluation.features import load_features
from flowdistill.evaluation.protocols import Protocol, vae_of
from flowdistill.flow_maps import SolvedTeacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import FlowMap
from flowdistill.plumbing import config
from flowdistill.plumbing.distributed import find_device, rank_and_world
from flowdistill.plumbing.errors import ConfigError, FlowDistillError, RunsFailedError, in_one_line
from flowdistill.plumbing.files import file_parts, fingerprint, json_fingerprint, write_json, write_text
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.registry import FEATURES, PROTOCOLS
from flowdistill.runs.evaluating import evaluate
from flowdistill.runs.loading import load_flow_map, load_teacher
from flowdistill.runs.run import Run
from flowdistill.solvers import Solver

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


@attrs.frozen(kw_only=True)
class System:
    """A row of a table: a teacher or a student, what is published of it, and where it can be had."""

    name: str
    """Its title."""
    kind: Literal["teacher", "from scratch", "distilled"]
    """A teacher sampled in many steps, a student trained without a teacher, or one with."""
    published: Mapping[int, float | None] = {1: None}
    """The published Frechet distances by the numbers of steps that are measured; None where none was found."""
    protocol: str = "not known"
    """The protocol of the published figures: a registered one, or words."""
    parameters: float | None = None
    """The published number of parameters, in millions."""
    citation: str | None = None
    """The key of the paper in ``references.bib``."""
    loads: str | None = None
    """The name that `flowdistill.load_flow_map` (or `load_teacher`) builds; None is a run or a student folder."""
    file: str | None = None
    """The name under which the file, the run or the folder is looked for; None where no reader or no file exists."""
    source: str = ""
    """The place that the file is from."""
    licence: str = ""
    """The licence of the file, as its authors state it."""
    arguments: Mapping[str, Any] = attrs.field(factory=dict)
    """Further arguments of what is loaded."""
    beside: Mapping[str, str] = attrs.field(factory=dict)
    """Arguments that are further files or folders, under the names that they are looked for."""
    autoencoder: Literal["ema", "mse"] = "ema"
    """The autoencoder of its authors."""
    guidance: float | None = None
    """The guidance scale of a student's samples; None is the student's own."""
    times: Mapping[int, Sequence[float]] = attrs.field(factory=dict)
    """The times of some numbers of a student's steps; otherwise they are its own."""
    renoise: bool | None = None
    """Whether a student jumps to data at each step and noises the result; None is as it needs."""
    solver: type[Solver] | None = None
    """A teacher's solver, which takes ``steps``."""
    guided: Mapping[str, Any] | None = None
    """The arguments by which a teacher is guided, see `flowdistill.guidance.GuidedTeacher`."""
    guide: tuple[str, str] | None = None
    """The name and the file of the weaker network that guides."""
    recipe: str | None = None
    """The packaged recipe that trains such a system."""
    bindings: Sequence[str] = ()
    """The bindings that are read after the recipe."""

    def files(self) -> list[str]:
        """The names of the files that it is loaded from."""
        names = (self.file, self.guide and self.guide[1], *self.beside.values())
        return [name for name in names if name is not None]

    def is_in(self, folder: Path) -> bool:
        """Whether all its files are in a folder."""
        return self.file is not None and all((folder / name).exists() for name in self.files())

    def record(self, steps: int) -> str:
        """The name of the record of a figure."""
        words = re.sub("[^a-z0-9]+", "_", self.name.lower()).strip("_")
        return f"{words}_{fingerprint(self.name)[:6]}_{steps}.json"

    def command(self) -> str | None:
        """The command that trains such a system; None where no recipe does."""
        if self.recipe is None:
            return None
        bindings = []
        for binding in self.bindings:
            name, _, value = binding.partition(" = ")
            word = value.strip("'")
            bindings.append(f"--gin.{name}={word if config.quoted(f'{name}={word}') != f'{name}={word}' else value}")
        return shlex.join(["flowdistill", "train", self.recipe, *bindings])

    def vae(self, folder: Path, autoencoder: Literal["ema", "mse"] | None = None) -> str:
        """The autoencoder: its folder among the files, or else its repository; see `load`."""
        repository = str(vae_of(autoencoder or self.autoencoder))
        own = folder / Path(repository).name
        return str(own) if own.is_dir() else repository

    def load(self, folder: Path, steps: int, autoencoder: Literal["ema", "mse"] | None = None) -> FlowMap:
        """The system, to be sampled in some steps.

        Args:
            folder: where the files are, and perhaps the folder ``sd-vae-ft-ema`` or ``sd-vae-ft-mse``.
            steps: of a teacher's solver.
            autoencoder: in place of its authors'.

        Raises:
            CheckpointError: a file is missing, damaged or of another system.
        """
        assert self.file is not None
        told = {"vae": self.vae(folder, autoencoder), **self.arguments}
        told |= {name: str(folder / file) for name, file in self.beside.items()}
        if self.loads is None:
            return load_flow_map(folder / self.file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the table names the licences
            if self.solver is None:
                return load_flow_map(self.loads, checkpoint=folder / self.file, **told)
            teacher = load_teacher(self.loads, checkpoint=folder / self.file, **told)
            if self.guided is not None:
                weak = None if self.guide is None else load_teacher(self.guide[0], checkpoint=folder / self.guide[1])
                teacher = GuidedTeacher(teacher, guide=weak, **self.guided)
        return SolvedTeacher(teacher.eval(), self.solver(steps=steps))  # type: ignore[call-arg]


@attrs.frozen(kw_only=True)
class SystemTable:
    """Systems that are measured by one protocol."""

    systems: Sequence[System] = attrs.field()
    """The rows, each with a name of its own."""
    protocol: str | Protocol
    """The protocol, or its name."""

    @systems.validator
    def _check(self, attribute: object, systems: Sequence[System]) -> None:
        names = [system.name for system in systems]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"two systems of a table have the name {twice[0]!r}")


def load_table(name: str | Path) -> SystemTable:
    """The table ``imagenet256`` or ``imagenet512`` of the package, or the ``TABLE`` of a Python file, which is run.

    Raises:
        ConfigError: there is no such table.
    """
    from flowdistill.bench.imagenet import TABLES

    if str(name) in TABLES:
        return TABLES[str(name)]
    if not Path(name).is_file():
        raise ConfigError(f"unknown table {str(name)!r}: known are {', '.join(TABLES)}, or a Python file with a TABLE")
    found = runpy.run_path(str(name)).get("TABLE")
    if not isinstance(found, SystemTable):
        raise ConfigError(f"{name} has no TABLE = flowdistill.bench.SystemTable(...)")
    return found


def bench_systems(
    table: str | Path | SystemTable,
    files: str | Path,
    *,
    out: str | Path,
    reference: str | Path | None = None,
    protocol: str | Protocol | None = None,
    num_samples: int | None = None,
    only: Sequence[str] = (),
    weights: str | Path | None = None,
    batch_size: int | None = None,
    device: str | None = None,
) -> Path:
    """Measure the systems whose files are at hand, and write their table beside what was published.

    Nothing is trained. Samples are drawn in blocks that are kept, see `flowdistill.evaluate`, so the same call
    continues an interrupted one. A figure that is there is measured again if anything that it rests on has changed:
    its files, the autoencoder, the reference, the protocol. Under torchrun the ranks share the blocks out.

    Args:
        table: ``imagenet256``, ``imagenet512``, a Python file with a `SystemTable` named ``TABLE``, or such a table.
        files: the folder of the files, under the names that the table expects.
        out: where ``table.md``, ``results.json`` and the records of figures go.
        reference: of all figures; None is the protocol's, in ``files``.
        protocol: of all figures; None is the table's.
        num_samples: of each figure; None is the protocol's.
        only: parts of the names of systems; others are left out.
        weights: the file of Inception's weights; None is the one in ``files``, or is downloaded.
        batch_size: see `flowdistill.evaluate`.
        device: see `flowdistill.evaluate`.

    Returns:
        ``out``.

    Raises:
        ConfigError: no such table, row or reference.
        RunsFailedError: some systems could not be measured, as the table says.
    """
    # What is to be measured, and by what.
    table = table if isinstance(table, SystemTable) else load_table(table)
    folder, results, first = Path(files), Path(out), rank_and_world()[0] == 0
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: --files names the one of the released files")
    chosen = table.protocol if protocol is None else protocol
    rules: Protocol = PROTOCOLS.build(chosen) if isinstance(chosen, str) else chosen
    wanted = [system for system in table.systems if not only or any(part in system.name for part in only)]
    if not wanted:
        raise ConfigError(f"no system has any of {', '.join(only)} in its name")
    here = [system for system in table.systems if system.is_in(folder)]
    truth = reference if reference is not None or rules.reference is None else folder / rules.reference
    extractor: Any = rules.features
    if here and truth is not None and not Path(truth).exists():
        raise ConfigError(f"{truth} is not there: name what figures are compared with by --reference")
    if here and extractor == "inception":
        own = folder / INCEPTION
        weights = own if weights is None and own.is_file() else weights
        extractor = FEATURES.build(extractor, **({} if weights is None else {"weights": weights}))
    elif here and extractor is not None:
        extractor = load_features(extractor)

    # What each figure rests on, by which it is known whether it is there already.
    keys: dict[str, str] = {}
    if first and here:
        digests = _Digests(results / "files.json")
        settings = [
            attrs.asdict(rules),
            None if truth is None else digests.of(Path(truth)),
            None if extractor is None else extractor.fingerprint(),
            num_samples,
        ]
        for system in here:
            parts = [repr(system), digests.of(Path(system.vae(folder, rules.autoencoder)))]
            keys[system.name] = json_fingerprint([*settings, *parts, *(digests.of(folder / f) for f in system.files())])
        digests.save()

    # Each system in each of its numbers of steps; a record of each figure.
    place, measured = find_device(device), [system for system in wanted if system in here]
    with progress("measuring systems", sum(len(system.published) for system in measured)) as phase:
        for system in measured:
            for steps in system.published:
                record = results / "figures" / system.record(steps)
                if not first or not _is_of(_read(record), keys[system.name]):
                    found = _measured(
                        system, folder, steps, rules, place, record,
                        protocol=chosen, features=extractor, reference=truth, num_samples=num_samples,
                        batch_size=batch_size, device=device,
                    )  # fmt: skip
                    if first:
                        write_json(record, {"key": keys[system.name], **found})
                phase.advance(1)

    # The table of all rows, those without a file as well.
    if not first:
        return results
    records: list[tuple[System, int, Mapping[str, Any]]] = []
    for system in table.systems:
        for steps in system.published:
            kept = _read(results / "figures" / system.record(steps))
            records.append((system, steps, kept if kept.get("key") == keys.get(system.name, "") else {}))
    write_json(results / "results.json", [{**r, "system": s.name, "steps": steps} for s, steps, r in records if r])
    write_text(results / "table.md", _written(rules, chosen, table, records, folder))
    if failed := {system.name: None for system, _, record in records if "error" in record}:
        raise RunsFailedError(f"{', '.join(failed)} could not be measured, as {results / 'table.md'} says")
    return results


def _measured(
    system: System, folder: Path, steps: int, rules: Protocol, place: torch.device, record: Path, **settings: Any
) -> dict[str, Any]:
    """The record of a figure, or that of an error, which is tried again by the next call."""
    try:
        model = system.load(folder, steps, rules.autoencoder).to(place)
        jumps = 1 if isinstance(model, SolvedTeacher) else steps
        evaluate(
            model, steps=system.times.get(steps, jumps), guidance=system.guidance, renoise=system.renoise,
            noise_floor=False, out=record, **settings,
        )  # fmt: skip
        counted = {"evaluations": Sampler(model, jumps).cost(system.guidance)[0], "parameters": _parameters(model)}
        return {**_read(record), **counted}
    except FlowDistillError as error:
        return {"error": in_one_line(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {in_one_line(error)}"}


class _Digests:
    """The hashes of files and folders, which are kept with their sizes and times of change in a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._known = path, _read(path)

    def of(self, path: Path) -> str:
        """The hash of a file, of the weights and configurations in a folder, or of the name of what is neither."""
        if path.is_dir() and (path / "config.gin").is_file():
            return json_fingerprint(Run(path).identity)
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            return json_fingerprint([(str(file.relative_to(path)), self.of(file)) for file in inside])
        if not path.is_file():
            return str(path)
        stat = path.stat()
        known = self._known.get(str(path.absolute()), [])
        if known[:2] != [stat.st_size, stat.st_mtime_ns]:
            known = [stat.st_size, stat.st_mtime_ns, fingerprint(file_parts(path))]
            self._known[str(path.absolute())] = known
        return str(known[2])

    def save(self) -> None:
        """Keep them for the next call."""
        write_json(self._path, self._known)


def _is_of(record: Mapping[str, Any], key: str) -> bool:
    return record.get("key") == key and "error" not in record


def _read(path: Path) -> dict[str, Any]:
    """A record of a figure; nothing where there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _parameters(model: FlowMap) -> int:
    """Those of what makes the samples, without a weaker network that guides."""
    sampled: torch.nn.Module = model.teacher if isinstance(model, SolvedTeacher) else model
    guided = sampled.teacher if isinstance(sampled, GuidedTeacher) else sampled
    return sum(parameter.numel() for parameter in guided.parameters())


_Records = Sequence[tuple[System, int, Mapping[str, Any]]]


def _written(rules: Protocol, name: str | Protocol, table: SystemTable, records: _Records, folder: Path) -> str:
    """The tables of measured and of missing systems, in Markdown."""
    blocks = []
    for kind in dict.fromkeys(system.kind for system in table.systems):
        rows = [row for row in records if row[0].kind == kind]
        blocks += [f"### {_TITLES[kind]}", markdown_table(_cells(rules, rows, folder))]
    missing = [system for system in table.systems if not system.is_in(folder)]
    if missing:
        blocks += ["### Not at hand", markdown_table(_missing(missing))]
        commands = [f"# {system.name}\n{command}" for system in missing if (command := system.command())]
        blocks += ["### Training them", "```bash\n" + "\n".join(commands) + "\n```"] if commands else []
    measured = [(system, record) for system, _, record in records if "figures" in record]
    others: dict[str, dict[str, None]] = {}
    for system, record in measured:
        for key, value in record["otherwise"].items():
            others.setdefault(f"{key} {value}", {})[system.name] = None
    exceptions = [
        f"{words} for {'all' if len(names) == len({s.name for s, _ in measured}) else ', '.join(names)}"
        for words, names in others.items()
    ]
    words = f"`{name}`" if isinstance(name, str) else "the table's own"
    notes = [
        f"Published figures are by the protocols that their column names, and do not compare with one another. "
        f"Measured figures are all by one protocol, {words}"
        + (f"; other than it says are {'; '.join(exceptions)}." if exceptions else ".")
    ]
    notes += sorted({f"{record['machine']}." for _, record in measured})
    notes += [f"Failed: {s.name}, {in_words(steps)}: {r['error']}" for s, steps, r in records if "error" in r]
    return "\n\n".join([*blocks, *notes]) + "\n"


_TITLES = {"teacher": "Teachers", "from scratch": "Students from scratch", "distilled": "Distilled students"}


def _cells(rules: Protocol, rows: _Records, folder: Path) -> Cells:
    """A row for each system and number of steps: what is published, and what was measured."""
    head = ["", "parameters", "steps", "evaluations", "published FID", "its protocol"]
    body: Cells = [[*head, *(metric.replace("_", " ") for metric in rules.metrics), "obtained"]]
    for system, steps, record in rows:
        figures, count = record.get("figures", {}), record.get("parameters")
        millions = system.parameters if count is None else count / 1e6
        published = system.published.get(steps)
        obtained = "failed" if "error" in record else "released file" if system.loads else "own run"
        body.append(
            [
                system.name,
                "" if millions is None else f"{millions:.0f}M" if millions > 100 else f"{millions:.3g}M",
                str(steps),
                str(record.get("evaluations", "")),
                "" if published is None else f"{published:g}",
                "" if published is None else system.protocol,
                *(f"{figures[metric]:.4g}" if metric in figures else "" for metric in rules.metrics),
                obtained if record else "not measured" if system.is_in(folder) else "not at hand",
            ]
        )
    return body


def _missing(systems: Sequence[System]) -> Cells:
    """Where to get the files of each system."""
    body: Cells = [["", "files", "from", "licence"]]
    for system in systems:
        files = ", ".join(f"`{name}`" for name in system.files())
        body.append([system.name, files, system.source, system.licence])
    return body
