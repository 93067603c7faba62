"""Run a suite: trainings in processes of their own, none of them twice."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from flowdistill.bench.suite import Job, Row, Suite, load_suite
from flowdistill.bench.tables import write_tables
from flowdistill.evaluation.comparison import compare, teacher_samples, trajectory_errors, write_metrics
from flowdistill.evaluation.samples import SampleSet
from flowdistill.interfaces import FlowMap
from flowdistill.plumbing import config
from flowdistill.plumbing.errors import ConfigError, FlowDistillError, RunsFailedError
from flowdistill.plumbing.files import fingerprint, module_fingerprint, warn_if_damaged, write_json
from flowdistill.plumbing.gin_errors import errors_located
from flowdistill.plumbing.progress import bars, progress
from flowdistill.runs.records import read_records
from flowdistill.runs.run import Run
from flowdistill.training.trainer import train


def bench(
    suite: str | Path,
    *,
    out: str | Path | None = None,
    runs: str | Path = "runs/bench",
    bindings: Sequence[str] = (),
    only: Sequence[str] = (),
    quick: bool = False,
    jobs: int = 1,
    device: str | None = None,
) -> Path:
    """Train and measure what a suite asks for, and write its tables.

    Trainings run in ``jobs`` processes of cores / ``jobs`` threads, each in a directory under ``runs`` with a name made
    of its configuration: interrupted ones continue from their last checkpoint, and finished ones are not repeated, in
    whichever suite they were, also where only their evaluation differs. What ``results.json`` in ``out`` holds already
    of the suite is kept as it is, so that a suite may be run in parts, and on several machines. A training that fails
    is named in the tables, and tried again by the next call. A script that calls this function needs the usual
    ``if __name__ == "__main__":``.

    Args:
        suite: ``toy``, ``digits``, ``mnist``, or a gin file that binds the attributes of `Suite`.
        out: where ``results.json``, ``table.md``, ``table.html`` and the plots go; None is ``runs/SUITE``.
        runs: where the trainings lie.
        bindings: ``bench.NAME = VALUE`` changes the suite, any other binding every training.
        only: parts of the names of rows; others are left out.
        quick: the suite's quick version.
        jobs: trainings at a time.
        device: of the trainings; None is a GPU if there is one.

    Returns:
        The directory of the results.

    Raises:
        ConfigError: the suite cannot work.
        RunsFailedError: some trainings failed, and the tables have been written; or a process was killed.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, not {jobs}")
    description = load_suite(suite, bindings, quick)
    name = Path(suite).stem + ("_quick" if quick else "")
    results = Path(runs) / name if out is None else Path(out)
    rows = description.table()
    chosen = [row for row in rows if not only or any(part in row.name for part in only)]
    if not chosen:
        raise ConfigError(f"no row of {suite} has any of {', '.join(only)} in its name")
    known = _known(results / "results.json")
    before = {(record["group"], record["name"]) for record in known.values()}
    shown = [row for row in rows if row in chosen or (row.group, row.name) in before]
    groups = {row.group for row in shown}
    wanted = [job for job in description.teachers(rows) if job.row.group in groups]
    with progress("counting what the rows cost", None):
        wanted += _jobs(description, shown, Path(runs) / "costs.json")
    # A process does all measurements of one training, one after another. Seed by seed, so that an interrupted suite has
    # measured all its rows on some seeds, and not some of its rows on all.
    tasks: dict[str, list[Job]] = {}
    for job in sorted(wanted, key=lambda job: job.seed):
        if job.figures not in known and (job.teacher or job.row in chosen):
            tasks.setdefault(job.run, []).append(job)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Processes that start afresh, since a GPU's context does not survive a fork; one does many trainings in turn.
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (threads,))
    with progress(f"bench {name}", len(tasks)) as phase, bars() as display, pool, _stopped_by_errors(pool):
        futures = [pool.submit(_run, jobs, Path(runs), device) for jobs in tasks.values()]
        for future in as_completed(futures):
            phase.advance(1)
            try:
                found = future.result()
            except BrokenProcessPool:
                raise RunsFailedError(
                    "a process was killed, perhaps for its memory: run the same command again to continue, with fewer "
                    "--jobs if it happens again"
                ) from None
            for record in found:
                known[record["figures"]] = record
                if "error" in record or not display.console.is_terminal:
                    display.console.print(_line(record), markup=False, highlight=False, soft_wrap=True)
    # Under the titles that they have now
    titles = [{"group": job.row.group, "name": job.row.name} for job in wanted]
    records = [known[job.figures] | title for job, title in zip(wanted, titles, strict=True) if job.figures in known]
    results.mkdir(parents=True, exist_ok=True)
    write_tables(name, description, records, results)
    if failed := sum("error" in record for record in records):
        raise RunsFailedError(f"{failed} of {len(records)} runs failed, as {results / 'table.md'} says")
    return results


