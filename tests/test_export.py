"""Student folders: written, read elsewhere, damaged, hostile, and trained further."""

import json
import shutil
import warnings

import pytest
import torch
from runs import command, write
from student_files import ARGUMENTS, written
from test_one_pass import NETWORKS, student_of

import flowdistill
from flowdistill import CheckpointError, Condition, ConfigError, Jumps, Run
from flowdistill.algorithms.piflow.flow_map import PolicyFlowMap
from flowdistill.decoders import Pixels, StableDiffusionVae
from flowdistill.flow_maps import NetworkFlowMap, from_teacher
from flowdistill.networks import MLP, SiT
from flowdistill.runs.exporting import export
from flowdistill.runs.student_folders import is_student, load_student
from flowdistill.students.imf import IMFFlowMap

KINDS = [
    (name, conditioning) for name, (_, all_of) in NETWORKS.items() if "rank" not in name for conditioning in all_of
]


FEW = ["train.steps = 2", "train.batch_size = 8", "evaluation.num_samples = 40", "evaluation.teacher_steps = (1,)"]


def same(one, other, steps=1):
    """Whether two students make the same samples, to the bit."""
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(3, *one.sample_shape, generator=g, dtype=next(one.parameters()).dtype)
    condition = Condition.in_turn(one.num_classes, 3)
    return torch.equal(one.eval().sample(noise, steps, condition), other.sample(noise, steps, condition))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the digits, whose teacher can be lost."""
    folder = tmp_path_factory.mktemp("export")
    flowdistill.train("freeflow", on="digits", gin_bindings=FEW, workdir=folder / "run")
    return folder / "run"


# Written and read.


@pytest.mark.parametrize(("network", "conditioning"), KINDS)
def test_a_student_comes_back_from_its_folder(tmp_path, network, conditioning):
    student, *_ = student_of(network, conditioning, dtype=torch.float32)
    student.decoder = Pixels(scale=0.5) if network == "edm2" else None
    again = load_student(export(student, tmp_path / "student"))
    assert same(student, again)
    assert type(again) is NetworkFlowMap
    assert (again.conditioning, again.guidance, again.jumps) == (conditioning, student.guidance, student.jumps)
    assert again.decoder == student.decoder
    assert not again.training
    assert any(p.requires_grad for p in again.parameters())
    assert not any(p.requires_grad for p in flowdistill.load_flow_map(tmp_path / "student").parameters())


@pytest.mark.parametrize("head", ["dx", "gmflow"])
def test_a_policy_comes_back_from_its_folder(tmp_path, head):
    torch.manual_seed(0)
    field = NetworkFlowMap(SiT(input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3), "instantaneous")
    field.decoder = StableDiffusionVae(scale=2.0)
    student = PolicyFlowMap(field, {"head": head, {"dx": "points", "gmflow": "components"}[head]: 3}, 5, 2, 3.0)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    again = flowdistill.load_flow_map(export(student, tmp_path / "student"), vae="somewhere")
    assert same(student, again, steps=2)
    assert type(again.head) is type(student.head)
    assert again.decoder == StableDiffusionVae(scale=2.0, vae="somewhere")


def test_all_arguments_come_back(tmp_path):
    network = SiT(input_size=4, patch_size=1, hidden_size=16, depth=3, num_heads=2, num_classes=3, time_factor=2.0)
    given = {
        "guidance": 2.0,
        "early_blocks": 1,
        "decoder": StableDiffusionVae(scale=[1.0, 2.0, 3.0, 4.0], rounding="down"),
        "guidance_input": "inverse",
        "guidance_range": (0.25, 1.0),
        "guidance_output": True,
        "start": 0.9,
        "shift": 2.0,
    }
    student = NetworkFlowMap(network, "decoupled", **given)
    export(student, tmp_path / "student")
    again = flowdistill.load_flow_map(tmp_path / "student", vae="somewhere")
    assert again.built_by()[1] == {
        **student.built_by()[1],
        "network": again.network,
        "decoder": StableDiffusionVae(vae="somewhere", scale=[1.0, 2.0, 3.0, 4.0], rounding="down"),
        "guidance_range": [0.25, 1.0],
    }
    for name in ("guidance", "guidance_input", "guidance_output"):
        assert getattr(again, name) == given[name]
    assert (again.first_time, again.time_shift) == (0.9, 2.0)
    assert again.network.early_blocks == 1
    assert again.network.arguments == network.arguments
    with pytest.raises(ConfigError, match="takes no scael"):
        flowdistill.load_flow_map(tmp_path / "student", scael=1.0)


def test_weights_may_be_stored_in_half_precision(tmp_path):
    student, *_ = student_of("mlp", dtype=torch.float32)
    whole, half = export(student, tmp_path / "whole"), export(student, tmp_path / "half", dtype="float16")
    assert (half / "model.safetensors").stat().st_size < 0.7 * (whole / "model.safetensors").stat().st_size
    again = load_student(half)
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(torch.equal(p, q.half().float()) for p, q in zip(again.parameters(), student.parameters(), strict=True))


def test_convert_knows_the_file_of_a_student(tmp_path):
    """Of a name that says whose it is; a file that is neither keeps the message about teachers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        path = written("secant", tmp_path)
        folder = flowdistill.convert(path, tmp_path / "student", num_heads=3)
        assert same(flowdistill.load_flow_map(path, num_heads=3), flowdistill.load_flow_map(folder))
    torch.save({"w": torch.zeros(2)}, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=r"odd\.pt"):
        flowdistill.convert(tmp_path / "odd.pt", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", [name for name in ARGUMENTS if not name.startswith("piflow")])
def test_students_of_others_become_folders(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        student = flowdistill.load_flow_map(written(name, tmp_path), **ARGUMENTS[name])
        again = flowdistill.load_flow_map(export(student, tmp_path / "student"))
    assert same(student, again)
    assert torch.equal(student.grid(3), again.grid(3))
    if student.jumps is Jumps.ANY and student.num_classes is not None:
        assert same(student, again, steps=2)


# Of runs.


def test_the_student_of_a_run_needs_nothing_else(tmp_path, run):
    """Not its teacher, not its directory."""
    student = flowdistill.load_flow_map(run)
    assert export(run, tmp_path / "student") == tmp_path / "student"
    names = {"README.md", "config.json", "model.safetensors", "samples.png"}
    assert {path.name for path in (tmp_path / "student").iterdir()} == names
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "student", tmp_path / "elsewhere")
    done = command("sample", "student", "--num_samples", 3, "--out", "s.npz", "--raw", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    again = flowdistill.load_flow_map(tmp_path / "elsewhere" / "student")
    assert same(student, again)
    assert torch.equal(flowdistill.sample(tmp_path / "elsewhere" / "student", 4), flowdistill.sample(run, 4))
    size = sum(path.stat().st_size for path in (tmp_path / "elsewhere" / "student").iterdir())
    assert 5 * size < sum(path.stat().st_size for path in run.rglob("*") if path.is_file())


def test_a_folder_says_where_its_student_comes_from(tmp_path, run):
    export(run, tmp_path / "student")
    origin = json.loads((tmp_path / "student" / "config.json").read_text())["origin"]
    assert (origin["objective"], origin["teacher"], origin["steps"]) == ("freeflow", ["guided", "digits_teacher"], 2)
    assert origin["versions"]["flowdistill"] == flowdistill.__version__
    stored = json.loads((run / "evaluation.json").read_text())
    assert origin["evaluation"] == {"num_samples": 40, "rows": stored["rows"]}
    card = (tmp_path / "student" / "README.md").read_text()
    assert "# student\n" in card
    assert "![Samples of one step](samples.png)" in card
    assert "from the teacher `guided of digits_teacher` by `freeflow` in 2 steps" in card
    assert "@article{tong2025freeflow," in card
    for row in stored["rows"]:
        assert f"| {row} |" in card


@pytest.mark.parametrize("text", ["{", "[]", '{"num_samples": 3, "rows": [1]}', '{"num_samples": "x", "rows": {}}'])
def test_a_record_that_is_damaged_is_left_out(tmp_path, run, text):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").write_text(text)
    export(tmp_path / "run", tmp_path / "student")
    assert json.loads((tmp_path / "student" / "config.json").read_text())["origin"]["evaluation"] is None
    assert "At the end of the training" not in (tmp_path / "student" / "README.md").read_text()


def test_a_card_tells_no_figures_of_other_weights(tmp_path, run):
    """Such as those of the end of a run, of an earlier step; the average is told."""
    assert "noise floor" in (export(run, tmp_path / "a") / "README.md").read_text()
    bindings = [*FEW, "train.steps = 4", "train.checkpoint_every = 1", "train.ema = @post_hoc_ema()"]
    flowdistill.train("freeflow", on="digits", gin_bindings=bindings, workdir=tmp_path / "run")
    earlier = sorted((tmp_path / "run" / "checkpoints").iterdir())[0]
    for number, other in enumerate((earlier, Run(tmp_path / "run", ema=0.08))):
        folder = export(other, tmp_path / f"other{number}")
        assert "noise floor" not in (folder / "README.md").read_text()
        told = json.loads((folder / "config.json").read_text())["origin"]
        assert (told["evaluation"], told.get("ema")) == (None, [None, 0.08][number])


def test_a_run_without_what_trains_it_further_is_used_as_before(tmp_path, run):
    thin = tmp_path / "thin"
    shutil.copytree(run, thin)
    (checkpoint,) = (thin / "checkpoints").iterdir()
    for path in checkpoint.iterdir():
        if path.name not in ("meta.json", "student.safetensors", "ema.safetensors"):
            path.unlink()
    assert torch.equal(flowdistill.sample(thin, 3), flowdistill.sample(run, 3))
    again = load_student(export(thin, tmp_path / "student"))
    assert same(Run(run).student, again)
    further = [*FEW, "train.steps = 3"]
    with pytest.raises(CheckpointError, match="lacks"):
        flowdistill.train("freeflow", on="digits", gin_bindings=further, workdir=thin, report=False)


def test_scales_that_stand_for_each_other_are_unknown(tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    with (tmp_path / "run" / "config.gin").open("a") as file:
        file.write("prior.guidance = %a\na = %b\nb = %a\n")
    assert Run(tmp_path / "run").scales is None


@pytest.mark.slow
def test_scales_of_the_training_are_told(tmp_path, run):
    bindings = ["train.steps = 1", "train.batch_size = 4", "train.evaluation = None"]
    scales = [
        "train.states = @prior()",
        "prior.guidance = %scales",
        "scales = (1.0, 2.5)",
        "from_teacher.guidance = 1.5",
    ]
    flowdistill.train(
        "freeflow", on="digits", gin_bindings=[*bindings, *scales], workdir=tmp_path / "run", report=False
    )
    export(tmp_path / "run", tmp_path / "student")
    assert json.loads((tmp_path / "student" / "config.json").read_text())["origin"]["guidance"] == [1.0, 2.5]
    assert "by default 1.5, and was trained with scales from 1 to 2.5" in (tmp_path / "student/README.md").read_text()


def test_the_command_line_writes_folders(tmp_path, run):
    done = command("export", run, "student", "--dtype", "float16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "student\n"
    assert is_student(tmp_path / "student")
    again = command("export", run, "student", cwd=tmp_path)
    assert again.returncode == 2
    assert "student is taken" in again.stderr


def test_a_student_of_a_folder_is_measured_and_teaches(tmp_path, run):
    export(run, tmp_path / "student")
    measured = flowdistill.evaluate(tmp_path / "student", num_samples=20, features="digits", noise_floor=False)
    assert measured == flowdistill.evaluate(run, num_samples=20, noise_floor=False)
    teacher, *_ = student_of("sit", dtype=torch.float32)
    export(teacher, tmp_path / "teacher")
    loaded = flowdistill.load_teacher(tmp_path / "teacher")
    x, t = torch.randn(2, *teacher.sample_shape), torch.tensor([0.3, 0.8])
    assert torch.equal(loaded.velocity(x, t), teacher.eval().velocity(x, t))


@pytest.mark.slow
def test_a_student_of_a_folder_is_trained_further(tmp_path, run):
    folder = export(run, tmp_path / "student")
    bindings = ["train.steps = 1", "train.batch_size = 4", "train.evaluation = None", "train.ema = None"]
    start = ["train.flow_map = @from_student()", f"from_student.student = '{folder}'", "AdamW.lr = 0.0"]
    still = flowdistill.train(
        "freeflow", on="digits", gin_bindings=[*bindings, *start], workdir=tmp_path / "still", report=False
    )
    assert same(still.flow_map, load_student(folder))
    moved = flowdistill.train(
        "freeflow", on="digits", gin_bindings=[*bindings, *start[:2]], workdir=tmp_path / "moved", report=False
    )
    assert not same(moved.flow_map, load_student(folder))
    shutil.rmtree(folder)  # a run needs it as it needs its teacher
    with pytest.raises(CheckpointError, match="there is no file"):
        flowdistill.load_flow_map(tmp_path / "moved")


# Refused.


def test_what_no_arguments_build_is_refused(tmp_path):
    ring = flowdistill.load_teacher("ring")
    with pytest.raises(ConfigError, match=r"_ResidualNetwork.*is not a registered network"):
        export(from_teacher(ring, "anchored", network=MLP(dim=2)), tmp_path / "student")
    low_rank, *_ = student_of("sit, low rank")
    with pytest.raises(ConfigError, match="was changed after it was made"):
        export(low_rank, tmp_path / "student")

    class Own(flowdistill.FlowMap):
        sample_shape = (2,)

        def average_velocity(self, x, t, s, condition=None):
            return x

    with pytest.raises(ConfigError, match="Own does not tell what builds it"):
        export(Own(), tmp_path / "student")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        (tmp_path / "authors").mkdir()
        policy = flowdistill.load_flow_map(written("piflow_repa", tmp_path / "authors"))
    with pytest.raises(ConfigError, match="is a folder already"):
        export(policy, tmp_path / "student")
    assert [path.name for path in tmp_path.iterdir()] == ["authors"]


@pytest.mark.parametrize("head", [{}, {"head": "mixture"}, {"head": "dx", "components": 3}, {"head": "dx", 3: 3}])
def test_odd_heads_of_policies_are_refused(head):
    with pytest.raises(ConfigError, match="a policy's head is described as"):
        PolicyFlowMap(NetworkFlowMap(MLP(dim=2), "instantaneous"), head)


def test_odd_arguments_of_a_transformer_are_refused():
    with pytest.raises(ConfigError, match="these are no arguments"):
        IMFFlowMap({"input_size": 4, "width": 3}, guidance=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 7}, "has format 7"),
        ({"flow_map": "sit_student", "arguments": {"checkpoint": "secret.pt"}}, "is not built by such arguments"),
        ({"flow_map": "from_teacher"}, "is not built by such arguments"),
        ({"flow_map": "netwrok"}, "did you mean network"),
        ({"flow_map": None}, "does not describe a student"),
        ({"arguments": {}}, "does not describe a student"),
        ({"arguments": []}, "does not describe a student"),
        ({"arguments": {"network": {"network": "mlp", "arguments": {"dim": 10**9}}}}, "must be from"),
        ({"arguments": {"network": {"network": "os.system", "arguments": {}}}}, "unknown network"),
        ({"arguments": {"network": {"decoder": "pixels", "arguments": {}}}}, "does not describe a student"),
    ],
)
def test_hostile_and_odd_descriptions_are_refused(tmp_path, changes, message):
    student, *_ = student_of("mlp", dtype=torch.float32)
    folder = export(student, tmp_path / "student")
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**described, **changes}))
    with pytest.raises(CheckpointError, match=message):
        flowdistill.load_flow_map(folder)


def test_damaged_folders_are_refused(tmp_path):
    student, *_ = student_of("mlp", dtype=torch.float32)
    folder = export(student, tmp_path / "student")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        flowdistill.load_flow_map(folder)
    (folder / "config.json").write_text("{")
    assert not is_student(folder)
    with pytest.raises(CheckpointError):
        Run.of(folder)
    other, *_ = student_of("sit", dtype=torch.float32)
    odd = export(other, tmp_path / "other")
    (odd / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is of another architecture"):
        flowdistill.load_flow_map(odd)


def test_a_recipe_is_written_for_no_run(tmp_path):
    gin_file = write(tmp_path / "ring.gin")
    with pytest.raises(CheckpointError, match="neither a run directory"):
        export(gin_file.parent, tmp_path / "student")
