"""Suites: which trainings they ask for, and at which cost."""

from pathlib import Path

import pytest

from flowdistill import ConfigError
from flowdistill.bench import load_suite
from flowdistill.bench.suite import evaluations_per_state
from flowdistill.plumbing import config

ONE = "bench.rows = {'FreeFlow': ('freeflow', 'plane', 'freeflow.alpha = 0.5'), 'IMM': ('imm', 'plane')}\n"


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["toy", "digits", "mnist"])
def test_packaged_suites_hold_every_method(name):
    suite = load_suite(name)
    for title, (_, setting, *_) in suite.rows.items():
        rows = [row for row in suite.table() if row.group == title]
        assert [row.name for row in rows] == list(config.methods())
        assert [row.files for row in rows] == [tuple(config.composed(row.name, setting)) for row in rows]


@pytest.mark.parametrize("name", [Path(file).stem for file in config.gin_files() if file.startswith("suites/")])
def test_packaged_suites_have_a_quick_version(name):
    suite, quick = load_suite(name), load_suite(name, quick=True)
    assert len(quick.seeds) < len(suite.seeds)


def test_named_rows_and_bindings(tmp_path):
    path = write(tmp_path / "two.gin", ONE + "bench.bindings = ('imm.groups = 3', 'train.steps = 7')")
    suite = load_suite(path, ["bench.seeds = (5,)", "AdamW.lr = 0.5", "freeflow.epsilon = 1.0"])
    freeflow, imm = suite.jobs(suite.table(), {})
    assert (freeflow.row.name, imm.row.name, freeflow.seed) == ("FreeFlow", "IMM", 5)
    assert "freeflow.alpha = 0.5\n" in freeflow.gin
    assert "imm.groups" not in freeflow.gin  # a part that FreeFlow's recipe does not have
    assert "imm.groups = 3\n" in imm.gin
    assert "freeflow.epsilon" not in imm.gin
    for job in (freeflow, imm):
        assert "AdamW.lr = 0.5\n" in job.gin
        assert "train.steps = 7\n" in job.gin
        assert "train.seed = 5\n" in job.gin


