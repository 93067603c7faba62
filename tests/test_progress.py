"""What long phases say, on a terminal and elsewhere."""

import io
import re
import time

import pytest

from flowdistill.plumbing import progress as module
from flowdistill.plumbing.progress import bars, progress
from flowdistill.training.run_log import RunLog


class Screen(io.StringIO):
    """Standard error, which is a terminal or not."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def text(self):
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())

    def wait_for(self, pattern):
        """Go on as soon as something has been said, which takes no fixed time."""
        for _ in range(3000):
            if found := re.search(pattern, self.text()):
                return found
            time.sleep(0.01)
        raise AssertionError(f"{pattern!r} was never said: {self.text()!r}")


@pytest.fixture
def screen(monkeypatch):
    def make(terminal):
        made = Screen(terminal)
        monkeypatch.setattr("sys.stderr", made)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setattr(module, "_PATIENCE", 0.01)
        return made

    return make


def test_a_line_now_and_then_where_there_is_no_terminal(screen):
    said = screen(terminal=False)
    with progress("adding", total=8) as phase:
        said.wait_for(r"^adding: 0%, \d+ s so far\n")
        phase.advance(2)
        said.wait_for(r"adding: 25%, \d+ s so far, \d+ s left\n")
        phase.completed = 9.0
        said.wait_for(r"adding: 100%, \d+ s so far, 0 s left\n")
    before = said.text()
    time.sleep(0.05)
    assert said.text() == before


def test_nothing_is_said_of_what_takes_no_time(screen, monkeypatch):
    said = screen(terminal=False)
    monkeypatch.setattr(module, "_PATIENCE", 10.0)
    with progress("adding", total=8):
        pass
    assert said.text() == ""


def test_progress_is_what_a_counter_says(screen):
    """Also while one call goes on and on."""
    said = screen(terminal=False)
    counter = [0]
    with progress("counting", total=None, done=lambda: counter[0]):
        said.wait_for(r"counting: \d+ s so far\n")
        counter[0] = 7
        said.wait_for(r"counting: 7 done, \d+ s so far\n")


def test_a_terminal_shows_a_bar_and_then_nothing(screen):
    said = screen(terminal=True)
    with progress("adding", total=8) as phase:
        phase.advance(2)
        said.wait_for(r"adding .*25%")
    assert "so far" not in said.text()  # no lines beside the bar


def test_phases_share_the_display(screen):
    """One within another adds a bar, since two displays would write over each other."""
    said = screen(terminal=True)
    with bars() as outer:
        outer.add_task("training", total=4, note="4/4")
        with progress("drawing", total=2) as phase, bars() as inner:
            assert inner is outer
            phase.advance(1)
            said.wait_for(r"training .*4/4.*\n.*drawing .*50%")
        assert [task.description for task in outer.tasks] == ["training"]
    with bars() as again:
        assert again is not outer


def test_an_error_ends_the_phase(screen):
    said = screen(terminal=False)

    def divide():
        with progress("dividing", total=1):
            said.wait_for("dividing")
            return 1 / 0

    with pytest.raises(ZeroDivisionError):
        divide()
    before = said.text()
    time.sleep(0.05)
    assert said.text() == before


def test_only_the_first_process_says_anything(screen, monkeypatch):
    said = screen(terminal=False)
    monkeypatch.setattr(module, "rank_and_world", lambda: (1, 2))
    with progress("adding", total=8) as phase:
        phase.advance(1)
        time.sleep(0.1)
    assert said.text() == ""


RECORD = {"loss": 1.003, "error": 0.25, "learning_rate": 3e-4, "steps_per_second": 5.0}


@pytest.mark.parametrize(
    ("record", "figure"), [(RECORD, "error 0.25"), ({k: v for k, v in RECORD.items() if k != "error"}, "loss 1.003")]
)
def test_a_training_says_the_error_where_there_is_one(screen, tmp_path, record, figure):
    said = screen(terminal=False)
    with RunLog(tmp_path, 0, 20) as log:
        log.advance(5)
        assert said.text() == ""
        log.write(20, record)
    assert said.text() == f"step 20/20  {figure}  lr 0.0003  5.0 steps/s  0 s left\n"


def test_a_bar_has_no_figures_before_the_first_record(screen, tmp_path):
    said = screen(terminal=True)
    with RunLog(tmp_path, 0, 20) as log:
        log.advance(4)
        said.wait_for("4/20")
        assert not re.search("nan|error|loss|lr", said.text())
        log.write(5, RECORD)
        log.advance(5)
        said.wait_for(r"5/20 +error 0\.25 +lr 0\.0003 +5\.0 steps/s")
