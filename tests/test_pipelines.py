"""Students as pipelines of diffusers: the same samples without this library."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_one_pass import student_of

import flowdistill
from flowdistill import Condition, ConfigError
from flowdistill.decoders import Pixels, StableDiffusionVae
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Decoder
from flowdistill.networks import MLP, SiT
from flowdistill.plumbing.randomness import step_generator
from flowdistill.plumbing.torch_fidelity import torch_fidelity
from flowdistill.runs.blocks import BLOCK
from flowdistill.runs.exporting import export
from flowdistill.runs.programs import PROGRAMS
from flowdistill.runs.programs import __file__ as programs

pytest.importorskip("diffusers")

LOADER = """
import sys
import torch

try:
    import torchvision
except RuntimeError:  # of another build than torch: diffusers imports it, and its operators must be known
    for name in ("torchvision::nms", "torchvision::qnms"):
        torch.library.define(name, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from diffusers import DiffusionPipeline

made = []
for folder, calls in torch.load("calls.pt"):
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for call in calls:
        if "generator" in call:
            call["generator"] = torch.Generator().manual_seed(call["generator"])
        try:
            made.append(pipeline(**call).images)
        except ValueError as error:
            made.append(str(error))
    pipeline.to("meta")  # whatever the program makes itself must move with it
    x, labels = torch.zeros(2, *pipeline.flow_map.config.sample_shape, device="meta"), torch.zeros(2, device="meta")
    assert pipeline.flow_map(x, 1000.0, 0.0, labels.long(), 1.0).device.type == "meta"
torch.save(made, "made.pt")
assert "flowdistill" not in sys.modules
"""


def elsewhere(tmp_path, calls):
    """What the pipelines of folders make in a process without this library, of calls or errors."""
    torch.save(calls, tmp_path / "calls.pt")
    done = subprocess.run([sys.executable, "-I", "-c", LOADER], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(tmp_path / "made.pt")


def noise_of(student, n=3, seed=0):
    return torch.randn(n, *student.sample_shape, generator=torch.Generator().manual_seed(seed))


def test_students_of_points(tmp_path):
    """Of jumps between all times, from noise alone, and to data; with and without labels and guidance."""
    torch.manual_seed(0)
    mlp = {"dim": 2, "hidden_size": 8}
    students = {
        "any": NetworkFlowMap(MLP(**mlp, num_classes=3), guidance=1.5, start=0.9, shift=2.0),
        "anchored": NetworkFlowMap(MLP(**mlp), "anchored"),
        "to_data": NetworkFlowMap(MLP(**mlp, num_classes=3), "to_data"),
    }
    for name, student in students.items():
        for parameter in student.eval().parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        (tmp_path / name).mkdir()
        PROGRAMS["diffusers"](student, tmp_path / name)
    noise, labels = noise_of(students["any"]), [2, 0, 1]
    calls = [
        ("any", {"latents": noise, "class_labels": labels, "guidance_scale": 2.0, "num_inference_steps": 3}),
        ("any", {"latents": noise[:1], "class_labels": 2}),
        ("any", {"class_labels": labels, "generator": 0}),
        ("any", {"class_labels": [3]}),
        ("any", {}),
        ("anchored", {"batch_size": 3, "generator": 0}),
        ("anchored", {"num_inference_steps": 2}),
        ("anchored", {"class_labels": labels}),
        ("to_data", {"class_labels": labels, "generator": 1, "num_inference_steps": 3}),
        ("to_data", {"class_labels": labels, "guidance_scale": 2.0}),
    ]
    made = elsewhere(tmp_path, [(name, [call for of, call in calls if of == name]) for name in students])

    def wanted(name, x, steps=1, labels=None, scale=None, renoise=None):
        condition = Condition(None if labels is None else torch.tensor(labels), scale and torch.full((len(x),), scale))
        return students[name].sample(x, steps, condition, renoise=renoise)

    drawn = torch.Generator().manual_seed(1)
    first, *fresh = (torch.randn(3, 2, generator=drawn) for _ in range(3))
    expected = [
        wanted("any", noise, 3, labels, 2.0),
        wanted("any", noise[:1], 1, [2]),
        wanted("any", noise, 1, labels),
        "class_labels lie in [0, 3)",
        "class_labels are missing",
        wanted("anchored", noise),
        "this network makes one jump alone: num_inference_steps is 1",
        "there are no class_labels here",
        wanted("to_data", first, 3, labels, renoise=torch.stack(fresh)),
        "this network takes no guidance_scale",
    ]
    for (name, call), got, right in zip(calls, made, expected, strict=True):
        if isinstance(right, str):
            assert got == right, (name, call)
        else:
            torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_students_of_images(tmp_path):
    """What flowdistill.sample draws, given its noise; pictures are the decoder's."""
    calls, expected = [], []
    for network in ("sit", "edm2"):
        student, *_ = student_of(network, dtype=torch.float32)
        student.decoder = StableDiffusionVae(scale=2.0) if network == "sit" else Pixels(scale=0.5, crop=4)
        export(student.eval(), tmp_path / network, programs=["diffusers"])
        wanted = flowdistill.sample(student, 2, labels=[2, 0], guidance=2.0, seed=5)
        noise = torch.randn(BLOCK, *student.sample_shape, generator=step_generator(5, 0, "sample"))[:2]
        call = {"latents": noise, "class_labels": [2, 0], "guidance_scale": 2.0}
        calls.append((network, [{**call, "output_type": "latent"}, {**call, "output_type": "pt"}]))
        shown = ((student.decoder.decode(wanted) + 1) / 2).clamp(0, 1) if network == "edm2" else None
        expected += [wanted, shown]
    made = elsewhere(tmp_path, calls)
    assert made[1].startswith("samples are latents")
    for got, right in ((made[0], expected[0]), *zip(made[2:], expected[2:], strict=True)):
        torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


# Pictures, in this process.


@pytest.fixture(scope="module")
def pipeline_class():
    torch_fidelity("version")  # after it torchvision can be imported, which diffusers does
    path = Path(programs).parent / "pipeline_files" / "pipeline.py"
    spec = importlib.util.spec_from_file_location("exported_pipeline", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FlowMapPipeline


def test_latents_become_the_images_of_their_autoencoder(tmp_path, pipeline_class):
    from diffusers import AutoencoderKL, FlowMapEulerDiscreteScheduler

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4).save_pretrained(tmp_path / "vae")
    decoder = StableDiffusionVae(
        vae=tmp_path / "vae", scale=[1.0, 2.0, 0.5, 4.0], bias=[0.5, 0, 1, 0], pixel_range=(0.0, 1.0)
    )
    network = SiT(input_size=4, patch_size=2, hidden_size=16, depth=1, num_heads=2)
    folder = export(NetworkFlowMap(network, decoder=decoder), tmp_path / "student", programs=["diffusers"])
    images = json.loads((folder / "model_index.json").read_text())["images"]
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    pipeline = pipeline_class(None, FlowMapEulerDiscreteScheduler(), vae, images)
    latents = 0.3 * torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(pipeline.decode(latents), ((decoder.decode(latents) + 1) / 2).clamp(0, 1))


def test_what_cannot_be_a_pipeline(tmp_path):
    class Inverted(Decoder):
        def decode(self, samples):
            return -samples

        def to_uint8(self, images):
            return images.byte()

    odd = NetworkFlowMap(MLP(dim=2, hidden_size=8), decoder=Inverted())
    with pytest.raises(ConfigError, match="does not know how Inverted decodes"):
        PROGRAMS["diffusers"](odd, tmp_path)
    odd.grid = lambda steps: torch.linspace(1.0, 0.0, steps + 1) ** 2
    with pytest.raises(ConfigError, match="not those of diffusers' scheduler"):
        PROGRAMS["diffusers"](odd, tmp_path)
    assert list(tmp_path.iterdir()) == []
