"""A flow map in the plane: the paths of a teacher, and its student's jumps along them."""

# %%
import itertools

import matplotlib.pyplot as plt
import torch

import flowdistill
from flowdistill.evaluation import trajectory_error

STEPS = 2000
settings = [f"train.steps = {STEPS}", "train.evaluation = None"]
student = flowdistill.train("freeflow", on="plane", gin_bindings=settings, report=False).flow_map
teacher = flowdistill.load_teacher("ring")
for error in trajectory_error(student, teacher):
    print(f"jump of duration {error.delta:.3f}: {error.mean:.3f} of the way off the teacher's path")

# %%
noise = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
times = torch.linspace(1, 0, 65)
path, jumps = [noise], [student(noise, torch.ones(60), s.expand(60)) for s in times]
for t, s in itertools.pairwise(times):  # 64 evaluations, one after another
    path.append(path[-1] - (t - s) * teacher.velocity(path[-1], t.expand(60)))

# %%
figure, axes = plt.subplots(1, 2, figsize=(7.4, 4.4), sharex=True, sharey=True, layout="constrained")
titles = ("teacher: 64 steps of its ODE", "student: each point is one jump from the noise")
for axis, title, points in zip(axes, titles, (path, jumps), strict=True):
    lines = torch.stack(points).detach()
    axis.plot(lines[..., 0], lines[..., 1], color="#2a6f97", linewidth=0.7, alpha=0.7)
    axis.scatter(*noise.T, s=8, color="#999999", label="noise")
    axis.scatter(*lines[-1].T, s=8, color="#d1495b", label="sample", zorder=3)
    axis.set_title(title, fontsize=10)
    axis.set_aspect("equal")
axes[0].legend(fontsize=8)
figure.savefig("trajectories.png", dpi=110)
