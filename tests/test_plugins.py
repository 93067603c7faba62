"""A plug-in of somebody else: built, installed, found and used, as docs/examples/plugin is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import command

from flowdistill.plumbing import config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The environment of a process that has the plug-in, built from a copy of its folder and installed into another.

    ``SOURCE`` is that copy.
    """
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "docs" / "examples" / "plugin", folder / "source")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
    place = folder / "site"
    install = [sys.executable, "-m", "pip", "install", *offline, "--target", place, folder / "source"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (place / "flowdistill_spiral" / "settings" / "spiral.gin").is_file()
    path = os.pathsep.join([str(place), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "SOURCE": str(folder / "source")}


def test_a_method_and_a_setting_of_a_plugin_are_listed_and_trained(installed, tmp_path):
    listed = command("list", cwd=tmp_path, env=installed).stdout
    for name in ("log_cosh ", "spiral ", "log_cosh_prediction "):
        assert f"\n  {name}" in listed
    few = ["--gin.train.steps=3", "--gin.evaluation.num_samples=50"]
    done = command("train", "log_cosh", "--on", "spiral", *few, "--workdir", "run", cwd=tmp_path, env=installed)
    assert done.returncode == 0, done.stderr
    drawn = command("sample", "run", "--num_samples", 4, "--out", "x.npz", cwd=tmp_path, env=installed)
    assert drawn.returncode == 0, drawn.stderr


def test_the_library_trains_on_a_setting_of_a_plugin(installed, tmp_path):
    done = command("plan", "meanflow", "--on", "spiral", cwd=tmp_path, env=installed)
    assert done.returncode == 0, done.stderr


def test_the_tests_of_the_plugin_pass(installed):
    tests = [sys.executable, "-m", "pytest", "-q", "tests"]
    folder, env = Path(installed["SOURCE"]), {**os.environ, **installed}
    done = subprocess.run(tests, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_a_plugin_hides_nothing_of_the_library(tmp_path, monkeypatch):
    """Neither a method nor a setting nor a file of a name that the library has."""
    (tmp_path / "settings").mkdir()
    (tmp_path / "freeflow").mkdir()
    taken = [tmp_path / name for name in ("freeflow.gin", "freeflow/freeflow.gin", "settings/plane.gin")]
    for path in (*taken, tmp_path / "settings" / "other.gin"):
        path.write_text("train.objective = @freeflow()\n" if "settings" not in str(path) else "train.steps = 3\n")
    roots = config.recipe_roots()
    monkeypatch.setattr(config, "recipe_roots", lambda: [*roots, tmp_path])
    methods, settings = config.methods.__wrapped__(), config.settings.__wrapped__()
    assert settings["other"] == tmp_path / "settings" / "other.gin"
    found = [methods["freeflow"], settings["plane"], config.find_gin_file("freeflow/freeflow.gin")]
    assert not any(path.is_relative_to(tmp_path) for path in found)


def test_a_plugin_of_one_file_or_of_none_has_no_gin_files(monkeypatch):
    class Plugin:
        def __init__(self, module):
            self.module = module

    announced = [Plugin("attr"), Plugin("six_or_none_at_all.parts"), Plugin("this"), Plugin("attr.validators")]
    monkeypatch.setattr(config, "entry_points", lambda group: announced)
    import attr

    assert config._plugin_roots.__wrapped__() == [Path(attr.__file__).parent]
