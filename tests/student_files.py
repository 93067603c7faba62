"""Files of released students, written as their authors write them, from the tensors in tests/golden/students."""

import json
import pickle
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path

import pytest
import safetensors.torch
import torch
from edm2_files import Layer, writing
from golden_files import golden
from hypothesis import strategies as st
from torch import Tensor, nn

import flowdistill
from flowdistill import Condition

ARGUMENTS = {
    "dmf": {"num_heads": 4, "early_blocks": 3},
    "dmf512": {"early_blocks": 3},
    "meanflow": {"num_heads": 4, "num_classes": 11},
    "secant": {"num_heads": 3},
    "stee": {"num_heads": 3},
    "alphaflow": {"num_heads": 4, "num_classes": 10},
}
"""What the tiny networks need said, as the released ones do not."""
ARGUMENTS |= {"imm_ts": {"num_classes": 10}, "imm_s": {"num_classes": 10}, "piflow_repa": {}, "piflow_fm": {}}
ARGUMENTS |= {"tvm": {"num_classes": 10}}
ARGUMENTS |= {"imf": {"num_classes": 10, "input_size": 8, "guidance": 8.0, "interval": (0.4, 0.65)}}
ARGUMENTS |= {"facm": {}}
_SHARED = {"stee": "secant", "imm_ts": "imm", "imm_s": "imm", "piflow_repa": "piflow", "piflow_fm": "piflow"}


def file_of(name: str) -> str:
    """The golden file that has the weights of a student."""
    return f"students/{_SHARED.get(name, name)}_tiny"


def state(name: str) -> dict[str, Tensor]:
    """The state dictionary of a student, under its authors' names."""
    tensors = golden(file_of(name)).part("state_dict")
    if name == "stee":
        changed = golden(file_of(name)).part("state_dict_stee")
        tensors = {k: v for k, v in tensors.items() if not k.startswith("cfg_embedder.")} | changed
    return tensors


