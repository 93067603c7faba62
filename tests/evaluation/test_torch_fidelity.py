"""Our figures are torch-fidelity's own: of the same images, through Inception with weights from a file."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowdistill import CheckpointError
from flowdistill.decoders import Pixels
from flowdistill.evaluation import frechet_distance, load_images, measure, sample_set
from flowdistill.evaluation.features import DinoV2, Inception
from flowdistill.plumbing.torch_fidelity import torch_fidelity

N = 12


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights: those of the trained network are not needed to compare two computations."""
    folder = tmp_path_factory.mktemp("weights")
    module = torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    torch.save({}, folder / "none.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict", lambda self, state: None)
        network = module("inception-v3-compat", ["2048"], str(folder / "none.pth"))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.kaiming_normal_(parameter, generator=generator)
    torch.nn.init.normal_(network.fc.bias, std=3.0, generator=generator)
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of images, the second of them darker and smoother."""
    root, generator = tmp_path_factory.mktemp("images"), torch.Generator().manual_seed(0)
    for name, brightness in (("bright", 255), ("dark", 180)):
        (root / name).mkdir()
        for i in range(N):
            pixels = torch.rand(24, 24, 3, generator=generator) * brightness
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / name / f"{i:02d}.png")
    return root / "bright", root / "dark"


@pytest.fixture(scope="module")
def ours(weights, folders, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return [load_images(folder, Inception(weights)) for folder in folders]


@pytest.mark.slow
def test_all_metrics_of_image_folders(weights, folders, ours):
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    theirs = torch_fidelity("metrics").calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor="inception-v3-compat",  # also where its own default is another
        feature_extractor_weights_path=str(weights),
        kid_subset_size=N,
        batch_size=N,
        save_cpu_ram=True,  # no processes to load the images
        **dict.fromkeys(("fid", "kid", "isc", "prc"), True),
        **dict.fromkeys(("cuda", "cache", "verbose"), False),
    )
    figures = measure(list(names), *ours)
    assert figures["fid"] > 0.1
    assert figures == pytest.approx({name: theirs[key] for name, key in names.items()}, rel=1e-3)


def test_images_of_a_model_are_rounded_as_its_decoder_does(weights, folders, ours):
    """Those of a folder, given as a model's in [-1, 1] with some dirt below a byte, have the folder's features."""
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(folders[0].iterdir())[:2]])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    network = Inception(weights)
    found = sample_set((images + 0.9 / 127.5) / 2, None, network, Pixels(scale=2.0, rounding="down"))
    torch.testing.assert_close(found.features, ours[0].features[:2], rtol=1e-4, atol=1e-6)
    unbiased = found.features @ torch.load(weights, weights_only=True)["fc.weight"].T  # as the Inception score has them
    torch.testing.assert_close(found.logits, unbiased, rtol=1e-3, atol=1e-3)
    nearest = sample_set(images - 0.4 / 127.5, None, network)  # without a decoder: to the nearest byte
    torch.testing.assert_close(nearest.features, ours[0].features[:2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("n", "dim"), [(300, 16), (20, 40)])
def test_frechet_distance_of_features(n, dim):
    """Beside torch-fidelity's functions, also where the covariance is singular."""
    generator, fid = torch.Generator().manual_seed(0), torch_fidelity("metric_fid")
    a, b = (torch.randn(n, dim, generator=generator).double() * scale for scale in (1.0, 1.5))
    statistics = [fid.fid_features_to_statistics(v) for v in (a, b)]
    wanted = fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)


def test_weights_are_read_without_running_anything_in_them(tmp_path, weights):
    class Malice:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"weight": Malice()}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="does not hold"):
        Inception(tmp_path / "bad.pth").network  # noqa: B018
    assert not (tmp_path / "ran").exists()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold"):
        Inception(tmp_path / "other.pth").network  # noqa: B018
    with pytest.raises(CheckpointError, match="no file"):
        Inception(tmp_path / "none.pth").network  # noqa: B018
    assert Inception(weights).fingerprint() == Inception(weights).fingerprint()


def test_without_a_network_the_message_says_which_file_to_give(tmp_path, monkeypatch):
    def unreachable(*arguments, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "load", unreachable)
    with pytest.raises(CheckpointError, match=r"put the file at .*weights-inception-2015-12-05-6726825d\.pth, or give"):
        Inception().network  # noqa: B018
    with pytest.raises(CheckpointError, match=r"dinov2_vits14_pretrain\.pth into"):
        DinoV2("s").network  # noqa: B018


def test_dinov2_through_torch_hub(monkeypatch):
    """With a tiny network in place of the one that torch.hub would fetch."""

    class Mean(torch.nn.Module):
        def forward(self, images):
            assert images.shape[-2:] == (224, 224)
            return images.mean((2, 3))

    asked = []
    monkeypatch.setattr(torch.hub, "load", lambda *arguments: asked.append(arguments) or Mean())
    found = sample_set(torch.rand(2, 1, 14, 14), None, DinoV2("b"))  # grey images are shown in all three channels
    assert found.features.shape == (2, 3)
    assert found.logits is None
    assert asked == [("facebookresearch/dinov2", "dinov2_vitb14")]
