"""A one-step student of MNIST in a few minutes on a CPU, trained on noise alone."""

# %%
import time

import torch

import flowdistill
from flowdistill.evaluation.plots import side_by_side

STEPS = 400
settings = [f"train.steps = {STEPS}", "train.evaluation = None"]
start = time.process_time()
result = flowdistill.train(
    "freeflow/mnist.gin",
    gin_bindings=settings,
    workdir="runs/mnist",
    report=False,
)
print(f"{STEPS} steps took {(time.process_time() - start) / 60:.1f} minutes of one CPU core")

# %%
run = flowdistill.Run(result.workdir)
noise = torch.randn(40, *run.student.sample_shape, generator=torch.Generator().manual_seed(0))
condition = flowdistill.Condition.in_turn(run.student.num_classes, 40)
many, one = (flowdistill.solvers.Euler(steps=steps) for steps in (32, 1))
panels = {
    "teacher, 32 steps": many.solve(run.teacher, noise, condition),
    "teacher, 1 step": one.solve(run.teacher, noise, condition),
    "student, 1 step": run.student.sample(noise, 1, condition),
}
side_by_side(panels, "mnist.png")

# %%
names = ("fid", "recall")
metrics = flowdistill.evaluate(run, metrics=names, features="mnist", num_samples=1000)
for name, value in metrics.items():
    print(f"{name}: {value:.3g}")
