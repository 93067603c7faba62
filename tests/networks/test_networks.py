import pytest
import torch

from flowdistill import NETWORKS, NULL_LABEL, ConfigError
from flowdistill.networks import MLP, Linear, SiT, add_lora
from flowdistill.networks.attention import attention

SIT = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}


def randomized(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return network


def networks():
    return {
        "sit": randomized(SiT(**SIT, num_classes=3)),
        "sit learn_sigma qk_norm": randomized(SiT(**SIT, num_classes=3, learn_sigma=True, qk_norm=True)),
        "mlp": randomized(MLP(dim=3, hidden_size=16, num_classes=3)),
    }


@pytest.mark.parametrize("name", networks())
def test_a_fresh_network_is_zero_and_a_trained_one_is_not(name):
    fresh = {"sit": SiT(**SIT, num_classes=3), "mlp": MLP(dim=3, hidden_size=16, num_classes=3)}.get(name)
    x = torch.randn(4, *networks()[name].sample_shape)
    if fresh is not None:
        assert not fresh.velocity(x, torch.rand(4), torch.arange(4) % 3).any()
    output = networks()[name].velocity(x, torch.rand(4), torch.arange(4) % 3)
    assert output.shape == x.shape
    assert output.any()


@pytest.mark.parametrize("name", networks())
def test_null_label_is_no_label(name):
    network = networks()[name]
    x, t = torch.randn(4, *network.sample_shape), torch.rand(4)
    none = network.velocity(x, t)
    assert torch.equal(none, network.velocity(x, t, torch.full((4,), NULL_LABEL)))
    assert not torch.allclose(none, network.velocity(x, t, torch.zeros(4, dtype=torch.long)))


@pytest.mark.parametrize("name", networks())
def test_extra_embedding_is_heard(name):
    network = networks()[name]
    x, t = torch.randn(4, *network.sample_shape), torch.rand(4)
    embedding = torch.randn(4, network.embedding_size)
    assert not torch.allclose(network.velocity(x, t), network.velocity(x, t, embedding=embedding))


def test_sit_in_the_authors_time_is_the_velocity_mirrored():
    network = randomized(SiT(**SIT, num_classes=3))
    x, t, y = torch.randn(4, 1, 4, 4), torch.rand(4), torch.arange(4) % 3
    torch.testing.assert_close(network.velocity(x, t, y), -network(x, 1 - t, y))


def test_sit_has_the_published_size():
    with torch.device("meta"):
        network = SiT(
            input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16, num_classes=1000
        )
    assert sum(p.numel() for p in network.parameters()) == 675_129_632


def test_position_table_is_never_trained():
    network = SiT(**SIT, num_classes=3).requires_grad_(False).requires_grad_(True)
    assert not network.pos_embed.requires_grad
    assert network.x_embedder.proj.weight.requires_grad


def test_linear_has_the_numbers_of_torch_under_every_transform():
    torch.manual_seed(0)
    ours = Linear(5, 3).double()
    theirs = torch.nn.Linear(5, 3).double()
    theirs.load_state_dict(ours.state_dict())
    x, v = torch.randn(2, 4, 5).double(), torch.randn(2, 4, 5).double()
    for call in (
        lambda layer: torch.func.jvp(layer, (x,), (v,)),
        lambda layer: torch.func.jvp(lambda x: layer(x).sin(), (x,), (v,)),
        lambda layer: torch.func.vjp(lambda x: layer(x).sin(), x)[1](torch.ones(2, 4, 3).double()),
        lambda layer: torch.func.jvp(
            lambda w: torch.func.functional_call(layer, {"weight": w}, (x,)), (layer.weight,), (layer.weight * 2,)
        ),
        lambda layer: torch.func.jvp(
            lambda b: torch.func.functional_call(layer, {"bias": b}, (x,)), (layer.bias,), (layer.bias * 2,)
        ),
        lambda layer: torch.func.grad(lambda x: layer(x).square().sum())(x),
        lambda layer: torch.func.jacfwd(lambda x: layer(x).square())(x[0, 0]),
    ):
        torch.testing.assert_close(call(ours), call(theirs))
    # reverse over forward: the gradient of a tangent with respect to weights
    for layer in (ours, theirs):
        layer.zero_grad()
        torch.func.jvp(lambda x, layer=layer: layer(x).sin(), (x,), (v,))[1].sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_lora_starts_as_the_module_and_trains_little():
    network = randomized(SiT(**SIT, num_classes=3))
    x, t = torch.randn(4, 1, 4, 4), torch.rand(4)
    before = network.velocity(x, t)
    whole = sum(p.numel() for p in network.parameters())
    add_lora(network, rank=2)
    torch.testing.assert_close(network.velocity(x, t), before)
    trainable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert all(name.endswith(("down.weight", "up.weight")) for name in trainable)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) < 0.5 * whole
    network.velocity(x, t).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in network.parameters())


@pytest.mark.parametrize("tokens", [5, 1025])
def test_attention_is_pytorchs(tokens):
    parts = torch.randn(3, 2, 2, tokens, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = parts.clone().requires_grad_(), parts.clone().requires_grad_()
    result, expected = attention(*ours), torch.nn.functional.scaled_dot_product_attention(*theirs)
    torch.testing.assert_close(result, expected)
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_keeps_a_low_precision(dtype):
    parts = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert attention(*parts.to(dtype)).dtype == dtype
    with torch.autocast("cpu", dtype):
        result = attention(*parts)
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), attention(*parts), atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *(("mlp", {name: size}) for name in ("dim", "hidden_size", "depth", "num_classes") for size in (-1, 10**6)),
        *(("sit", {name: size}) for name in (*SIT, "num_classes") for size in (-1, 10**6)),
        *(("edm2", {name: size}) for name in ("img_resolution", "num_blocks", "model_channels") for size in (0, 10**6)),
        ("mlp", {"depth": 1001}),
        ("sit", {"patch_size": 0}),
    ],
)
def test_sizes_that_nobody_means_are_refused(name, sizes):
    with torch.device("meta"), pytest.raises(ConfigError, match=f"{next(iter(sizes))} must be from [01] to 1000*, not"):
        NETWORKS.build(name, **sizes)
