"""Pictures: grids of images, models side by side, training curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flowdistill.decoders import quantize
from flowdistill.plumbing.caches import prepare_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> Figure:
    prepare_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _tile(images: Tensor, columns: int) -> np.ndarray[Any, Any]:
    """Images (N, C, H, W) in [-1, 1] as one array with a thin margin around each."""
    rows = math.ceil(len(images) / columns)
    blank = images.new_full((rows * columns - len(images), *images.shape[1:]), 1.0)
    padded = torch.nn.functional.pad(torch.cat([images.clamp(-1, 1), blank]), (1, 1, 1, 1), value=1.0)
    _, c, h, w = padded.shape
    grid = padded.reshape(rows, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
    return (grid.squeeze(-1).float().numpy() + 1) / 2


def _show(axes: Any, images: Tensor, columns: int) -> None:
    axes.imshow(_tile(images, columns), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def image_grid(images: Tensor, path: Path, columns: int = 10, captions: Sequence[str] | None = None) -> None:
    """Write images (N, C, H, W) in [-1, 1], with C = 1 or 3, as a grid.

    A pixel of an image is one of the grid, unless images are smaller than 64 pixels, which are enlarged by a whole
    number, or larger than 256, which are reduced.

    Args:
        images: to be shown.
        path: of the picture.
        columns: images in a row; fewer where there are fewer.
        captions: a few words under each.
    """
    pixels = quantize(images.cpu(), "nearest").expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    larger = max(pixels.shape[1:3])
    factor = max(_SMALLEST // larger, 1) if larger < _LARGEST else _LARGEST / larger
    height, width = (max(round(factor * side), 1) for side in pixels.shape[1:3])
    columns = min(columns, len(pixels))
    across, down = width + 2, height + 2 + (0 if captions is None else _CAPTION)
    grid = Image.new("RGB", (columns * across, math.ceil(len(pixels) / columns) * down), "white")
    draw = ImageDraw.Draw(grid)
    for i, tile in enumerate(map(Image.fromarray, pixels)):
        x, y = i % columns * across + 1, i // columns * down + 1
        grid.paste(
            tile.resize((width, height), Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.BOX), (x, y)
        )
        if captions is not None:
            draw.text((x + width / 2, y + height + 1), captions[i], "black", ImageFont.load_default(_CAPTION - 4), "ma")
    grid.save(path)


_SMALLEST, _LARGEST = 64, 256  # of images in a grid, in pixels
_CAPTION = 16  # pixels for a line of text


def side_by_side(panels: Mapping[str, Tensor], path: Path, columns: int = 10) -> None:
    """Write sets of images that belong together row by row, each as a grid under its title."""
    rows = math.ceil(len(next(iter(panels.values()))) / columns)
    figure = _figure(3.6 * len(panels), 3.6 * rows / columns + 0.33)
    for axes, (title, images) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _show(axes, images, columns)
        axes.set_title(title)
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.05)


def scatter_side_by_side(panels: Mapping[str, Tensor], path: Path) -> None:
    """Write sets of points (N, 2) as scatter plots with common axes."""
    figure = _figure(3.6 * len(panels), 3.8)
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (title, points) in zip(grid, panels.items(), strict=True):
        axes.scatter(*points.T.numpy(), s=2, alpha=0.4, linewidths=0, color="#2a6f97")
        axes.set_title(title)
        axes.set_aspect("equal")
    figure.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.05)


def loss_curves(records: Sequence[Mapping[str, float]], path: Path) -> bool:
    """Write the training curves: raw values faint, a running median over them.

    Counters and speeds are left out, and so is a metric that never changes or repeats an earlier one. Six panels at
    most, in the order of the records. An axis is logarithmic where values are positive and span more than a decade.

    Args:
        records: as ``metrics.jsonl`` holds them.
        path: of the picture.

    Returns:
        Whether there was anything to draw.
    """
    curves = _curves(records)
    if not curves:
        return False
    columns = min(len(curves), 3)
    rows = math.ceil(len(curves) / columns)
    figure = _figure(3.4 * columns, 2.4 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, (steps, values)) in zip(grid, curves.items(), strict=False):
        window = max(1, len(values) // 40)
        smooth = [np.median(values[max(0, i - window) : i + window + 1]) for i in range(len(values))]
        axes.plot(steps, values, color="#2a6f97", alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color="#2a6f97", linewidth=1.5)
        if values.min() > 0 and values.max() > 10 * values.min():
            axes.set_yscale("log")
            _plain_log(axes.yaxis)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.grid(alpha=0.2)
        axes.locator_params(axis="x", nbins=5, integer=True)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(which="both", labelsize=8)
        axes.set_xlabel("step", fontsize=8)
    for axes in grid[len(curves) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=130)
    return True


def _curves(records: Sequence[Mapping[str, float]]) -> dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Steps and finite values of the metrics that a person wants to see, by their names."""
    curves: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
    for name in dict.fromkeys(key for record in records for key in record):
        if name in ("step", "learning_rate") or name.endswith(("_evaluations", "_per_second", "_gib")):
            continue
        points = [(r["step"], r[name]) for r in records if name in r and math.isfinite(r[name])]
        if len({value for _, value in points}) < 2:
            continue
        steps, values = np.array(points).T
        if not any(values.shape == shown.shape and np.allclose(values, shown) for _, shown in curves.values()):
            curves[name] = steps, values
    return dict(list(curves.items())[:6])


