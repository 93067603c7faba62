"""Value and derivative in one pass, of networks of diffusers."""

import pytest
import torch
from test_one_pass import distance, value_slope_gradients
from torch import nn

from flowdistill.interfaces import FlowMap, Jump
from flowdistill.plumbing.torch_fidelity import torch_fidelity

pytestmark = pytest.mark.slow  # diffusers takes long to import

UNET = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
}


def unet(diffusers):
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    network = diffusers.UNet2DModel(in_channels=4, out_channels=4, **blocks, **UNET)
    return network, lambda x, t: network(x, 1000 * t).sample


def conditional_unet(diffusers):
    network = diffusers.UNet2DConditionModel(
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **UNET,
    )
    text = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
    return network, lambda x, t: network(x, 1000 * t, encoder_hidden_states=text.to(x) * t[:, None, None]).sample


def dit(diffusers):
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=16,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    )
    return network, lambda x, t: network(x, timestep=1000 * t, class_labels=torch.arange(3)).sample[:, :4]


class Student(FlowMap):
    """Sees the duration in its input."""

    sample_shape, num_classes = (4, 16, 16), None

    def __init__(self, network, evaluate):
        super().__init__()
        self.network, self.evaluate, self.duration = network, evaluate, nn.Linear(1, 4)

    def average_velocity(self, x, t, s, condition=None):
        return self.evaluate(x + self.duration((t - s)[:, None])[:, :, None, None], t)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("build", [unet, conditional_unet, dit])
def test_one_pass_is_two_passes(build, dtype, training):
    torch_fidelity("version")  # after it torchvision can be imported, which diffusers does
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    student = Student(*build(diffusers)).to(dtype).train(training)
    x, dx = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    jump = Jump(x, torch.tensor([0.9, 0.8, 0.7], dtype=dtype), torch.tensor([0.1, 0.4, 0.2], dtype=dtype))
    for direction in ({"ds": 1.0}, {"dx": dx, "dt": 1.0}):
        one = value_slope_gradients(student, jump, **direction)
        two = value_slope_gradients(student, jump, passes=2, **direction)
        for got, wanted in zip(one, two, strict=True):
            assert distance(got, wanted) < (1e-10 if dtype == torch.float64 else 1e-5)
