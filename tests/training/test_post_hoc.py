"""Averages over other stretches of a training, made of those that its checkpoints left."""

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import RING, command, write
from torch import nn

import flowdistill
from flowdistill import CheckpointError, ConfigError, Run
from flowdistill.ema import AveragedModel, PostHocEma, PowerEma
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.networks import MLP
from flowdistill.runs.averages import coefficients
from flowdistill.runs.checkpoints import checkpoint_paths
from flowdistill.runs.exporting import export
from flowdistill.training import loop

WIDTHS = (0.05, 0.1)


def profile(tau, end, gamma):
    return torch.where(tau <= end, (gamma + 1) * (tau / end) ** gamma / end, torch.zeros_like(tau))


@settings(max_examples=40)
@given(st.integers(2, 12), st.floats(0.04, 0.2), st.floats(0.3, 1.0))
def test_no_other_sum_of_the_stored_profiles_is_nearer(count, width, part):
    """Against the profiles themselves on a fine grid."""
    ends = [100.0 * (i + 1) / count for i in range(count) for _ in WIDTHS]
    gammas = [PowerEma(relative_width=w).gamma for _ in range(count) for w in WIDTHS]
    end, gamma = 100.0 * math.ceil(part * count) / count, PowerEma(relative_width=width).gamma
    factors, error = coefficients(ends, gammas, end, gamma)
    tau = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 1000
    stored = torch.stack([profile(tau, e, g) for e, g in zip(ends, gammas, strict=True)])
    wanted = profile(tau, end, gamma)
    made = torch.tensor(factors, dtype=torch.float64) @ stored
    assert float((made - wanted).norm() / wanted.norm()) == pytest.approx(error, abs=2e-3)
    assert sum(factors) == pytest.approx(1.0, abs=1e-9)
    differences, base = (stored[:-1] - stored[-1]).T, (wanted - stored[-1])[:, None]  # all sums whose factors add up
    found = torch.linalg.lstsq(differences, base, driver="gelsd").solution[:, 0]
    best = stored[-1] + differences @ found
    assert float((made - best).norm() / wanted.norm()) < 2e-3


def test_a_stored_average_is_made_up_of_itself():
    gammas = [PowerEma(relative_width=w).gamma for _ in range(5) for w in WIDTHS]
    ends = [20.0 * (i + 1) for i in range(5) for _ in WIDTHS]
    factors, error = coefficients(ends, gammas, 80.0, gammas[1])
    assert factors == pytest.approx([0.0] * 7 + [1.0] + [0.0] * 2, abs=1e-6)
    assert error < 1e-5


@pytest.mark.parametrize(("width", "near"), [(0.05, 1e-6), (0.07, 1e-3), (0.1, 1e-6), (0.12, 5e-3)])
def test_weights_of_another_width_are_those_of_a_training_with_it(width, near):
    """A weight that moves as weights do: far at first, then noisily about a slow drift."""
    torch.manual_seed(0)
    model = nn.Linear(50, 1, bias=False).double()
    tracks = [AveragedModel(model, track) for track in (*PostHocEma().tracks, PowerEma(relative_width=width))]
    stored, ends, gammas = [], [], []
    for step in range(4000):
        drift = torch.linspace(1, 3, 50, dtype=torch.float64) * math.exp(-step / 800)
        model.weight.data = drift[None] + 0.05 * torch.randn(1, 50, dtype=torch.float64)
        for track in tracks:
            track.update(step)
        if (step + 1) % 125 == 0:
            for track in tracks[:2]:
                stored.append(track.module.weight.detach().clone())
                ends.append(step + 1.0)
                gammas.append(track.averaging.gamma)
    factors, error = coefficients(ends, gammas, 4000.0, PowerEma(relative_width=width).gamma)
    made = sum(factor * weight for factor, weight in zip(factors, stored, strict=True))
    wanted = tracks[2].module.weight
    assert float((made - wanted).norm() / wanted.norm()) < near
    assert error < 0.1


POST_HOC = "train.ema = @post_hoc_ema()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("post_hoc")
    many = ["train.steps = 400", "train.checkpoint_every = 20"]
    for name, binding in {"run": POST_HOC, "wide": "train.ema = @power_ema()"}.items():
        wide = ["power_ema.relative_width = 0.08"] if name == "wide" else []
        write(folder / "ring.gin")
        flowdistill.train(
            folder / "ring.gin", gin_bindings=[*many, binding, *wide], workdir=folder / name, report=False
        )
    return folder