def written(name: str, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """A file of a student as its authors write it."""
    tensors = state(name) if tensors is None else tensors
    if name.startswith("piflow"):
        path = folder / {"piflow_repa": "gmrepa_k6_2step", "piflow_fm": "gmdit_k6_1step"}[name]
        path.mkdir()
        config = golden(file_of(name)).metadata["config"] | {"_class_name": "GMDiTTransformer2DModelV2"}
        (path / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(dict(tensors), path / "diffusion_pytorch_model.safetensors")
        return path
    if name.startswith("imm"):
        path = folder / f"imagenet256_{name.removeprefix('imm_')}_a1.pkl"
        path.write_bytes(pickled(tensors))
        return path
    if name == "tvm":
        path = folder / "im256_w1p75.pkl"
        path.write_bytes(pickled(tensors, network="TVMWrapper", change=lambda release: {"net": release["ema"]}))
        return path
    if name == "facm":
        averages = {f"ema_models.{n}.ema_model.{k}": v + (1 - n) for n in (0, 1) for k, v in tensors.items()}
        other = {k: v + 2 for k, v in tensors.items()}
        torch.save({"model": other, "emas": averages, "epoch": 3}, folder / "3ep-stg2.pt")
        return folder / "3ep-stg2.pt"
    if name == "imf":
        torch.save(dict(tensors), folder / "iMF-tiny-2.pth")
        return folder / "iMF-tiny-2.pth"
    content = {"dmf": tensors, "dmf512": tensors, "meanflow": {"ema": tensors}}
    torch.save(content.get(name, {"net": {}, "ema": tensors, "stats": {"step": 3}}), folder / f"{name}.pt")
    return folder / f"{name}.pt"


# Pickles with source code, as of inductive moment matching and terminal velocity matching.


class Attention(nn.Module):
    """Stands for timm's, which is pickled by its name."""


class OwnAttention(nn.Module):
    """Stands for terminal velocity matching's own, which is pickled by its name all the same."""


class Mlp(nn.Module):
    """Stands for timm's."""


class PatchEmbed(nn.Module):
    """Stands for timm's."""


class Format(Enum):
    """Stands for timm's."""

    NCHW = "NCHW"


_BY_NAME = {
    Attention: "timm.models.vision_transformer",
    OwnAttention: "training.dit",
    Mlp: "timm.layers.mlp",
    PatchEmbed: "timm.layers.patch_embed",
    Format: "timm.layers.format",
}
_CARRIED = {
    "model.t_embedder": "TimestepEmbedder",
    "model.s_embedder": "TimestepEmbedder",
    "model.guidance_embedder": "TimestepEmbedder",
    "model.y_embedder": "LabelEmbedder",
    "model.final_layer": "FinalLayer",
}
_NAMED = {"mlp": Mlp, "x_embedder": PatchEmbed}
_OUTER = {
    "IMMPrecond": {"": "IMMPrecond", "model": "DiT_XL_2"},
    "TVMWrapper": {"": "TVMWrapper", "model": "DiT_XL_2_18h"},
}


def _module(place: str, tensors: Mapping[str, Tensor], network: str) -> nn.Module:
    """The module at a place in a network, with its classes as its authors' pickles have them."""
    inside = {k.removeprefix(f"{place}." if place else ""): v for k, v in tensors.items() if k.startswith(place)}
    children = {name.split(".")[0] for name in inside if "." in name}
    carried = (_CARRIED | _OUTER[network]).get(place) or (
        "DiTBlock" if re.fullmatch(r"model\.blocks\.\d+", place) else None
    )
    name = place.rpartition(".")[2]
    if carried is not None:
        module: nn.Module = type(carried, (Layer,), {})()
    elif name == "attn":
        module = Attention() if network == "IMMPrecond" else OwnAttention()
    elif name in _NAMED and "embedder" not in place.rpartition(".")[0]:
        module = _NAMED[name]()
    elif children and all(child.isdigit() for child in children):
        last = max(map(int, children))
        module = nn.ModuleList() if name == "blocks" else nn.Sequential(*(nn.SiLU() for _ in range(last + 1)))
    else:
        weight = inside["weight"]
        if weight.ndim == 1:
            module = nn.RMSNorm(1)
        elif weight.ndim == 4:
            module = nn.Conv2d(1, 1, 1)
        else:
            module = nn.Embedding(1, 1) if name == "embedding_table" else nn.Linear(1, 1)
    for child in sorted(children, key=lambda c: (len(c), c)):
        module.add_module(child, _module(f"{place}.{child}".strip("."), tensors, network))
    for parameter, value in inside.items():
        if "." not in parameter:
            setattr(module, parameter, nn.Parameter(value.clone(), requires_grad=parameter != "pos_embed"))
    if isinstance(module, Attention):
        module.num_heads, module.fused_attn, module.q_norm = 4, True, nn.Identity()
    if isinstance(module, PatchEmbed):
        module.output_fmt, module.dtype = Format.NCHW, torch.float32
    return module


def pickled(
    tensors: Mapping[str, Tensor],
    protocol: int = 4,
    change: Callable = lambda release: release,
    network: str = "IMMPrecond",
    **said: object,
) -> bytes:
    """The bytes of a file, where the wrapper of the network says some things."""
    wrapper = _module("", tensors, network)
    wrapper._init_kwargs = {"model_type": "DiT_XL_2", "T": 0.994, "eps": 0.0, "model_kwargs": {"depth": 28}}
    vars(wrapper).update({"temb_type": "stride", "do_scale_param": True, **said})
    with pytest.MonkeyPatch.context() as patch, writing():
        for kind, home in _BY_NAME.items():
            parts = home.split(".")
            for i in range(1, len(parts) + 1):
                place = ".".join(parts[:i])
                patch.setitem(sys.modules, place, sys.modules.get(place) or types.ModuleType(place))
            patch.setattr(sys.modules[home], kind.__name__, kind, raising=False)
            patch.setattr(kind, "__module__", home)
        return pickle.dumps(change({"ema": wrapper.eval(), "augment_pipe": None, "steps": 2**40}), protocol)


def load(name_or_path: object, **kwargs: object) -> flowdistill.FlowMap:
    """`flowdistill.load_flow_map` without its words on licences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return flowdistill.load_flow_map(name_or_path, **kwargs)


def saved(path, content):
    """A file of PyTorch, whose path it gives."""
    torch.save(content, path)
    return path


def drawn(flow_map, condition=None):
    """A jump of every row, which the whole network shows in."""
    x = torch.randn(3, *flow_map.sample_shape, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([1.0, 0.8, 0.5]), torch.tensor([0.0, 0.3, 0.2])
    return flow_map(x, t, s, Condition(torch.tensor([1, 5, 9])) if condition is None else condition)


def altered(data, tensors):
    """Take tensors away, or change their names, shapes or kinds, as hypothesis chooses."""
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        value = tensors.pop(name)
        change = data.draw(st.sampled_from(["none", "shape", "empty", "scalar", "int", "rename", "half"]))
        if change != "none":
            tensors[name + ("x" if change == "rename" else "")] = {
                "shape": value.flatten()[:7].clone(),
                "empty": value.flatten()[:0].clone(),
                "scalar": torch.tensor(1.0),
                "int": value.int(),
                "half": value.half(),
            }.get(change, value)
