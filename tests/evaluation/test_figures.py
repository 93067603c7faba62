"""Pictures of figures over seeds."""

from flowdistill.evaluation.plots import curves, ranking

EQUAL = [0.1, 0.1, 0.1]  # whose mean, rounded, is larger than each


def test_equal_values_have_no_reach(tmp_path):
    ranking({"a": {"1 step": EQUAL}, "b": {"1 step": [0.2, 0.4]}}, {"teacher": 0.1}, "fid", tmp_path / "ranking.png")
    lines = {"a": [(1.0, EQUAL), (2.0, [])], "b": [(1.0, [0.2, 0.4]), (2.0, [0.3])]}
    curves({"fid": lines, "recall": lines, "none": {"a": []}}, "budget", tmp_path / "curves.png", log_y=("fid",))
    for name in ("ranking", "curves"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