def _plain_log(axis: Any) -> None:
    """Ticks of a logarithmic axis as plain numbers, of which 2, 3 and 5 stand between the powers of ten."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "235" else "")  # all would overlap


def ranking(
    rows: Mapping[str, Mapping[str, Sequence[float]]], levels: Mapping[str, float], metric: str, path: Path
) -> None:
    """Write a figure of each row under several conditions, over seeds, one line a row, beside levels to compare with.

    Args:
        rows: values over the seeds, by row and condition.
        levels: a vertical line each.
        metric: the name of the axis, which is logarithmic.
        path: of the picture.
    """
    figure = _figure(8.0, 1.2 + 0.24 * len(rows))
    axes = figure.subplots()
    colours, shades = ("#d1495b", "#edae49", "#2a6f97", "#7a7a7a"), ("#000000", "#555555", "#888888", "#aaaaaa")
    conditions = list(dict.fromkeys(condition for row in rows.values() for condition in row))
    for number, condition in enumerate(conditions):
        points = [(i, row[condition]) for i, row in enumerate(rows.values()) if condition in row]
        places = [i + 0.14 * (number - (len(conditions) - 1) / 2) for i, _ in points]
        means = np.array([np.mean(values) for _, values in points])
        reach = _reach([values for _, values in points])
        axes.errorbar(means, places, xerr=reach, fmt="o", ms=4, lw=1, color=colours[number % 4], label=condition)
    for number, (name, level) in enumerate(levels.items()):
        style = ("-", "--", ":", "-.")[number % 4]
        axes.axvline(level, color=shades[number % 4], lw=1 + number // 4, ls=style, label=name)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    _plain_log(axes.xaxis)
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.set_xlabel(metric)
    axes.grid(alpha=0.2, which="both")
    figure.legend(fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=130)


def _reach(rows: Sequence[Sequence[float]]) -> np.ndarray[Any, Any]:
    """How far the least and the largest of each row lie from its mean, (2, rows); not below 0, as by rounding."""
    distances = [(np.mean(row) - min(row), max(row) - np.mean(row)) for row in rows]
    reach: np.ndarray[Any, Any] = np.maximum(np.array(distances).T, 0.0)
    return reach


def curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Sequence[float]]]]],
    label: str,
    path: Path,
    log_x: bool = False,
    log_y: Sequence[str] = (),
) -> None:
    """Write values over seeds against a number, a panel for each kind of value and in it a line for each name.

    The line is at the means, and its bars reach from the least to the largest.

    Args:
        panels: numbers and the values there, by kind and by name.
        label: of the number.
        path: of the picture.
        log_x: makes its axis logarithmic.
        log_y: kinds of values whose axis is logarithmic.
    """
    from matplotlib.ticker import LogLocator

    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = _figure(5.0 * columns + 2.0, 4.0 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    handles = {}
    for axes, (kind, lines) in zip(grid, panels.items(), strict=False):
        for name, points in lines.items():
            known = [(x, values) for x, values in points if values]
            if not known:
                continue
            number = names.index(name)
            handles[name] = axes.errorbar(
                [x for x, _ in known],
                [np.mean(values) for _, values in known],
                yerr=_reach([values for _, values in known]),
                fmt="o",
                ms=3,
                lw=1,
                ls=("-", "--", ":")[number // 10 % 3],
                color=f"C{number % 10}",
            )
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.xaxis.set_minor_formatter("{x:,.0f}")
        if kind in log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="both", labelsize=7)
        axes.set_xlabel(label)
        axes.set_ylabel(kind)
        axes.grid(alpha=0.2, which="both")
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside right upper")
    figure.savefig(path, dpi=130)
