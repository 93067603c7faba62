"""What is executed: modules that a gin file imports which the user names, and nothing that comes with a run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import RING, command, write

import flowdistill
from flowdistill import ConfigError, Run
from flowdistill.cli import main

PART = """
import flowdistill
from flowdistill.teachers.gaussian import Ring
print("EXECUTED")

@flowdistill.register_teacher("{name}")
class Mine(Ring):
    pass
"""
COMMANDS = {
    "sample": ("sample", "run", "--num_samples", 2, "--out", "x.npz"),
    "evaluate": ("evaluate", "run", "--metrics", "w2", "--num_samples", 20),
    "search": ("search", "run", "--budget", 4, "--num_samples", 2, "--gin.feature_distance.features='digits'"),
    "cite": ("cite", "run"),
    "convert": ("convert", "run", "model"),
}


@pytest.fixture(scope="module")
def downloaded(tmp_path_factory):
    """A folder with a run whose configuration imports a module, and the module beside it and in the run."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "helper.py").write_text(PART.format(name="helpers"))
    write(folder / "mine.gin", "import helper\n" + RING + "train.teacher = @helpers()\n", steps=2, checkpoint_every=2)
    done = command("train", "mine.gin", "--workdir", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "EXECUTED" in done.stdout
    shutil.copy(folder / "helper.py", folder / "run")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_run_executes_nothing_unasked(name, where, downloaded, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(downloaded, tmp_path / "copy")
    inside = where == "inside"
    monkeypatch.chdir(folder / "run" if inside else folder)
    with pytest.raises(SystemExit) as ended:
        main(["." if inside and a == "run" else str(a) for a in COMMANDS[name]])
    out, err = capsys.readouterr()
    assert "EXECUTED" not in out + err
    assert "helper" not in sys.modules
    if name == "cite":  # whose objective needs no module of the run's
        assert ended.value.code == 0
    else:
        assert ended.value.code == 2
        assert "imports helper, and nothing that comes with a run is executed unasked" in err
        assert "--allow_imports" in err


def test_imports_are_allowed_by_name(downloaded, tmp_path):
    folder = shutil.copytree(downloaded, tmp_path / "copy")
    done = command(*COMMANDS["sample"], "--allow_imports", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "EXECUTED" in done.stdout


def test_a_module_that_is_imported_already_may_be_used(downloaded, tmp_path, monkeypatch):
    run = shutil.copytree(downloaded / "run", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"imports helper.*allow_imports=True"):
        flowdistill.sample(run, 2)
    monkeypatch.syspath_prepend(downloaded)
    monkeypatch.setitem(sys.modules, "helper", __import__("helper"))
    assert flowdistill.sample(run, 2).shape == (2, 2)
    assert flowdistill.sample(Run(run, allow_imports=True), 2).shape == (2, 2)


@pytest.mark.slow
def test_files_where_the_user_stands_hide_no_installed_package(tmp_path):
    """Of the command ``flowdistill``: with ``python -m`` Python itself looks there first."""
    for name in ("rich", "matplotlib", "safetensors", "gin", "numpy"):
        (tmp_path / f"{name}.py").write_text("print('EXECUTED')\nraise SystemExit(7)\n")
    write(tmp_path / "ring.gin", RING, steps=2, checkpoint_every=2)
    script = Path(sys.executable).with_name("flowdistill")
    for arguments in (("train", "ring.gin", "--workdir", "run"), ("sample", "run", "--out", "x.npz")):
        done = subprocess.run([script, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "EXECUTED" not in done.stdout + done.stderr


@pytest.mark.parametrize("module", ["parts", "configs.parts"])
def test_modules_beside_a_gin_file_are_found_from_elsewhere(module, tmp_path, monkeypatch):
    configs, name = tmp_path / "configs", module.replace(".", "_")
    configs.mkdir()
    (configs / "parts.py").write_text(PART.format(name=name))
    text = f"import {module}\n" + RING + f"train.teacher = @{name}()\n"
    file = write(configs / "mine.gin", text, steps=2, checkpoint_every=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = sys.path.copy()
    flowdistill.train(gin_file=file, workdir="run", report=False)
    assert sys.path == before
    assert flowdistill.sample("run", 2).shape == (2, 2)


def test_a_module_that_is_nowhere(tmp_path):
    file = write(tmp_path / "mine.gin", "import nowhere.at_all\n" + RING)
    with pytest.raises(
        ConfigError, match=r"No module named 'nowhere': add the folder that holds it to PYTHONPATH(?s:.*)line 1"
    ):
        flowdistill.train(gin_file=file, workdir=tmp_path / "run")


def test_a_run_that_is_its_own_teacher(downloaded, tmp_path):
    for name, teacher in (("a", "b"), ("b", "a")):
        run = shutil.copytree(downloaded / "run", tmp_path / name)
        text = RING + f"train.teacher = @load_teacher()\nload_teacher.name_or_path = '{tmp_path / teacher}'\n"
        (run / "config.gin").write_text(text)
    with pytest.raises(ConfigError, match=r"is its own teacher, directly or through other runs") as found:
        flowdistill.sample(tmp_path / "a", 2)
    assert len(str(found.value)) < 1000
