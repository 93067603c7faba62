"""Latents of images in shards: what they hold, how they are shared out and continued, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from runs import command

from flowdistill import ConfigError, DataError
from flowdistill.data import encoding
from flowdistill.data.encoding import encode
from flowdistill.data.image_folder import centre_crop
from flowdistill.data.latents import Latents
from flowdistill.decoders import EDM2_LATENTS, StableDiffusionVae
from flowdistill.plumbing.files import load_tensors, read_tensors

COUNT = 7


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A tiny autoencoder, and its folder; the library comes first, which makes diffusers importable."""
    folder = tmp_path_factory.mktemp("vae")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        StableDiffusionVae(vae=folder).autoencoder()
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    arguments = {"block_out_channels": (4, 8), "norm_num_groups": 2, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, **arguments)
    vae.save_pretrained(folder / "vae")
    return vae.eval(), folder / "vae"


@pytest.fixture
def images(tmp_path):
    """Images of several sizes, in folders of two classes; one is grey."""
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 33, 3), np.uint8)
        path = tmp_path / "images" / ("ants" if i < 3 else "bees") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0] if i == 5 else pixels).save(path)
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(encoding, "_SHARD", 3)


def pixels_of(images):
    paths = sorted(images.rglob("*.png"))
    cropped = [np.asarray(centre_crop(Image.open(path).convert("RGB"), 16)) for path in paths]
    return torch.from_numpy(np.stack(cropped)).permute(0, 3, 1, 2).float()


def shards(folder):
    found = [load_tensors(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in found]) for name in found[0]}


@torch.no_grad()
@pytest.mark.parametrize("family", ["sit", "edm2"])
def test_shards_hold_the_posterior_on_the_scale_of_samples(vae, images, tmp_path, family):
    model, folder = vae
    decoder = StableDiffusionVae(vae=folder, **(EDM2_LATENTS if family == "edm2" else {}))
    assert encode(images, tmp_path / "latents", decoder, size=16) == COUNT
    pixels = pixels_of(images)
    posterior = model.encode(pixels / 255 if family == "edm2" else pixels / 127.5 - 1).latent_dist
    mean, std = posterior.mean, posterior.std
    if family == "edm2":  # the authors' numbers
        centre, spread = (torch.tensor(v)[:, None, None] for v in ([5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]))
        mean, std = (mean - centre) / spread, std / spread
    else:
        mean, std = 0.18215 * mean, 0.18215 * std
    found = shards(tmp_path / "latents")
    torch.testing.assert_close(found["mean"], mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["std"], std, rtol=1e-4, atol=1e-5)
    assert found["labels"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    torch.testing.assert_close(decoder.latents(found["mean"]), posterior.mean, rtol=1e-4, atol=1e-4)
    # And the data set draws of just these posteriors.
    latents, labels = Latents(tmp_path / "latents", (4, 8, 8), 2).sample(4000, torch.Generator().manual_seed(0))
    ants = latents[labels == 0]
    wanted = found["mean"][:3].mean(0), (found["std"][:3].square() + found["mean"][:3].var(0, correction=0)).mean(0)
    assert float((ants.mean(0) - wanted[0]).abs().max() / wanted[1].max().sqrt()) < 5 / len(ants) ** 0.5
    torch.testing.assert_close(ants.var(0), wanted[1], rtol=0.25, atol=0)


def test_mirror_images_follow_after_all_images(vae, images, tmp_path):
    decoder = StableDiffusionVae(vae=vae[1])
    assert encode(images, tmp_path / "latents", decoder, size=16, flips=True) == 2 * COUNT
    mirrored = tmp_path / "mirrored"
    for path in images.rglob("*.png"):
        other = mirrored / path.relative_to(images)
        other.parent.mkdir(parents=True, exist_ok=True)
        cropped = centre_crop(Image.open(path).convert("RGB"), 16)
        cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other)
    encode(images, tmp_path / "plain", decoder, size=16)
    encode(mirrored, tmp_path / "others", decoder, size=16)
    found, plain, others = (shards(tmp_path / name) for name in ("latents", "plain", "others"))
    for name in ("mean", "std", "labels"):
        torch.testing.assert_close(found[name], torch.cat([plain[name], others[name]]), rtol=1e-4, atol=1e-5)


