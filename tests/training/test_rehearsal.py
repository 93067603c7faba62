"""Mistakes in the settings of the evaluation show before the first step, when nothing has been written."""

import pytest

import flowdistill
from flowdistill import ConfigError, DataError

FIRST = "freeflow/digits.gin"


@pytest.mark.parametrize(
    ("binding", "error", "words"),
    [
        ("evaluation.reference = 'nothing.npz'", ConfigError, "unknown reference 'nothing.npz'"),
        ("evaluation.reference = 'mnits'", ConfigError, "did you mean mnist"),
        ("evaluation.features = 'mnist'", DataError, r"28 by 28 pixels, not \(8, 8\)"),
        ("evaluation.features = None", ConfigError, "features"),
        ("evaluation.metrics = ('fid', 'fd')", ConfigError, "unknown metric 'fd'"),
        ("evaluation.teacher_steps = (0,)", ConfigError, "teacher_steps"),
        ("evaluation.teacher_steps = ()", ConfigError, "teacher_steps"),
        ("evaluation.student_steps = (1, -1)", ConfigError, "student_steps"),
        ("evaluation.guidance = 'x'", ConfigError, "evaluation.guidance must be a number or None"),
        ("evaluation.num_samples = 1", ConfigError, "num_samples"),
        ("evaluation.deltas = (2.0,)", ConfigError, r"deltas must be in \(0, 1\]"),
        ("evaluation.precision = 'fp8'", ConfigError, "evaluation.precision must be 'float32' or 'bf16'"),
    ],
)
def test_before_the_first_step(binding, error, words, tmp_path):
    with pytest.raises(error, match=words):
        flowdistill.train(FIRST, gin_bindings=[binding], workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_without_images(tmp_path):
    (tmp_path / "empty").mkdir()
    binding = f"evaluation.reference = '{tmp_path / 'empty'}'"
    with pytest.raises(DataError, match="holds no images"):
        flowdistill.train(FIRST, gin_bindings=[binding], workdir=tmp_path / "run")
    assert not (tmp_path / "run").exists()
