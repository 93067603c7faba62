"""Measuring the students of runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from flowdistill.evaluation.features import FeatureExtractor, load_features
from flowdistill.evaluation.metrics import measure, spread
from flowdistill.evaluation.protocols import Protocol
from flowdistill.evaluation.references import Reference, reference_set, split
from flowdistill.evaluation.samples import SampleSet, sample_set
from flowdistill.interfaces import FlowMap, Jumps
from flowdistill.plumbing.distributed import find_device, rank_and_world
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.files import write_json
from flowdistill.plumbing.machine import machine
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.registry import FEATURES, METRICS, PROTOCOLS
from flowdistill.runs.blocks import BLOCK, collect
from flowdistill.runs.run import Run, on_device
from flowdistill.runs.sampling import (
    Labels,
    Steps,
    check_counts,
    check_guidance,
    default_batch_size,
    draw,
    labels_as_json,
    make_condition,
    times_of,
)


def evaluate(
    run: Run | FlowMap | str | Path,
    *,
    protocol: str | Protocol = "plain",
    metrics: Sequence[str] | None = None,
    num_samples: int | None = None,
    steps: Steps = 1,
    labels: Labels = None,
    guidance: float | None = None,
    seed: int = 0,
    features: str | FeatureExtractor | None = None,
    reference: Reference | None = None,
    renoise: bool | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    noise_floor: bool = True,
    bootstrap: int = 0,
    out: str | Path | None = None,
) -> dict[str, float]:
    """Metrics of a run's student against the truth.

    Samples are drawn in blocks of 500, each from noise of its own. What features say of a block is kept in
    ``RUN/evaluations``, so that an interrupted evaluation continues, and one with more samples or other metrics begins
    with what is there. Under torchrun the ranks share the blocks out; rank 0 measures, and the others return nothing.

    Args:
        run: a run directory, a checkpoint in it, or a `Run`; or a student, as `load_flow_map` gives it.
        protocol: how published figures are made, which is all that follows where it is not given, see
            `flowdistill.evaluation.Protocol`; a name that ``flowdistill list protocols`` shows.
        metrics: names that ``flowdistill list metrics`` shows; None is the protocol's, which is fid where none is said.
        num_samples: samples of the student, exactly; None is the protocol's, 10 000 where none is said.
        steps: see `sample`.
        labels: see `sample`.
        guidance: see `sample`.
        seed: of the noise.
        features: a feature extractor or its name, as ``flowdistill list feature_extractors`` shows; None is the one of
            the run's own evaluation, or the samples themselves beside those of an exact teacher.
        reference: a folder or a file of images, or of their mean and covariance, or a data set, see
            `flowdistill.evaluation.load_images`; None is that of the run's own evaluation, or the features of real data
            that come with the extractor.
        renoise: see `sample`.
        batch_size: samples at a time; None is 100 on a CPU, else 500. It does not change the figures, up to rounding.
        device: where samples and features are computed; by default the first GPU (of each rank its own), else the CPU.
        noise_floor: measure also a second true set of as many samples: the best that a student can look.
        bootstrap: estimate the spread of each metric over other seeds, from so many random halves of the samples; 0
            does not.
        out: a JSON file for the figures and all that they rest on: the protocol, and what is other than it says.

    Returns:
        The metrics by their names; under ``NAME_noise_floor`` the same between two sets of true samples, one of
        ``num_samples``, where the reference has as many again, else a warning says why it is not there; and under
        ``NAME_std`` the spread.

    Raises:
        CheckpointError: the run, or the extractor's weights, cannot be read.
        ConfigError: an unknown metric, nothing to compare with, or a metric that the reference does not allow.
        DataError: the reference is not what it should be.

    Examples:
        >>> flowdistill.evaluate("runs/ring", metrics=("w2",), num_samples=2000)  # doctest: +SKIP
        {'w2': 0.09, 'w2_noise_floor': 0.05}
    """
    # The protocol, and what the call or the run says in place of it.
    rules: Protocol = PROTOCOLS.build(protocol) if isinstance(protocol, str) else protocol
    if not isinstance(rules, Protocol):
        raise ConfigError(f"a protocol is one that flowdistill list protocols shows, or a Protocol, not {protocol!r}")
    if out is not None and Path(out).is_dir():
        raise ConfigError(f"{out} is a folder: name a file for the figures")
    run = Run.of(run)
    metrics = rules.metrics if metrics is None else metrics
    num_samples = rules.num_samples if num_samples is None else num_samples
    labels = rules.labels if labels is None and run.student.num_classes is not None else labels
    features = rules.features if features is None else features
    reference = rules.reference if reference is None else reference
    if run.evaluation is not None:
        features = run.evaluation.features if features is None else features
        reference = run.evaluation.reference if reference is None else reference
    check_counts(num_samples=num_samples, batch_size=batch_size, bootstrap=bootstrap or None)
    num_samples = int(num_samples)
    for name in metrics:
        METRICS.get(name)
    check_guidance(run, guidance)

    # What is compared: the student, and the truth.
    extractor = None if features is None else load_features(features)
    place = find_device(device)
    flow_map = on_device(run.student, place)
    renoise = flow_map.jumps is Jumps.TO_DATA if renoise is None else renoise
    times = times_of(flow_map, steps, rules.shift)
    condition = make_condition(flow_map.num_classes, num_samples, labels, guidance, seed)
    truth = None
    if rank_and_world()[0] == 0:
        truth = reference_set(extractor, run.teacher, num_samples, seed, reference, flow_map.decoder, place)

    # The student's samples, of which all ranks draw blocks.
    def block_of_samples(block: int, n: int) -> SampleSet:
        phase.completed = block * BLOCK
        rows = condition[block * BLOCK :][:n]
        size = batch_size or default_batch_size(place)
        batches = draw(flow_map, n, rows, block, size, phase, steps=times.tolist(), seed=seed, renoise=renoise)
        return sample_set(torch.cat(list(batches)), rows.labels, extractor, flow_map.decoder, rules.rounding)

    folder = run.folder(
        "evaluations",
        format=2,
        features=None if extractor is None else extractor.fingerprint(),
        steps=len(times) - 1 if torch.equal(times, times_of(flow_map, len(times) - 1)) else times.tolist(),
        guidance=guidance,
        seed=seed,
        renoise=renoise,
        **({} if labels in (None, "in_turn") else {"labels": labels_as_json(labels)}),
        **({} if rules.rounding is None else {"rounding": rules.rounding}),
    )
    with progress("drawing samples", num_samples) as phase:
        generated = collect(SampleSet, folder, num_samples, block_of_samples)
    if generated is None or truth is None:
        return {}

    # The figures, their noise floors and their spreads.
    figures = measure(metrics, generated, truth)
    if noise_floor:
        again = None if extractor is not None else reference_set(None, run.teacher, num_samples, seed + 1)
        figures |= _noise_floors(metrics, num_samples, truth, again)
    if bootstrap:
        figures |= {f"{name}_std": v for name, v in spread(metrics, generated, truth, bootstrap, seed).items()}
    if out is not None:
        decoder = flow_map.decoder
        rounded = decoder is not None and extractor is not None and extractor.quantized
        several = len(times) > 2
        own_grid = torch.equal(times, times_of(flow_map, len(times) - 1, rules.shift))
        settings = {
            "metrics": list(metrics),
            "features": None if features is None else _name_of(features),
            "reference": None if reference is None else str(reference),
            "num_samples": num_samples,
            "labels": labels_as_json(labels),
            "rounding": (rules.rounding or "the model's own") if rounded else "none",
            "autoencoder": "none" if decoder is None or decoder.vae is None else decoder.vae,
            "shift": None if not several else rules.shift if own_grid else "times of its own",
        }
        record = {
            "protocol": protocol if isinstance(protocol, str) else None,
            "otherwise": rules.otherwise(settings),
            **settings,
            "times": times.tolist(),
            "guidance": guidance,
            "renoise": renoise,
            "seed": seed,
            "bootstrap": bootstrap,
            "student": {"run": str(run.workdir), **run.identity},
            "machine": machine(),
            "figures": figures,
        }
        write_json(Path(out), record)
    return figures


def _name_of(features: str | FeatureExtractor) -> str:
    """The registered name of a feature extractor, or that of its class."""
    if isinstance(features, str):
        return features
    with contextlib.suppress(ConfigError):
        return FEATURES.name_of(type(features))
    return type(features).__name__


def _noise_floors(metrics: Sequence[str], n: int, truth: SampleSet, again: SampleSet | None) -> dict[str, float]:
    """The metrics between two true sets: ``again`` and all of the truth, or n and the others of a reference."""
    pair = split(truth, n) if again is None else (again, truth)
    floors: dict[str, float] = {}
    if pair is not None:
        for name in metrics:
            with contextlib.suppress(ConfigError):  # of a metric that needs what true samples lack, such as labels
                floors[f"{name}_noise_floor"] = measure([name], *pair)[name]
    missing = [name for name in metrics if f"{name}_noise_floor" not in floors]
    if missing:
        if pair is not None:
            why = "true samples do not have what it is measured on"
        elif len(truth):
            why = f"the reference holds {len(truth)} samples, and {2 * n} are needed"
        else:
            why = "the reference holds a mean and a covariance alone"
        warnings.warn(f"no noise floor of {', '.join(missing)}: {why}", RuntimeWarning, stacklevel=3)
    return floors
