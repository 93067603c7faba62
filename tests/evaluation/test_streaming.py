"""Evaluations in blocks: figures depend on the seed alone, and nothing is drawn twice."""

import os
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from runs import command, write

import flowdistill
from flowdistill import ConfigError, DataError
from flowdistill.cli import main
from flowdistill.evaluation import SampleSet, measure, reference_set, spread
from flowdistill.runs import evaluating
from flowdistill.runs.blocks import BLOCK, collect
from flowdistill.teachers.gaussian import Ring

METRICS = ("sliced_w2", "mmd")
RING = {"metrics": METRICS, "noise_floor": False, "device": "cpu"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    flowdistill.train(gin_file=write(folder / "ring.gin"), workdir=folder / "ring")
    evaluation = ["evaluation.num_samples = 20", "evaluation.teacher_steps = (1,)"]
    bindings = ["train.steps = 2", "train.sample_every = 0", *evaluation]
    flowdistill.train(gin_file="digits/train.gin", gin_bindings=bindings, workdir=folder / "digits")
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A fresh copy of the ring's run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return shutil.copytree(trained / "ring", tmp_path / "run")


@pytest.fixture
def drawn(monkeypatch):
    """The numbers of samples that are drawn, block by block."""
    sizes, draw = [], evaluating.draw

    def counting(flow_map, n, *arguments, **settings):
        sizes.append(n)
        return draw(flow_map, n, *arguments, **settings)

    monkeypatch.setattr(evaluating, "draw", counting)
    return sizes


@flowdistill.register_metric("number_measured")
def number_measured(generated: SampleSet, reference: SampleSet) -> float:
    return len(generated.features) + 1e-4 * len(torch.unique(generated.features, dim=0))


@pytest.mark.parametrize("n", [1, 499, BLOCK, 1201])
def test_just_as_many_samples_are_measured_as_asked_for(run, n):
    for _ in range(2):  # drawn, then read
        figures = flowdistill.evaluate(
            run, metrics=["number_measured"], num_samples=n, batch_size=64, noise_floor=False
        )
        assert figures["number_measured"] == pytest.approx(n + 1e-4 * n)  # and no two are the same


def test_classes_are_taken_in_turn_across_blocks(trained, tmp_path):
    seen = []
    flowdistill.METRICS._entries["seen"] = lambda generated, reference: seen.append(generated.labels) or 0.0
    labelled = ("ring.labelled = True", "mlp.num_classes = 8")
    flowdistill.train(gin_file=trained / "ring.gin", gin_bindings=labelled, workdir=tmp_path / "run")
    for _ in range(2):  # drawn, then read
        flowdistill.evaluate(tmp_path / "run", metrics=["seen"], num_samples=1100, noise_floor=False)
    del flowdistill.METRICS._entries["seen"]
    assert [labels.tolist() for labels in seen] == 2 * [[i % 8 for i in range(1100)]]


def test_fewer_samples_than_asked_for_are_an_error(run, monkeypatch):
    whole = evaluating.sample_set
    monkeypatch.setattr(evaluating, "sample_set", lambda samples, *rest: whole(samples[1:], *rest))
    with pytest.raises(DataError, match="499 samples in place of 500"):
        flowdistill.evaluate(run, num_samples=600)


def test_batches_do_not_change_the_figures(run):
    figures = []
    for size in (7, 500):
        figures.append(flowdistill.evaluate(run, num_samples=600, batch_size=size, **RING))
        shutil.rmtree(run / "evaluations")
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)


def test_what_is_there_is_not_drawn_again(run, drawn):
    first = flowdistill.evaluate(run, num_samples=1200, **RING)
    assert drawn == [500, 500, 200]
    assert flowdistill.evaluate(run, num_samples=1200, **RING) == first
    flowdistill.evaluate(run, num_samples=700, metrics=("fid",), noise_floor=False)  # other metrics, fewer samples
    assert drawn == [500, 500, 200]
    flowdistill.evaluate(run, num_samples=1300, **RING)
    assert drawn == [500, 500, 200, 300]  # the last block with more samples
    flowdistill.evaluate(run, num_samples=100, seed=1, **RING)
    assert drawn == [500, 500, 200, 300, 100]  # another seed


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


