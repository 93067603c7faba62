"""References: image folders, files of samples and of statistics, data sets, and the cache of their features."""

import json
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from flowdistill import ConfigError, DataError
from flowdistill.data import Digits, ImageDataset
from flowdistill.decoders import Pixels
from flowdistill.evaluation import frechet_distance, load_features, load_images, measure, reference_set, sample_set
from flowdistill.evaluation.features import SmallClassifier
from flowdistill.evaluation.references import split
from flowdistill.teachers.gaussian import Ring

PIXELS = torch.randint(0, 256, (250, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
FEATURES = sample_set(torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 127.5 - 1, None, "digits").features


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "flowdistill" / "references"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    for i, pixels in enumerate(PIXELS):
        path = folder / str(i % 3) / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[..., 0]).save(path)
    return folder


def statistics(features=FEATURES):
    return {"mu": features.double().mean(0).numpy(), "sigma": np.cov(features.double().numpy(), rowvar=False)}


def test_a_folder_of_images_and_a_file_of_samples(folder, tmp_path):
    np.savez(tmp_path / "samples.npz", PIXELS)
    torch.testing.assert_close(load_images(tmp_path / "samples.npz", "digits").features, FEATURES)
    found = load_images(folder, "digits")
    assert len(found) == 250
    assert found.logits.shape == (250, 10)
    assert frechet_distance(found.features, FEATURES) < 1e-4  # the same images in another order


def test_statistics_as_edm_publishes_them(tmp_path):
    np.savez(tmp_path / "edm.npz", **statistics())
    reference = load_images(tmp_path / "edm.npz", "digits")
    generated = sample_set(Digits().images[:500], None, "digits")
    wanted = frechet_distance(generated.features, FEATURES)
    assert measure(["fid"], generated, reference)["fid"] == pytest.approx(wanted, rel=1e-6)
    for name in ("kid", "precision", "recall", "w2", "mmd"):
        with pytest.raises(ConfigError, match="only fid"):
            measure([name], generated, reference)


def test_statistics_and_samples_as_adm_publishes_them(tmp_path):
    """The statistics are those of more images than the samples; fid is measured against them."""
    real = load_features("digits").reference
    spatial = {"mu_s": np.zeros(7), "sigma_s": np.eye(7)}
    np.savez(tmp_path / "adm.npz", arr_0=PIXELS, **statistics(real), **spatial)
    generated = sample_set(Digits().images[:500], None, "digits")
    for _ in range(2):  # computed, then from the cache
        reference = load_images(tmp_path / "adm.npz", "digits")
        figures = measure(["fid", "precision"], generated, reference)
        assert figures["fid"] == pytest.approx(frechet_distance(generated.features, real), rel=1e-6)
        assert figures["precision"] < 0.5
    assert reference[:10].moments[0].shape == (64,)  # of the rows, not what was published
    assert not torch.equal(reference[:10].moments[0], reference.moments[0])


def test_an_array_and_an_archive_of_images(tmp_path):
    np.save(tmp_path / "images.npy", PIXELS)
    (tmp_path / "images.npy").rename(tmp_path / "images.NPY")
    torch.testing.assert_close(load_images(tmp_path / "images.NPY", "digits").features, FEATURES)
    with zipfile.ZipFile(tmp_path / "edm.zip", "w") as archive:
        for i, pixels in enumerate(PIXELS):
            with archive.open(f"{i // 100:05d}/img{i:08d}.png", "w") as file:
                Image.fromarray(pixels[..., 0]).save(file, "PNG")
        labels = [[f"{i // 100:05d}/img{i:08d}.png", i % 10] for i in range(len(PIXELS))]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    found = load_images(tmp_path / "edm.zip", "digits")
    torch.testing.assert_close(found.features, FEATURES)
    assert found.labels.tolist() == [i % 10 for i in range(len(PIXELS))]


def test_a_folder_of_images_of_16_bits_is_that_of_8(folder, tmp_path):
    for i, pixels in enumerate(PIXELS):
        path = tmp_path / "deep" / f"{i:03d}.{'webp' if i % 5 == 0 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        image = pixels[..., 0] if i % 5 == 0 else pixels[..., 0].astype(np.uint16) * 257
        Image.fromarray(image).save(path, **({"lossless": True} if i % 5 == 0 else {}))
    (tmp_path / "deep" / "prompts.txt").write_text("none")
    with pytest.warns(RuntimeWarning, match=r"250 images are read, and 1 other files are left out \(1 \.txt\)"):
        found = load_images(tmp_path / "deep", "digits")
    torch.testing.assert_close(found.features, FEATURES)


def test_a_data_set_by_name_or_as_it_is():
    reference = load_images("digits", "digits")
    assert len(reference) == 1797
    assert measure(["accuracy"], reference, reference)["accuracy"] > 0.99
    dark = ImageDataset(torch.full((3, 1, 12, 12), -0.5), torch.tensor([0, 1, 2]))
    decoded = load_images(dark, "digits", Pixels(scale=2.0, crop=8))
    torch.testing.assert_close(decoded.features, sample_set(torch.full((3, 1, 8, 8), -1.0), None, "digits").features)


def test_features_are_computed_once_for_the_same_content(folder, cache, monkeypatch):
    seen = []
    forward = SmallClassifier.forward
    monkeypatch.setattr(SmallClassifier, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))

    def computed(extractor="digits"):
        seen.clear()
        load_images(folder, extractor)
        return sum(seen)

    assert computed() == 250
    assert computed() == 0
    other = SmallClassifier(8).eval()
    assert computed(other) == 250  # other weights
    assert computed(other) == 0
    assert len(list(cache.iterdir())) == 2
    for file in cache.iterdir():
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        file.write_bytes(data)
    with pytest.warns(RuntimeWarning, match="is damaged: what it held is computed again"):
        assert computed() == 250
    assert computed() == 0
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="is damaged"):
        assert computed() == 250
    assert computed() == 0
    Image.fromarray(255 - PIXELS[0, ..., 0]).save(folder / "0" / "000.png")
    assert computed() == 250  # the content counts, not the name