def test_bindings_may_be_includes(tmp_path, monkeypatch):
    """One that sets parts of a recipe up is for it; one of the evaluation alone is no part of a training."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "groups.gin", "imm.groups = 3\n")
    write(tmp_path / "few.gin", "evaluation.num_samples = 10\n")
    bindings = ["bench.seeds = (1,)", "include 'groups.gin'", "include 'few.gin'"]
    path = write(tmp_path / "two.gin", ONE)
    freeflow, imm = load_suite(path, bindings).jobs(load_suite(path).table(), {})
    assert "groups.gin" not in freeflow.gin
    assert "include 'groups.gin'\ninclude 'few.gin'\n" in imm.gin
    without, _ = load_suite(path, bindings[:2]).jobs(load_suite(path).table(), {})
    assert freeflow.run == without.run
    assert freeflow.figures != without.figures


def test_runs_are_told_apart_by_what_they_train(tmp_path):
    suite = load_suite(write(tmp_path / "two.gin", ONE))
    jobs = suite.jobs(suite.table(), {})
    assert len({job.run for job in jobs}) == 6
    assert {job.run for job in suite.teachers(suite.table())}.isdisjoint(job.run for job in jobs)
    same = load_suite(write(tmp_path / "other.gin", ONE.replace("'IMM'", "'another title'")))
    assert [job.run for job in same.jobs(same.table(), {})] == [job.run for job in jobs]


def test_an_evaluation_is_not_a_part_of_the_training(tmp_path):
    suite = load_suite(write(tmp_path / "two.gin", ONE), ["bench.seeds = (1,)"])
    other = load_suite(write(tmp_path / "two.gin", ONE), ["bench.seeds = (1,)", "bench.metrics = ('mmd',)"])
    for job, measured in zip(suite.jobs(suite.table(), {}), other.jobs(other.table(), {}), strict=True):
        assert job.run == measured.run
        assert job.figures != measured.figures


def test_a_sweep_takes_its_values_where_its_part_is(tmp_path):
    text = ONE + "bench.sweep = ('with_point_mass.fraction', (0.5, 0.75))"
    suite = load_suite(write(tmp_path / "two.gin", text), ["bench.seeds = (5,)"])
    jobs = suite.jobs(suite.table(), {})
    assert [(job.row.name, job.value) for job in jobs] == [("FreeFlow", None), ("IMM", 0.5), ("IMM", 0.75)]
    assert "with_point_mass.fraction = 0.75\n" in jobs[2].gin
    assert [job.value for job in suite.teachers(suite.table())] == [None]
    # A part that only a binding of the suite brings in
    text = ONE + "bench.sweep = ('logit_normal.std', (0.5, 2.0))\nbench.bindings = ('below.starts = @logit_normal()',)"
    suite = load_suite(write(tmp_path / "two.gin", text), ["bench.seeds = (5,)"])
    assert [job.value for job in suite.jobs(suite.table(), {})] == [None, 0.5, 2.0]


def test_a_sweep_of_the_evaluation_trains_once_and_measures_the_teacher_as_well(tmp_path):
    text = ONE + "bench.sweep = ('evaluation.guidance', (1.0, 2.0))"
    suite = load_suite(write(tmp_path / "two.gin", text), ["bench.seeds = (5,)"])
    one, two, *_ = suite.jobs(suite.table(), {})
    assert (one.value, two.value) == (1.0, 2.0)
    assert one.run == two.run
    assert one.figures != two.figures
    assert [job.value for job in suite.teachers(suite.table())] == [1.0, 2.0]


def test_a_changed_recipe_is_another_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = []
    for rate in (1e-3, 2e-3):
        write(tmp_path / "mine.gin", f"include 'freeflow/ring.gin'\nAdamW.lr = {rate}\n")
        suite = load_suite(write(tmp_path / "one.gin", "bench.rows = {'A': ('mine.gin',)}\nbench.seeds = (1,)"))
        keys.append([job.run for job in (*suite.jobs(suite.table(), {}), *suite.teachers(suite.table()))])
    assert not set(keys[0]) & set(keys[1])


def test_a_budget_sets_the_steps(tmp_path):
    path = write(
        tmp_path / "budget.gin",
        "bench.rows = {'FreeFlow': ('freeflow', 'plane')}\nbench.seeds = (1,)\nbench.budgets = (256_000, 512_000)",
    )
    costs = {}
    few, many = load_suite(path).jobs(load_suite(path).table(), costs)
    (cost,) = costs.values()
    with config.parsed([write(tmp_path / "few.gin", few.gin)], []):
        steps = config.value("train.steps")
    assert steps == round(256_000 / (256 * cost))
    with config.parsed([write(tmp_path / "many.gin", many.gin)], []):
        assert config.value("train.steps") == pytest.approx(2 * steps, abs=1)
    given = dict.fromkeys(costs, 100.0)
    assert f"train.steps = {256_000 // 25_600}\n" in load_suite(path).jobs(load_suite(path).table(), given)[0].gin


def test_the_least_budget_is_one_step(tmp_path):
    path = write(
        tmp_path / "least.gin", "bench.rows = {'CD': ('cd', 'plane')}\nbench.seeds = (1,)\nbench.budgets = (1,)"
    )
    (job,) = load_suite(path).jobs(load_suite(path).table(), {})
    with config.parsed([write(tmp_path / "job.gin", job.gin)], []):
        assert config.value("train.steps") == 1


def test_costs_are_those_of_all_phases():
    def cost(start):
        bindings = [f"freeflow.correction_start = {start}", "freeflow.online_warmup = 0.0"]
        return evaluations_per_state(config.composed("freeflow", "plane"), bindings)

    prediction, both = cost(1.0), cost(0.0)
    assert prediction == 3.0  # two of the student, for its difference, and one of the teacher
    assert both > prediction
    assert cost(0.5) == pytest.approx((prediction + both) / 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bench.rows = {'A': ('*nothing', 'plane')}", "no packaged method matches '\\*nothing'"),
        ("bench.rows = {'A': ('*',)}", "needs a setting, such as 'digits'"),
        ("bench.rows = {}", "rows"),
        (ONE + "bench.seed = (1,)", "seeds"),
        (ONE + "bench.seeds = ()", "seeds"),
        ("bench.seeds = (1,)", "rows"),
    ],
)
def test_mistakes(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_suite(write(tmp_path / "wrong.gin", text)).table()


def test_unknown_suites(tmp_path):
    with pytest.raises(ConfigError, match=r"suites/mnist\.gin"):
        load_suite("mnits")
    with pytest.raises(ConfigError, match=r"bench\.quick"):
        load_suite(write(tmp_path / "two.gin", ONE), quick=True)