def test_damaged_and_lost_blocks_are_drawn_again(run, drawn):
    whole = flowdistill.evaluate(run, num_samples=1500, **RING)
    (folder,) = (run / "evaluations").iterdir()
    first, second, third = sorted(folder.iterdir())
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    third.write_bytes(flipped(third.read_bytes(), 3000))
    drawn.clear()
    with pytest.warns(RuntimeWarning, match=r"0000[02]\.safetensors is damaged") as warned:
        assert flowdistill.evaluate(run, num_samples=1500, **RING) == whole
    assert len(warned) == 2
    assert drawn == [500, 500, 500]
    drawn.clear()
    assert flowdistill.evaluate(run, num_samples=1500, **RING) == whole
    assert drawn == []


def test_a_flipped_bit_anywhere_is_noticed(tmp_path):
    features = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    SampleSet(features, torch.arange(40)).save(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(8, start, 7), *range(start, len(data), 5)]:
        (tmp_path / "x").write_bytes(flipped(data, place))
        found = SampleSet.load(tmp_path / "x")
        assert found is None or (data[place] == 32 and torch.equal(found.features, features)), (
            place
        )  # blanks at the end


def test_a_run_that_cannot_be_written_is_measured_in_memory(run, drawn, capsys):
    whole = flowdistill.evaluate(run, num_samples=1200, **RING)
    shutil.rmtree(run / "evaluations")
    (run / "evaluations").write_text("in the way")  # of which root, too, can make no folder
    drawn.clear()
    with pytest.warns(RuntimeWarning, match=r"evaluations.* cannot be written .*held in memory") as warned:
        assert flowdistill.evaluate(run, num_samples=1200, **RING) == whole
    assert len(warned) == 1
    assert drawn == [500, 500, 200]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", str(run), "--metrics", "mmd", "--num_samples", "20", "--device", "cpu"])
    assert ended.value.code == 0
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_a_full_disk_and_what_is_there_already(run, drawn, monkeypatch):
    """Blocks that others kept are read; what cannot be kept is drawn and held."""
    whole = flowdistill.evaluate(run, num_samples=1200, **RING)
    (folder,) = (run / "evaluations").iterdir()
    for name in ("00001", "00002"):
        (folder / f"{name}.safetensors").unlink()
    drawn.clear()

    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SampleSet, "save", full)
    with pytest.warns(RuntimeWarning, match="No space left on device") as warned:
        assert flowdistill.evaluate(run, num_samples=1200, **RING) == whole
    assert len(warned) == 1
    assert drawn == [500, 200]


