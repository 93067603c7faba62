"""Search for good noises with the student of a run, or its teacher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch

from flowdistill.evaluation.pictures import images_of
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import FlowMap, Teacher, Verifier
from flowdistill.plumbing.caches import refusal
from flowdistill.plumbing.distributed import find_device
from flowdistill.plumbing.errors import ConfigError
from flowdistill.plumbing.files import module_fingerprint
from flowdistill.plumbing.progress import progress
from flowdistill.plumbing.randomness import step_generator
from flowdistill.plumbing.registry import SEARCH_STRATEGIES, VERIFIERS
from flowdistill.runs.blocks import collect
from flowdistill.runs.loading import load_teacher
from flowdistill.runs.run import Run, on_device
from flowdistill.runs.sampling import Labels, check_counts, default_batch_size, labels_as_json, make_condition
from flowdistill.searching.result import SearchResult
from flowdistill.searching.strategies import SearchStrategy
from flowdistill.searching.trials import PricedModel, Trials, evaluation_flops
from flowdistill.searching.verifiers import FunctionVerifier, Score

_BLOCK = 50  # samples whose search is stored at a time
_PICTURE = 100  # samples in the picture


def search(
    run: Run | FlowMap | str | Path,
    budget: float,
    *,
    teacher: str | Path | None = None,
    verifier: str | Verifier | Score = "feature_distance",
    strategy: str | SearchStrategy = "best_of",
    proposer: Literal["student", "teacher"] = "student",
    num_samples: int = 64,
    labels: Labels = None,
    teacher_steps: int = 16,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
) -> SearchResult | None:
    """Search for noises whose samples a verifier scores high, with a one-step student in place of its slow teacher.

    The student tries noises, and the teacher is given the best alone (Tong et al. 2025, FreeFlow, arXiv 2511.19428;
    verifiers and strategies after Ma et al. 2025, arXiv 2501.09732). It works as far as the student carries a noise
    to what the teacher would carry it to.

    The unit of the budget is one evaluation of the teacher's network on one sample. A step of the teacher under
    classifier-free guidance costs 2, an evaluation of the student its floating-point operations over those of the
    teacher's network. Evaluations of the verifier are not counted.

    Samples are drawn in the precision of the run's evaluation. What is found for a sample depends on the seed, its
    number and its label. Samples are searched for in blocks of 50, which are kept in ``RUN/searches``: an interrupted
    search continues, and one for more samples begins with what is there. Under torchrun the ranks share the blocks out.

    Args:
        run: a run directory, a checkpoint in it, or a `Run`; or a student, as `load_flow_map` gives it.
        budget: for each sample.
        teacher: see `load_teacher`; None is the one that the student was trained on, as it was guided there.
        verifier: a name that ``flowdistill list verifiers`` shows, a verifier, or a function of images and their
            condition to scores (B,).
        strategy: a name that ``flowdistill list search_strategies`` shows, or a strategy.
        proposer: "teacher" lets the teacher try the noises itself, without a student.
        num_samples: how many.
        labels: see `sample`.
        teacher_steps: Euler steps of the teacher.
        guidance: guidance scale of the teacher, and of the student where it takes one; None is their own.
        seed: of the noises.
        batch_size: samples evaluated at a time; None is 100 on a CPU, else 500. It does not change the result, up to
            rounding.
        device: where models are evaluated; by default the first GPU (of each rank its own), else the CPU.
        out: a folder for ``result.safetensors``, ``figures.json`` and ``images.png``; None is that of the blocks.

    Returns:
        Noises, samples, scores and counted evaluations, on the CPU; None on all ranks but the first.

    Raises:
        CheckpointError: the run or the teacher cannot be read.
        ConfigError: a budget that does not pay for one proposal and one sample of the teacher, arguments that do not
            fit the models, or a folder that cannot be written.
        DataError: scores that are not finite.

    Examples:
        >>> result = flowdistill.search("runs/digits", 80, labels=3)  # doctest: +SKIP
        >>> result.scores.mean(), result.samples.shape  # doctest: +SKIP
        (tensor(-3.8), torch.Size([64, 1, 8, 8]))
    """
    check_counts(num_samples=num_samples, batch_size=batch_size, teacher_steps=teacher_steps)
    if not 0 < budget < math.inf:
        raise ConfigError(f"a budget is a positive number of evaluations, not {budget}")
    if proposer not in ("student", "teacher"):
        raise ConfigError(f"the proposer is 'student' or 'teacher', not {proposer!r}")
    judge, plan = _verifier(verifier), _strategy(strategy)
    # The verifier, the models and what their evaluations cost.
    run = Run.of(run)
    evaluation = run.evaluation
    judge.setup(None if evaluation is None else evaluation.features)
    place = find_device(device)
    student = on_device(run.student, place)
    model = on_device(_teacher(teacher, run, guidance), place)
    condition = make_condition(model.num_classes, num_samples, labels, guidance, seed)
    unit = evaluation_flops(model, condition)
    bf16 = evaluation is not None and evaluation.precision == "bf16"
    expensive = PricedModel(model, unit, condition, bf16)
    cheap = expensive if proposer == "teacher" else PricedModel(student, unit, condition, bf16)

    # The search of a block of samples, and the settings that its result depends on.
    def draw(block: int, n: int) -> SearchResult:
        first = block * _BLOCK
        phase.completed = first * budget
        trials = Trials(
            proposer=cheap,
            teacher=expensive,
            teacher_steps=teacher_steps,
            verifier=judge,
            decode=lambda samples: images_of(samples, model),
            budget=budget,
            condition=condition[first:][:n],
            generators=[step_generator(seed, row, "search") for row in range(first, first + n)],
            batch_size=batch_size or default_batch_size(place),
            progress=phase.advance,
        )
        return find(plan, trials)

    settings = {
        "budget": budget,
        "verifier": repr(judge),
        "strategy": repr(plan),
        "proposer": proposer,
        "teacher": None if teacher is None else str(teacher),
        "teacher_steps": teacher_steps,
        "guidance": guidance,
        "labels": labels_as_json(labels),
        "seed": seed,
    }
    folder = run.folder(
        "searches",
        format=3,
        teacher=module_fingerprint(model),
        verifier=judge.fingerprint(),
        settings=settings,
    )

    # All blocks, and the files of the result.
    written = folder if out is None else Path(out)
    if (error := refusal(written)) is not None:
        raise ConfigError(f"{written} cannot be written ({error}): name another folder for the result")
    with progress("searching", num_samples * budget) as phase:
        result = collect(SearchResult, folder, num_samples, draw, _BLOCK)
    if result is None:
        return None
    pictured = images_of(result.samples[:_PICTURE].to(place), model).cpu()
    return result.write(written, pictured, settings)


def find(strategy: SearchStrategy, trials: Trials) -> SearchResult:
    """Search for the noises of some samples, and count what it takes."""
    student, teacher, n = trials.proposer, trials.teacher, len(trials.generators)
    before = student.model.evaluations, teacher.model.evaluations
    best = strategy.search(trials)
    students = 0.0 if trials.alone else (student.model.evaluations - before[0]) / n
    teachers = (teacher.model.evaluations - before[1]) / n
    cost = students * student.price + teachers * teacher.price
    return SearchResult(
        noise=best.noise[0],
        samples=best.samples[0],
        scores=best.scores[0],
        labels=trials.condition.labels,
        student_evaluations=torch.full((n,), students, dtype=torch.float64),
        teacher_evaluations=torch.full((n,), teachers, dtype=torch.float64),
        cost=torch.full((n,), cost, dtype=torch.float64),
    )


def _verifier(verifier: str | Verifier | Score) -> Verifier:
    if isinstance(verifier, str):
        built: Verifier = VERIFIERS.build(verifier)
        return built
    return verifier if isinstance(verifier, Verifier) else FunctionVerifier(verifier)


def _strategy(strategy: str | SearchStrategy) -> SearchStrategy:
    if isinstance(strategy, str):
        built: SearchStrategy = SEARCH_STRATEGIES.build(strategy)
        return built
    return strategy


def _teacher(name: str | Path | None, run: Run, guidance: float | None) -> Teacher:
    """The teacher of a search, guided if it is to be."""
    teacher = run.teacher if name is None else load_teacher(name)
    if teacher is None:
        raise ConfigError("the run has no teacher: name one")
    for what in ("sample_shape", "num_classes"):
        ours, theirs = getattr(run.student, what), getattr(teacher, what)
        if ours != theirs:
            raise ConfigError(f"{what} of the student is {ours}, of the teacher {theirs}")
    if guidance is not None and not teacher.takes_guidance:
        teacher = GuidedTeacher(teacher, guidance)
    return teacher.eval()