@contextmanager
def _stopped_by_errors(pool: ProcessPoolExecutor) -> Iterator[None]:
    """On an error inside, Ctrl-C among them, nothing further is started and what runs is stopped."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()
        raise


def _start_worker(threads: int) -> None:
    """Set a process of the pool up; it ends with the one that started it, even where that is killed."""
    torch.set_num_threads(threads)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    Thread(target=follow, daemon=True).start()


def _jobs(suite: Suite, rows: Sequence[Row], costs: Path) -> list[Job]:
    """The trainings, with the costs of their configurations kept in a file."""
    known: dict[str, float] = json.loads(costs.read_text(encoding="utf-8")) if costs.is_file() else {}
    before = len(known)
    jobs = suite.jobs(rows, known)
    if len(known) > before:
        write_json(costs, known)
    return jobs


def _known(results: Path) -> dict[str, dict[str, Any]]:
    """What has been measured, by the name of the figures; nothing of what failed."""
    if not results.is_file():
        return {}
    try:
        records = json.loads(results.read_text(encoding="utf-8"))["records"]
        return {record["figures"]: record for record in records if "error" not in record}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{results} is not what flowdistill bench writes: move it, or name another --out") from None


def _run(jobs: Sequence[Job], runs: Path, device: str | None) -> list[dict[str, Any]]:
    """A training and its measurements, in a process of the pool, unless they are done; what `write_tables` needs."""
    return [_record(job, runs / job.run, device) for job in jobs]


def _record(job: Job, workdir: Path, device: str | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "group": job.row.group,
        "name": job.row.name,
        "recipe": job.row.recipe,
        "budget": job.budget,
        "value": job.value,
        "seed": job.seed,
        "run": job.run,
        "figures": job.figures,
        "configuration": job.gin,
    }
    if not (workdir / job.figures).is_file():
        try:
            _process(job, workdir, device)
        except FlowDistillError as error:
            return record | {"error": str(error).splitlines()[0]}
        except Exception as error:
            return record | {"error": f"{type(error).__name__}: {error}; see {workdir.with_suffix('.log')}"}
    figures = json.loads((workdir / job.figures).read_text(encoding="utf-8"))
    kept = ("num_samples", "machine", "rows", "trajectory_errors")
    return record | {key: figures[key] for key in kept if key in figures} | _training(workdir)


def _process(job: Job, workdir: Path, device: str | None) -> None:
    """Train what is not trained yet, and measure; what is printed goes into a log beside the run directory."""
    workdir.mkdir(parents=True, exist_ok=True)
    gin_file = workdir.with_suffix(".gin").absolute()
    gin_file.write_text(job.gin, encoding="utf-8")
    with workdir.with_suffix(".log").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            student = None
            if not job.teacher:
                train(gin_file=gin_file, workdir=workdir, device=device, report=False)
                student = Run(workdir).student
            _measure(student, gin_file, workdir / job.figures, workdir.parent / "teacher_samples", device)
        except Exception:
            traceback.print_exc()
            raise


def _measure(student: FlowMap | None, gin_file: Path, figures: Path, cache: Path, device: str | None) -> None:
    """Write the figures of a student, or of the teacher alone.

    The samples of a teacher that students are measured against are drawn once, and kept under what they depend on:
    whatever gin has used to build it, its weights, and the evaluation but for what it measures them by.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with config.parsed([gin_file], []), errors_located():
        teacher, evaluation = config.value("train.teacher"), config.value("train.evaluation")
        used = config.operative()
    if evaluation is None:
        raise ConfigError("nothing to measure: the recipe has no train.evaluation")
    best = None
    if student is not None:
        student.to(device)
    if teacher is not None:
        teacher.eval().requires_grad_(False).to(device)
    if student is not None and teacher is not None:
        free = [f"evaluation.{name}" for name in ("metrics", "reference", "student_steps", "deltas")]
        bindings = config.statements_of(used, "the configuration")
        kept = [*(str(binding) for binding in bindings if binding.name not in free), module_fingerprint(teacher)]
        path = cache / f"{fingerprint(chr(10).join(kept))[:16]}.safetensors"
        best = SampleSet.load(path)
        if best is None:
            warn_if_damaged(path)
            best = teacher_samples(teacher, evaluation)
            best.save(path)
    rows = compare(student, teacher, evaluation, best)
    write_metrics(figures, rows, evaluation, trajectory_errors(student, teacher, evaluation))


def _training(workdir: Path) -> dict[str, Any]:
    """What a training spent: steps, seconds, and evaluations of each network."""
    records = read_records(workdir)
    if not records:
        return {}
    before = [0, *(record["step"] for record in records)]
    seconds = sum((r["step"] - b) / r["steps_per_second"] for r, b in zip(records, before, strict=False))
    counts = {k.removesuffix("_evaluations"): v for k, v in records[-1].items() if k.endswith("_evaluations")}
    return {"steps": records[-1]["step"], "seconds": round(seconds, 1), "evaluations": counts}


def _line(record: dict[str, Any]) -> str:
    name = " ".join(filter(None, (record["group"], record["name"], f"seed {record['seed']}")))
    if "error" in record:
        return f"{name} failed: {record['error']}"
    best = [row for title, row in record["rows"].items() if title.startswith("student")] or [*record["rows"].values()]
    return f"{name}: {', '.join(f'{key} {value:.3g}' for key, value in best[0].items())}"