def distance(one, other):
    parts = zip(one.parameters(), other.parameters(), strict=True)
    return math.sqrt(sum(float((a - b).square().sum()) for a, b in parts))


def test_the_average_of_a_run_over_another_width(folder):
    run = folder / "run"
    assert len(checkpoint_paths(run)) == 2
    assert len(list((run / "averages").iterdir())) == 20
    made, wanted, plain = Run(run, ema=0.08).student, Run(folder / "wide").student, Run(run).student
    moved = distance(plain, wanted)
    assert distance(made, wanted) < 0.02 * moved
    assert distance(Run(run, ema=0.05).student, plain) < 1e-3 * moved
    # Whatever takes a run takes it, and knows the widths apart.
    one, other = (flowdistill.evaluate(Run(run, ema=w), metrics=("w2",), num_samples=50) for w in (0.06, 0.1))
    assert one["w2"] != other["w2"]
    # A checkpoint in the middle ends the average there.
    early = Run(checkpoint_paths(run)[0], ema=0.08).student
    assert distance(early, wanted) > 5 * distance(made, wanted)


def test_a_resumed_run_keeps_the_same_averages(folder, tmp_path):
    bindings = ["train.checkpoint_every = 20", POST_HOC]
    gin_file = write(tmp_path / "ring.gin")
    for steps in (100, 200):
        again = [*bindings, f"train.steps = {steps}", "train.schedule = @schedule()", "schedule.decay = 'constant'"]
        flowdistill.train(gin_file, gin_bindings=again, workdir=tmp_path / "two", report=False)
    flowdistill.train(gin_file, gin_bindings=again, workdir=tmp_path / "one", report=False)
    one, two = (Run(tmp_path / name, ema=0.07).student for name in ("one", "two"))
    assert len(list((tmp_path / "two" / "averages").iterdir())) == 10
    names = dict(one.named_parameters()).keys()
    assert all(torch.equal(one.state_dict()[name], two.state_dict()[name]) for name in names)


def test_averages_that_a_killed_process_did_not_keep_are_kept_by_the_next(tmp_path, monkeypatch):
    gin_file, binding = write(tmp_path / "ring.gin"), [POST_HOC]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "keep_averages", lambda *_: None)
        flowdistill.train(gin_file, gin_bindings=[*binding, "train.steps = 8"], workdir=tmp_path / "run", report=False)
    flowdistill.train(gin_file, gin_bindings=binding, workdir=tmp_path / "run", report=False)
    assert [path.name for path in sorted((tmp_path / "run/averages").iterdir())] == ["step_00000008", "step_00000012"]


def test_what_cannot_be_averaged_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"without train\.ema = @post_hoc_ema"):
        _ = Run(folder / "wide", ema=0.1).student
    for width in (0.0, 0.3, float("nan"), "wide"):
        with pytest.raises(ConfigError, match=r"between 0 and 0\.28"):
            _ = Run(folder / "run", ema=width).student
    with pytest.raises(ConfigError, match=r"do not make up one of relative width 0\.001"):
        _ = Run(folder / "run", ema=0.001).student
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run)
    damaged = sorted((run / "averages").iterdir())[7] / "ema_2.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"step_00000160/ema_2\.safetensors is truncated or altered"):
        _ = Run(run, ema=0.08).student
    shutil.rmtree(run / "averages")
    with pytest.raises(CheckpointError, match="holds no averages up to step 400"):
        _ = Run(run, ema=0.1).student
    for widths in ("0.1", "()", "(0.3,)", "('a',)"):
        text = f"{RING}{POST_HOC}\npost_hoc_ema.relative_widths = {widths}\n"
        with pytest.raises(ConfigError, match="width"):
            flowdistill.train(write(tmp_path / "odd.gin", text), workdir=tmp_path / "odd")


@pytest.mark.slow
def test_the_commands(folder, tmp_path):
    run = folder / "run"
    done = command("sample", run, "--ema", 0.08, "--num_samples", 5, "--out", "x.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = flowdistill.sample(Run(run, ema=0.08), 5).numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["samples"], wanted)
    export(NetworkFlowMap(MLP(dim=2), "anchored"), tmp_path / "student")
    done = command("sample", tmp_path / "student", "--ema", 0.08, cwd=tmp_path)
    assert (done.returncode, "a student alone has none" in done.stderr) == (2, True)
