"""A prediction and a correction in one: FreeFlow is made of them, bit for bit; rows, modules, warm-up, balance."""

import attrs
import pytest
import torch
from exact import below, gradient, loss_of, perturbed, prior_states
from runs import RING

import flowdistill
from flowdistill import OBJECTIVES, Condition, ConfigError, Objective, States, Step
from flowdistill.algorithms.combined import Combined
from flowdistill.algorithms.freeflow import FreeFlow, FreeFlowCorrection, FreeFlowPrediction
from flowdistill.interfaces import ObjectiveOutput
from flowdistill.pairs import WithDiagonal
from flowdistill.runs.records import read_records
from flowdistill.teachers.gaussian import GaussianTeacher
from flowdistill.velocities import Exact


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def teacher_of():
    return GaussianTeacher(torch.tensor([1.0, 0.0]).double(), torch.tensor([0.5, 0.5]).double())


def parts():
    elsewhere = GaussianTeacher(torch.tensor([0.3, 0.3]).double(), torch.tensor([0.5, 0.5]).double())
    return {
        "prediction": FreeFlowPrediction(),
        "correction": FreeFlowCorrection(noising=Exact(distribution=elsewhere)),
    }


@pytest.mark.parametrize("kwargs", [{}, {"balance": "fixed", "alpha": 0.3}, {"correction_fraction": 0.5}])
def test_freeflow_is_its_parts_combined(kwargs):
    teacher = teacher_of()
    student, states = perturbed(teacher, 0.3), prior_states(teacher)
    outputs = [
        loss_of(kind(**parts(), **kwargs), student, teacher, states, step=0, generator=generator())
        for kind in (FreeFlow, Combined)
    ]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(*(gradient(output.loss, student) for output in outputs))
    assert outputs[0].metrics == outputs[1].metrics


@pytest.mark.parametrize("changes", ["", "{}.balance = 'fixed'", "{}.correction_start = 0.3\n{}.online_warmup = 0.2"])
def test_training_freeflow_is_training_its_parts_combined(changes, tmp_path):
    """Twelve steps with an online network: weights, averages, optimisers and metrics to the last bit."""
    results = {}
    for name in ("freeflow", "combined"):
        text = RING.replace("@freeflow()", f"@{name}()").replace("freeflow.", f"{name}.")
        file = tmp_path / f"{name}.gin"
        file.write_text(text + changes.replace("{}", name))
        results[name] = flowdistill.train(gin_file=file, workdir=tmp_path / name)
    files = [sorted(path.name for path in result.checkpoint.iterdir()) for result in results.values()]
    assert files[0] == files[1]
    assert {"student.safetensors", "ema.safetensors", "online.safetensors"} <= set(files[0])
    for file in files[0]:
        if file != "meta.json":
            contents = [(result.checkpoint / file).read_bytes() for result in results.values()]
            assert contents[0] == contents[1], file
    records = [
        [
            {k: v for k, v in record.items() if k not in ("steps_per_second", "time")}
            for record in read_records(run.workdir)
        ]
        for run in results.values()
    ]
    assert records[0] == records[1]
    assert "lambda" in records[0][-1]


def test_fixed_balance_is_alpha():
    teacher = teacher_of()
    student, states = perturbed(teacher, 0.3), prior_states(teacher, 40)
    objective = Combined(**parts(), balance="fixed", alpha=0.3)
    output = loss_of(objective, student, teacher, states, step=0, generator=generator())
    shared = generator()
    prediction = loss_of(objective.prediction, student, teacher, states[10:], step=0, generator=shared)
    correction = loss_of(objective.correction, student, teacher, states[:10], step=0, generator=shared)
    torch.testing.assert_close(output.loss, prediction.loss + 0.3 * correction.loss, rtol=1e-14, atol=0)


@attrs.define(kw_only=True)
class Recorder(Objective):
    """Remembers the rows that it was given, and has a module."""

    citation = "@misc{recorder}"

    name: str
    norm: float | None = 1.0
    weighted: float | None = None
    updates: int = 1
    data: bool = False
    calls: list = attrs.field(factory=list)
    module: torch.nn.Module = attrs.field(factory=lambda: torch.nn.Linear(1, 1))

    @property
    def needs_data(self):
        return self.data

    @property
    def auxiliary_updates(self):
        return self.updates

    def modules(self):
        return {self.name: self.module}

    def setup(self, student, teacher):
        self.calls.append("setup")

    def after_step(self, number):
        self.calls.append(("after", number))

    def loss(self, states, step):
        self.calls.append(states.x[:, 0].tolist())
        norms = (None if norm is None else torch.tensor(norm) for norm in (self.norm, self.weighted))
        return ObjectiveOutput(self.module(states.x).mean(), {"error": torch.tensor(0.0)}, *norms)

    def auxiliary_loss(self, name, states, step):
        assert name == self.name
        self.calls.append(states.x[:, 0].tolist())
        return ObjectiveOutput(self.module(states.x).mean())


def recorders(prediction=None, correction=None, **kwargs):
    return Combined(
        prediction=Recorder(name="target", **(prediction or {})),
        correction=Recorder(name="online", **(correction or {})),
        **kwargs,
    )


