"""Where a report measures, and what it draws at which cost."""

import json

import pytest
from tiny_teachers import SIT

from flowdistill import load_teacher
from flowdistill.evaluation import pictures, report
from flowdistill.evaluation.comparison import Evaluation, device_of
from flowdistill.flow_maps import from_teacher
from flowdistill.networks import MLP, SiT
from flowdistill.wrapped_teachers import NetworkTeacher


@pytest.mark.parametrize("model", [load_teacher("ring"), MLP(dim=2, hidden_size=4)], ids=["buffers", "parameters"])
def test_a_model_is_measured_where_it_is(model):
    """Exact teachers have no parameters."""
    assert device_of(None, model).type == "cpu"
    assert device_of(None, model.to("meta"), None).type == "meta"


COUNTS = {"step": 10, "loss": 1.0, "student_evaluations": 0.0}
SEEN = "teacher, 64 steps"


@pytest.fixture
def reported(tmp_path, monkeypatch):
    """Write a report of a digits student; how often its teacher was evaluated, what was drawn, and the page."""
    drawn = []
    monkeypatch.setattr(pictures, "side_by_side", lambda panels, path: drawn.extend(panels))

    def write(counts, light, evaluation=None, student=True):
        monkeypatch.setattr(report, "_LIGHT", light)
        (tmp_path / "metrics.jsonl").write_text(json.dumps(COUNTS | counts) + "\n")
        teacher = load_teacher("digits_teacher")
        distilled = from_teacher(teacher) if student else from_teacher(teacher, conditioning="instantaneous")
        drawn.clear()
        report.write_report(tmp_path, distilled, teacher if student else None, evaluation)
        return teacher.evaluations, list(drawn), (tmp_path / "report.md").read_text()

    return write


FEW, MANY = {"teacher_evaluations": 100.0}, {"teacher_evaluations": 10 * 40 * 64.0}


def test_without_an_evaluation_a_costly_teacher_is_not_integrated(reported):
    evaluations, drawn, page = reported(FEW, light=0)
    assert evaluations == 1  # to know the cost
    assert drawn == ["student, 1 step"]
    assert "leaves the teacher at 64 steps out: it takes 2560 evaluations" in page
    assert "the training took 100" in page


@pytest.mark.parametrize("case", [(MANY, 0), (FEW, 1e12)], ids=["a tenth of the training", "few operations"])
def test_without_an_evaluation_a_teacher_that_costs_little_is_drawn(reported, case):
    evaluations, drawn, page = reported(*case)
    assert evaluations >= 40 * 65
    assert drawn == [SEEN, "teacher, 1 step", "student, 1 step"]
    assert "leaves" not in page


def test_an_evaluation_asks_for_the_teacher(reported):
    evaluation = Evaluation(features="digits", metrics=("accuracy",), num_samples=10, teacher_steps=(1,))
    _, drawn, page = reported(FEW, light=0, evaluation=evaluation)
    assert drawn == [SEEN, "teacher, 1 step", "student, 1 step"]
    assert "noise floor" in page


def test_a_costly_velocity_field_of_a_run_is_drawn_at_one_step(reported):
    _, drawn, page = reported(FEW, light=0, student=False)
    assert drawn == ["teacher, 1 step"]
    assert "leaves the teacher at 64 steps out" in page


def test_what_is_no_picture_is_not_drawn(tmp_path):
    """Latents without a decoder: not a single sample is made of them."""
    sit = SiT(**{**SIT, "in_channels": 4}, learn_sigma=False)
    teacher = NetworkTeacher(sit)
    assert not pictures.save_comparison(from_teacher(teacher), teacher, tmp_path / "samples.png")
    pictures.save_samples(student := from_teacher(teacher), tmp_path / "samples.png", seed=0)
    assert (teacher.evaluations, student.evaluations) == (0, 0)
    assert list(tmp_path.iterdir()) == []
