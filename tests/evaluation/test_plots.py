"""Pictures of metrics over seeds, and of a training."""

import pytest

from flowdistill.evaluation.plots import curves, loss_curves, ranking

EQUAL = [0.1, 0.1, 0.1]  # whose mean, rounded, is larger than each


def test_equal_values_have_no_reach(tmp_path):
    ranking({"a": {"1 step": EQUAL}, "b": {"1 step": [0.2, 0.4]}}, {"teacher": 0.1}, "fid", tmp_path / "ranking.png")
    lines = {"a": [(1.0, EQUAL), (2.0, [])], "b": [(1.0, [0.2, 0.4]), (2.0, [0.3])]}
    curves({"fid": lines, "recall": lines, "none": {"a": []}}, "budget", tmp_path / "curves.png", log_y=("fid",))
    for name in ("ranking", "curves"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_args, **_kwargs: figures.append(figure))
    return figures


def records(**metrics):
    return [{"step": 10 * i, **{name: value(i) for name, value in metrics.items()}} for i in range(1, 9)]


def panels(figure):
    """Titles of the axes that are seen, each of which must hold a curve."""
    seen = [axes for axes in figure.axes if axes.axison]
    assert all(axes.lines for axes in seen)
    return [axes.get_title() for axes in seen]


def test_the_curves_are_metrics_that_change(drawn, tmp_path):
    """No counters, no speeds, nothing twice, nothing constant, and no empty axes."""
    counted = {f"{name}_evaluations": lambda i: 100.0 * i for name in ("student", "teacher", "online")}
    metrics = {"loss": lambda i: 1 / i, "error": lambda i: 1 / i, "gradient_norm": float, "steps_per_second": float}
    assert loss_curves(records(**metrics, **counted, weight=lambda i: 1.0), tmp_path / "curves.png")
    assert panels(drawn[0]) == ["loss", "gradient norm"]
    four = {name: lambda i, power=power: i**power for power, name in enumerate("abcd", start=1)}
    assert loss_curves(records(**four), tmp_path / "curves.png")
    assert panels(drawn[1]) == ["a", "b", "c", "d"]
    assert len(drawn[1].axes) == 6  # two of them unseen
    many = {f"metric {power}": lambda i, power=power: i**power for power in range(1, 12)}
    assert loss_curves(records(**many), tmp_path / "curves.png")
    assert panels(drawn[2]) == [f"metric {power}" for power in range(1, 7)]


def test_no_curves_of_a_run_without_records(tmp_path):
    path = tmp_path / "curves.png"
    assert not loss_curves([], path)
    assert not loss_curves(records(loss=lambda i: float("nan")), path)
    assert not loss_curves(records(loss=float)[:1], path)  # a point is no curve
    assert not path.exists()


@pytest.mark.parametrize(
    ("value", "scale"),
    [
        (lambda i: 10.0 ** (-i), "log"),
        (lambda i: 0.3 + 0.6 / i, "linear"),  # less than a decade
        (lambda i: 4.0 - i, "linear"),  # not positive
    ],
)
def test_ticks_are_numbers_that_a_person_reads(drawn, tmp_path, value, scale):
    loss_curves(records(loss=value), tmp_path / "curves.png")
    drawn[0].canvas.draw()
    (axes,) = drawn[0].axes
    assert axes.get_yscale() == scale
    labels = [label.get_text() for label in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True))]
    assert [label for label in labels if label]
    assert not any("$" in label for label in labels)  # as in $6\\times10^{-1}$
