"""What the documentation tells users to type."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import command

import flowdistill
from flowdistill.teachers.gaussian import GaussianTeacher

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> dict[str, str]:
    """The titled code blocks of a page, by title."""
    text = (ROOT / page).read_text()
    return dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', text, re.DOTALL))


def modules() -> list[str]:
    """All modules of the package, the algorithms and teachers included."""
    walked = pkgutil.walk_packages(flowdistill.__path__, "flowdistill.")
    return sorted(m.name for m in walked if not m.name.endswith("__main__"))


@pytest.mark.parametrize("name", modules())
def test_examples_of_docstrings(name, tmp_path, monkeypatch):
    if name == "flowdistill.duals.triton_attention":
        pytest.importorskip("triton", reason="triton, which comes with torch for CUDA, is not installed")
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "nn": torch.nn}
    torch.manual_seed(0)
    results = doctest.testmod(importlib.import_module(name), extraglobs=names)
    assert results.failed == 0


def test_a_custom_objective_from_a_users_file(tmp_path):
    """The documented file is short, is used by name from gin, and passes the conformance kit as documented."""
    page = "docs/custom_objectives.md"
    for name, body in blocks(page).items():
        (tmp_path / name).write_text(body)
    assert len((tmp_path / "huber.py").read_text().splitlines()) < 30
    done = command("train", "huber.gin", "--on", "plane", "--gin.train.steps=20", "--workdir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "huber_prediction.c = 0.05" in (tmp_path / "run" / "config.gin").read_text()
    assert command("sample", "run", "--num_samples", 4, cwd=tmp_path).returncode == 0
    check = re.search(
        r"```python\n(import flowdistill\n.*?check_objective.*?)```", (ROOT / page).read_text(), re.DOTALL
    )
    (tmp_path / "check.py").write_text(check[1])
    checked = subprocess.run([sys.executable, "check.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert checked.returncode == 0, checked.stderr


def test_a_documented_teacher_passes_the_conformance_kit(tmp_path):
    code = re.search(
        r"```python\n(import torch\n.*?check_teacher.*?)```", (ROOT / "docs/getting_started.md").read_text(), re.DOTALL
    )
    (tmp_path / "two_points.py").write_text(code[1])
    done = subprocess.run([sys.executable, "two_points.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_network_of_a_user_is_distilled(tmp_path):
    page = "docs/your_network.md"
    for name, body in blocks(page).items():
        (tmp_path / name).write_text(body)
    save = "import points, torch; torch.save(points.Denoiser().state_dict(), 'denoiser.pt')"
    for code in (["-c", save], ["check.py"]):
        done = subprocess.run([sys.executable, *code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    trained = command("train", "--gin_file", "points.gin", "--gin.train.steps=3", "--workdir", "run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert command("sample", "run", "--allow_imports", "--num_samples", 4, cwd=tmp_path).returncode == 0


def test_the_documented_conversion_of_a_schedule_is_the_velocity(tmp_path, monkeypatch):
    """With the exact v of a Gaussian, E[x_0 | z] = m + s^2 cos(a) (z - cos(a) m) / V with V the variance of z."""
    (tmp_path / "points.py").write_text(blocks("docs/your_network.md")["points.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flowdistill.NETWORKS, "_entries", dict(flowdistill.NETWORKS._entries))
    monkeypatch.setattr(flowdistill.TEACHERS, "_entries", dict(flowdistill.TEACHERS._entries))
    network = importlib.import_module("points").Points()
    mean, variance = torch.tensor([1.0, -0.5]).double(), 0.3

    class Exact(torch.nn.Module):
        def forward(self, z, time, extra=None):
            angle = (time * torch.pi / 2)[:, None]
            total = variance * angle.cos() ** 2 + angle.sin() ** 2
            clean = mean + variance * angle.cos() * (z - angle.cos() * mean) / total
            noise = angle.sin() * (z - angle.cos() * mean) / total
            return angle.cos() * noise - angle.sin() * clean

    network.denoiser = Exact()
    x, t = torch.randn(50, 2).double(), torch.linspace(0, 1, 50).double()
    exact = GaussianTeacher(mean, torch.full((2,), variance).double())
    torch.testing.assert_close(network.velocity(x, t), exact.velocity(x, t))


def test_a_data_set_of_a_user_trains_a_teacher(tmp_path):
    for name, body in blocks("docs/data.md").items():
        (tmp_path / name).write_text(body)
    trained = command("train", "--gin_file", "stripes.gin", "--gin.train.steps=3", "--workdir", "run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr


def test_a_loop_of_a_user_trains_a_student(tmp_path):
    (tmp_path / "loop.py").write_text(blocks("docs/own_loop.md")["loop.py"])
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    errors = [float(line.split()[1]) for line in done.stdout.splitlines() if re.fullmatch(r"\d+ [\d.]+", line)]
    assert len(errors) == 5
    assert errors[-1] < 0.5 * errors[0]


def test_a_hook_of_a_user_is_called(tmp_path):
    (tmp_path / "nearest.py").write_text(blocks("docs/logging.md")["nearest.py"])
    done = subprocess.run([sys.executable, "nearest.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["100", "200", "300"]
