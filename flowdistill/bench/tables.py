"""What a suite found: ``results.json``, a Markdown and an HTML table, and plots."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from flowdistill.bench.suite import Suite
from flowdistill.evaluation.plots import curves, ranking
from flowdistill.plumbing.files import write_json, write_text

Record: TypeAlias = Mapping[str, Any]
Cells: TypeAlias = list[list[str]]
Section: TypeAlias = tuple[str, Cells | str]  # a title, and a table or the name of a picture


def write_tables(name: str, whole: Suite, records: Sequence[Record], out: Path) -> None:
    """Write everything about the records of the whole suite into a directory."""
    write_json(out / "results.json", {"suite": name, "records": list(records)})
    sections: list[Section] = []
    for group in dict.fromkeys(record["group"] for record in records):
        ours = [record for record in records if record["group"] == group]
        suite = attrs.evolve(whole, metrics=whole.metrics or _metrics(ours))
        stem = "_".join(filter(None, (group.lower().replace(" ", "_"), "quality")))
        sections += _swept(suite, group, stem, ours, out) if suite.sweep else _compared(suite, group, stem, ours, out)
    note = _note(whole, records)
    write_text(out / "table.md", _markdown(sections, note))
    write_text(out / "table.html", _html(name, sections, note))


def _metrics(records: Sequence[Record]) -> list[str]:
    """The metrics that were measured, in the order of the recipe."""
    columns = dict.fromkeys(c for record in records for row in record.get("rows", {}).values() for c in row)
    return [c for c in columns if c != "evaluations" and not c.endswith("_to_teacher")]


def _compared(suite: Suite, group: str, stem: str, records: Sequence[Record], out: Path) -> list[Section]:
    """Tables of teachers and students, with a ranking of the students at each budget, and quality against budget."""
    sections: list[Section] = []
    teachers = [record for record in records if record["name"] == "teacher" and "rows" in record]
    if teachers:
        sections.append((_title(group, "teacher"), teacher_table(suite, teachers)))
    for budget in suite.budgets:
        students = [r for r in records if r["name"] != "teacher" and r["budget"] == budget]
        title = _title(group, "students") + _trained(budget)
        sections.append((title, student_table(suite, students)))
        if ranked := _ranked(suite, students):
            picture = f"{stem}.png" if budget is None else f"{stem}_{budget}.png"
            ranking(ranked, _levels(suite, teachers), suite.metrics[0], out / picture)
            sections.append(("", picture))
        if suite.deltas and ranked:
            sections.append((f"{title}: distance from the teacher's trajectories", error_table(suite, students)))
            picture = picture.replace("quality", "errors")
            errors = {"distance / length of the way": _by_delta(suite, students)}
            curves(errors, "duration of the jump", out / picture, log_y=tuple(errors))
            sections.append(("", picture))
    if len(suite.budgets) > 1:
        picture = f"{stem}_budgets.png"
        panels = {metric.replace("_", " "): _by_budget(suite, records, metric) for metric in suite.metrics}
        curves(panels, "evaluations of networks in training", out / picture, log_x=True, log_y=tuple(panels)[:1])
        sections.append(("", picture))
    return sections


def _swept(suite: Suite, group: str, stem: str, records: Sequence[Record], out: Path) -> list[Section]:
    """A table for each metric, of rows by the values of the sweep, and a plot of all at each budget."""
    assert suite.sweep is not None
    parameter, numbers = suite.sweep
    sections: list[Section] = []
    for budget in suite.budgets:
        panels = {}
        for metric in suite.metrics:
            lines = _by_value(suite, records, budget, metric)
            panels[metric.replace("_", " ")] = lines
            head = ["", *(f"{parameter.rpartition('.')[2]} = {number:g}" for number in numbers)]
            body = [[name, *(cell(found) for _, found in points)] for name, points in lines.items()]
            sections.append((_title(group, metric.replace("_", " ")) + _trained(budget), [head, *body]))
        picture = f"{stem}.png" if budget is None else f"{stem}_{budget}.png"
        curves(panels, parameter.rpartition(".")[2].replace("_", " "), out / picture, log_y=tuple(panels)[:1])
        sections.append(("", picture))
    return sections


def _by_value(
    suite: Suite, records: Sequence[Record], budget: int | None, metric: str
) -> dict[str, list[tuple[float, list[float]]]]:
    """A metric by the value of the sweep: of each row of the teacher, and of each method in one jump.

    Rows that do not have the sweep's parameter are on one level for all values.
    """
    assert suite.sweep is not None
    one, rows = _jumps(suite.student_steps[0]), {}
    teachers = [record for record in records if record["name"] == "teacher" and "rows" in record]
    for row in dict.fromkeys(row for record in teachers for row in record["rows"]):
        rows[row] = {v: values(ours, row, metric) for v, ours in _split(teachers, "value").items()}
    students = [r for r in records if r["name"] != "teacher" and r["budget"] == budget]
    for name, seeds in seeds_of(students).items():
        rows[name] = {v: values(ours, one, metric) for v, ours in _split(seeds, "value").items()}
    return {
        name: [(value, found.get(value, found.get(None, []))) for value in suite.sweep[1]]
        for name, found in rows.items()
    }


def _split(records: Sequence[Record], key: str) -> dict[Any, list[Record]]:
    """The records by what they have under a key."""
    return {value: [r for r in records if r[key] == value] for value in dict.fromkeys(r[key] for r in records)}


def _trained(budget: int | None) -> str:
    return "" if budget is None else f", {budget:,} evaluations of training"


def _title(group: str, what: str) -> str:
    title = f"{group}: {what}" if group else what
    return title[0].upper() + title[1:]


def seeds_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each row, by its name."""
    return _split(records, "name")


