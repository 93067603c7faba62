"""EDM2 teachers from files in the release format."""

import pytest
import torch
from edm2_files import released

import flowdistill
from flowdistill import CheckpointError, Condition, ConfigError
from flowdistill.networks import EDM2
from flowdistill.networks.edm2 import SIZES
from flowdistill.runs.pretrained import save_model
from flowdistill.teachers.edm2 import VARIANTS

TINY = {
    "img_resolution": 8,
    "label_dim": 5,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "channels_per_head": 8,
}


def network(**changes):
    torch.manual_seed(0)
    result = EDM2(**{**TINY, **changes})
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.7)
    return result.eval()


@pytest.fixture
def write(tmp_path):
    def write(net, dtype=torch.float16):
        path = tmp_path / "edm2-img512-tiny.pkl"
        path.write_bytes(released(net, dtype))
        return path

    return write


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_velocity_is_the_networks(write, dtype):
    net = network(dropout=0.1, use_fp16=True)
    teacher = flowdistill.load_teacher(write(net, dtype))
    x, t = teacher.sample_prior(4), torch.linspace(0, 1, 4)
    labels = torch.tensor([0, 4, -1, 2])
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        torch.testing.assert_close(
            teacher.velocity(x, t, Condition(labels)), net.velocity(x, t, labels), rtol=0, atol=tolerance
        )
    assert teacher.num_classes == 5
    assert teacher.network.arguments["dropout"] == 0.0  # which a student would inherit


def test_latents_have_unit_variance_and_a_decoder_that_knows_it(write):
    decoder = flowdistill.load_teacher(write(network())).decoder
    assert not decoder.ready
    mean, std = torch.tensor([5.81, 3.25, 0.12, -2.15]), torch.tensor([4.17, 4.62, 3.71, 3.28])
    torch.testing.assert_close(decoder.latents(torch.zeros(1, 4, 2, 2))[0, :, 0, 0], mean)
    torch.testing.assert_close(decoder.latents(torch.ones(1, 4, 2, 2))[0, :, 0, 0], mean + std)
    assert decoder.pixel_range == (0.0, 1.0)
    with pytest.raises(ConfigError, match="autoencoder"):
        decoder.decode(torch.zeros(1, 4, 2, 2))


def test_pixels_are_half_of_the_samples(write):
    decoder = flowdistill.load_teacher(write(network(img_channels=3))).decoder
    assert decoder.ready
    assert torch.equal(decoder.decode(torch.full((1, 3, 2, 2), 2.0)), torch.ones(1, 3, 2, 2))


def test_an_unconditional_network_guides_a_conditional_one(write, tmp_path):
    strong = flowdistill.load_teacher(write(network()))
    path = tmp_path / "uncond.pkl"
    path.write_bytes(released(network(label_dim=0)))
    weak = flowdistill.load_teacher(path)
    assert weak.num_classes is None
    guided = flowdistill.guidance.GuidedTeacher(strong, 1.4, guide=weak)
    x, t, condition = strong.sample_prior(3), torch.rand(3), Condition(torch.tensor([0, 1, 2]))
    a, b = strong.velocity(x, t, condition), weak.velocity(x, t)
    torch.testing.assert_close(guided.velocity(x, t, condition), b + 1.4 * (a - b))


def test_its_own_null_label_guides_nothing_in_model_folders_neither(write, tmp_path):
    teacher = flowdistill.load_teacher(write(network()))
    for found in (teacher, flowdistill.load_teacher(save_model(teacher, tmp_path / "model"))):
        with pytest.raises(ConfigError, match="trained with a class for every sample"):
            flowdistill.guidance.GuidedTeacher(found, 1.4)


def test_another_architecture_is_refused(write):
    path = write(network())
    with pytest.raises(CheckpointError, match="model_channels 8 in place of 192, label_dim 5 in place of 1000"):
        flowdistill.load_teacher("edm2-s-512", checkpoint=path)
    with pytest.raises(ConfigError, match=r"did you mean edm2-s-512"):
        flowdistill.load_teacher("edm2-s512", checkpoint=path)
    strange = network()
    strange.arguments["model_channels"] = 16
    with pytest.raises(CheckpointError, match="another architecture"):
        flowdistill.load_teacher(write(strange))
    strange.arguments["surprise"] = 1
    with pytest.raises(CheckpointError, match="surprise"):
        flowdistill.load_teacher(write(strange))


def test_names_of_the_published_networks():
    assert len(VARIANTS) == 4 * len(SIZES)
    for name in ("edm2-xs-512", "edm2-xxl-512", "edm2-s-512-uncond", "edm2-xl-64"):
        assert name in VARIANTS
    with pytest.raises(ConfigError, match="checkpoint"):
        flowdistill.load_teacher("edm2-xs-512")


def test_a_student_of_the_file_starts_as_its_teacher(write):
    from flowdistill.flow_maps import from_teacher

    teacher = flowdistill.load_teacher(write(network()))
    student = from_teacher(teacher, "anchored", guidance=1.4)
    z, one, condition = teacher.sample_prior(4), torch.ones(4), Condition(torch.arange(4))
    torch.testing.assert_close(
        student.average_velocity(z, one, 0 * one, condition), teacher.velocity(z, one, condition), rtol=0, atol=1e-5
    )
    assert student.decoder is teacher.decoder


def test_a_model_folder_stands_for_the_file(write, tmp_path):
    teacher = flowdistill.load_teacher(write(network()))
    folder = flowdistill.convert(tmp_path / "edm2-img512-tiny.pkl", tmp_path / "folder")
    for again in (
        flowdistill.load_teacher(folder, vae="elsewhere"),
        flowdistill.load_teacher("edm2-s-512", checkpoint=folder, vae="elsewhere"),
    ):
        x, t, condition = teacher.sample_prior(2), torch.rand(2), Condition(torch.tensor([0, 1]))
        assert torch.equal(again.velocity(x, t, condition), teacher.velocity(x, t, condition))
        assert again.decoder.vae == "elsewhere"
        assert again.decoder.scale == teacher.decoder.scale
    with pytest.raises(ConfigError, match="takes no speed"):
        flowdistill.load_teacher(folder, speed=2)
    with pytest.raises(CheckpointError, match="edm2, not sit"):
        flowdistill.load_teacher("sit-xl/2-256", checkpoint=folder)
