"""The scripts of the gallery, in a few steps, and the notebooks that are made of them."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
SCRIPTS = sorted((DOCS / "gallery").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_writes_its_picture(path, tmp_path, monkeypatch, capsys):
    """What it prints has as many lines as the output on the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    source, found = re.subn(r"^STEPS = \d+$", "STEPS = 2", path.read_text(), flags=re.MULTILINE)
    assert found == 1
    source = source.replace("num_samples=1000", "num_samples=50")
    exec(compile(source, path, "exec"), {"__name__": "__main__"})
    ours, committed = Image.open(tmp_path / f"{path.stem}.png"), Image.open(path.with_suffix(".png"))
    assert abs(ours.width - committed.width) < 60  # the labels of axes differ with the samples
    assert len(capsys.readouterr().out.splitlines()) == len(path.with_suffix(".txt").read_text().splitlines())


def test_notebooks_hold_what_the_scripts_do():
    spec = importlib.util.spec_from_file_location("notebooks", DOCS / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path in SCRIPTS:
        made = json.loads(module.notebook(path))
        text, *cells, picture = made["cells"]
        assert f'"""{text["source"]}"""' == path.read_text().splitlines()[0]
        code = [line for cell in cells for line in cell["source"].splitlines() if line]
        assert code == [line for line in path.read_text().splitlines()[1:] if line and line != "# %%"]
        assert picture["source"].endswith(f'Image("{path.stem}.png")')
        assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])


def test_the_page_shows_all_scripts():
    page = (DOCS / "gallery.md").read_text()
    for path in SCRIPTS:
        for name in (f'"docs/gallery/{path.name}"', f'"docs/gallery/{path.stem}.txt"', f"(gallery/{path.stem}.png)"):
            assert name in page
        assert f"(gallery/{path.stem}.ipynb)" in page
