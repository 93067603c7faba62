"""The recipes for ImageNet train three steps on tiny networks and latents, with all that they bind beside sizes."""

import argparse

import pytest
import torch
from edm2_files import released
from safetensors.torch import save_file

import flowdistill
from flowdistill.bench.imagenet import TABLES
from flowdistill.networks import EDM2, SiT
from flowdistill.plumbing import config
from flowdistill.plumbing.statements import parts_of

_WITH_BINDINGS = {
    f"{system.name} ({name})": (system.recipe, tuple(system.bindings))
    for name, table in TABLES.items()
    for system in table.systems
    if system.recipe is not None and system.bindings
}
RECIPES = {name: (name, ()) for name in config.recipes() if "imagenet" in name} | _WITH_BINDINGS
SHAPE = (4, 8, 8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A SiT, an EDM2 network, and latents of ten classes."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    sit = SiT(input_size=8, patch_size=2, hidden_size=16, depth=2, num_heads=2, num_classes=10, learn_sigma=False)
    torch.save({"ema": sit.state_dict(), "args": argparse.Namespace(num_classes=10)}, folder / "sit.pt")
    edm2 = EDM2(
        img_resolution=8, img_channels=4, label_dim=10, model_channels=8, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=(4,), channels_per_head=4,
    )  # fmt: skip
    (folder / "edm2.pkl").write_bytes(released(edm2))
    (folder / "latents").mkdir()
    rows = {"latents": torch.randn(40, *SHAPE), "labels": torch.arange(40) % 10}
    save_file(rows, folder / "latents" / "00000.safetensors")
    return folder


def small(recipe, bindings, files):
    """The bindings that make a recipe tiny: networks, files and numbers, and nothing that a method chooses."""
    given = [*config.statements(recipe), *(s for b in bindings for s in config.statements_of(b, "bindings"))]
    names, parts = {statement.name for statement in given}, parts_of(*given)
    sizes = {
        "sit_teacher.checkpoint": str(files / "sit.pt"),
        "sit_teacher.variant": None,
        "sit_teacher.num_heads": 2,
        "sit_teacher.noise_time": 0,
        "edm2_teacher.checkpoint": str(files / "edm2.pkl"),
        "edm2_teacher.variant": None,
        "weak/edm2_teacher.checkpoint": str(files / "edm2.pkl"),
        "weak/edm2_teacher.variant": None,
        "latents.folder": str(files / "latents"),
        "latents.sample_shape": SHAPE,
        "latents.num_classes": 10,
        "sit.input_size": 8,
        "sit.hidden_size": 16,
        "sit.depth": 2,
        "sit.num_heads": 2,
        "sit.num_classes": 10,
        "edm2.img_resolution": 8,
        "edm2.label_dim": 10,
        "edm2.model_channels": 8,
        "from_teacher.early_blocks": 1,
    }
    added = {"sit_teacher.num_heads": "sit_teacher", "sit_teacher.noise_time": "sit_teacher"}
    added |= {"sit.input_size": "sit", "sit.num_classes": "sit"}
    kept = [f"{k} = {v!r}" for k, v in sizes.items() if k in names or added.get(k) in parts]
    trained = {"steps": 3, "batch_size": 4, "accumulation": 1, "log_every": 1, "sample_every": 0, "checkpoint_every": 3}
    return [*kept, *(f"train.{k} = {v}" for k, v in trained.items())]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_it_trains_three_steps(name, files, tmp_path):
    recipe, bindings = RECIPES[name]
    made = [*bindings, *small(recipe, bindings, files)]
    result = flowdistill.train(recipe, gin_bindings=made, workdir=tmp_path / "run", device="cpu", report=False)
    assert result.steps == 3
    student = flowdistill.load_flow_map(tmp_path / "run")
    assert student.sample_shape == SHAPE
    assert bool(torch.isfinite(flowdistill.sample(student, 2, device="cpu")).all())
