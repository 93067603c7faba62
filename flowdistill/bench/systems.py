"""Tables of systems that others have trained: released files measured by one protocol, beside what was published."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import attrs
import torch

from flowdistill.bench.tables import Cells, markdown_table
from flowdistill.evaluation.comparison import Sampler, in_words
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

    def bytes_in(self, folder: Path) -> Iterator[bytes]:
        """The bytes of its files."""
        for path in (folder / name for name in self.files()):
            for part in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
                yield from file_parts(part)

    def record(self, steps: int) -> str:
        """The name of the record of a figure."""
        return f"{re.sub('[^a-z0-9]+', '_', self.name.lower()).strip('_')}_{steps}.json"

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
        vae = str(vae_of(autoencoder or self.autoencoder))
        own = folder / Path(vae).name
        told = {"vae": str(own) if own.is_dir() else vae, **self.arguments}
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

    systems: Sequence[System]
    """The rows."""
    protocol: str | Protocol
    """The protocol, or its name."""


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
    continues an interrupted one; a figure that is there is not measured again unless its file or the protocol changes.
    Under torchrun the ranks share the blocks out.

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
    chosen = table.protocol if protocol is None else protocol
    rules: Protocol = PROTOCOLS.build(chosen) if isinstance(chosen, str) else chosen
    systems = [system for system in table.systems if not only or any(part in system.name for part in only)]
    if not systems:
        raise ConfigError(f"no system has any of {', '.join(only)} in its name")
    systems = [system for system in systems if system.is_in(folder)]
    truth = reference if reference is not None or rules.reference is None else folder / rules.reference
    if systems and truth is not None and not Path(truth).exists():
        raise ConfigError(f"{truth} is not there: name what figures are compared with by --reference")
    if weights is None and (folder / INCEPTION).is_file():
        weights = folder / INCEPTION
    extractor: Any = rules.features
    if extractor is not None and weights is not None:
        extractor = FEATURES.build(extractor, weights=weights)
    how = json_fingerprint([attrs.asdict(rules), str(truth), num_samples, str(weights)])[:8]
    figures = results / "figures" / how

    # Each system in each of its numbers of steps; a record of each figure.
    place = find_device(device)
    with progress("measuring systems", sum(len(system.published) for system in systems)) as phase:
        for system in systems:
            key = fingerprint([repr(system).encode(), *system.bytes_in(folder)]) if first else ""
            for steps in system.published:
                record = figures / system.record(steps)
                if not first or _read(record).get("key") != key:
                    try:
                        model = system.load(folder, steps, rules.autoencoder).to(place)
                        jumps = 1 if isinstance(model, SolvedTeacher) else steps
                        evaluate(
                            model, protocol=chosen, features=extractor, reference=truth, num_samples=num_samples,
                            steps=jumps, guidance=system.guidance, batch_size=batch_size, device=device,
                            noise_floor=False, out=record,
                        )  # fmt: skip
                        counted: dict[str, Any] = {
                            "evaluations": Sampler(model, jumps).cost(system.guidance)[0],
                            "parameters": _parameters(model),
                        }
                    except FlowDistillError as error:
                        counted = {"error": in_one_line(error)}
                    if first:
                        write_json(record, {"key": key, **_read(record), **counted})
                phase.advance(1)

    # The table of all rows, those without a file as well.
    if not first:
        return results
    records = [
        (system, steps, _read(figures / system.record(steps))) for system in table.systems for steps in system.published
    ]
    write_json(results / "results.json", [{**r, "system": s.name, "steps": steps} for s, steps, r in records if r])
    write_text(results / "table.md", _written(rules, chosen, table, records, folder))
    if failed := {system.name: None for system, _, record in records if "error" in record}:
        raise RunsFailedError(f"{', '.join(failed)} could not be measured, as {results / 'table.md'} says")
    return results


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
    measured = [record for _, _, record in records if "figures" in record]
    words = f"`{name}`" if isinstance(name, str) else "the table's own"
    notes = [
        f"Published figures are by the protocols that their column names, and do not compare with one another. "
        f"Measured figures are all by one protocol, {words}"
        + "".join(f", but {key} {value}" for key, value in (measured[0]["otherwise"] if measured else {}).items())
        + "."
    ]
    notes += sorted({f"{record['machine']}." for record in measured})
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
