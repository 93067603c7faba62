"""A run as an object: what it holds, that it does nothing twice, and what it is known by."""

import shutil
from pathlib import Path

import pytest
import torch
from runs import FLOW_MATCHING, RING, write

import flowdistill
from flowdistill import CheckpointError, ConfigError, Run
from flowdistill.cli import main
from flowdistill.interfaces import Jumps
from flowdistill.plumbing import config, files
from flowdistill.runs import checkpoints
from flowdistill.runs.run import on_device
from flowdistill.teachers.gaussian import Ring

built = []


@flowdistill.register_teacher("counted_ring")
class CountedRing(Ring):
    """A ring that remembers that it was built."""

    def __init__(self, modes: int = 8) -> None:
        super().__init__(modes)
        built.append(self)


COUNTED = RING.replace("@ring()", "@counted_ring()") + "train.evaluation = @evaluation()\nevaluation.num_samples = 20\n"
METRICS = "evaluation.metrics = ('w2',)\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    flowdistill.train(gin_file=write(folder / "ring.gin", COUNTED + METRICS), workdir=folder / "run", report=False)
    return folder / "run"


@pytest.fixture
def path(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def counts(monkeypatch):
    """How often a teacher is built, a file hashed, and a configuration given to gin."""
    built.clear()
    done = {"hashed": [], "parsed": 0}
    fingerprint = files.file_fingerprint
    parse = config.gin.parse_config

    def hashing(file):
        done["hashed"].append(file.name)
        return fingerprint(file)

    def parsing(text, **settings):
        done["parsed"] += Path(text.name).name == "config.gin"
        return parse(text, **settings)

    from flowdistill.runs import run

    for module in (run, checkpoints):
        monkeypatch.setattr(module, "file_fingerprint", hashing)
    monkeypatch.setattr(config.gin, "parse_config", parsing)
    return done


def once(counts, *more):
    """Everything was done once."""
    assert len(built) == 1
    assert counts["parsed"] == 1
    assert sorted(counts["hashed"]) == sorted(["ema.safetensors", *more])


def first(images, condition):
    """The first coordinate as the score of a sample."""
    return images[:, 0]


def test_an_evaluation_builds_and_hashes_once(path, counts):
    flowdistill.evaluate(path, metrics=("w2",), num_samples=30)
    once(counts, "config.gin")


def test_a_search_builds_and_hashes_once(path, counts):
    flowdistill.search(path, 20.0, verifier=first, num_samples=2, teacher_steps=4)
    once(counts, "config.gin")


def test_sampling_on_the_command_line_builds_and_hashes_once(path, counts, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(path), "--num_samples", "4", "--out", str(tmp_path / "samples.png")])
    assert ended.value.code == 0
    assert (tmp_path / "samples.png").is_file()
    once(counts)


def test_functions_that_are_given_one_run_share_it(path, counts):
    run = Run(path)
    assert Run.of(run) is run
    student = flowdistill.load_flow_map(run)
    samples = flowdistill.sample(run, 4)
    figures = flowdistill.evaluate(run, metrics=("w2",), num_samples=30)
    searched = {"verifier": first, "num_samples": 2, "teacher_steps": 4}
    result = flowdistill.search(run, 20.0, **searched)
    once(counts, "config.gin")
    assert flowdistill.load_flow_map(run) is student
    # And each says what it says of the path.
    assert torch.equal(samples, flowdistill.sample(path, 4))
    assert figures == flowdistill.evaluate(path, metrics=("w2",), num_samples=30)
    assert torch.equal(
        result.noise, flowdistill.search(path, 20.0, verifier=first, num_samples=2, teacher_steps=4).noise
    )


def test_what_a_run_holds(path):
    run = Run(path)
    assert run.workdir == path
    assert run.checkpoint.name == "step_00000012"
    assert run.meta.step == 12
    assert isinstance(run.teacher, CountedRing)
    assert run.student.jumps is Jumps.FROM_NOISE
    assert not run.student.training
    assert not any(p.requires_grad for p in run.student.parameters())
    assert type(run.objective).__name__ == "FreeFlow"
    assert run.evaluation.num_samples == 20
    assert run.config.statements == config.statements(path / "config.gin")
    assert repr(run) == f"Run('{path}')"


