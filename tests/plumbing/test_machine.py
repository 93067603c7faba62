"""The commit that a measurement names."""

import subprocess

import pytest

import flowdistill
from flowdistill.plumbing import machine


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    machine.code.cache_clear()
    yield tmp_path
    machine.code.cache_clear()


def git(folder, *command):
    identity = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")
    return subprocess.run(["git", "-C", folder, *identity, *command], check=True, capture_output=True, text=True).stdout


def committed(folder, name):
    (folder / name).write_text("one\n")
    git(folder, "init")
    git(folder, "add", name)
    git(folder, "commit", "-m", "first")
    return git(folder, "rev-parse", "HEAD")[:7]


def test_a_checkout_names_its_commit(checkout):
    commit = committed(checkout, "code.py")
    assert machine.code() == f"commit {commit}"
    assert machine.machine().endswith(f", commit {commit}")


@pytest.mark.parametrize(
    ("name", "words"), [("code.py", " with changes"), ("mnist.gin", " with changes"), ("a.md", "")]
)
def test_changes_of_code_and_of_recipes_are_said(checkout, name, words):
    commit = committed(checkout, name)
    (checkout / name).write_text("two\n")
    assert machine.code() == f"commit {commit}{words}"


def test_an_installed_package_names_its_version_whatever_repository_it_lies_in(tmp_path, checkout, monkeypatch):
    committed(checkout, "code.py")
    monkeypatch.setattr(machine, "_ROOT", tmp_path / "site-packages")
    (tmp_path / "site-packages").mkdir()
    assert machine.code() == f"flowdistill {flowdistill.__version__}"
