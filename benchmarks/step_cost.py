"""What a training step costs: ratios within one process, on the digits network; also import time and peak memory.

    python benchmarks/step_cost.py

Every pair of things is timed in turns, so that a machine that slows down slows both. Prints a Markdown table and
writes it to benchmarks/results/step_cost.md.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from reports import report

import flowdistill
from flowdistill.algorithms.freeflow import FreeFlowCorrection, FreeFlowPrediction
from flowdistill.ema import AveragedModel, Ema
from flowdistill.flow_maps import from_teacher
from flowdistill.interfaces import Objective, Step
from flowdistill.networks import sit
from flowdistill.plumbing.randomness import step_generator
from flowdistill.states import Prior
from flowdistill.training import Loop, Training
from flowdistill.velocities import FiniteDifference, Jvp
from flowdistill.wrapped_teachers import NetworkTeacher

BATCH = 128
ROUNDS = 30


def in_turns(**calls: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each call over ROUNDS rounds, after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(ROUNDS + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def objectives() -> dict[str, float]:
    """Costs of whole objectives and of the online network's step, relative to the student's forward and backward."""
    teacher = flowdistill.load_teacher("digits_teacher")
    student = from_teacher(teacher, "anchored")
    source, correction = Prior(), FreeFlowCorrection()
    source.setup(student, teacher)
    states = source.sample(BATCH, FreeFlowPrediction().pairs, torch.Generator().manual_seed(0))

    def plain() -> None:
        average = student.average_velocity(*states)
        average.square().mean().backward()  # type: ignore[no-untyped-call]

    def step(objective: Objective) -> Callable[[], None]:
        objective.setup(student, teacher)

        def call() -> None:
            output = objective.loss(states, Step(torch.Generator().manual_seed(0)))
            output.loss.backward()  # type: ignore[no-untyped-call]

        return call

    def online() -> None:
        output = correction.auxiliary_loss("online", states, Step(torch.Generator().manual_seed(0)))
        assert output is not None
        output.loss.backward()  # type: ignore[no-untyped-call]

    seconds = in_turns(
        plain=plain,
        backward=step(FreeFlowPrediction(estimator=FiniteDifference(scheme="backward"))),
        central=step(FreeFlowPrediction(estimator=FiniteDifference(scheme="central"))),
        jvp=step(FreeFlowPrediction(estimator=Jvp())),
        correction=step(correction),
        online=online,
    )
    return {name: value / seconds["plain"] for name, value in seconds.items()}


def loop_overhead(workdir: Path) -> float:
    """Cost of the loop's step relative to the same step written out by hand."""
    teacher = flowdistill.load_teacher("digits_teacher")
    objective, source, averaging = FreeFlowPrediction(), Prior(), Ema()
    steps = 10**9

    def adamw(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-4)  # type: ignore[arg-type]

    torch.manual_seed(0)
    training = Training(
        objective=FreeFlowPrediction(),
        flow_map=from_teacher(teacher, "anchored"),
        teacher=teacher,
        steps=steps,
        batch_size=BATCH,
        optimizer=adamw,
        ema=averaging,
    )
    loop = Loop.build(training, workdir)
    torch.manual_seed(0)
    bare = from_teacher(teacher, "anchored")
    source.setup(bare, teacher)
    objective.setup(bare, teacher)
    parameters = [p for p in bare.parameters() if p.requires_grad]
    optimizer, average = adamw(parameters), AveragedModel(bare, averaging)
    step = 0

    def by_hand() -> None:
        nonlocal step
        states = source.sample(BATCH, objective.law(step / steps), step_generator(0, step, "states"))
        output = objective.loss(states, Step(step_generator(0, step, "loss"), step, step / steps))
        output.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step)
        step += 1

    seconds = in_turns(bare=by_hand, loop=loop.train_step)
    return seconds["loop"] / seconds["bare"]


def fused_attention() -> float:
    """Cost in bfloat16 of the MNIST network's forward and backward with PyTorch's fused attention on a CPU."""
    teacher = flowdistill.load_teacher("mnist_sit")
    assert isinstance(teacher, NetworkTeacher)
    network = teacher.network.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(64, *network.sample_shape, generator=generator), torch.rand(64, generator=generator)
    labels = torch.randint(10, (64,), generator=generator)

    def plain() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            velocity = network.velocity(x, t, labels)
        velocity.square().mean().backward()  # type: ignore[no-untyped-call]

    def fused() -> None:
        with mock.patch.object(sit, "attention", F.scaled_dot_product_attention):
            plain()

    seconds = in_turns(plain=plain, fused=fused)
    return seconds["fused"] / seconds["plain"]


def import_seconds() -> float:
    """Seconds that `import flowdistill` takes beyond `import torch`; the median of five processes."""
    code = "import time, torch; start = time.perf_counter(); import flowdistill; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    return statistics.median(float(run.stdout) for run in runs)


def demo_gigabytes(workdir: Path) -> float:
    """Peak memory of a short demo: every part of it, with few steps and the whole evaluation of few teacher steps."""
    command = [sys.executable, "-m", "flowdistill", "train", "--gin_file", "freeflow/digits.gin"]
    changes = ["train.steps=30", "evaluation.teacher_steps=(1,4)"]
    bindings = [f"--gin.{change}" for change in changes]
    subprocess.run([*command, *bindings, "--workdir", str(workdir)], check=True, capture_output=True)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024**2


def main() -> None:
    """Measure everything and write the table."""
    torch.set_num_threads(1)
    cost = objectives()
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            ("prediction step, backward difference", cost["backward"], "2.0"),
            ("prediction step, central difference", cost["central"], ""),
            ("prediction step, JVP", cost["jvp"], "3.2"),
            ("correction step", cost["correction"], "2.0"),
            ("online network's step", cost["online"], ""),
            ("loop's step / the same by hand", loop_overhead(Path(folder)), "1.03"),
            ("MNIST network in bfloat16: PyTorch's attention / the library's", fused_attention(), ""),
            ("`import flowdistill` after `import torch`, seconds", import_seconds(), "1"),
            ("peak memory of the demo, GiB", demo_gigabytes(Path(folder) / "demo"), "1.5"),
        ]
    head = ["relative to the student's forward + backward, where no unit is given", "measured", "at most"]
    table = [head, *([name, f"{value:.2f}", limit] for name, value, limit in rows)]
    report("step_cost", [table], f"Digits network, batch {BATCH}, float32; medians of {ROUNDS} turns.")


if __name__ == "__main__":
    main()