def values(records: Sequence[Record], row: str, column: str) -> list[float]:
    """A figure over the seeds, where it is there."""
    return [r["rows"][row][column] for r in records if column in r.get("rows", {}).get(row, {})]


def teacher_table(suite: Suite, records: Sequence[Record]) -> Cells:
    """A row for each number of the teacher's steps, and the noise floor."""
    rows = list(dict.fromkeys(row for record in records for row in record["rows"]))
    columns = list(dict.fromkeys(c for record in records for row in record["rows"].values() for c in row))
    head = ["", *(column.replace("_", " ") for column in columns)]
    return [head, *([row, *(cell(values(records, row, column)) for column in columns)] for row in rows)]


def student_table(suite: Suite, records: Sequence[Record]) -> Cells:
    """A row for each method: the first metric at every number of jumps, then the others in one jump, then the cost."""
    first, *others = suite.metrics
    jumps = [_jumps(steps) for steps in suite.student_steps]
    figures = [(row, first) for row in jumps] + [(jumps[0], f"{first}_to_teacher")] + [(jumps[0], m) for m in others]
    methods = {name: seeds for name, seeds in seeds_of(records).items() if any("rows" in seed for seed in seeds)}
    kept = [(r, c) for r, c in figures if any(values(seeds, r, c) for seeds in methods.values())]
    head = [""]
    for row, column in kept:
        title = column.replace("_", " ")
        head.append(title if column in others else f"{title}, {row.removeprefix('student, ')}")
    head += ["steps", "student", "teacher", "others"]
    body = []
    best = {row: _best({name: values(seeds, row, first) for name, seeds in methods.items()}) for row in jumps}
    for name, seeds in methods.items():
        cells = [cell(values(seeds, row, column)) for row, column in kept]
        cells = [
            f"**{text}**" if column == first and best[row] == name else text
            for text, (row, column) in zip(cells, kept, strict=True)
        ]
        done, all_seeds = sum("rows" in seed for seed in seeds), len(suite.seeds)
        body.append([name if done == all_seeds else f"{name} ({done} of {all_seeds} seeds)", *cells, *_costs(seeds)])
    return [head, *body]


def error_table(suite: Suite, records: Sequence[Record]) -> Cells:
    """A row for each method: its distance from the teacher's trajectories at every duration."""
    head = ["", *(f"$\\delta$ = {delta:g}" for delta in sorted(suite.deltas))]
    rows = _by_delta(suite, records)
    return [head, *([name, *(cell(found) for _, found in points)] for name, points in rows.items())]


def _by_delta(suite: Suite, records: Sequence[Record]) -> dict[str, list[tuple[float, list[float]]]]:
    """The distances of each method over the seeds, by the duration."""
    found = {}
    for name, seeds in seeds_of(records).items():
        errors = [error for seed in seeds for error in seed.get("trajectory_errors", [])]
        found[name] = [(d, [e["mean"] for e in errors if e["delta"] == d]) for d in sorted(suite.deltas)]
    return found


def _costs(seeds: Sequence[Record]) -> list[str]:
    """Steps, and thousands of evaluations of student, teacher and other networks."""
    done = [seed for seed in seeds if "steps" in seed]
    spent = []
    for seed in done:
        counts = dict(seed["evaluations"])
        student, teacher = counts.pop("student", 0), counts.pop("teacher", 0)
        spent.append((seed["steps"], student / 1e3, teacher / 1e3, sum(counts.values()) / 1e3))
    return [f"{statistics.mean(column):.0f}" for column in zip(*spent, strict=True)] if spent else [""] * 4


