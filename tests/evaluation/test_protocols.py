"""Protocols: what a figure is made by beside the model, and what its record says."""

import json

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import flowdistill
from flowdistill import PROTOCOLS, Condition, ConfigError, FlowMap
from flowdistill.cli import main
from flowdistill.decoders import Pixels
from flowdistill.evaluation import FeatureExtractor, Protocol
from flowdistill.evaluation.comparison import Evaluation, compare
from flowdistill.evaluation.protocols import vae_of
from flowdistill.paths import shifted
from flowdistill.runs.sampling import make_condition, times_of

SEEN = []


class Bright(FlowMap):
    """A student of 3 classes: pictures a shade above a byte, and what it was asked."""

    sample_shape, num_classes, decoder = (1, 4, 4), 3, Pixels(rounding="nearest")

    def __init__(self):
        super().__init__()
        self.level = nn.Parameter(torch.tensor(0.7 / 127.5))

    def average_velocity(self, x, t, s, condition=None):
        SEEN.append((float(t[0]), float(s[0]), condition.labels.tolist()))
        return (x - self.level) / t.reshape(-1, 1, 1, 1)


class Mean(FeatureExtractor):
    channels, quantized = 1, True

    def forward(self, images):
        return 127.5 * (images.flatten(1)[:, :1] + 1), None


@flowdistill.register_metric("mean_byte")
def mean_byte(generated, reference):
    return float(generated.features.mean())


