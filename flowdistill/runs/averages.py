"""Averages of the weights over another stretch of a training, chosen when it is over (Karras et al. 2024, EDM2)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from flowdistill.ema import PostHocEma, PowerEma
from flowdistill.plumbing.errors import CheckpointError, ConfigError
from flowdistill.plumbing.files import replaced_folder
from flowdistill.runs.checkpoints import checkpoints_in, load_tensors_of, read_meta, verify_checkpoint

_FOLDER = "averages"
_WORST = 0.1  # of a profile that the stored ones make up, relative to it


def names_of(count: int) -> list[str]:
    """The names in checkpoints of so many averages of the student."""
    return ["ema", *(f"ema_{number}" for number in range(2, count + 1))]


def keep_averages(checkpoint: Path, count: int) -> None:
    """Keep the averages of a checkpoint in ``averages/`` of its run, where they stay when the checkpoint is deleted.

    The files are links to those of the checkpoint, which take no further place while it is there. A folder that is
    there already stays.
    """
    folder = checkpoint.parent.parent / _FOLDER / checkpoint.name
    if folder.is_dir():
        return
    with replaced_folder(folder) as partial:
        meta = read_meta(checkpoint)
        for file in ("meta.json", *(file for name in names_of(count) for file in meta.files(name))):
            try:
                os.link(checkpoint / file, partial / file)
            except OSError:  # a file system without links
                shutil.copyfile(checkpoint / file, partial / file)


def post_hoc(workdir: Path, averaging: PostHocEma, relative_width: float, step: int) -> dict[str, Tensor]:
    """The weights of the student averaged up to a step over another relative width.

    Among all sums of stored averages it is the one whose profile is nearest to the wanted one: with p_i(tau) for the
    weight that the stored average i gives to the student at the time tau, it minimises
    integral (sum_i x_i p_i - p)^2 over x (EDM2, arXiv 2312.02696, section 3.2), here with sum_i x_i = 1.

    Args:
        workdir: the run directory.
        averaging: what the run kept.
        relative_width: sigma_rel, in (0, 0.28).
        step: the last step of the average.

    Raises:
        CheckpointError: nothing was kept up to this step, or a file of it is damaged.
        ConfigError: what was kept cannot make up such a profile.
    """
    target = PowerEma(relative_width=relative_width)
    kept = [path for path in checkpoints_in(workdir / _FOLDER) if 0 < _step(path) <= step]
    if not kept:
        raise CheckpointError(f"{workdir / _FOLDER} holds no averages up to step {step}")
    stored = [(path, name, track) for path in kept for name, track in zip(
        names_of(len(averaging.tracks)), averaging.tracks, strict=True
    )]  # fmt: skip
    ends, gammas = [float(_step(path)) for path, _, _ in stored], [track.gamma for _, _, track in stored]
    factors, error = coefficients(ends, gammas, float(step), target.gamma)
    if error > _WORST:
        raise ConfigError(
            f"the averages in {workdir / _FOLDER} do not make up one of relative width {relative_width:g}: its weights "
            f"would be {error:.0%} off; widths near {' and '.join(f'{t.relative_width:g}' for t in averaging.tracks)} "
            "need fewer checkpoints than others"
        )
    # The sum, file by file, in float64; what is no floating-point number is the newest.
    total: dict[str, Tensor] = {}
    for (path, name, _), factor in zip(stored, factors, strict=True):
        if factor == 0:
            continue
        verify_checkpoint(path, name)
        for key, value in load_tensors_of(path, name).items():
            if not value.is_floating_point():
                total[key] = value
            elif key in total:
                total[key] += factor * value.double()
            else:
                total[key] = factor * value.double()
    return {key: value.float() if value.is_floating_point() else value for key, value in total.items()}


def coefficients(ends: Sequence[float], gammas: Sequence[float], end: float, gamma: float) -> tuple[list[float], float]:
    """The factors x of stored averages, with the sum 1, in the sum that is nearest to a wanted one; and how near.

    The profile of an average that ends at t is p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t].

    Args:
        ends: the end t of each stored average.
        gammas: the exponent of each.
        end: of the wanted average.
        gamma: its exponent.

    Returns:
        The factors, and the norm of the difference of the profiles over that of the wanted one.

    Examples:
        >>> coefficients([50.0, 100.0], [6.0, 6.0], 100.0, 6.0)
        ([0.0, 1.0], 0.0)
    """
    t, g = np.array([*ends, end]), np.array([*gammas, gamma]) + 1
    first = np.minimum(t[:, None], t[None, :])
    # of profiles in units of their norms, which makes the matrix one of cosines
    power = (first / t[:, None]) ** g[:, None] * (first / t[None, :]) ** g[None, :] / first
    products = g[:, None] * g[None, :] * power / (g[:, None] + g[None, :] - 1)
    norms = np.sqrt(np.diag(products))
    cosines = products / norms[:, None] / norms[None, :]
    units = norms[-1] / norms[:-1]
    system = np.block([[cosines[:-1, :-1], units[:, None]], [units[None, :], np.zeros((1, 1))]])  # Lagrange's
    x = np.linalg.lstsq(system, np.array([*cosines[:-1, -1], 1.0]), rcond=1e-12)[0][:-1]
    left = 1 - 2 * x @ cosines[:-1, -1] + x @ cosines[:-1, :-1] @ x
    factors = x * units
    return [round(float(factor), 12) + 0.0 for factor in factors], round(float(np.sqrt(max(left, 0.0))), 7)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))
