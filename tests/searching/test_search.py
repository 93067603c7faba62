"""Searches of runs: what they leave, what they repeat, and the command line."""

import json
import os
import re
import shutil
import subprocess
import sys

import attrs
import pytest
import torch
from runs import command, write

import flowdistill
from flowdistill import ConfigError, DataError
from flowdistill.cli import main
from flowdistill.searching import SearchResult, SearchStrategy
from flowdistill.searching import noises as module

QUICK = {"teacher_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student of the digits that has hardly been trained, a velocity field, and a student in the plane."""
    folder = tmp_path_factory.mktemp("runs")
    few = ["train.steps = 2", "train.sample_every = 0", "evaluation.num_samples = 20"]
    few += ["evaluation.teacher_steps = (1,)"]
    flowdistill.train(gin_file="freeflow/digits.gin", gin_bindings=few, workdir=folder / "digits")
    flowdistill.train(gin_file="digits/train.gin", gin_bindings=few, workdir=folder / "teacher")
    flowdistill.train(gin_file=write(folder / "ring.gin"), workdir=folder / "ring")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A fresh copy of the digits' run."""
    return shutil.copytree(trained / "digits", tmp_path / "run")


@pytest.fixture
def searched(monkeypatch):
    """The numbers of samples that are searched for, block by block."""
    sizes, find = [], module.find

    def counting(strategy, trials):
        sizes.append(len(trials.generators))
        return find(strategy, trials)

    monkeypatch.setattr(module, "find", counting)
    return sizes


def test_samples_are_drawn_in_the_precision_of_the_evaluation(run):
    def drawn():
        seen = []  # what the student makes of the noises, one for each sample, and then the teacher

        def score(images, condition):
            seen.append(images)
            return images.mean((1, 2, 3))

        flowdistill.search(run, 5.5, num_samples=4, verifier=score, **QUICK)
        return seen

    full = drawn()
    with (run / "config.gin").open("a") as file:
        file.write("\nevaluation.precision = 'bf16'\n")
    for low, high in zip(drawn(), full, strict=True):
        assert low.dtype == torch.float32
        assert 1e-4 < (low - high).abs().max() < 0.1


def test_a_search_leaves_its_result_and_figures(run):
    result = flowdistill.search(run, 10, num_samples=12, **QUICK)
    assert result.samples.shape == result.noise.shape == (12, 1, 8, 8)
    assert result.labels.tolist() == [*range(10), 0, 1]
    stored = SearchResult.load(result.folder / "result.safetensors")
    for name in ("noise", "samples", "scores", "labels", "student_evaluations", "teacher_evaluations", "cost"):
        assert torch.equal(getattr(stored, name), getattr(result, name))
    figures = json.loads((result.folder / "figures.json").read_text())
    assert figures.pop("settings")["strategy"] == "BestOf()"
    assert figures == result.figures
    assert figures["num_samples"] == 12
    assert figures["teacher_evaluations"] == 4  # 2 guided steps
    assert figures["student_evaluations"] == 5  # as the sixth does not fit: embeddings of delta and gamma cost a little
    assert 9 < figures["cost"] < 10
    assert figures["score"] == pytest.approx(result.scores.mean().item())
    assert (result.folder / "images.png").read_bytes()[:4] == b"\x89PNG"


def test_the_student_of_a_search_finds_better_noises_than_none(run):
    """A student that starts as its teacher, one step of which it is, and the verifier of the run's own features."""
    alone, found, tried = (
        flowdistill.search(run, budget, num_samples=40, proposer=proposer, **QUICK)
        for budget, proposer in ((4, "teacher"), (24, "student"), (24, "teacher"))
    )
    assert alone.teacher_evaluations.unique().tolist() == [4]
    assert tried.teacher_evaluations.unique().tolist() == [24]
    assert found.scores.mean() > alone.scores.mean() + 0.3
    assert tried.scores.mean() > alone.scores.mean() + 0.3
    assert (tried.scores >= alone.scores).all()  # whose noise is the first of the six


def test_batches_do_not_change_the_result_and_other_seeds_and_guidance_do(run, tmp_path):
    def scores(**settings):
        shutil.rmtree(run / "searches", ignore_errors=True)
        return flowdistill.search(run, 8, num_samples=20, **QUICK, **settings).scores

    first = scores()
    assert torch.allclose(first, scores(batch_size=7), rtol=1e-4)
    assert torch.equal(first, scores())
    assert not torch.allclose(first, scores(seed=1))
    assert not torch.allclose(first, scores(guidance=1.5))
    assert not torch.allclose(first, scores(labels=3))
    assert not torch.allclose(first, scores(teacher="digits_teacher"))  # which is not guided


def test_what_is_there_is_not_searched_for_again(run, searched, tmp_path):
    settings = {**QUICK, "strategy": "zero_order", "out": tmp_path / "out"}
    whole = flowdistill.search(run, 8, num_samples=120, **settings)
    assert whole.folder == tmp_path / "out"
    assert searched == [50, 50, 20]
    again = flowdistill.search(run, 8, num_samples=60, **settings)
    assert torch.equal(again.noise, whole.noise[:60])
    assert searched == [50, 50, 20]
    more = flowdistill.search(run, 8, num_samples=130, **settings)
    assert searched == [50, 50, 20, 30]
    assert torch.equal(more.scores[:100], whole.scores[:100])
    assert torch.allclose(more.scores[100:120], whole.scores[100:], rtol=1e-4)
    flowdistill.search(run, 9, num_samples=10, **settings)  # another budget
    flowdistill.search(run, 8, num_samples=10, **settings | {"strategy": flowdistill.searching.ZeroOrder(radius=0.1)})
    flowdistill.search(run, 8, num_samples=10, verifier="class_log_probability", **settings)
    assert searched[4:] == [10, 10, 10]


def test_a_killed_search_continues_where_it_was(run, tmp_path):
    """The command in a process of its own, which dies in its third block."""
    arguments = ["search", str(run), "--budget", "8", "--num_samples", "130", "--teacher_steps", "2"]
    code = (
        "import os, signal; from flowdistill.cli import main; from flowdistill.searching import noises\n"
        "found, find = [], noises.find\n"
        "def dying(*given):\n"
        "    found.append(1)\n"
        "    return find(*given) if len(found) < 3 else os.kill(os.getpid(), signal.SIGKILL)\n"
        f"noises.find = dying; main({arguments!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    first, second = sorted(run.glob("searches/*/*.safetensors"))
    written = first.stat().st_mtime_ns, second.stat().st_mtime_ns
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (first.stat().st_mtime_ns, second.stat().st_mtime_ns) == written
    assert re.fullmatch(r"num_samples: 130\nscore: -[\d.]+\n(\w+: [\d.]+\n){4}.*/searches/\w+\n", done.stdout)
    resumed = SearchResult.load(first.parent / "result.safetensors")
    shutil.rmtree(run / "searches")
    whole = flowdistill.search(run, 8, num_samples=130, **QUICK)
    assert torch.equal(whole.scores, resumed.scores)


def test_ranks_share_a_search_and_the_first_tells(run):
    """Two processes as torchrun starts them, beside one that does all; 120 samples are three blocks."""
    arguments = ["search", run, "--budget", 6, "--num_samples", 120, "--teacher_steps", 2, "--device", "cpu"]
    code = [sys.executable, "-m", "flowdistill", *map(str, arguments)]
    ranks = [{"OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "2"} for rank in (0, 1)]
    other = subprocess.Popen(code, env={**os.environ, **ranks[1]}, stdout=subprocess.PIPE, text=True)
    first = command(*arguments, cwd=run.parent, env=ranks[0])
    assert first.returncode == 0, first.stderr
    assert other.communicate(timeout=120)[0] == ""
    assert other.returncode == 0
    (found,) = run.glob("searches/*/result.safetensors")
    shared = SearchResult.load(found)
    shutil.rmtree(run / "searches")
    alone = flowdistill.search(run, 6, num_samples=120, **QUICK)
    assert torch.equal(shared.scores, alone.scores)


def test_functions_and_users_strategies(run, searched):
    @attrs.frozen
    class Last(SearchStrategy):
        """Takes the last of three noises without a look."""

        def search(self, trials):
            return trials.finish(trials.draw(3)[2:])

    def bright(images, condition):
        return images.mean((1, 2, 3))

    for _ in range(2):
        result = flowdistill.search(run, 100, verifier=bright, strategy=Last(), num_samples=6, **QUICK)
        assert result.figures["cost"] == 4  # as counted, whatever the budget
        assert torch.allclose(result.scores, result.samples.mean((1, 2, 3)), atol=1e-6)
    assert searched == [6, 6]  # as nothing says that the function is the same


def test_points_in_the_plane(trained):
    """The exact teacher has no features; a student costs its operations over those of the closed form."""
    result = flowdistill.search(
        trained / "ring", 500, verifier=lambda x, c: x[:, 0], num_samples=30, teacher_steps=4, device="cpu"
    )
    assert result.labels is None
    assert result.samples[:, 0].mean() > 0.5
    assert result.cost.mean() <= 500


def test_a_run_without_a_teacher_is_given_one(trained, tmp_path):
    run = shutil.copytree(trained / "teacher", tmp_path / "run")
    with pytest.raises(ConfigError, match="has no teacher"):
        flowdistill.search(run, 8, **QUICK)
    result = flowdistill.search(run, 8, teacher="digits_teacher", num_samples=4, **QUICK)
    assert result.figures["teacher_evaluations"] == 2
    assert result.figures["student_evaluations"] == 6  # the same network


def test_mistakes(run, trained, tmp_path, monkeypatch, capsys):
    for settings, match in (
        ({"budget": 3}, "one sample of the teacher at 2 steps costs 4, and this search at least 5.02"),
        ({"budget": float("nan")}, "positive number of evaluations"),
        ({"budget": -1}, "positive number of evaluations"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"teacher_steps": 0}, "teacher_steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"proposer": "nobody"}, "'student' or 'teacher'"),
        ({"verifier": "feature_distanc"}, "did you mean feature_distance"),
        ({"strategy": "best"}, "did you mean best_of"),
        ({"teacher": "ring"}, "sample_shape of the student"),
        ({"labels": 10}, "labels must be"),
        ({"device": "quantum"}, "is no device"),
    ):
        with pytest.raises(ConfigError, match=match):
            flowdistill.search(run, **{"budget": 8, **QUICK, **settings})
    with pytest.raises(ConfigError, match="needs the features of a registered extractor"):
        flowdistill.search(trained / "ring", 500, **QUICK)
    with pytest.raises(DataError, match="finite"):
        flowdistill.search(run, 8, verifier=lambda x, c: x.mean((1, 2, 3)) / 0, num_samples=2, **QUICK)
    monkeypatch.chdir(tmp_path)

    def refused(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["search", str(run), "--teacher_steps", "2", *map(str, arguments)])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "--budget" in refused()
    assert "too small" in refused("--budget", 3)
    assert "did you mean zero_order" in refused("--budget", 8, "--strategy", "zero_ordr")
    assert "zero_order.radius" in refused("--budget", 8, "--strategy", "zero_order", "--gin.zero_order.radius=2")
    assert "nothing uses zero_order.radius" in refused("--budget", 8, "--gin.zero_order.radius=0.5")
    assert "prompts" in refused("--budget", 8, "--verifier", "clip_score")
    assert not list(run.glob("searches/*/*.safetensors"))


def test_the_command_sets_up_verifier_and_strategy(run):
    arguments = ["--strategy", "zero_order", "--gin.zero_order.radius=0.5", "--gin.zero_order.neighbours=2"]
    arguments += ["--verifier", "feature_distance", "--gin.feature_distance.features='digits'", "--labels", 3]
    arguments += ["--budget", 9, "--num_samples", 5, "--teacher_steps", 2, "--out", "found"]
    done = command("search", run, *arguments, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("found\n")
    settings = json.loads((run.parent / "found" / "figures.json").read_text())["settings"]
    assert settings["strategy"] == "ZeroOrder(radius=0.5, neighbours=2)"
    assert "features='digits'" in settings["verifier"]
    assert SearchResult.load(run.parent / "found" / "result.safetensors").labels.tolist() == [3] * 5


def test_a_run_that_cannot_be_written_needs_another_folder_for_the_result(run, searched, tmp_path):
    (run / "searches").write_text("in the way")
    with pytest.raises(ConfigError, match=r"searches.* cannot be written .*name another folder"):
        flowdistill.search(run, 5.5, num_samples=4, **QUICK)
    assert searched == []
    with pytest.warns(RuntimeWarning, match="held in memory"):
        result = flowdistill.search(run, 5.5, num_samples=4, out=tmp_path / "out", **QUICK)
    assert len(result) == 4
    assert (tmp_path / "out" / "result.safetensors").is_file()
