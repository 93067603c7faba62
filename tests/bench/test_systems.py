"""Tables of released systems, on tiny stand-ins of every family in their authors' formats."""

import importlib.util
import json
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import safetensors.torch
import torch
from student_files import load

import flowdistill
from flowdistill import PROTOCOLS, ConfigError
from flowdistill.bench import System, SystemTable, bench_systems
from flowdistill.bench.imagenet import TABLES
from flowdistill.bench.systems import load_table
from flowdistill.cli import main
from flowdistill.flow_maps import SolvedTeacher
from flowdistill.interfaces import Condition
from flowdistill.plumbing import config
from flowdistill.plumbing.errors import RunsFailedError
from flowdistill.runs import evaluating
from flowdistill.solvers import Euler, EulerMaruyama
from flowdistill.teachers.gaussian import Ring

STAND_INS = Path(__file__).parents[2] / "benchmarks" / "stand_ins.py"


@pytest.fixture(scope="module")
def stand_ins():
    """The script, once: it registers its features."""
    spec = importlib.util.spec_from_file_location("stand_ins", STAND_INS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["stand_ins"] = module
    return module


@pytest.fixture(scope="module")
def files(stand_ins, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    stand_ins.write(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch):
    """The systems that are measured, one by one."""
    names, original = [], evaluating.evaluate

    def noting(model, **settings):
        names.append(type(model).__name__)
        return original(model, **settings)

    monkeypatch.setattr("flowdistill.bench.systems.evaluate", noting)
    return names


def small(table, *names):
    """A table of some systems, with few samples."""
    systems = [s for s in table.systems if s.name.removeprefix("stand-in of ") in names]
    return SystemTable(systems=systems, protocol=attrs.evolve(table.protocol, num_samples=12, metrics=("fid",)))


def rows(out):
    return {(row["system"], row["steps"]): row for row in json.loads((out / "results.json").read_text())}


def test_every_family_is_found_read_sampled_and_measured(files, cache, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", str(STAND_INS), "--files", str(files), "--out", str(tmp_path / "out"), "--num_samples", "12"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    table = load_table(STAND_INS)
    found = rows(tmp_path / "out")
    expected = {(s.name, steps) for s in table.systems if s.is_in(files) for steps in s.published}
    assert found.keys() == expected
    assert all(np.isfinite(list(row["figures"].values())).all() for row in found.values())
    assert found["stand-in of SiT", 5]["evaluations"] == 10  # guided
    assert found["stand-in of EDM2, autoguided", 4]["evaluations"] == 14  # Heun's method, whose last step is Euler's
    assert found["stand-in of imm_ts", 2]["evaluations"] == 4
    assert found["stand-in of secant", 4]["evaluations"] == 4
    assert printed == (tmp_path / "out" / "table.md").read_text() + "\n"
    assert "| a system without a file | `not_there.pt` | nowhere | none |" in printed


def test_a_figure_is_that_of_the_student_by_the_protocol(stand_ins, files, cache, tmp_path):
    table = small(stand_ins.TABLE, "dmf", "secant", "SiT", "a system without a file")
    bench_systems(table, files, out=tmp_path / "out", device="cpu")
    found = rows(tmp_path / "out")
    student = load("dmf", checkpoint=files / "dmf.pt", vae=files / "sd-vae-ft-ema", num_heads=4, early_blocks=3)
    again = flowdistill.evaluate(
        student, protocol=table.protocol, reference=files / "reference.npz", steps=2, device="cpu", noise_floor=False
    )
    assert found["stand-in of dmf", 2]["figures"] == again
    assert found["stand-in of dmf", 2]["labels"] == "random"
    assert found["stand-in of dmf", 2]["autoencoder"] == str(files / "sd-vae-ft-ema")
    assert found["stand-in of dmf", 2]["parameters"] == sum(p.numel() for p in student.parameters())
    text = (tmp_path / "out" / "table.md").read_text()
    assert "not at hand" in text
    assert "--gin.train.batch_size=128" in text


def test_what_is_measured_is_not_measured_again(stand_ins, files, cache, measured, tmp_path):
    folder = shutil.copytree(files, tmp_path / "files")
    table, out = small(stand_ins.TABLE, "dmf", "meanflow"), tmp_path / "out"
    bench_systems(table, folder, out=out, only=["meanflow"])
    assert len(measured) == 1
    bench_systems(table, folder, out=out)
    bench_systems(table, folder, out=out)
    assert len(measured) == 3  # of dmf in one and in two steps
    assert len(rows(out)) == 3
    tensors = torch.load(folder / "meanflow.pt")
    tensors["ema"]["final_layer.linear.bias"] += 1
    torch.save(tensors, folder / "meanflow.pt")
    before = rows(out)["stand-in of meanflow", 1]["figures"]
    bench_systems(table, folder, out=out)
    assert len(measured) == 4
    assert rows(out)["stand-in of meanflow", 1]["figures"] != before
    bench_systems(table, folder, out=out, num_samples=10, only=["meanflow"])
    assert len(measured) == 5
    assert rows(out).keys() == {("stand-in of meanflow", 1)}  # no figures of two protocols in one table


def test_a_file_that_cannot_be_read_is_a_row_that_says_so(stand_ins, files, cache, tmp_path):
    folder = shutil.copytree(files, tmp_path / "files")
    (folder / "dmf.pt").write_bytes(b"PK damaged")
    table = small(stand_ins.TABLE, "dmf", "meanflow")
    with pytest.raises(RunsFailedError, match="stand-in of dmf could not be measured"):
        bench_systems(table, folder, out=tmp_path / "out")
    found = rows(tmp_path / "out")
    assert "figures" in found["stand-in of meanflow", 1]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| failed |" in text
    assert "Failed: stand-in of dmf, 1 step: " in text
    shutil.copy(files / "dmf.pt", folder / "dmf.pt")
    bench_systems(table, folder, out=tmp_path / "out")
    assert "failed" not in (tmp_path / "out" / "table.md").read_text().lower()


def test_figures_rest_on_the_autoencoder_and_the_reference(stand_ins, files, cache, measured, tmp_path):
    folder, out = shutil.copytree(files, tmp_path / "files"), tmp_path / "out"
    table = small(stand_ins.TABLE, "meanflow")
    found = []
    for change in ("nothing", "autoencoder", "reference"):
        if change == "autoencoder":
            weights = folder / "sd-vae-ft-ema" / "diffusion_pytorch_model.safetensors"
            tensors = safetensors.torch.load_file(weights)
            safetensors.torch.save_file({k: 1.5 * v for k, v in tensors.items()}, weights)
        if change == "reference":
            np.savez(folder / "reference.npz", arr_0=np.full((40, 8, 8, 3), 200, np.uint8))
        bench_systems(table, folder, out=out)
        found.append(rows(out)["stand-in of meanflow", 1]["figures"]["fid"])
    assert len(set(found)) == len(measured) == 3


def test_an_error_is_tried_again_and_hides_what_was_measured(stand_ins, files, cache, tmp_path):
    folder, out = shutil.copytree(files, tmp_path / "files"), tmp_path / "out"
    table = small(stand_ins.TABLE, "meanflow")
    bench_systems(table, folder, out=out)
    good = (folder / "meanflow.pt").read_bytes()
    (folder / "meanflow.pt").write_bytes(good[:1000])
    with pytest.raises(RunsFailedError):
        bench_systems(table, folder, out=out)
    assert "figures" not in rows(out)["stand-in of meanflow", 1]
    (folder / "meanflow.pt").write_bytes(good)
    (folder / "sd-vae-ft-ema").rename(folder / "away")
    with pytest.raises(RunsFailedError):
        bench_systems(table, folder, out=out)
    (folder / "away").rename(folder / "sd-vae-ft-ema")
    bench_systems(table, folder, out=out)
    assert "figures" in rows(out)["stand-in of meanflow", 1]
    (folder / "meanflow.pt").unlink()
    bench_systems(table, folder, out=out)
    assert rows(out) == {}


def test_names_that_differ_in_signs_alone_have_records_of_their_own():
    one, two = (System(name=name, kind="distilled") for name in ("a, XL/2", "a, XL/2+"))
    assert one.record(1) != two.record(1)
    with pytest.raises(ConfigError, match="two systems of a table have the name 'a, XL/2'"):
        SystemTable(systems=[one, two, one], protocol="adm")


def test_mistakes_are_told(stand_ins, files, tmp_path):
    table, out = small(stand_ins.TABLE, "dmf"), tmp_path / "out"
    with pytest.raises(ConfigError, match="nowhere is no folder"):
        bench_systems(table, "nowhere", out=out)
    with pytest.raises(ConfigError, match="no system has any of nobody"):
        bench_systems(table, files, out=out, only=["nobody"])
    with pytest.raises(ConfigError, match=r"other\.npz is not there: name what figures are compared with"):
        bench_systems(table, files, out=out, reference=tmp_path / "other.npz")
    with pytest.raises(ConfigError, match="known are imagenet256, imagenet512"):
        load_table("imagenet1024")
    (tmp_path / "mine.py").write_text("TABLE = 3\n")
    with pytest.raises(ConfigError, match=r"has no TABLE = flowdistill\.bench\.SystemTable"):
        load_table(tmp_path / "mine.py")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "imagenet256"])
    assert stop.value.code == 2


def test_without_any_file_the_table_says_where_each_is(tmp_path, capsys):
    (tmp_path / "files").mkdir()
    with pytest.raises(SystemExit) as stop:
        main(["bench", "imagenet512", "--files", str(tmp_path / "files"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for system in TABLES["imagenet512"].systems:
        assert system.name in text
    assert "hf://lumaai/tvm" in text
    assert rows(tmp_path / "out") == {}


SYSTEMS = [system for table in TABLES.values() for system in table.systems]


def test_the_packaged_tables_name_what_exists():
    names = {*flowdistill.FLOW_MAPS.all_names(), *flowdistill.TEACHERS.all_names()}
    recipes = config.recipes()
    bib = (Path(flowdistill.__file__).parent / "references.bib").read_text()
    for table in TABLES.values():
        assert len({s.name for s in table.systems}) == len(table.systems)
        for system in table.systems:
            assert system.loads is None or system.loads in names
            assert system.protocol == "not known" or system.protocol in PROTOCOLS
            assert f"{{{system.citation}," in bib
            assert (system.kind == "teacher") == (system.solver is not None)
            assert system.recipe is None or system.recipe in recipes
            assert (system.file is None) == (system.loads is None)


def test_a_solved_teacher_is_its_solver_and_counts_its_evaluations():
    ring = Ring()
    sampler = SolvedTeacher(ring, Euler(steps=8))
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sampler.sample(noise), Euler(steps=8).solve(ring, noise.double()).float())
    assert sampler.evaluations == ring.evaluations == 2 * 5 * 8


def test_a_stochastic_solver_draws_the_same_for_the_same_noises():
    sampler = SolvedTeacher(Ring(), EulerMaruyama(steps=8))
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    first, again = sampler.sample(noise), sampler.sample(noise)
    assert torch.equal(first, again)
    alone = torch.cat([sampler.sample(row[None]) for row in noise])
    torch.testing.assert_close(alone, first)
    other = sampler.sample(noise + 1e-3)
    assert float((other - first).abs().max()) > 0.1


def test_samples_of_two_solvers_are_kept_apart():
    one, two = (flowdistill.Run.of(SolvedTeacher(Ring(), Euler(steps=steps))) for steps in (4, 8))
    assert one.identity != two.identity


def test_conditions_reach_the_teacher():
    seen = []

    class Labelled(Ring):
        def velocity(self, x, t, condition=None):
            seen.append(condition.labels)
            return super().velocity(x, t)

    SolvedTeacher(Labelled(), Euler(steps=2)).sample(torch.zeros(2, 2), condition=Condition(torch.tensor([1, 2])))
    assert [labels.tolist() for labels in seen] == [[1, 2], [1, 2]]


def test_a_command_trains_what_the_table_names():
    bindings = ("edm2_teacher.variant = 'edm2-s-512'", "latents.sample_shape = (4, 64, 64)", "train.steps = 3")
    system = System(name="x", kind="distilled", recipe="freeflow/imagenet.gin", bindings=bindings)
    command = system.command()
    assert command == (
        "flowdistill train freeflow/imagenet.gin --gin.edm2_teacher.variant=edm2-s-512 "
        "'--gin.latents.sample_shape=(4, 64, 64)' --gin.train.steps=3"
    )
    given = [word.removeprefix("--gin.") for word in shlex.split(command)[3:]]
    assert [config.quoted(binding).replace(" ", "") for binding in given] == [b.replace(" ", "") for b in bindings]


@pytest.mark.parametrize("name", TABLES)
def test_the_committed_page_shows_the_table(name, cache, tmp_path):
    bench_systems(name, tmp_path, out=tmp_path / "out")
    committed = Path(__file__).parents[2] / "benchmarks" / "results" / name / "table.md"
    assert (tmp_path / "out" / "table.md").read_text() == committed.read_text()


def test_the_committed_plans_are_of_the_recipes_and_have_the_published_sizes():
    plans = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "plans.json").read_text())
    wanted = runpy.run_path(str(STAND_INS.with_name("plans.py")))["wanted"]()
    assert {title: (row["recipe"], tuple(row["bindings"])) for title, row in plans.items()} == {
        title: (recipe, bindings) for title, (recipe, bindings, _) in wanted.items()
    }
    for title, (_, _, published) in wanted.items():
        if published is not None:
            assert plans[title]["parameters"] == pytest.approx(1e6 * published, rel=0.01), title


def test_the_committed_plans_of_many_gpus_are_of_the_recipes_and_are_the_table():
    results, script = STAND_INS.parent / "results", runpy.run_path(str(STAND_INS.with_name("parallel_plans.py")))
    plans = json.loads((results / "parallel_plans.json").read_text())
    assert [{name: row[name] for name in wanted} for row, wanted in zip(plans, script["wanted"](), strict=True)] == (
        script["wanted"]()
    )
    text = (results / "parallel_plans.md").read_text()
    assert text.startswith(script["table"](plans) + "\n")
    assert "computed for H100-80, of which none has run a step" in text


@pytest.mark.slow
def test_a_committed_plan_of_many_gpus_is_what_is_planned_now():
    script = runpy.run_path(str(STAND_INS.with_name("parallel_plans.py")))
    committed, *_ = json.loads((STAND_INS.parent / "results" / "parallel_plans.json").read_text())
    for name, value in script["planned"](script["wanted"]()[0]).items():
        assert value == (pytest.approx(committed[name]) if isinstance(value, float) else committed[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_the_recipe_of_a_system_can_be_planned(system):
    """EDM2-XXL's are left out, which take a minute each: benchmarks/plans.py plans them."""
    if system.recipe is None or "XXL" in system.name:
        pytest.skip("no recipe, or a large one")
    found = flowdistill.plan(system.recipe, gin_bindings=system.bindings)
    if system.parameters is not None:
        assert found.parameters["student"] == pytest.approx(1e6 * system.parameters, rel=0.01)
