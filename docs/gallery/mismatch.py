"""Distillation on data that are not the teacher's, and FreeFlow, which sees no data."""

# %%
import torch

import flowdistill
from flowdistill.evaluation.plots import scatter_side_by_side

STEPS = 2000
ring = flowdistill.load_teacher("ring")  # eight Gaussians at a radius of 1
WRONG = ["exact_samples.teacher = @wrong/ring()", "wrong/ring.radius = 3.0"]


def one_step(method, workdir, data=()):
    """One-step samples of a student of the ring."""
    settings = [f"train.steps = {STEPS}", "train.evaluation = None", *data]
    result = flowdistill.train(
        method,
        on="plane",
        gin_bindings=settings,
        workdir=workdir,
        report=False,
    )
    print(f"{workdir}: error {result.metrics['error']:.1e} at the end")
    return result.flow_map.sample(noise)


# %%
noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
panels = {
    "teacher, 64 steps": flowdistill.solvers.Euler(steps=64).solve(ring, noise),
    "FreeFlow, no data": one_step("freeflow", "runs/no_data"),
    "consistency, right data": one_step("cd", "runs/right_data"),
    "consistency, wrong data": one_step("cd", "runs/wrong_data", WRONG),
}
scatter_side_by_side(panels, "mismatch.png")

# %%
for name, samples in panels.items():
    distance = torch.cdist(samples, ring.means.to(samples)).min(dim=1).values
    near = (distance < 0.24).float().mean()
    print(f"{name}: {near:.1%} within 3 standard deviations of a mode")