@pytest.fixture
def student(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    SEEN.clear()
    return Bright()


@pytest.fixture
def reference(tmp_path):
    np.save(tmp_path / "truth.npy", np.zeros((4, 4, 4, 1), np.uint8))
    return tmp_path / "truth.npy"


def measured(student, reference, protocol, **settings):
    rules = attrs.evolve(PROTOCOLS.build(protocol), metrics=("mean_byte",), num_samples=20, features=None)
    settings = {"features": Mean(), "noise_floor": False, "device": "cpu", "reference": reference, **settings}
    return flowdistill.evaluate(student, protocol=rules, **settings)["mean_byte"]


def test_rounding_is_the_protocols_and_else_the_models_own(student, reference):
    # 127.5 (x + 1) = 128.2 on the way to bytes: 128 either way of rounding, but for the half that "nearest" adds
    assert measured(student, reference, "plain") == 128
    student.level.data.fill_(1.2 / 127.5)  # 128.7
    assert measured(student, reference, "sit") == 129
    assert measured(student, reference, "adm") == 128


@pytest.mark.parametrize(("protocol", "how"), [("plain", "in_turn"), ("adm", "random"), ("facm", "balanced")])
def test_labels_are_chosen_as_the_protocol_says(student, reference, protocol, how):
    measured(student, reference, protocol)
    chosen = make_condition(3, 20, how, None, 0).labels.tolist()
    assert [label for _, _, labels in SEEN for label in labels] == chosen
    SEEN.clear()
    measured(student, reference, protocol, labels=2, seed=1)
    assert {label for _, _, labels in SEEN for label in labels} == {2}


def test_the_grid_of_several_steps_is_the_protocols(student, reference):
    rules = Protocol(metrics=("mean_byte",), num_samples=2, shift=1.5)
    flowdistill.evaluate(
        student, protocol=rules, features=Mean(), reference=reference, steps=4, noise_floor=False, device="cpu"
    )
    expected = shifted(torch.linspace(1, 0, 5), 1.5).tolist()
    assert [t for t, _, _ in SEEN] == pytest.approx(expected[:-1])
    assert [s for _, s, _ in SEEN] == pytest.approx(expected[1:])


def test_a_shift_leaves_one_step_and_the_first_time_alone(student):
    student.first_time = 0.9
    assert times_of(student, 1, 2.0).tolist() == pytest.approx([0.9, 0.0])
    assert times_of(student, 2, 2.0).tolist() == pytest.approx([1.8 / 1.9, 0.9 / 1.45, 0.0])


def test_times_beside_a_protocol_with_a_grid_are_told(student, reference, tmp_path):
    flowdistill.evaluate(
        student, protocol="secant", metrics=["mean_byte"], num_samples=4, features=Mean(), reference=reference,
        steps=(1.0, 0.3, 0.0), noise_floor=False, device="cpu", out=tmp_path / "figures.json",
    )  # fmt: skip
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["otherwise"]["shift"] == "times of its own"
    assert record["times"] == pytest.approx([1.0, 0.3, 0.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocol": None}, "a protocol is one that"),
        ({"num_samples": True}, "num_samples must be a whole number"),
        ({"num_samples": 20.0}, "num_samples must be a whole number"),
        ({"out": "."}, "is a folder"),
    ],
)
def test_odd_arguments_are_told_before_anything_is_drawn(student, reference, settings, message):
    with pytest.raises(ConfigError, match=message):
        flowdistill.evaluate(student, **{"features": Mean(), "reference": reference, "num_samples": 4, **settings})
    assert SEEN == []


def test_steps_may_be_times(student):
    drawn = flowdistill.sample(student, 4, steps=(1.0, 0.55, 0.0), device="cpu")
    assert [(t, s) for t, s, _ in SEEN] == [(1.0, pytest.approx(0.55)), (pytest.approx(0.55), 0.0)]
    assert drawn.shape == (4, 1, 4, 4)
    for wrong in [(0.5, 0.6), (1.0,), (1.0, -0.1), (1.0, 0.5), (1.0, float("nan"), 0.0)]:
        with pytest.raises(ConfigError, match="decrease from 1 to 0"):
            flowdistill.sample(student, 4, steps=wrong)
    for wrong in [(1.5, 0.0), (0.5, 0.0)]:
        with pytest.raises(ConfigError, match="samples of this student begin at 1"):
            flowdistill.sample(student, 4, steps=wrong)
    for wrong in [2.0, True, "ab", None]:
        with pytest.raises(ConfigError, match="steps are a whole number"):
            flowdistill.sample(student, 4, steps=wrong)
    assert flowdistill.sample(student, 4, steps=np.int64(2), device="cpu").shape == (4, 1, 4, 4)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        flowdistill.sample(student, 4, steps=0)


def test_the_record_names_the_protocol_and_what_is_otherwise(student, reference, tmp_path):
    truth = reference.rename(tmp_path / "VIRTUAL_imagenet256_labeled.npy")
    flowdistill.evaluate(
        student, protocol="secant", metrics=["mean_byte"], num_samples=30, features=Mean(), reference=truth,
        steps=2, labels="in_turn", noise_floor=False, device="cpu", out=tmp_path / "figures.json",
    )  # fmt: skip
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["protocol"] == "secant"
    assert record["otherwise"] == {
        "features": "Mean",
        "reference": str(truth),
        "num_samples": 30,
        "labels": "in_turn",
        "autoencoder": "none",
    }
    assert record["rounding"] == "nearest"
    assert record["times"] == [1.0, 0.5, 0.0]
    assert record["figures"] == {"mean_byte": 128}
    assert record["machine"]
    assert record["student"]["weights"]


def test_what_is_as_the_protocol_says_is_not_told():
    sit = PROTOCOLS.build("sit")
    said = attrs.asdict(sit) | {"reference": "a/VIRTUAL_imagenet256_labeled.npz", "autoencoder": vae_of("ema")}
    assert sit.otherwise(said) == {}
    assert sit.otherwise(said | {"autoencoder": "/models/sd-vae-ft-ema"}) == {}
    assert sit.otherwise(said | {"autoencoder": vae_of("mse")}) == {"autoencoder": vae_of("mse")}
    assert Protocol().otherwise(said | {"num_samples": 10_000, "labels": "in_turn"}) == {}


def test_an_evaluation_in_training_follows_a_protocol_where_nothing_is_bound():
    plain, adm = Evaluation(), Evaluation(protocol="adm", num_samples=100)
    assert (plain.num_samples, plain.labels, plain.rounding, plain.features) == (2000, "in_turn", None, None)
    assert (adm.num_samples, adm.labels, adm.rounding, adm.features) == (100, "random", "down", "inception")
    assert adm.metrics == ("fid", "inception_score", "precision", "recall")
    with pytest.raises(ConfigError, match="unknown protocol 'amd'"):
        Evaluation(protocol="amd")


def test_an_evaluation_in_training_rounds_and_labels_as_it_says(student, reference):
    student.level.data.fill_(1.2 / 127.5)
    evaluation = Evaluation(
        protocol="adm", metrics=("mean_byte",), features=Mean(), reference=str(reference), num_samples=9, seed=3
    )
    rows = compare(student, None, evaluation)
    assert rows["student, 1 step"]["mean_byte"] == 128
    drawn = [label for _, _, labels in SEEN for label in labels][-9:]
    assert drawn != Condition.in_turn(3, 9).labels.tolist()
    (row,) = compare(student, None, attrs.evolve(evaluation, rounding="nearest")).values()
    assert row["mean_byte"] == 129
    told = evaluation.as_record()["otherwise"]
    assert told.keys() == {"features", "reference", "num_samples"}


def test_the_command_line_takes_protocols_and_times(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path), "--protocol", "amd"])
    assert "unknown protocol 'amd': did you mean adm" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["list", "protocols"])
    assert stop.value.code == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == set(PROTOCOLS.names())
