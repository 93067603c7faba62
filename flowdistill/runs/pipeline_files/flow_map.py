"""The network of a pipeline that flowdistill exported; it needs PyTorch and diffusers alone."""

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config


class FlowMap(ModelMixin, ConfigMixin):
    """The average velocity v of a flow map, which jumps from t to r by x - (t - r) v, as a program in float32.

    Args:
        sample_shape: the shape of a sample, without the batch.
        num_classes: the number of classes; None for an unconditional map.
        guidance_scale: the default guidance scale; None for a map that takes none.
        start: the time of noise, in [0, 1].
        anchored: whether jumps can start at noise alone, so that there is one.
        renoise: whether all jumps lead to data, whose noise several jumps renew between them.
    """

    @register_to_config
    def __init__(self, sample_shape, num_classes=None, guidance_scale=None, start=1.0, anchored=False, renoise=False):
        super().__init__()

    @classmethod
    def from_pretrained(cls, folder, **_):
        """The network of a folder."""
        model = cls.from_config(cls.load_config(folder))
        model.exported = torch.export.load(Path(folder) / "flow_map.pt2")
        model.program = model.exported.module()
        return model

    def save_pretrained(self, *_, **__):
        """Nothing: diffusers would write a folder without the program."""
        raise NotImplementedError("copy the folder that flowdistill exported")

    def forward(self, sample, timestep, r_timestep, class_labels=None, guidance_scale=None):
        """The average velocity between two timesteps in [0, 1000], of samples and their labels."""
        time, end = (torch.full((len(sample),), float(step) / 1000, device=sample.device)
                     for step in (timestep, r_timestep))  # fmt: skip
        given = [sample, time, end]
        if self.config.num_classes is not None:
            given.append(class_labels)
        if self.config.guidance_scale is not None:
            given.append(torch.full_like(time, guidance_scale))
        return self.program(*given)

    def train(self, mode=True):
        """Nothing: the program is that of evaluation."""
        return self

    def _apply(self, fn, recurse=True):
        """Move the program to the device that tensors are moved to; it stays in float32."""
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            from torch.export.passes import move_to_device_pass

            self.exported = move_to_device_pass(self.exported, device)
            self.program = self.exported.module()
        return self
