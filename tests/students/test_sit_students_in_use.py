"""SiT-shaped students of others: sampled, measured, searched with, planned, trained further."""

import numpy as np
import pytest
import torch
from runs import write
from student_files import ARGUMENTS, drawn, load, saved, state, written

import flowdistill
from flowdistill import FLOW_MAPS, Condition, ConfigError
from flowdistill.cli import main
from flowdistill.runs.pretrained import save_model
from flowdistill.students import SiTStudent

FAMILY = {"dmf": "dmf", "dmf512": "dmf", "meanflow": "meanflow", "secant": "secant", "stee": "secant"}
FAMILY |= {name: name for name in ("alphaflow", "imm_ts", "imm_s", "tvm")}
NAMES = [name for name in FAMILY if not name.startswith(("imm", "tvm"))]  # which have tests of their own beside these


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Files of students, a tiny autoencoder, and images to compare with."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("dmf", "secant", "meanflow"):
        written(name, folder)
    flowdistill.plumbing.torch_fidelity.torch_fidelity("version")  # makes diffusers importable beside any torchvision
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).save_pretrained(folder / "vae")
    images = np.random.default_rng(0).integers(0, 255, (60, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=images)
    return folder


class Mean(flowdistill.evaluation.features.FeatureExtractor):
    """The mean and the corners of each channel."""

    channels, image_size = 3, None

    def forward(self, images):
        return torch.cat([images.mean((2, 3)), images[:, :, 0, 0]], dim=1), None


def test_sample(tiny):
    student = load(tiny / "secant.pt", **ARGUMENTS["secant"])
    samples = flowdistill.sample(student, 4, labels=[1, 2, 3, 4], steps=2, seed=3)
    assert samples.shape == (4, 4, 8, 8)
    first = flowdistill.sample(student, 2, labels=[1, 2], steps=2, seed=3)
    torch.testing.assert_close(first, samples[:2])
    noise = torch.randn(500, 4, 8, 8, generator=flowdistill.plumbing.randomness.step_generator(3, 0, "sample"))[:4]
    torch.testing.assert_close(samples, student.sample(noise, 2, Condition(torch.tensor([1, 2, 3, 4]))))
    assert not torch.allclose(
        samples, flowdistill.sample(student, 4, labels=[1, 2, 3, 4], steps=2, guidance=2.0, seed=3)
    )


def test_evaluate(tiny, tmp_path, monkeypatch):
    """Figures are kept under what the student is, its settings included."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = {"features": Mean(), "reference": tiny / "reference.npz", "num_samples": 20, "noise_floor": False}
    dmf = {k: v for k, v in ARGUMENTS["dmf"].items() if k != "early_blocks"}

    def fid(**kwargs):
        return flowdistill.evaluate(load(tiny / "dmf.pt", vae=tiny / "vae", **dmf, **kwargs), **said)["fid"]

    once = fid(early_blocks=3)
    assert 0 < once < 100
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("students/**/*.safetensors")}
    assert len(kept) == 1
    assert fid(early_blocks=3) == once
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("students/**/*.safetensors")} == kept
    assert fid(early_blocks=2) != once  # the same weights, and another map


@flowdistill.register_features("tiny_means")
def tiny_means():
    return Mean()


def said(capsys, *arguments, code=0):
    """What the command line prints, and its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    return printed


@pytest.mark.filterwarnings("ignore:.*licence")
def test_the_command_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file, told = tiny / "meanflow.pt", ("--num_heads", 4, "--num_classes", 11)
    three = ("--num_samples", 3, "--out")
    said(capsys, "sample", file, *told, *three, tmp_path / "x.npz", "--raw")
    raw = np.load(tmp_path / "x.npz")["samples"]
    assert np.array_equal(raw, flowdistill.sample(load(file, **ARGUMENTS["meanflow"]), 3).numpy())
    assert "give its vae" in said(capsys, "sample", file, *told, *three, tmp_path / "x.npz", code=2).err
    named = ("--student", "meanflow", "--vae", tiny / "vae", *told)
    said(capsys, "sample", file, *named, *three, tmp_path / "x.png")
    compared = ("--features", "tiny_means", "--reference", tiny / "reference.npz", "--num_samples", 10)
    printed = said(capsys, "evaluate", file, *named, *compared)
    assert printed.out.startswith("fid: ")
    assert "is a student of MeanFlow in PyTorch (github.com/zhuyu-cs/MeanFlow): MIT licence" in printed.err
    wrong = said(capsys, "sample", tiny / "dmf.pt", "--student", "dmf-xl/2-256", *told[:2], code=2)
    assert "is not dmf-xl/2-256" in wrong.err


def test_the_list_shows_them(capsys):
    printed = said(capsys, "list", "flow_maps").out
    assert "sit_student" in printed
    assert "dmf-xl/2-512" in printed
    assert "guidance_range" in said(capsys, "show", "flow_maps", "sit_student").out


TRAINING = """
train.teacher = @load_teacher()
load_teacher.name_or_path = 'sit_teacher'
load_teacher.checkpoint = '{folder}/sit.pt'
load_teacher.num_heads = 4
load_teacher.num_classes = 11
load_teacher.noise_time = 1
train.flow_map = @sit_student()
sit_student.checkpoint = '{folder}/meanflow.pt'
sit_student.num_heads = 4
sit_student.num_classes = 11
train.objective = @freeflow_prediction()
train.states = @prior()
train.optimizer = @AdamW
AdamW.lr = 1e-4
train.steps = {steps}
train.batch_size = 4
train.sample_every = 0
"""


@pytest.mark.filterwarnings("ignore:.*licence")
def test_training_starts_from_a_released_student(tiny, tmp_path):
    saved(tiny / "sit.pt", {k: v for k, v in state("meanflow").items() if not k.startswith("r_embedder.")})
    text = TRAINING.format(folder=tiny, steps=2)
    run = flowdistill.train(gin_file=write(tmp_path / "x.gin", text), workdir=tmp_path / "run", report=False)
    before, after = load(tiny / "meanflow.pt", **ARGUMENTS["meanflow"]), load(tmp_path / "run")
    assert isinstance(after, SiTStudent)
    assert not torch.equal(drawn(before), drawn(after))
    ours = after.state_dict()
    changed = [name for name, value in before.state_dict().items() if not torch.equal(value, ours[name])]
    assert "network.pos_embed" not in changed
    assert len(changed) > 30
    assert torch.equal(flowdistill.sample(run.workdir, 2), flowdistill.sample(after, 2))


def test_a_search_with_a_released_student(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    saved(tiny / "sit.pt", {k: v for k, v in state("meanflow").items() if not k.startswith("r_embedder.")})
    student = load(tiny / "meanflow.pt", **ARGUMENTS["meanflow"])
    teacher = flowdistill.load_teacher(tiny / "sit.pt", num_heads=4, num_classes=11, noise_time=1)
    save_model(teacher, tmp_path / "teacher")
    found = flowdistill.search(
        student,
        8,
        teacher=tmp_path / "teacher",
        verifier=lambda x, c: x.mean((1, 2, 3)),
        num_samples=2,
        teacher_steps=2,
    )
    assert found.samples.shape == (2, 4, 8, 8)


def test_a_plan_needs_no_file():
    from flowdistill.plumbing.dry import without_files

    with without_files():
        for name, count in (("dmf-xl/2-256", 675_000_000), ("secant-xl/2-256", 678_000_000)):
            student = FLOW_MAPS.build(name, checkpoint="nowhere.pt")
            parameters = sum(p.numel() for p in student.parameters())
            assert abs(parameters / count - 1) < 0.01
            assert student.early_blocks if name == "dmf" else True
        with pytest.raises(ConfigError, match=r"give sit_student\.variant"):
            FLOW_MAPS.build("dmf", checkpoint="nowhere.pt")


def test_a_file_on_a_hub(tmp_path, monkeypatch):
    path = written("meanflow", tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repository, file: str(tmp_path / file))
    student = load("hf://someone/students/meanflow.pt", **ARGUMENTS["meanflow"])
    named = load("meanflow", checkpoint="hf://someone/students/meanflow.pt", **ARGUMENTS["meanflow"])
    assert torch.equal(drawn(student), drawn(load(path, **ARGUMENTS["meanflow"])))
    assert torch.equal(drawn(student), drawn(named))


def test_students_pass_the_conformance_kit(tmp_path):
    for name in NAMES:
        flowdistill.testing.check_flow_map(load(written(name, tmp_path), **ARGUMENTS[name]))