def test_ranks_that_share_no_folder_leave_all_to_the_first(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WORLD_SIZE", "2")
    drawn = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        made = lambda block, n: drawn.append((block, n)) or SampleSet(torch.full((n, 1), float(block)))  # noqa: E731
        with warnings.catch_warnings():
            warnings.simplefilter("error" if rank else "ignore")
            found = collect(SampleSet, tmp_path / "file" / "blocks", 1200, made)
        assert (found is None) == (rank == 1)
    assert drawn == [(0, 500), (1, 500), (2, 200)]
    assert found.features.flatten().long().bincount().tolist() == [500, 500, 200]


def test_a_killed_evaluation_continues(run, drawn, tmp_path):
    code = (
        "import os, signal, flowdistill; from flowdistill.runs import evaluating; draw = evaluating.draw; drawn = []\n"
        "def dying(*arguments, **settings):\n"
        "    drawn.append(1)\n"
        "    return draw(*arguments, **settings) if len(drawn) < 3 else os.kill(os.getpid(), signal.SIGKILL)\n"
        f"evaluating.draw = dying; flowdistill.evaluate({str(run)!r}, num_samples=2000)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    assert len(list((run / "evaluations").glob("*/*.safetensors"))) == 2
    resumed = flowdistill.evaluate(run, num_samples=2000, **RING)
    assert drawn == [500, 500]
    shutil.rmtree(run / "evaluations")
    assert flowdistill.evaluate(run, num_samples=2000, **RING) == resumed


def test_ranks_share_the_work_and_the_first_measures(run, trained):
    """Two processes as torchrun starts them, beside one that does all."""
    arguments = [run, "--num_samples", 2300, "--device", "cpu", "--metrics", *METRICS]
    code = [sys.executable, "-m", "flowdistill", "evaluate", *map(str, arguments)]
    ranks = [{"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"} for rank in (0, 1)]
    other = subprocess.Popen(code, env={**os.environ, **ranks[1]}, stdout=subprocess.PIPE, text=True)
    first = command("evaluate", *arguments, cwd=run.parent, env=ranks[0])
    assert first.returncode == 0, first.stderr
    assert other.communicate(timeout=120)[0] == ""
    assert other.returncode == 0
    alone = flowdistill.evaluate(trained / "ring", metrics=METRICS, num_samples=2300, device="cpu")
    assert first.stdout == "".join(f"{name}: {value:.4g}\n" for name, value in alone.items())


def test_a_rank_draws_its_share_alone(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = collect(
        SampleSet, tmp_path, 2300, lambda block, n: drawn.append((block, n)) or SampleSet(torch.zeros(n, 1))
    )
    assert result is None
    assert drawn == [(1, 500), (3, 500)]


def test_the_noise_floor_of_an_exact_teacher_is_that_of_other_draws(run):
    figures = flowdistill.evaluate(run, metrics=METRICS, num_samples=1000)
    sets = [reference_set(None, Ring(), 1000, seed) for seed in (1, 0)]
    assert {name: figures[f"{name}_noise_floor"] for name in METRICS} == measure(METRICS, *sets)


def test_the_noise_floor_of_a_reference_takes_as_many_samples_again(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run, asked = shutil.copytree(trained / "digits", tmp_path / "run"), ("fid", "accuracy")
    settings = {"features": "digits", "metrics": asked, "steps": 2}
    figures = flowdistill.evaluate(run, reference="digits", num_samples=800, **settings)
    assert 1.0 < figures["fid_noise_floor"] < 3.0 < figures["fid"]
    assert figures["accuracy_noise_floor"] > 0.99  # of the data set's labels
    with pytest.warns(RuntimeWarning, match="no noise floor of accuracy: true samples do not have"):
        stored = flowdistill.evaluate(run, num_samples=800, **settings)
    assert stored["fid"] == pytest.approx(figures["fid"], rel=1e-2)
    with pytest.warns(
        RuntimeWarning, match="no noise floor of fid, accuracy: the reference holds 1797 samples, and 18"
    ):
        assert flowdistill.evaluate(run, num_samples=900, **settings).keys() == set(asked)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.warns(RuntimeWarning, match="no noise floor of fid: the reference holds a mean and a covariance alone"):
        flowdistill.evaluate(
            run, num_samples=10, **settings | {"metrics": ["fid"]}, reference=tmp_path / "statistics.npz"
        )


def test_the_spread_is_that_over_seeds():
    """Also of metrics that look at nearest neighbours, which an ordinary bootstrap repeats."""
    names = ("fid", "sliced_w2", "mmd", "precision", "recall")

    def drawn(seed, shift=0.5):
        x = torch.randn(400, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return SampleSet((1 + shift) * x + shift)

    reference = drawn(10_000, 0.0)
    fresh = [measure(names, drawn(seed), reference) for seed in range(20)]
    estimated = spread(names, drawn(0), reference, resamples=20)
    for name in names:
        wanted = float(torch.tensor([figures[name] for figures in fresh]).std())
        assert wanted / 1.7 < estimated[name] < 1.7 * wanted


def test_spreads_and_mistakes(run):
    figures = flowdistill.evaluate(run, num_samples=100, bootstrap=5, **RING)
    assert figures.keys() == {*METRICS, *(f"{name}_std" for name in METRICS)}
    for settings, match in (
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"bootstrap": 1}, "at least 2"),
        ({"device": "quantum"}, "is no device"),
        ({"metrics": ["accuracy"]}, "class-conditional"),
        ({"features": "inceptoin"}, "did you mean inception"),
        ({"features": "inception"}, "name a reference"),
        ({"reference": "digits"}, "needs features"),
    ):
        with pytest.raises(ConfigError, match=match):
            flowdistill.evaluate(run, **{"num_samples": 10, **settings})
