"""Students as programs: the same numbers without this library, for batches of any size."""

import subprocess
import sys

import pytest
import torch
from test_one_pass import student_of

import flowdistill
from flowdistill import Condition, ConfigError
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import MLP
from flowdistill.runs.exporting import export

NETWORKS = ["mlp", pytest.param("sit", marks=pytest.mark.slow), pytest.param("edm2", marks=pytest.mark.slow)]

LOADER = """
import sys
import torch

given = torch.load("given.pt")
torch.save(torch.export.load("student/student.pt2").module()(*given), "made.pt")
assert "flowdistill" not in sys.modules
"""


def jumps(student, n=5):
    """Arguments of a batch, and the ends of its jumps."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, *student.sample_shape, generator=g)
    t, s = torch.linspace(1.0, 0.5, n), torch.linspace(0.4, 0.0, n)
    labels, scales = torch.arange(n) % 3, torch.linspace(1.0, 2.0, n)
    with torch.no_grad():
        return (x, t, s, labels, scales), student.eval()(x, t, s, Condition(labels, scales))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_program_of_pytorch(tmp_path, network):
    student, *_ = student_of(network, dtype=torch.float32)
    export(student, tmp_path / "student", programs=["torch"])
    given, wanted = jumps(student)
    torch.save(given, tmp_path / "given.pt")
    done = subprocess.run([sys.executable, "-I", "-c", LOADER], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "made.pt"), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_program_of_onnx(tmp_path, network):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student, *_ = student_of(network, dtype=torch.float32)
    folder = export(student, tmp_path / "student", programs=["onnx"])
    given, wanted = jumps(student)
    session = onnxruntime.InferenceSession(folder / "student.onnx")
    names = [part.name for part in session.get_inputs()]
    assert names == ["x", "t", "s", "labels", "guidance"]
    made = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
    torch.testing.assert_close(torch.from_numpy(made[0]), wanted, rtol=1e-4, atol=1e-5)


def test_inputs_are_those_that_the_student_takes(tmp_path):
    student = NetworkFlowMap(MLP(dim=2, hidden_size=8), "anchored").eval()
    folder = export(student, tmp_path / "student", programs=["torch"])
    noise, ones = torch.randn(7, 2), torch.ones(7)
    program = torch.export.load(folder / "student.pt2").module()
    with torch.no_grad():
        assert torch.allclose(program(noise, ones, 0 * ones), student.sample(noise), atol=1e-6)


def test_a_student_that_the_null_label_guides_is_a_program(tmp_path):
    torch.manual_seed(0)
    network = MLP(dim=2, hidden_size=8, num_classes=3)
    student = NetworkFlowMap(network, "two_time", guidance=1.5, guidance_input="null_label").eval()
    for parameter in student.parameters():
        parameter.data.normal_()
    folder = export(student, tmp_path / "student", programs=["torch"])
    given, wanted = jumps(student)
    torch.testing.assert_close(torch.export.load(folder / "student.pt2").module()(*given), wanted)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(ConfigError, match="torch, onnx, diffusers, not tflite"):
        export(NetworkFlowMap(MLP(dim=2)), tmp_path / "student", programs=["tflite"])

    @flowdistill.register_network("asks_for_values")
    class Asking(MLP):
        def velocity(self, x, t, labels=None, embedding=None, late_time=None):
            return x * float(x.sum())

    with pytest.raises(ConfigError, match="cannot write NetworkFlowMap as a program"):
        export(NetworkFlowMap(Asking(dim=2)), tmp_path / "student", programs=["torch"])
    assert list(tmp_path.iterdir()) == []
