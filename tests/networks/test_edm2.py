"""EDM2: published sizes and names, the change of variables to the linear path, and the weights in training."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowdistill import NULL_LABEL, ConfigError
from flowdistill.networks import EDM2, ForcedWeight, SiT, add_lora
from flowdistill.networks.edm2 import SIZES, MPConv, mp_cat, mp_silu, mp_sum, normalize
from flowdistill.plumbing import config
from flowdistill.plumbing.flops import Flops
from flowdistill.teachers.gaussian import GaussianTeacher
from flowdistill.training.loop import configured_loop

TINY = {
    "img_resolution": 8,
    "img_channels": 2,
    "label_dim": 3,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "channels_per_head": 8,
}
COUNTS = {
    "xxs": 31_309_029,
    "xs": 124_713_253,
    "s": 280_212_837,
    "m": 497_807_781,
    "l": 777_498_085,
    "xl": 1_119_283_749,
    "xxl": 1_523_164_773,
}


def tiny(**changes):
    torch.manual_seed(0)
    network = EDM2(**{**TINY, **changes})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.7)
            else:
                parameter.mul_(torch.rand(len(parameter), *[1] * (parameter.ndim - 1)) + 0.5)
    return network.eval()


def on_meta(**arguments):
    with torch.device("meta"):
        return EDM2(**arguments)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_of_the_published_sizes(size):
    network = on_meta(model_channels=SIZES[size])
    assert sum(p.numel() for p in network.parameters()) == COUNTS[size]
    assert len(network.state_dict()) == 203
    assert len(on_meta(model_channels=SIZES[size], label_dim=0).state_dict()) == 202


def test_names_and_shapes_of_the_largest():
    shapes = {name: tuple(v.shape) for name, v in on_meta(model_channels=448).state_dict().items()}
    width = 448
    expected = {
        "unet.out_gain": (),
        "unet.emb_fourier.freqs": (width,),
        "unet.emb_fourier.phases": (width,),
        "unet.emb_noise.weight": (4 * width, width),
        "unet.emb_label.weight": (4 * width, 1000),
        "unet.enc.64x64_conv.weight": (width, 5, 3, 3),
        "unet.out_conv.weight": (4, width, 3, 3),
        "logvar_fourier.freqs": (128,),
        "logvar_fourier.phases": (128,),
        "logvar_linear.weight": (1, 128),
    }

    def block(name, n_in, n_out, decoder, attention):
        key = f"unet.{'dec' if decoder else 'enc'}.{name}"
        expected[f"{key}.emb_gain"] = ()
        expected[f"{key}.conv_res0.weight"] = (n_out, n_in if decoder else n_out, 3, 3)
        expected[f"{key}.emb_linear.weight"] = (n_out, 4 * width)
        expected[f"{key}.conv_res1.weight"] = (n_out, n_out, 3, 3)
        if n_in != n_out:
            expected[f"{key}.conv_skip.weight"] = (n_out, n_in, 1, 1)
        if attention:
            expected[f"{key}.attn_qkv.weight"] = (3 * n_out, n_out, 1, 1)
            expected[f"{key}.attn_proj.weight"] = (n_out, n_out, 1, 1)

    skips = [width]
    for level, resolution in enumerate((64, 32, 16, 8)):
        n, before = (level + 1) * width, max(level, 1) * width
        if level:
            block(f"{resolution}x{resolution}_down", before, before, False, False)
            skips.append(before)
        for i in range(3):
            block(f"{resolution}x{resolution}_block{i}", before if i == 0 else n, n, False, resolution <= 16)
            skips.append(n)
    below = 4 * width
    for level, resolution in reversed(list(enumerate((64, 32, 16, 8)))):
        n, name = (level + 1) * width, f"{resolution}x{resolution}"
        if resolution == 8:
            block(f"{name}_in0", below, below, True, True)
            block(f"{name}_in1", below, below, True, False)
        else:
            block(f"{name}_up", below, below, True, False)
        for i in range(4):
            block(f"{name}_block{i}", (below if i == 0 else n) + skips.pop(), n, True, resolution <= 16)
        below = n
    assert shapes == expected


def test_names_and_shapes_of_the_largest_sit():
    with torch.device("meta"):
        network = SiT()
    shapes = {name: tuple(v.shape) for name, v in network.state_dict().items()}
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
    }
    for i in range(28):
        for name, n_in, n_out in (
            ("attn.qkv", 1152, 3456),
            ("attn.proj", 1152, 1152),
            ("mlp.fc1", 1152, 4608),
            ("mlp.fc2", 4608, 1152),
            ("adaLN_modulation.1", 1152, 6912),
        ):
            expected[f"blocks.{i}.{name}.weight"] = (n_out, n_in)
            expected[f"blocks.{i}.{name}.bias"] = (n_out,)
    assert shapes == expected
    assert len(shapes) == 292


def test_a_fresh_network_only_skips():
    network = EDM2(**TINY)
    z, sigma = torch.randn(3, 2, 8, 8), torch.tensor([0.01, 1.0, 50.0])
    skip = 0.25 / (sigma.square() + 0.25)
    torch.testing.assert_close(network.denoise(z, sigma), skip[:, None, None, None] * z)


def test_no_label_is_no_label():
    network = tiny()
    x, t = torch.randn(4, 2, 8, 8), torch.rand(4)
    none = network.velocity(x, t)
    for null in (NULL_LABEL, 3):
        assert torch.equal(none, network.velocity(x, t, torch.full((4,), null)))
    assert not torch.allclose(none, network.velocity(x, t, torch.zeros(4, dtype=torch.long)))


def test_an_unconditional_network_ignores_labels():
    network = tiny(label_dim=0)
    assert network.num_classes is None
    x, t = torch.randn(4, 2, 8, 8), torch.rand(4)
    assert torch.equal(network.velocity(x, t), network.velocity(x, t, torch.zeros(4, dtype=torch.long)))


def test_extra_embedding_and_late_time_are_heard():
    network = tiny()
    x, t = torch.randn(4, 2, 8, 8), torch.rand(4)
    plain = network.velocity(x, t)
    assert not torch.allclose(plain, network.velocity(x, t, embedding=torch.randn(4, network.embedding_size)))
    assert torch.equal(plain, network.velocity(x, t, late_time=t))
    assert not torch.allclose(plain, network.velocity(x, t, late_time=t / 2))


def test_a_resolution_that_cannot_be_halved():
    with pytest.raises(ConfigError, match="halved 2 times"):
        EDM2(**{**TINY, "img_resolution": 6, "channel_mult": (1, 1, 1)})


def test_low_rank_updates_need_linear_layers():
    with pytest.raises(ConfigError, match="no linear layers"):
        add_lora(tiny(), rank=2)


# Magnitudes.


@given(st.integers(0, 1000), st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_operations_preserve_magnitude(seed, t):
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (torch.randn(64, n, 16, 16, generator=generator) for n in (8, 8, 24))
    for result in (mp_sum(a, b, t), mp_silu(a)):
        assert abs(float(result.square().mean().sqrt()) - 1) < 0.02
    cat = mp_cat(a, c, t)
    assert abs(float(cat.square().mean().sqrt()) - 1) < 0.02
    left, right = cat[:, :8].square().sum().sqrt(), cat[:, 8:].square().sum().sqrt()
    assert abs(float(left / right) - (1 - t) / t) < 0.05 * (1 - t) / t
    assert abs(float(normalize(5 * a, dim=[1]).square().mean().sqrt()) - 1) < 1e-3


def test_only_the_direction_of_weights_counts():
    conv = MPConv(6, 5, (3, 3)).eval()
    x = torch.randn(2, 6, 8, 8)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(torch.linspace(0.5, 20, 5)[:, None, None, None])
    torch.testing.assert_close(conv(x), before, rtol=5e-4, atol=5e-4)


def test_training_replaces_weights_by_scaled_ones_once_after_each_change():
    network = tiny().train()
    x, t = torch.randn(4, 2, 8, 8), torch.rand(4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    weight = network.unet.out_conv.weight
    for _ in range(2):
        first, second = network.velocity(x, t), network.velocity(x, t / 2)  # two evaluations, one graph
        version = weight._version
        (first + second).square().mean().backward()
        assert weight._version == version
        lengths = weight.detach().flatten(1).square().mean(1).sqrt()
        torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=0, atol=5e-4)
        optimizer.step()
        optimizer.zero_grad()
        assert weight._version > version
    stored = weight.detach().clone()
    network.eval().velocity(x, t)
    assert torch.equal(weight, stored)


def test_dropout_is_for_training():
    network = tiny(dropout=0.5)
    x, t = torch.randn(4, 2, 8, 8), torch.rand(4)
    assert torch.equal(network.velocity(x, t), network.velocity(x, t))
    network.train()
    assert not torch.equal(network.velocity(x, t), network.velocity(x, t))


# The linear path.


class OfGaussian(EDM2):
    """The network that denoises Gaussian data N(mean, std^2) perfectly: F from D by the preconditioner, in float64."""

    mean, std = 0.3, 0.8

    def _raw(self, x, c_noise, labels, embedding=None, late_c_noise=None):
        sigma = (4 * c_noise.double()).exp()[:, None, None, None]
        sd = self.sigma_data
        total = sigma**2 + sd**2
        z = x.double() * total.sqrt()
        denoised = self.mean + self.std**2 / (self.std**2 + sigma**2) * (z - self.mean)
        return ((denoised - sd**2 / total * z) / (sigma * sd / total.sqrt())).to(x.dtype)


@given(
    st.floats(math.log(0.002), math.log(80.0)),
    st.floats(-2, 2),
    st.floats(0.1, 2.0),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_change_of_variables_is_exact_on_gaussian_data(log_sigma, mean, std, scale, dtype):
    network = OfGaussian(**TINY, data_scale=scale)
    network.mean, network.std = mean, std
    sigma = math.exp(log_sigma)
    t = torch.full((4,), sigma / (sigma + scale), dtype=torch.float64).to(dtype)
    x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    exact = GaussianTeacher(torch.full((128,), mean / scale).double(), (std / scale) ** 2)
    reference = exact.velocity(x.double().flatten(1), t.double()).reshape(x.shape)
    ours = network.velocity(x, t)
    assert ours.dtype == dtype
    error = (ours - reference).abs().max() / (1 + reference.abs().max())
    assert error <= 1e-5


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_velocity_and_denoiser_agree(scale):
    """D = S (x - t u) at z = S x/(1 - t)."""
    network = tiny(data_scale=scale).double()
    x, t = torch.randn(6, 2, 8, 8).double(), torch.linspace(0.05, 0.95, 6).double()
    labels = torch.tensor([0, 1, 2, -1, 0, 1])
    one_hot = torch.nn.functional.one_hot(labels.clamp_min(0), 3) * (labels >= 0)[:, None]
    at = t[:, None, None, None]
    denoised = network.denoise(scale * x / (1 - at), scale * t / (1 - t), one_hot.double())
    torch.testing.assert_close(denoised, scale * (x - at * network.velocity(x, t, labels)))


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_velocity_is_finite_and_continuous_to_both_ends(scale):
    network = tiny(data_scale=scale)
    x = torch.randn(1, 2, 8, 8).expand(6, -1, -1, -1)
    for end, near in ((0.0, 1e-6), (1.0, 1 - 1e-6)):
        t = torch.tensor([end, near] * 3)
        velocity = network.velocity(x, t)
        assert velocity.isfinite().all()
        assert (velocity[0] - velocity[1]).abs().max() < 1e-4
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda t: network.velocity(x[:2], t), (torch.tensor([0.0, 1.0]),), (torch.ones(2),))
    assert slope.isfinite().all()


def test_what_it_was_built_with():
    network = tiny()
    again = EDM2(**network.arguments)
    again.load_state_dict(network.state_dict())
    x, t = torch.randn(2, 2, 8, 8), torch.rand(2)
    assert torch.equal(network.velocity(x, t), again.eval().velocity(x, t))
    assert network.arguments["num_blocks"] == 1
    assert network.arguments["sigma_data"] == 0.5


def test_sums_of_mixed_precisions():
    """Under autocast on a GPU one branch is in half precision and the other, after a normalisation, is not."""
    a, b = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    mixed = mp_sum(a, b.bfloat16(), 0.3)
    torch.testing.assert_close(mixed, mp_sum(a, b, 0.3), rtol=0, atol=0.02)


def frozen(network):
    """The network, of which the weights are scaled once."""
    network.eval().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, ForcedWeight):
            module.freeze()
    return network


def test_frozen_weights_are_scaled_once():
    network = tiny()
    x, t, labels = torch.randn(2, 2, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([0, 2])
    with torch.no_grad():
        wanted = network.eval().velocity(x, t, labels)
        frozen(network)
        kernels = []
        for _ in range(3):
            with Flops() as counts:
                assert torch.equal(network.velocity(x, t, labels), wanted)
            kernels.append(counts.kernels)
    layers = sum(isinstance(module, ForcedWeight) for module in network.modules())
    assert kernels[1] == kernels[2] <= kernels[0] - 5 * layers
    assert network.double().velocity(x.double(), t.double(), labels).dtype == torch.float64


def test_copies_of_frozen_weights_are_trained():
    network = frozen(tiny())
    x, t, labels = torch.randn(2, 2, 8, 8), torch.tensor([0.3, 0.9]), torch.tensor([0, 2])
    before = network.velocity(x, t, labels)
    copied = copy.deepcopy(network).train().requires_grad_(True)
    copied.velocity(x, t, labels).square().mean().backward()
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad
    average = copy.deepcopy(copied).eval().requires_grad_(False)  # as an average of the student
    for other in (copied.eval(), average):
        assert not torch.allclose(other.velocity(x, t, labels), before)
    assert torch.equal(network.velocity(x, t, labels), before)


def test_what_inference_mode_makes_is_not_kept():
    network = frozen(tiny())
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([0.3, 0.9])
    with torch.inference_mode():
        network.velocity(x, t)
    _, slope = torch.func.jvp(lambda x: network.velocity(x, t), (x,), (torch.ones_like(x),))
    leaf = x.clone().requires_grad_()
    network.velocity(leaf, t).sum().backward()
    assert leaf.grad is not None
    assert slope.abs().max() > 0


def test_the_teacher_of_a_training_is_frozen_and_its_student_is_not(tmp_path):
    short = ["train.steps = 2", "train.batch_size = 2", "train.states = @prior()", "train.precision = 'float32'"]
    with config.parsed(config.composed("freeflow", "mnist_edm2"), short):
        loop = configured_loop(tmp_path, "cpu")
    before = {name: value.clone() for name, value in loop.student.state_dict().items()}
    loop.train_step()
    modules = {name: [m for m in part.modules() if isinstance(m, MPConv)] for name, part in parts_of(loop).items()}
    assert all(module._frozen is not None for module in modules["teacher"])
    assert any(module._frozen for module in modules["teacher"])
    for name in ("student", "average", "online"):
        assert modules[name]
        assert all(module._frozen is None for module in modules[name])
    assert any(not torch.equal(value, before[name]) for name, value in loop.student.state_dict().items())


def parts_of(loop):
    return {
        "teacher": loop.teacher,
        "student": loop.student,
        "average": loop.averages["ema"].module,
        "online": loop.objective.modules()["online"],
    }
