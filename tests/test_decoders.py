"""Decoders: bytes of images, scales of latents, and an autoencoder of diffusers."""

import copy
import json
import shutil
import sys

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowdistill import DECODERS, ConfigError
from flowdistill.decoders import Pixels, StableDiffusionVae, quantize
from flowdistill.flow_maps import from_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.networks import SiT
from flowdistill.wrapped_teachers import NetworkTeacher

EDM2_MEAN, EDM2_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)


def edm2_scale(**kwargs):
    """Latents of unit variance from EDM2's statistics of the raw ones."""
    scale = [1 / std for std in EDM2_STD]
    bias = [-mean / std for mean, std in zip(EDM2_MEAN, EDM2_STD, strict=True)]
    return StableDiffusionVae(scale=scale, bias=bias, **kwargs)


# Bytes.


@pytest.mark.parametrize("rounding", ["nearest", "down"])
def test_every_byte_survives_the_way_to_minus_one_and_one_and_back(rounding):
    """But where the float is a little less than the byte, so that rounding down lowers it."""
    every = torch.arange(256)
    again = quantize(every.double() / 127.5 - 1, rounding)
    assert again.dtype == torch.uint8
    allowed = 0 if rounding == "nearest" else 1
    assert int((every - again.long()).abs().max()) <= allowed
    assert torch.equal(quantize((every.double() + 0.25) / 127.5 - 1, rounding).long(), every)