def _best(rows: Mapping[str, list[float]]) -> str | None:
    """The row of the least mean, if it is so by more than the spreads; None otherwise."""
    measured = sorted((statistics.mean(v), _spread(v), name) for name, v in rows.items() if v)
    if len(measured) < 2:
        return None
    mean, spread, name = measured[0]  # without a spread, which is nan, nothing is less
    return name if all(mean + spread < other - theirs for other, theirs, _ in measured[1:]) else None


def _spread(numbers: Sequence[float]) -> float:
    return statistics.stdev(numbers) if len(numbers) > 1 else math.nan


def cell(numbers: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    if not numbers:
        return ""
    mean = f"{statistics.mean(numbers):.3g}"
    return f"{mean} ± {_spread(numbers):.2g}" if len(set(numbers)) > 1 else mean


def _jumps(steps: int) -> str:
    return f"student, {steps} step{'s' * (steps > 1)}"


def _ranked(suite: Suite, records: Sequence[Record]) -> dict[str, dict[str, list[float]]]:
    """The first metric of each method by jumps; the best in one jump first."""
    found = {
        name: {
            row.removeprefix("student, "): v
            for k in suite.student_steps
            if (v := values(s, row := _jumps(k), suite.metrics[0]))
        }
        for name, s in seeds_of(records).items()
    }
    one = _jumps(suite.student_steps[0]).removeprefix("student, ")
    return dict(sorted(((n, v) for n, v in found.items() if one in v), key=lambda item: statistics.mean(item[1][one])))


def _levels(suite: Suite, teachers: Sequence[Record]) -> dict[str, float]:
    """The first metric of each row of the teacher."""
    rows = list(dict.fromkeys(row for record in teachers for row in record["rows"]))
    return {row: statistics.mean(v) for row in rows if (v := values(teachers, row, suite.metrics[0]))}


def _by_budget(suite: Suite, records: Sequence[Record], metric: str) -> dict[str, list[tuple[float, list[float]]]]:
    """A metric of each method in one jump, by the evaluations that its training spent."""
    one, found = _jumps(suite.student_steps[0]), {}
    for name, seeds in seeds_of([r for r in records if "steps" in r]).items():
        points = []
        for ours in _split(seeds, "budget").values():
            if figures := values(ours, one, metric):
                points.append((statistics.mean(sum(seed["evaluations"].values()) for seed in ours), figures))
        found[name] = points
    return found


_EXPLANATION = (
    " The best is bold where it lies outside the spreads. Steps are those of training; student, teacher and others are "
    "thousands of evaluations of networks in training, counted, each on one sample."
)


def _note(suite: Suite, records: Sequence[Record]) -> list[str]:
    done = [record for record in records if "rows" in record]
    lines = [
        f"Seeds {', '.join(map(str, suite.seeds))}: mean ± standard deviation; "
        f"{', '.join(sorted({str(r['num_samples']) for r in done}))} samples a figure."
        + ("" if suite.sweep else _EXPLANATION),
        *sorted({f"{r['machine']}." for r in done}),
    ]
    lines += [
        f"Failed: {' '.join(filter(None, (r['group'], r['name'])))}, seed {r['seed']}: {r['error']}"
        for r in records
        if "error" in r
    ]
    return lines


def markdown_table(cells: Cells) -> str:
    """A table in Markdown; the first row of the cells is the head."""
    head, *body = (f"| {' | '.join(row)} |" for row in cells)
    return "\n".join([head, "|---" * len(cells[0]) + "|", *body])


def _markdown(sections: Sequence[Section], note: Sequence[str]) -> str:
    blocks = []
    for title, content in sections:
        blocks += [f"### {title}"] if title else []
        if isinstance(content, str):
            continue  # pictures are named by the page that shows the table
        blocks.append(markdown_table(content))
    return "\n\n".join([*blocks, *note]) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0 }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
img { max-width: 100% } div { overflow-x: auto }
"""


def _html(name: str, sections: Sequence[Section], note: Sequence[str]) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{_bold(html.escape(cell))}</{tag}>' for cell in cells)}</tr>"

    body = []
    for title, content in sections:
        body += [f"<h2>{html.escape(title)}</h2>"] if title else []
        if isinstance(content, str):
            body.append(f'<img src="{html.escape(content)}" alt="quality">')
        else:
            head, *rows = content
            body.append(f"<div><table>{row('th', head)}{''.join(row('td', cells) for cells in rows)}</table></div>")
    body += [f"<p>{html.escape(line)}</p>" for line in note]
    lines = ["<!doctype html>", '<html lang="en"><meta charset="utf-8">', f"<title>{html.escape(name)}</title>"]
    return "\n".join([*lines, f"<style>{_STYLE}</style>", f"<h1>{html.escape(name)}</h1>", *body, "</html>", ""])


def _bold(cell: str) -> str:
    return f"<b>{cell.strip('*')}</b>" if cell.startswith("**") else cell
