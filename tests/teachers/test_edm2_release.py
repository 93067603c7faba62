"""Files in EDM2's released format come back bit for bit; hostile ones end in one message, and run nothing.

The files are made here: networks of a few small layers, pickled as the official code pickles its own.
"""

import copy
import json
import math
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from torch import nn

from flowdistill.errors import CheckpointError
from flowdistill.teachers.edm2.release import read_release

ARGUMENTS = {"model_channels": 4, "dropout": 0.1, "use_fp16": True, "label_dim": 0, "channel_mult": [1, 2], "name": None}
HOLE = "here goes something else"


# --- a writer of the format


def _reconstruct_persistent_obj(meta):
    raise AssertionError("nothing of the file is called")


class EasyDict(dict):
    pass


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
EasyDict.__module__ = "dnnlib.util"


@contextmanager
def official_modules():
    """The modules by whose names the official code pickles its objects, as long as something is pickled."""
    modules = {name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")}
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    modules["dnnlib.util"].EasyDict = EasyDict
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield


class Call:
    """Pickled as a call of the function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class Persistent:
    """Pickled as the official code pickles its objects."""

    def __init__(self, class_name, source, **state):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}

    def __reduce__(self):
        return _reconstruct_persistent_obj, (self.meta,)


class Layer(nn.Module):
    """Pickled likewise; ``meta`` replaces parts of what the file says of it."""

    def __init__(self, source, **children):
        super().__init__()
        self._init_args, self._init_kwargs = (), {}
        self._source, self._class_name, self._meta = source, "Layer", {}
        for name, child in children.items():
            setattr(self, name, child)

    def __reduce__(self):
        state = {name: value for name, value in vars(self).items() if name not in ("_source", "_class_name", "_meta")}
        return Persistent(self._class_name, self._source, **state | {"training": False}, **{}).__reduce__()[0], (
            {"type": "class", "version": 6, "module_src": self._source, "class_name": self._class_name, "state": state}
            | self._meta,
        )


def network(source, width=4, dtype=torch.float16):
    """Some of the layers of EDM2, with their names."""
    g = torch.Generator().manual_seed(0)

    def weight(*shape):
        return Layer(source, weight=nn.Parameter(torch.randn(*shape, generator=g)))

    def fourier(n):
        layer = Layer(source)
        layer.register_buffer("freqs", torch.randn(n, generator=g))
        layer.register_buffer("phases", torch.rand(n, generator=g))
        return layer

    def block(gain):
        parts = {"conv_res0": weight(width, width, 3, 3), "emb_linear": weight(width, 3), "conv_res1": weight(width, width, 3, 3)}
        return Layer(source, emb_gain=nn.Parameter(torch.tensor(gain)), **parts)

    unet = Layer(source, out_gain=nn.Parameter(torch.tensor(0.7)), emb_fourier=fourier(width), out_conv=weight(4, width, 3, 3))
    unet.enc = nn.ModuleDict({"8x8_conv": weight(width, 5, 3, 3), "8x8_block0": block(0.3)})
    unet.dec = nn.ModuleDict({"8x8_in0": block(1.1)})
    net = Layer(source, unet=unet, logvar_fourier=fourier(8), logvar_linear=weight(1, 8))
    net._class_name, net._init_kwargs = "Precond", dict(ARGUMENTS)
    return net.to(dtype).eval().requires_grad_(False)


def write(canary, change=lambda net: None, release=lambda parts: parts, dtype=torch.float16, width=4):
    """The bytes of a file whose network went through ``change`` and whose parts through ``release``.

    All source text in it would leave the file ``canary`` if it ran.
    """
    source = f"open({str(canary)!r}, 'w').write('ran')\n"
    net = network(source, width, dtype)
    change(net)
    scale = np.arange(4, dtype=np.float32)
    parts = EasyDict(
        encoder=Persistent("StabilityVAEEncoder", source, scale=scale, bias=scale.astype(np.float64), _vae=None),
        dataset_kwargs=EasyDict(path="imagenet.zip", use_labels=True, resolution=512),
        loss_fn=Persistent("EDM2Loss", source, P_mean=-0.4, note=HOLE),
        ema=net,
    )
    with official_modules():
        return pickle.dumps(release(parts), protocol=4)


def spliced(canary, instructions):
    """A file in which the instructions, which leave one value on the stack, stand in place of a string."""
    data = write(canary)
    hole = b"\x8c" + bytes([len(HOLE)]) + HOLE.encode()
    assert data.count(hole) == 1
    data = data.replace(hole, instructions)
    assert data[2:3] == b"\x95"
    return data[:3] + (len(data) - 11).to_bytes(8, "little") + data[11:] if data.count(b"\x95") == 1 else data


def saved(canary, tmp=Path(), **options):
    path = canary.with_suffix(".pkl")
    path.write_bytes(write(canary, **options))
    return path
