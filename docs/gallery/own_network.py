"""A network of one's own: a teacher by flow matching, then distilled into its copy."""

# %%
import torch
from torch import nn

import flowdistill
from flowdistill import OBJECTIVES
from flowdistill.evaluation.plots import scatter_side_by_side

STEPS = 4000


class Net(flowdistill.VelocityNetwork):
    """Points in the plane. By ``embedding`` a student learns how long a jump is."""

    def __init__(self, size=128):
        super().__init__()
        self.sample_shape, self.num_classes, self.embedding_size = (2,), None, size
        self.layers = nn.ModuleList(nn.Linear(n, size) for n in (3, size, size))
        self.last = nn.Linear(size, 2)

    def velocity(self, x, t, labels=None, embedding=None, late_time=None):
        """The velocity dx/dt at x (B, 2) and t (B,); noise is at t = 1."""
        hidden = torch.cat([x, t[:, None]], dim=1)
        for layer in self.layers:
            hidden = nn.functional.silu(layer(hidden) + (0 if embedding is None else embedding))
        return self.last(hidden)


def train(objective, flow_map, **parts):
    """The result of a training whose parts are objects."""
    training = flowdistill.Training(
        objective=objective,
        flow_map=flow_map,
        steps=STEPS,
        batch_size=256,
        **parts,
    )
    loop = flowdistill.training.Loop.build(training)
    for _ in range(STEPS):
        loop.train_step()
    return loop.result


# %%
torch.manual_seed(0)
data = flowdistill.data.ExactSamples(flowdistill.load_teacher("two_moons"))
field = flowdistill.flow_maps.NetworkFlowMap(Net(), "instantaneous")
states = flowdistill.states.NoisedData(dataset=data)
field = train(OBJECTIVES.build("flow_matching"), field, states=states)
teacher = flowdistill.wrapped_teachers.NetworkTeacher(field.backbone)
student = flowdistill.flow_maps.from_teacher(teacher, "anchored")
student = train(OBJECTIVES.build("freeflow_prediction", power=0.0), student, teacher=teacher)

# %%
noise = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
panels = {
    "teacher, 64 steps": flowdistill.solvers.Euler(steps=64).solve(teacher, noise),
    "teacher, 1 step": flowdistill.solvers.Euler(steps=1).solve(teacher, noise),
    "student, 1 step": student.sample(noise),
}
scatter_side_by_side(panels, "own_network.png")
apart = (panels["student, 1 step"] - panels["teacher, 64 steps"]).norm(dim=1).mean()
print(f"{apart:.3f} between the samples of student and teacher from one noise, on average")