@given(st.floats(-3, 3))
def test_down_is_half_a_grey_level_darker_than_nearest(value):
    """floor(y) and floor(y + 1/2) of y = 127.5 (x + 1), cut to bytes."""
    x = torch.tensor([value], dtype=torch.float64)
    down, nearest = (int(quantize(x, rounding)) for rounding in ("down", "nearest"))
    y = 127.5 * value + 127.5
    assert down == min(max(int(y // 1), 0), 255)
    assert nearest == min(max(int((y + 0.5) // 1), 0), 255)
    assert nearest - down in (0, 1)


def test_black_grey_and_white():
    values = torch.tensor([-5.0, -1.0, -0.996, 0.0, 0.9999, 1.0, 5.0])
    assert quantize(values, "nearest").tolist() == [0, 0, 1, 128, 255, 255, 255]
    assert quantize(values, "down").tolist() == [0, 0, 0, 127, 254, 255, 255]


def test_the_decoder_rounds_as_it_was_told():
    grey = torch.zeros(1, 1, 2, 2)
    for build in (Pixels, StableDiffusionVae):
        assert set(build().to_uint8(grey).flatten().tolist()) == {128}
        assert set(build(rounding="down").to_uint8(grey).flatten().tolist()) == {127}
        with pytest.raises(ValueError, match="rounding"):
            build(rounding="up")


# Pixels.


def test_pixels_are_scaled_and_their_margin_is_cut():
    samples = torch.arange(2 * 3 * 8 * 8.0).reshape(2, 3, 8, 8)
    assert torch.equal(Pixels().decode(samples), samples)
    assert torch.equal(Pixels(scale=0.5).decode(samples), samples / 2)
    assert torch.equal(Pixels(crop=4).decode(samples), samples[:, :, 2:6, 2:6])
    assert torch.equal(Pixels(scale=2.0, crop=6).decode(samples), 2 * samples[:, :, 1:7, 1:7])
    assert torch.equal(Pixels(crop=8).decode(samples), samples)
    assert Pixels().decode(samples.double()).dtype == torch.float32
    assert Pixels().ready


def test_the_margin_is_the_one_that_mnist_is_padded_by():
    padded = torch.nn.functional.pad(torch.ones(1, 1, 28, 28), (2, 2, 2, 2))
    assert torch.equal(Pixels(crop=28).decode(padded), torch.ones(1, 1, 28, 28))


def test_more_than_there_is_cannot_be_cut_out():
    with pytest.raises(ConfigError, match=r"crop 9 is larger than the images, \(8, 8\)"):
        Pixels(crop=9).decode(torch.zeros(1, 1, 8, 8))
    for wrong in ({"crop": 0}, {"scale": 0.0}):
        with pytest.raises(ValueError, match="must be > 0"):
            Pixels(**wrong)


# Latents.


def test_latents_of_sit_are_raw_ones_times_a_number():
    raw = torch.randn(3, 4, 2, 2)
    torch.testing.assert_close(StableDiffusionVae().latents(0.18215 * raw), raw)


def test_latents_of_edm2_are_raw_ones_whitened_by_channel():
    raw = torch.randn(3, 4, 2, 2)
    mean, std = (torch.tensor(v).reshape(4, 1, 1) for v in (EDM2_MEAN, EDM2_STD))
    torch.testing.assert_close(edm2_scale().latents((raw - mean) / std), raw)


def test_latents_keep_their_dtype():
    assert edm2_scale().latents(torch.randn(1, 4, 2, 2).double()).dtype == torch.float64


def test_a_decoder_is_a_value():
    """Scales that come as lists, as from JSON, are the same."""
    assert edm2_scale() == StableDiffusionVae(scale=tuple(edm2_scale().scale), bias=tuple(edm2_scale().bias))
    assert hash(edm2_scale()) == hash(edm2_scale())
    assert edm2_scale() != StableDiffusionVae()
    assert DECODERS.build("stable_diffusion_vae", pixel_range=[0.0, 1.0]) == StableDiffusionVae(pixel_range=(0.0, 1.0))


# The autoencoder.


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """A tiny one, and its folder; the library comes first, which makes diffusers importable beside any torchvision."""
    folder = tmp_path_factory.mktemp("vae")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        StableDiffusionVae(vae=folder).decode(torch.zeros(1, 4, 2, 2))
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    arguments = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4}
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **arguments
    )
    vae.save_pretrained(folder / "vae")
    return vae.eval(), folder / "vae"


@torch.no_grad()
def test_an_autoencoder_whose_images_are_in_minus_one_to_one(autoencoder):
    vae, folder = autoencoder
    raw = torch.randn(3, 4, 4, 4)
    images = StableDiffusionVae(vae=folder).decode(0.18215 * raw)
    torch.testing.assert_close(images, vae.decode(raw).sample)
    assert images.shape == (3, 3, 8, 8)
    assert images.std() > 0.01


@torch.no_grad()
def test_an_autoencoder_whose_images_are_in_zero_to_one(autoencoder):
    vae, folder = autoencoder
    raw = torch.randn(2, 4, 4, 4)
    mean, std = (torch.tensor(v).reshape(4, 1, 1) for v in (EDM2_MEAN, EDM2_STD))
    decoder = edm2_scale(vae=folder, pixel_range=(0.0, 1.0))
    images = decoder.decode((raw - mean) / std)
    expected = 2 * vae.decode(raw).sample - 1
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    assert decoder.decode(raw.double()).dtype == torch.float32


def test_the_autoencoder_is_read_once_and_trains_nothing(autoencoder, monkeypatch):
    from diffusers import AutoencoderKL

    _, folder = autoencoder
    first = StableDiffusionVae(vae=folder).decode(torch.ones(1, 4, 2, 2))
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", None)
    assert torch.equal(StableDiffusionVae(vae=str(folder), rounding="down").decode(torch.ones(1, 4, 2, 2)), first)
    assert not StableDiffusionVae(vae=folder).decode(torch.ones(1, 4, 2, 2, requires_grad=True)).requires_grad


def test_latents_without_an_autoencoder_are_not_decoded():
    decoder = StableDiffusionVae()
    assert not decoder.ready
    assert StableDiffusionVae(vae="somewhere").ready
    with pytest.raises(ConfigError, match="load the teacher with vae="):
        decoder.decode(torch.zeros(1, 4, 2, 2))


def test_folders_that_hold_no_whole_autoencoder(autoencoder, tmp_path):
    """Weights that are missing must not be random ones."""
    _, good = autoencoder
    weights = "diffusion_pytorch_model.safetensors"

    def refused(change):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(good, folder)
        change(folder)
        with pytest.raises(ConfigError) as error:
            StableDiffusionVae(vae=folder).decode(torch.zeros(1, 4, 2, 2))
        assert f"the autoencoder {folder} cannot be loaded: " in str(error.value)
        return str(error.value)

    tensors = safetensors.torch.load_file(good / weights)
    without = {name: v for name, v in tensors.items() if name != "decoder.conv_in.weight"}
    misshapen = tensors | {"decoder.conv_in.weight": torch.zeros(2)}
    refused(lambda folder: (folder / "config.json").unlink())
    refused(lambda folder: (folder / "config.json").write_text("{"))
    refused(lambda folder: (folder / weights).unlink())
    refused(lambda folder: (folder / weights).write_bytes((good / weights).read_bytes()[:1000]))
    refused(lambda folder: safetensors.torch.save_file(misshapen, folder / weights))
    assert "lacks decoder.conv_in.weight" in refused(lambda f: safetensors.torch.save_file(without, f / weights))
    other = json.dumps({"format": 1, "network": "sit"})  # a model folder of this library
    refused(lambda folder: (folder / "config.json").write_text(other))


def test_weights_in_a_pickle_are_not_read(autoencoder, tmp_path):
    _, good = autoencoder
    shutil.copy(good / "config.json", tmp_path)
    tensors = safetensors.torch.load_file(good / "diffusion_pytorch_model.safetensors")
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="safetensors"):
        StableDiffusionVae(vae=tmp_path).decode(torch.zeros(1, 4, 2, 2))


def test_without_diffusers_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what an import of it sees where it is missing
    with pytest.raises(ConfigError, match=r"needs diffusers: pip install 'flowdistill\[vae\]'"):
        StableDiffusionVae(vae="never/loaded").decode(torch.zeros(1, 4, 2, 2))


# Decoders of models.


def test_a_student_carries_its_teachers_decoder():
    decoder = StableDiffusionVae(vae="somewhere")
    net = SiT(input_size=4, patch_size=2, hidden_size=8, depth=1, num_heads=2, num_classes=3)
    teacher = NetworkTeacher(net, decoder)
    student = from_teacher(teacher, "anchored")
    assert student.decoder is decoder
    assert GuidedTeacher(teacher, 2.0).decoder is decoder
    assert from_teacher(GuidedTeacher(teacher, 2.0)).decoder is decoder
    assert not any("decoder" in name for name in student.state_dict())
    bare = from_teacher(NetworkTeacher(net), "anchored")
    assert bare.decoder is None
    assert bare.state_dict().keys() == student.state_dict().keys()


def test_copies_of_a_model_share_its_decoder():
    decoder = Pixels(scale=0.5)
    teacher = NetworkTeacher(SiT(input_size=4, patch_size=2, hidden_size=8, depth=1, num_heads=2), decoder)
    copied = copy.deepcopy(teacher)
    assert copied.decoder is decoder
    assert copied.network is not teacher.network