def test_true_samples_are_split_into_independent_ones():
    reference = load_images("digits", "digits")
    a, b = split(reference, 800)
    assert (len(a), len(b)) == (800, 997)
    assert len(torch.unique(torch.cat([a.features, b.features]), dim=0)) == len(torch.unique(reference.features, dim=0))
    assert split(reference, 899) is None


def test_what_is_no_reference(tmp_path, folder):
    def refused(error, match, source, features="digits"):
        with pytest.raises(error, match=match):
            reference_set(features, Ring(), 10, 0, source)

    refused(ConfigError, "did you mean digits", "digit")
    refused(ConfigError, "no such file or folder", "nowhere.npz")
    refused(ConfigError, "needs features", folder, None)
    (tmp_path / "empty").mkdir()
    refused(DataError, "no images", tmp_path / "empty")
    refused(DataError, "a file ends in .npz", folder / "0" / "000.png")
    (tmp_path / "broken.npz").write_bytes(b"PK\3\4 and no more")
    refused(DataError, "cannot be read", tmp_path / "broken.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    refused(DataError, "not images arr_0", tmp_path / "other.npz")
    np.savez(tmp_path / "floats.npz", np.zeros((3, 8, 8, 1)))
    refused(DataError, "uint8", tmp_path / "floats.npz")
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.zeros((1, 1)))
    refused(DataError, "cannot be read", tmp_path / "objects.npz")
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    refused(DataError, r"not \(D,\)", tmp_path / "shapes.npz")
    np.savez(tmp_path / "colours.npz", np.zeros((3, 8, 8, 3), np.uint8))
    refused(DataError, "1 channels", tmp_path / "colours.npz")
    Image.new("L", (9, 8)).save(folder / "2" / "zzz.png")
    refused(DataError, "one size", folder)
    (folder / "0" / "000.png").write_bytes(b"no image")
    refused(DataError, "not a whole image", folder)
    with pytest.raises(ConfigError, match="without features of real data"):
        reference_set(SmallClassifier(8), None, 10, 0)