def test_one_draw_in_place_of_the_posterior(vae, images, tmp_path):
    decoder = StableDiffusionVae(vae=vae[1])
    for name, how in {"a": {}, "b": {"draw": True}, "c": {"draw": True, "seed": 1, "dtype": "float16"}}.items():
        encode(images, tmp_path / name, decoder, size=16, **how)
    posterior, one, other = (shards(tmp_path / name) for name in "abc")
    assert one.keys() == {"latents", "labels"}
    assert other["latents"].dtype == torch.float16
    for drawn in (one, other):
        normal = (drawn["latents"].float() - posterior["mean"]) / posterior["std"]
        assert abs(float(normal.mean())) < 0.1
        assert abs(float(normal.std()) - 1) < 0.1
        assert float((normal[:3] - normal[3:6]).abs().mean()) > 0.5  # of two shards
    assert float((one["latents"] - other["latents"].float()).abs().mean()) > 0.1 * float(posterior["std"].mean())


def test_processes_share_the_shards_out_and_what_is_there_is_kept(vae, images, tmp_path, monkeypatch):
    decoder = StableDiffusionVae(vae=vae[1])
    encode(images, tmp_path / "one", decoder, size=16)
    two, names = tmp_path / "two", ["00000.safetensors", "00001.safetensors", "00002.safetensors"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in ((1, names[1:2]), (0, names)):
        monkeypatch.setenv("RANK", str(rank))
        encode(images, two, decoder, size=16, batch_size=2)
        assert sorted(path.name for path in two.glob("*.safetensors")) == there
    monkeypatch.delenv("WORLD_SIZE")
    (two / names[1]).unlink()
    before = {name: (two / name).stat().st_mtime_ns for name in (names[0], names[2])}
    encode(images, two, decoder, size=16)
    assert before == {name: (two / name).stat().st_mtime_ns for name in before}
    for name in ("mean", "std", "labels"):
        torch.testing.assert_close(shards(two)[name], shards(tmp_path / "one")[name], rtol=1e-4, atol=1e-5)
    assert all(read_tensors(two / name) is not None for name in names)  # whose hashes fit


def test_what_does_not_belong_together_is_refused(vae, images, tmp_path):
    decoder, out = StableDiffusionVae(vae=vae[1]), tmp_path / "latents"
    encode(images, out, decoder, size=16)
    for how in ({"size": 8}, {"flips": True}, {"draw": True}, {"dtype": "float16"}):
        with pytest.raises(ConfigError, match=rf"made otherwise \(.*{next(iter(how))}.* differ\)"):
            encode(images, out, decoder, **{"size": 16, **how})
    with pytest.raises(ConfigError, match=r"made otherwise .*scale"):
        encode(images, out, StableDiffusionVae(vae=vae[1], **EDM2_LATENTS), size=16)
    (images / "ants" / "0.png").rename(images / "bees" / "0.png")
    with pytest.raises(ConfigError, match=r"made otherwise .*names"):
        encode(images, out, decoder, size=16)
    (out / "encoding.json").write_text("[")
    with pytest.raises(ConfigError, match="made otherwise"):
        encode(images, out, decoder, size=16)
    with pytest.raises(ConfigError, match="is there already"):
        encode(images, tmp_path, decoder, size=16)
    (images / "bees" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"3\.png is not a whole image"):
        encode(images, tmp_path / "other", decoder, size=16)
    for size in (0, 1, 17):
        with pytest.raises(ConfigError, match=f"a multiple of 2 for this autoencoder, not {size}"):
            encode(images, tmp_path / "fourth", decoder, size=size)
    for inside in (images, images / "latents"):
        with pytest.raises(ConfigError, match=r"lies in .*images, whose images are read"):
            encode(images, inside, decoder, size=16)
    with pytest.raises(ConfigError, match="latents need an autoencoder"):
        encode(images, tmp_path / "third", StableDiffusionVae(), size=16)


@pytest.mark.slow
def test_the_command(vae, images, tmp_path):
    options = ["--vae", vae[1], "--scale", "edm2", "--size", 16, "--device", "cpu"]
    done = command("encode", images, "latents", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "latents\n"
    told = json.loads((tmp_path / "latents" / "encoding.json").read_text())
    assert (told["images"], told["sample_shape"], told["num_classes"]) == (COUNT, [4, 8, 8], 2)
    assert Latents(tmp_path / "latents", (4, 8, 8), 2).sample(3, torch.Generator())[0].shape == (3, 4, 8, 8)
    done = command("encode", images, "latents", *options[:-2], "--draw", cwd=tmp_path)
    assert done.returncode == 2
    assert "(draw differ)" in done.stderr
