"""What all tests of files of students share."""

import pytest


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """No code of any file that a test reads has run: it would have left a file."""
    path = tmp_path / "canary"
    monkeypatch.setenv("CANARY", str(path))
    yield path
    assert not path.exists()
