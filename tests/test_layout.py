"""What the layout promises: links, the rule of the house, one package."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    """The modules that a file imports, by their full names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(folder: str) -> list[Path]:
    linked = [ROOT / "flowdistill" / "algorithms", ROOT / "flowdistill" / "teachers"]
    return [p for p in (ROOT / folder).rglob("*.py") if not any(link in p.parents for link in linked)]


def offenders(folder: str, forbidden: str) -> list[str]:
    return [f"{path}: {name}" for path in files(folder) for name in imports(path) if name.startswith(forbidden)]


def test_the_core_imports_neither_algorithms_nor_teachers():
    assert len(files("flowdistill")) > 30
    assert offenders("flowdistill", "flowdistill.algorithms") == []
    assert offenders("flowdistill", "flowdistill.teachers") == []


def test_algorithms_and_teachers_do_not_import_each_other():
    assert offenders("algorithms", "flowdistill.teachers") == []
    assert offenders("teachers", "flowdistill.algorithms") == []
    shared = tuple(f"flowdistill.algorithms.{path.stem}" for path in (ROOT / "algorithms").glob("[a-z]*.py"))
    for folder in (p for p in (ROOT / "algorithms").iterdir() if (p / "__init__.py").is_file()):
        others = [
            name
            for path in folder.rglob("*.py")
            for name in imports(path)
            if name.startswith("flowdistill.algorithms.")
            and not name.startswith((f"flowdistill.algorithms.{folder.name}", *shared))
        ]
        assert others == []


def test_this_test_sees_a_forbidden_import(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from flowdistill import teachers\n")
    assert "flowdistill.teachers" in imports(path)


@pytest.mark.parametrize("name", ["algorithms", "teachers"])
def test_links_lead_to_the_folders(name):
    link = ROOT / "flowdistill" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


def python(code: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_modules_have_one_identity(tmp_path):
    """The same class whether reached through the package or found by a registry, from any directory."""
    code = (
        "import flowdistill, flowdistill.algorithms.freeflow as f; "
        "assert flowdistill.OBJECTIVES.get('freeflow') is f.FreeFlow; "
        "import flowdistill.teachers.digits"
    )
    for cwd in (ROOT, tmp_path):
        done = python(code, cwd)
        assert done.returncode == 0, done.stderr


def test_checkout_without_links(tmp_path):
    """Where the file system has no symbolic links, git writes small files in their place."""
    for folder in ("algorithms", "teachers", "flowdistill"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("algorithms", "teachers"):
        (tmp_path / "flowdistill" / name).unlink()
        (tmp_path / "flowdistill" / name).write_text(f"../{name}")
    code = (
        "import flowdistill; "
        "f = flowdistill.OBJECTIVES.get('freeflow'); "
        "assert f.__module__ == 'flowdistill.algorithms.freeflow.objective'; "
        "flowdistill.load_teacher('digits_teacher'); "
        "from flowdistill.plumbing.config import find_gin_file, recipes; "
        "print(find_gin_file('freeflow/ring.gin').resolve()); assert len(recipes()) >= 4"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path.resolve() / "algorithms" / "freeflow" / "ring.gin")


def test_folders_of_the_checkout_are_not_packages_of_their_own():
    done = python("import algorithms", ROOT)
    assert done.returncode != 0
    assert "flowdistill.algorithms" in done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    builder = WheelBuilder(str(ROOT))
    return zipfile.ZipFile(next(builder.build(directory=str(tmp_path_factory.mktemp("wheel")))))


def test_wheel_holds_one_package_with_everything_in_it(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flowdistill"}
    for folder in ("algorithms", "teachers", "flowdistill"):
        prefix = "flowdistill/" if folder == "flowdistill" else f"flowdistill/{folder}/"
        base = ROOT / folder
        for path in [*files(folder), *base.rglob("*.gin"), *base.rglob("*.safetensors")]:
            if folder == "flowdistill" and path not in files(folder) and path.suffix == ".gin":
                continue
            assert prefix + path.relative_to(base).as_posix() in names
    assert "flowdistill/teachers/digits/model.safetensors" in names
    assert len(names) == len(set(names))