def test_a_checkpoint_is_a_run_as_well(path):
    earlier = Run(path / "checkpoints" / "step_00000008")
    assert earlier.workdir == path.resolve()
    assert earlier.meta.step == 8
    assert not torch.equal(flowdistill.sample(earlier, 4), flowdistill.sample(path, 4))
    assert earlier.folder("jobs") != Run(path).folder("jobs")


def test_results_are_known_by_weights_configuration_and_settings(path):
    folder = Run(path).folder("jobs", seed=1, steps=2)
    assert folder.parent == path / "jobs"
    assert Run(path).folder("jobs", steps=2, seed=1) == folder
    assert Run(path).folder("jobs", steps=2, seed=2).name != folder.name
    with (path / "config.gin").open("a") as file:
        file.write("\n")
    assert Run(path).folder("jobs", seed=1, steps=2).name != folder.name


def test_a_run_without_a_checkpoint_has_a_configuration(path):
    shutil.rmtree(path / "checkpoints")
    run = Run(path)
    assert "freeflow" in run.objective.citation
    for part in ("checkpoint", "meta", "student"):
        with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
            getattr(run, part)


def test_models_of_a_run_stay_where_they_are(path):
    run = Run(path)
    assert on_device(run.student, torch.device("cpu")) is run.student
    elsewhere = on_device(run.student, torch.device("meta"))
    assert {p.device.type for p in elsewhere.parameters()} == {"meta"}
    assert {p.device.type for p in run.student.parameters()} == {"cpu"}


def test_a_run_is_a_teacher(tmp_path):
    bindings = ["mlp.hidden_size = 8", "mlp.depth = 1", "train.batch_size = 8", "train.steps = 2"]
    ring = write(tmp_path / "ring.gin", FLOW_MATCHING)
    flowdistill.train(gin_file=ring, gin_bindings=bindings, workdir=tmp_path / "run", report=False)
    run = Run(tmp_path / "run")
    teacher = flowdistill.load_teacher(run)
    x, t = torch.randn(3, 2), torch.rand(3)
    assert torch.equal(teacher.velocity(x, t), flowdistill.load_teacher(tmp_path / "run").velocity(x, t))
    assert not teacher.training
    with pytest.raises(ConfigError, match="takes no arguments, not vae"):
        flowdistill.load_teacher(run, vae="x")


# Parts that are built one by one.


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("train.teacher = @rong()", ["unknown name 'rong'", "did you mean", "line"]),
        ("train.teacher = @guided()\nguided.teacher = @rong()", ["unknown name 'rong'", "ring", "line"]),
        ("counted_ring.modes = 0", ["modes", "config.gin, line"]),
        ("counted_ring.nodes = 3", ["unknown parameter of counted_ring 'nodes'", "modes", "line"]),
        ("train.flow_map = 3", ["train.flow_map must be a FlowMap"]),
        ("train.steps = = 3", ["config.gin", "line"]),
    ],
)
def test_mistakes_in_the_configuration_of_a_run_are_located(path, change, wanted):
    with (path / "config.gin").open("a") as file:
        file.write(f"\n{change}\n")
    with pytest.raises(ConfigError) as error:
        flowdistill.load_flow_map(path)
    for part in wanted:
        assert part in str(error.value)


def test_a_student_needs_not_what_its_training_alone_needed(path):
    """An objective of a package that is not installed any more, say."""
    text = (path / "config.gin").read_text().replace("@freeflow()", "@objective_of_others()")
    (path / "config.gin").write_text("import a_package_that_is_gone\n" + text + "\nobjective_of_others.alpha = 3\n")
    assert flowdistill.sample(path, 3).shape == (3, 2)
    with pytest.raises(ConfigError, match="a_package_that_is_gone"):
        Run(path).objective  # noqa: B018


def test_configurations_build_through_macros_scopes_and_containers(tmp_path):
    (tmp_path / "macros.gin").write_text(
        "train.teacher = %distribution\n"
        "distribution = @mine/counted_ring()\n"
        "mine/counted_ring.modes = %modes\n"
        "modes = 5\n"
        "train.states = (@counted_ring, {'a': [@counted_ring()]})\n"
    )
    configuration = config.Configuration(tmp_path / "macros.gin")
    assert len(configuration.build("train.teacher").means) == 5
    _, parts = configuration.build("train.states")
    assert len(parts["a"][0].means) == 8
    assert configuration.build("train.flow_map") is None
    assert config.gin.config._CONFIG == {}
