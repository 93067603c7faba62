"""How near a student's own diagonal is to the velocity of its noised samples, next to an online network.

    python benchmarks/pseudo_velocity.py

FreeFlow is trained in the plane, on a Gaussian and on eight Gaussians on a ring, with either estimator of the noising
velocity v_N. Then the estimator is compared, at noised samples of the student, with the closed form over 10000 others
of its samples. The rows of the teacher say how large the difference v_N - u is that the correction is after. A
relative error is a root mean square over that of v_N. The table goes to benchmarks/results/pseudo_velocity.md.
"""

from __future__ import annotations

import torch
from reports import SEEDS, report

from flowdistill.algorithms.freeflow import FreeFlow, FreeFlowCorrection, FreeFlowPrediction, FreeFlowPseudo
from flowdistill.bench.tables import cell
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Condition, NoisingVelocity, Teacher
from flowdistill.networks import MLP
from flowdistill.paths import interpolate
from flowdistill.teachers.gaussian import GaussianTeacher, Ring
from flowdistill.training import Loop, Schedule, Training
from flowdistill.velocities import FiniteDifference, Minibatch, OnlineNetwork, PseudoVelocity

STEPS, BATCH = 600, 256
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SAMPLES, QUERIES = 10_000, 500
ESTIMATORS = ("pseudo_velocity", "online_network")


def distributions() -> dict[str, Teacher]:
    """The teachers by name."""
    return {"Gaussian": GaussianTeacher(mean=[1.0, -0.5], covariance=[0.1, 1.0]), "ring": Ring()}


def trained(teacher: Teacher, estimator: str, seed: int) -> tuple[NetworkFlowMap, NoisingVelocity]:
    """A student, half of whose training is prediction alone, and its noising velocity."""
    torch.manual_seed(seed)
    noising: NoisingVelocity = PseudoVelocity() if estimator == "pseudo_velocity" else OnlineNetwork(network=MLP)
    kind = FreeFlowPseudo if estimator == "pseudo_velocity" else FreeFlow
    objective = kind(
        prediction=FreeFlowPrediction(estimator=FiniteDifference(h=0.2), power=0.0),
        correction=FreeFlowCorrection(noising=noising),
        alpha=0.3,
        correction_start=0.5,
        online_warmup=0.25,
    )
    student = NetworkFlowMap(MLP())
    training = Training(
        objective=objective,
        flow_map=student,
        teacher=teacher,
        steps=STEPS,
        batch_size=BATCH,
        optimizer=adam,
        schedule=Schedule(warmup=1 / 12, decay="cosine"),
        ema=None,
        seed=seed,
    )
    loop = Loop.build(training)
    for _ in range(STEPS):
        loop.train_step()
    loop.check_finite()
    return student.eval(), noising


def adam(parameters: object) -> torch.optim.Optimizer:
    """The optimiser of the recipes in the plane."""
    return torch.optim.Adam(parameters, lr=2e-3, betas=(0.9, 0.99))  # type: ignore[arg-type]


def relative_errors(
    student: NetworkFlowMap, noising: NoisingVelocity, teacher: Teacher, seed: int
) -> dict[str, list[float]]:
    """For each time: of the estimator, of the teacher in its place, and of the closed form itself."""
    generator = torch.Generator().manual_seed(seed + 10_000)
    first, second, fresh = (student.sample(torch.randn(n, 2, generator=generator)) for n in (SAMPLES, SAMPLES, QUERIES))
    errors: dict[str, list[float]] = {"estimator": [], "teacher": [], "closed form": []}
    for time in TIMES:
        r = torch.full((QUERIES,), time)
        x = interpolate(fresh, torch.randn(fresh.shape, generator=generator), r)
        one, other = (Minibatch().estimate(x, r, Condition(), samples=samples) for samples in (first, second))
        scale = one.norm()
        errors["estimator"].append(float((noising.estimate(x, r, Condition(), samples=fresh) - one).norm() / scale))
        errors["teacher"].append(float((teacher.velocity(x, r) - one).norm() / scale))
        errors["closed form"].append(float((other - one).norm() / scale / 2**0.5))
    return errors


def main() -> None:
    """Train all and write the table."""
    torch.set_num_threads(1)
    rows = [["", *(f"r = {r}" for r in TIMES)]]
    for name, teacher in distributions().items():
        for estimator in ESTIMATORS:
            seeds = [relative_errors(*trained(teacher, estimator, seed), teacher, seed) for seed in SEEDS]
            titles = {
                "estimator": f"{name}, `{estimator}`",
                "teacher": f"{name}, the teacher in its place",
                "closed form": f"{name}, error of the closed form itself",
            }
            for key, title in titles.items():
                columns = zip(*(errors[key] for errors in seeds), strict=True)
                rows.append([title, *(cell(values) for values in columns)])
    named = ", ".join(map(str, SEEDS))
    note = f"Relative errors, mean ± standard deviation over seeds {named}; {STEPS} steps."
    report("pseudo_velocity", [rows], note)


if __name__ == "__main__":
    main()
