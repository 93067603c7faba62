"""Search at inference: a student tries many noises, and its teacher draws the best."""

# %%
import flowdistill
from flowdistill.evaluation.plots import side_by_side

STEPS = 300
settings = [f"train.steps = {STEPS}", "train.evaluation = None"]
result = flowdistill.train(
    "freeflow",
    on="digits",
    gin_bindings=settings,
    workdir="runs/digits",
    report=False,
)
run = flowdistill.Run(result.workdir)


# %%
def ink(images, condition):
    """The score of images in [-1, 1]: how much of them is white."""
    return images.mean((1, 2, 3)) / 2 + 0.5


panels = {}
for budget in (34, 48, 80):  # evaluations for each sample; the teacher's 16 steps take 32
    found = flowdistill.search(run, budget, verifier=ink, num_samples=40)
    tried = found.student_evaluations.mean()
    panels[f"best of {tried:.0f}, {found.cost.mean():.0f} evaluations"] = found.samples
    print(f"{tried:.0f} noises tried, {found.cost.mean():.1f} evaluations: {found.scores.mean():.3f} of ink")
side_by_side(panels, "search_noises.png")
