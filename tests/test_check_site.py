"""The script that looks at the site sees what is wrong with a page."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "docs" / "check_site.py"
PAGE = """<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>body { margin: 0 }</style><article><h1 id="top">A page</h1><math><mi>x</mi></math> %s</article>"""
FAULTS = {
    '<div style="width: 500px">wide</div>': ["at 390: is 50"],
    '<div style="width: 1000px" class="md-typeset__scrollwrap"><div style="width: 1100px; overflow: auto">columns</div>'
    "</div>": ["at 1440: hides columns of a table: columns"],
    "<p>\\(x\\)</p>": ["formula not rendered: \\(x\\)"],
    "<math><mo>\\lVert</mo></math>": ["formula not rendered: \\lVert"],
    '<img src="gone.png">': ["picture not shown", "console: Failed to load resource"],
    "<script>nothing()</script>": ["console: Uncaught"],
    '<img src="http://localhost:9/outside.png">': ["asks for http://localhost:9/outside.png"],
    '<a href="gone/">gone</a>': ["no such page: {page}gone/"],
    '<a href="#nowhere">nowhere</a>': ["no such place: {page}#nowhere"],
}


def checked(folder, *pages):
    """What the script says of a site of such pages."""
    if not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))):
        pytest.skip("no Chromium is installed")
    for number, page in enumerate(pages):
        path = folder / "site" / (f"page{number}" if number else "") / "index.html"
        path.parent.mkdir(parents=True)
        path.write_text(PAGE % page)
    return subprocess.run([sys.executable, SCRIPT], cwd=folder, capture_output=True, text=True, timeout=300)


def test_a_page_without_faults(tmp_path):
    done = checked(tmp_path, '<a href="page1/#top">on</a>', '<a href="../">back</a>')
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 pages, 2 formulas" in done.stdout
    assert (tmp_path / "build/screenshots/phone/home.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "build/screenshots/screen/page1.png").is_file()


def test_each_fault_is_told(tmp_path):
    done = checked(tmp_path, *FAULTS)
    assert done.returncode == 1
    for number, said in enumerate(FAULTS.values()):
        page = f"/page{number}/" if number else "/"
        ours = "".join(line + "\n" for line in done.stdout.splitlines() if re.match(rf"{page}[ :]", line))
        for words in said:
            assert words.replace("{page}", page) in ours


def test_what_to_install_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "apt-get install chromium" in done.stderr