STATES = States(x=torch.arange(8.0)[:, None], t=torch.ones(8), s=below(torch.ones(8)), condition=Condition())


def called(objective, function, step, *arguments):
    """The rows that each part was given."""
    objective.prediction.calls.clear()
    objective.correction.calls.clear()
    output = function(*arguments, STATES, Step(generator(), step, step / 10))
    return output, objective.prediction.calls, objective.correction.calls


def test_rows_are_shared_out():
    objective = recorders(correction_start=0.2)
    whole, first, rest = [*range(8)], [0, 1], [*range(2, 8)]
    output, *rows = called(objective, objective.loss, 1)
    assert rows == [[whole], []]
    assert "lambda" not in output.metrics
    output, *rows = called(objective, objective.loss, 2)
    assert rows == [[rest], [first]]
    assert set(output.metrics) == {"error", "correction_error", "lambda"}


@pytest.mark.parametrize(("fraction", "rows"), [(0.01, 1), (0.9, 7), (0.99, 7)])
def test_neither_part_is_left_without_rows(fraction, rows):
    objective = recorders(correction_fraction=fraction)
    _, rest, first = called(objective, objective.loss, 0)
    assert [*first, *rest] == [[*range(rows)], [*range(rows, 8)]]


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_single_state_cannot_be_shared(start):
    with pytest.raises(ConfigError, match=r"at least 2 states: a larger train\.batch_size"):
        recorders(correction_start=start).loss(STATES[:1], Step(generator()))


def test_modules_learn_from_the_rows_of_their_part():
    objective = recorders(correction_start=0.4, online_warmup=0.2)
    whole, first, rest = [*range(8)], [0, 1], [*range(2, 8)]

    def rows(name, step):
        output, *calls = called(objective, objective.auxiliary_loss, step, name)
        return output is None, *calls

    assert rows("online", 1) == (True, [], [])
    assert rows("online", 2) == (False, [], [first])
    assert rows("online", 4) == (False, [], [first])
    assert rows("target", 3) == (False, [whole], [])
    assert rows("target", 4) == (False, [rest], [])


def teacher_student():
    return perturbed(teacher_of())


def test_each_part_has_its_own_law_of_times():
    """From the start of the correction on its rows jump from noise to data; before it all rows are the prediction's."""
    objective = Combined(
        prediction=OBJECTIVES.build("meanflow", pairs=WithDiagonal(share=0.5)),
        correction=FreeFlowCorrection(),
        correction_fraction=0.25,
        correction_start=0.5,
    )
    before, after = objective.law(0.4), objective.law(0.5)
    t, s = before.sample(16, generator())
    assert (t == s).tolist() == [True] * 8 + [False] * 8
    t, s = after.sample(16, generator())
    assert t[:4].tolist() == [1.0] * 4
    assert s[:4].tolist() == [0.0] * 4
    assert (t == s)[4:].tolist() == [True] * 6 + [False] * 6


def test_what_the_parts_declare():
    objective = recorders({"updates": 2}, {"updates": 5, "data": True})
    objective.setup(teacher_student(), None)
    objective.after_step(7)
    for part in (objective.prediction, objective.correction):
        assert part.calls == ["setup", ("after", 7)]
    assert list(objective.modules()) == ["target", "online"]
    assert objective.auxiliary_updates == 5
    assert objective.needs_data
    assert not recorders().needs_data
    assert objective.needs_teacher
    assert objective.citation == "@misc{recorder}"
    assert Combined(prediction=Recorder(name="a"), correction=FreeFlowCorrection()).citation.count("@") == 2


def test_modules_of_one_name():
    objective = Combined(prediction=Recorder(name="online"), correction=Recorder(name="online"))
    with pytest.raises(ConfigError, match="module named online"):
        objective.modules()


def test_adaptive_balance():
    """Lambda is the ratio of the norms times alpha, at most 10^4 alpha, and needs both norms."""

    def scale(prediction, correction):
        objective = recorders({"norm": prediction}, {"norm": correction}, alpha=0.5)
        return float(called(objective, objective.loss, 0)[0].metrics["lambda"])

    assert scale(3.0, 2.0) == pytest.approx(0.75)
    assert scale(3.0, 1e-9) == pytest.approx(0.5e4)
    assert scale(0.0, 0.0) == 0.0
    for missing in ((None, 1.0), (1.0, None)):
        with pytest.raises(ConfigError, match="norms of their residuals"):
            scale(*missing)


def test_the_balance_of_weighted_residuals():
    """It asks for the norms after the weights, whatever the raw ones are."""
    norms = ({"norm": 7.0, "weighted": 3.0}, {"norm": 5.0, "weighted": 2.0})
    objective = recorders(*norms, alpha=0.5, balance="weighted")
    assert float(called(objective, objective.loss, 0)[0].metrics["lambda"]) == pytest.approx(0.75)
    objective = recorders({}, {}, balance="weighted")
    with pytest.raises(ConfigError, match="norms of their residuals"):
        called(objective, objective.loss, 0)
