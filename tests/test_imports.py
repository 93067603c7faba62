"""Loading and sampling a model imports neither the trainer nor the report, and every name is there all the same."""

import json
import subprocess
import sys

import pytest
from runs import write

import flowdistill

HEAVY = (
    "flowdistill.training",
    "flowdistill.evaluation",
    "flowdistill.searching",
    "flowdistill.bench",
    "matplotlib",
    "tensorboard",
    "torch.utils.tensorboard",
)

POLICY = """
train.teacher = @ring()
train.objective = @piflow()
train.flow_map = @policy
policy.velocity = @network()
policy.head = @dx
policy.substeps = 4
network.network = @mlp()
network.conditioning = 'instantaneous'
piflow.dropout = 0.0
mlp.hidden_size = 8
mlp.depth = 1
train.optimizer = @AdamW
train.steps = 1
train.batch_size = 4
"""


def imported(code, cwd):
    """The modules that a fresh process has imported after some code."""
    code = f"{code}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def heavy(modules):
    return [name for name in modules if any(name == part or name.startswith(f"{part}.") for part in HEAVY)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imports")
    for recipe in ("freeflow/ring.gin", "digits/train.gin", "freeflow/digits.gin"):
        few = ["train.steps = 1", "train.batch_size = 4", "train.sample_every = 0", "evaluation.num_samples = 10"]
        flowdistill.train(gin_file=recipe, gin_bindings=few, workdir=folder / recipe.replace("/", "_"), report=False)
    return folder


@pytest.mark.parametrize(
    "code",
    [
        "flowdistill.load_teacher('ring')",
        "flowdistill.load_teacher('digits_teacher')",
        "flowdistill.load_flow_map('freeflow_ring.gin')",
        "flowdistill.sample('freeflow_digits.gin', 2)",
        "flowdistill.load_teacher('digits_train.gin')",
        "flowdistill.Run('freeflow_ring.gin').objective",
        "flowdistill.OBJECTIVES.names()",
    ],
)
def test_models_are_loaded_without_what_trains_and_measures_them(folder, code):
    modules = imported(f"import flowdistill\n{code}", folder)
    assert heavy(modules) == []
    assert "flowdistill.teachers.gaussian" in modules


def test_this_test_sees_what_it_forbids(folder):
    code = "import flowdistill\nflowdistill.Run('freeflow_ring.gin').evaluation"
    assert {"flowdistill.evaluation", "flowdistill.training"} <= set(heavy(imported(code, folder)))


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "freeflow/ring.gin"],
        pytest.param(["list", "methods"], marks=pytest.mark.slow),
        pytest.param(["show", "objectives", "freeflow"], marks=pytest.mark.slow),
    ],
)
def test_commands_that_only_tell_import_no_trainer(tmp_path, arguments):
    code = f"from flowdistill.cli import main\ntry: main({arguments!r})\nexcept SystemExit as end: assert not end.code"
    modules = imported(code, tmp_path)
    trainer = {"flowdistill.training.trainer", "flowdistill.evaluation.report", "matplotlib", "tensorboard"}
    assert not trainer & set(modules)
    assert ("flowdistill.training.loop" in modules) is (arguments[0] == "plan")


@pytest.mark.parametrize(
    "module", ["evaluation", "evaluation.report", "searching", "training", "bench", "runs.evaluating", "runs.loading"]
)
def test_every_room_can_be_entered_first(tmp_path, module):
    assert f"flowdistill.{module}" in imported(f"import flowdistill.{module}", tmp_path)


def test_every_public_name_is_there(tmp_path):
    code = (
        "import flowdistill\n"
        "rooms = ['evaluation', 'guidance', 'decoders', 'ema', 'searching', 'training', 'bench']\n"
        "names = [*flowdistill.__all__, *rooms]\n"
        "assert set(names) <= set(dir(flowdistill))\n"
        "for name in names: assert getattr(flowdistill, name) is not None, name\n"
        "assert not hasattr(flowdistill, 'trian')\n"
        "from flowdistill import *\n"
        "assert train is flowdistill.train and callable(plan)"
    )
    imported(code, tmp_path)


def test_names_of_a_kind_are_known_in_a_fresh_process(tmp_path):
    for registry, name, near in (
        ("METRICS", "w2", "w3"),
        ("FEATURES", "digits", "digit"),
        ("VERIFIERS", "feature_distance", "feature_distanc"),
        ("SEARCH_STRATEGIES", "best_of", "best"),
    ):
        code = (
            f"import flowdistill\nassert {name!r} in flowdistill.{registry}\n"
            f"try: flowdistill.{registry}.get({near!r})\n"
            f"except flowdistill.ConfigError as error: assert 'did you mean' in str(error), error\n"
            "else: raise AssertionError"
        )
        assert "flowdistill.training" not in imported(code, tmp_path)


def test_a_run_of_a_flow_map_of_an_algorithm(folder):
    """The policy is registered by an algorithm, whose modules import nothing that trains either."""
    run = folder / "policy"
    flowdistill.train(gin_file=write(folder / "policy.gin", POLICY), workdir=run, report=False)
    assert heavy(imported("import flowdistill\nflowdistill.load_flow_map('policy')", folder)) == []
