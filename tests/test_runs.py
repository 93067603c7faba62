"""A teacher trained from data, then distilled, all from gin files."""

import json

import pytest
import torch
from runs import write

import flowdistill
from flowdistill.testing import check_teacher

TEACHER = """
train.objective = @flow_matching()
train.flow_map = @network()
network.network = @mlp()
network.conditioning = 'instantaneous'
mlp.hidden_size = 16
mlp.depth = 1
mlp.num_classes = 2
train.states = @noised_data()
noised_data.dataset = @exact_samples()
noised_data.label_dropout = 0.1
exact_samples.teacher = @two_moons()
train.optimizer = @AdamW
AdamW.lr = 1e-2
train.ema = None
train.steps = 10
train.batch_size = 16
train.sample_every = 0
"""

STUDENT = """
train.teacher = @guided()
guided.teacher = @load_teacher()
guided.scale = 1.5
load_teacher.name_or_path = 'teacher'
train.flow_map = @from_teacher
from_teacher.conditioning = 'anchored'
train.objective = @freeflow()
train.optimizer = @AdamW
AdamW.lr = 1e-3
train.ema = None
train.steps = 4
train.batch_size = 16
train.sample_every = 0
"""


JUMPS = """
train.objective = @consistency()
train.flow_map = @network()
network.network = @sit()
network.conditioning = 'to_data'
sit.input_size = 8
sit.patch_size = 4
sit.in_channels = 1
sit.hidden_size = 16
sit.depth = 1
sit.num_heads = 2
sit.num_classes = 10
train.states = @noised_data()
noised_data.dataset = @digits()
train.optimizer = @AdamW
train.evaluation = @evaluation()
evaluation.features = 'digits'
evaluation.num_samples = 200
evaluation.student_steps = (1, 2)
train.steps = 2
train.batch_size = 16
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flowdistill.train(gin_file=write(tmp_path / "teacher.gin", TEACHER), workdir="teacher")
    return tmp_path


def test_a_run_is_distilled(folder):
    result = flowdistill.train(gin_file=write(folder / "student.gin", STUDENT), workdir="student")
    configuration = (folder / "student" / "config.gin").read_text()
    assert "load_teacher.name_or_path = 'teacher'" in configuration
    assert "AdamW.lr = 0.001" in configuration  # the student's, although the teacher's file sets another
    assert "flow_matching" not in configuration
    samples = flowdistill.sample("student", 6, labels=1)
    assert samples.shape == (6, 2)
    noise = torch.randn(5, 2)
    assert torch.equal(flowdistill.load_flow_map("student").sample(noise), result.flow_map.sample(noise))


def test_a_run_as_a_teacher(folder):
    teacher = flowdistill.load_teacher("teacher")
    flow_map = flowdistill.load_flow_map("teacher")
    x, t = torch.randn(3, 2), torch.rand(3)
    condition = flowdistill.Condition(torch.tensor([0, 1, flowdistill.NULL_LABEL]))
    assert torch.equal(teacher.velocity(x, t, condition), flow_map.velocity(x, t, condition))
    assert not any(p.requires_grad for p in teacher.parameters())
    check_teacher(teacher)


def test_an_anchored_student_is_no_teacher(folder):
    flowdistill.train(gin_file=write(folder / "student.gin", STUDENT), workdir="student")
    with pytest.raises(flowdistill.ConfigError, match="anchored"):
        flowdistill.load_teacher("student")


def test_evaluation_of_a_teachers_run(tmp_path):
    """Its labels are those of its own classes, although the run had no teacher."""
    bindings = ["train.steps = 2", "evaluation.num_samples = 20", "train.sample_every = 0"]
    flowdistill.train(gin_file="digits/train.gin", gin_bindings=bindings, workdir=tmp_path / "run")
    figures = flowdistill.evaluate(tmp_path / "run", metrics=("accuracy", "fid"), num_samples=50, steps=2)
    assert 0 <= figures["accuracy"] <= 1
    assert figures["fid"] > 10  # hardly trained


def test_configurations_of_the_caller_survive(folder):
    import gin

    gin.clear_config()
    gin.parse_config("AdamW.lr = 0.5")
    flowdistill.load_flow_map("teacher")
    assert gin.query_parameter("AdamW.lr") == 0.5
    gin.clear_config()


def test_a_student_without_a_teacher_is_measured_in_its_own_jumps(tmp_path):
    result = flowdistill.train(gin_file=write(tmp_path / "jumps.gin", JUMPS), workdir=tmp_path / "run")
    rows = json.loads((tmp_path / "run" / "evaluation.json").read_text())["rows"]
    assert {name: row["evaluations"] for name, row in rows.items()} == {"student, 1 step": 1, "student, 2 steps": 2}
    assert result.metrics["fid"] == rows["student, 1 step"]["fid"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "plots/samples.png" in report
    assert "noise floor" not in report
