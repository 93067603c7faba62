"""Released students against their authors' code: every tensor that it computed, through the loader of their files."""

import copy
import functools
import itertools
import re

import pytest
import torch
from golden_files import error, golden, outputs, recorded
from student_files import ARGUMENTS, file_of, load, pickled, state, written

from flowdistill import NULL_LABEL, Condition

NAMES = ["dmf", "dmf512", "meanflow", "secant", "alphaflow", "imm", "tvm"]
ENDS = {"secant": ("derived/t", "derived/s"), "imm": ("inputs/t", "inputs/s")}
ENDS["tvm"] = ENDS["imm"]
EMBEDDERS = {
    "t_embedding": "network.t_embedder",
    "y_embedding": "network.y_embedder",
    "duration_embedding": "duration_embedding",
    "s_embedding": "duration_embedding",
    "cfg_embedding": "guidance_embedding",
    "guidance_embedding": "guidance_embedding",
    "final_layer_out": "network.final_layer",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    found = {name: written(name, folder) for name in ARGUMENTS}
    found["tvm_unscaled"] = folder / "im512_w2p5.pkl"
    found["tvm_unscaled"].write_bytes(pickled(state("tvm"), network="TVMWrapper", do_scale_param=False))
    return found


def cases(*parts):
    """Each student with each of its tensors of some parts, but for those that others are computed from."""
    given = ("derived/t", "derived/s", "derived/x_t")
    found = [(name, key) for name in NAMES for key in outputs(file_of(name)) if key not in given]
    return [(name, key) for name, key in found if key.startswith(parts)]


def tolerance(name, key):
    if name == "tvm":
        return 1e-5 if key.startswith("outputs/") else 3e-5
    return 2e-5 if "cfg1" in key or name == "imm" else 1e-5


def student_of(name, key):
    """Which of the students that share a file a tensor is of."""
    if name == "imm":
        return "imm_s" if "identity" in key else "imm_ts"
    if name == "tvm":
        return "tvm_unscaled" if "unscaled" in key or key == "outputs/forward_model" else "tvm"
    return "stee" if "stee" in key else name


@functools.cache
def _loaded(path, name, **kwargs):
    return load(path, **ARGUMENTS[name.removesuffix("_unscaled")], **kwargs)


def inputs(name):
    """The state, the times in this library's convention, and the condition."""
    data = golden(file_of(name))
    x = data["derived/x_t" if name == "imm" else "inputs/x"].reshape(4, *data["derived/F"].shape[1:])
    times = [data[key] for key in ENDS.get(name, ("inputs/t", "inputs/r"))]
    one_hot = data.tensors.get("inputs/class_labels", data.tensors.get("inputs/label"))
    if one_hot is not None:  # all zero for no class
        classes = torch.where(one_hot.sum(1) > 0, one_hot.argmax(1), NULL_LABEL)
    labels = data["inputs/y"] if one_hot is None else classes
    scale = torch.ones(4) if name == "imm" else data.tensors.get("inputs/cfg")
    return x, *times, Condition(labels, scale)


# One evaluation.


def scaled(name, key):
    """The authors' states over ours."""
    return 0.5 if name == "imm" and not key.startswith("derived/") else 1.0


@pytest.mark.parametrize(("name", "key"), cases("derived/", "outputs/"))
def test_evaluations(files, name, key):
    data, student = golden(file_of(name)), student_of(name, key)
    flow_map = _loaded(files[student], student)
    x, t, s, condition = inputs(name)
    if "stee" in key:
        condition = Condition(condition.labels, torch.full((4,), 1.7) if key.endswith("cfg1.7") else None)
    if key == "outputs/denormalised":
        ours = flow_map.decoder.latents(data["inputs/z"][:, 0])[:, None]
    elif key == "outputs/stride_cfg_forward":  # the first rows, at the times of the first
        ours = flow_map(x[:2], t[:1].expand(2), s[:1].expand(2), Condition(condition.labels[:2]))
    elif key.endswith("X") or (name == "imm" and key.startswith("outputs/")):
        ours = flow_map(x, t, s, condition)
    else:
        sign = -1 if name == "secant" and key.startswith("outputs/") else 1
        ours = sign * flow_map.average_velocity(x, t, s, condition)
        if "with_cfg" in key:  # the authors guide the first half of the batch, and give it twice
            ours = ours[:2].repeat(2, 1, 1, 1)
    assert error(scaled(name, key) * ours.reshape(data[key].shape), data[key]) <= tolerance(name, key)


@pytest.mark.parametrize(("name", "key"), cases("intermediates/"))
def test_intermediates(files, name, key):
    data, student = golden(file_of(name)), student_of(name, key)
    flow_map = _loaded(files[student], student)
    x, t, s, condition = inputs(name)
    kind = key.removeprefix("intermediates/")
    if kind == "tokens_in":
        x = x / ((1 - t) ** 2 + t**2).sqrt()[:, None, None, None] if name == "imm" else x
        ours = flow_map.network.x_embedder(x) + flow_map.network.pos_embed
    elif kind == "r_embedding":
        ours = flow_map.network.t_embedder(s)
    elif kind == "network_out":
        ours = flow_map.average_velocity(x, t, s, condition)
    else:
        module = EMBEDDERS.get(kind, kind.replace("block", "network.blocks.").removesuffix("_out"))
        ours = recorded(flow_map, [module], lambda: flow_map(x, t, s, condition))[module]
        ours = ours[: len(data[key])]  # without those of the second evaluation
    if name == "secant" and kind in ("t_embedding", "s_embedding"):
        ours = 2 * ours  # the mean of the two lies in their last layers
    assert error(ours, data[key]) <= tolerance(name, key)


# Samples.


def sampled(files, name, key):
    """Samples as a setting of the authors' code describes them."""
    data = golden(file_of(name))
    _, setting, steps = key.split("/")
    steps = int(steps.removeprefix("steps"))
    kind, *options = setting.split("_")
    student = student_of(name, key)
    guidance = next((float(o[3:]) for o in setting.split("_") if o.startswith("cfg")), None)
    if name == "imm":
        guidance = guidance or 1.0
    flow_map = _loaded(files[student], student, **({"guidance": guidance} if name != "secant" and guidance else {}))
    z = data["inputs/z"].reshape(3, *flow_map.sample_shape) / scaled(name, key)
    condition = Condition(data["inputs/labels"])
    if kind.startswith("guidance"):
        guidance = float(kind.removeprefix("guidance"))
    if kind == "script":
        guidance = 1.0  # the script's own range embeds every scale as it does its lowest
    if guidance is not None:
        condition = condition.guided(scale=torch.full((3,), guidance))
    if "interval" in setting:
        low, high = (float(v) for v in setting.split("interval")[1].split("-"))
        # Secant's authors include the start of their interval, whose time runs the other way, and not its end.
        condition = condition.guided(interval=(low + 1e-3, high) if name == "secant" else (low, high))
    noise = {part: v.float() for part, v in data.part("noise").items()}
    times, renoise = None, None
    if kind.startswith("shift"):
        times = float(kind[5:]) * torch.linspace(1, 0, steps + 1)
        times = times / (1 + (times - times / float(kind[5:])))
    if kind in ("restart", "consistency"):
        renoise = noise[kind][: steps - 1].reshape(steps - 1, *z.shape)
        if options:
            times = torch.tensor([float(v) for v in options[0].removeprefix("times").split("-")])
    if kind == "ctm":
        return _with_ctm(flow_map, z, condition, noise["ctm"], steps, float(options[0].removeprefix("gamma")))
    return flow_map.sample(z, steps, condition, times, renoise)


@torch.no_grad()
def _with_ctm(flow_map, x, condition, noise, steps, gamma):
    """The sampler of consistency trajectory models: each jump goes further than its end, and noise goes back."""
    grid = torch.linspace(1, 0, steps + 1).tolist()
    for i, (t, end) in enumerate(itertools.pairwise(grid)):
        further = end * (1 - gamma**2) ** 0.5
        x = flow_map(x, x.new_full((len(x),), t), x.new_full((len(x),), further), condition)
        kept = (1 - end) / (1 - further)
        x = kept * x + (1 - kept) * noise[i] if end > 0 else x
    return x


@pytest.mark.parametrize(("name", "key"), cases("samples/"))
def test_samples(files, name, key):
    reference = golden(file_of(name))[key]
    samples = scaled(name, key) * sampled(files, name, key).reshape(reference.shape)
    assert error(samples, reference) <= tolerance(name, key)


# pi-Flow, whose network gives a policy.


def piflow(files, key):
    data, flow_map = golden("students/piflow_tiny"), _loaded(files["piflow_repa"], "piflow_repa")
    kind, name, *steps = key.split("/")
    x, t, s, condition = (*(data[f"inputs/{k}"] for k in "xts"), Condition(data["inputs/y"]))
    policy = flow_map.policy(x, t, condition)
    outputs = {"means": policy.outputs, "logweights": policy.logits.log_softmax(1), "logstds": policy.log_std}
    if kind == "outputs":
        return outputs[name].reshape(data[key].shape)
    if kind == "samples":
        flow_map = copy.deepcopy(_loaded(files["piflow_fm"], "piflow_fm") if "x1000" in name else flow_map)
        flow_map.substeps = int(name.rpartition("substeps")[2])
        return flow_map.sample(data["inputs/z"], int(steps[0].removeprefix("steps")), Condition(data["inputs/labels"]))
    derived = {
        "F": lambda: flow_map.average_velocity(x, t, s, condition),
        "X": lambda: flow_map(x, t, s, condition),
        "pi_source": lambda: policy.velocity(x, t),
        "mid": lambda: x - (t - (t + s) / 2)[:, None, None, None] * policy.velocity(x, t),
        "pi_mid": lambda: policy.velocity(data["derived/mid"], (t + s) / 2),
    }
    network = flow_map.wide.network
    derived |= {
        "t_embedding": lambda: network.t_embedder(t),
        "y_embedding": lambda: network.y_embedder(condition.labels),
        "embedding": lambda: network.t_embedder(t) + network.y_embedder(condition.labels),
        "tokens_in": lambda: network.x_embedder(x) + network.pos_embed,
    }
    if name in derived:
        return derived[name]()
    module = "wide.network." + name.replace("block", "blocks.").removesuffix("_out")
    return recorded(flow_map, [module], lambda: flow_map.policy(x, t, condition))[module]


@pytest.mark.parametrize("key", outputs("students/piflow_tiny"))
def test_piflow(files, key):
    kind = key.split("/")[0]
    bound = {"outputs": 5e-6, "intermediates": 5e-6, "derived": 1e-4, "samples": 3e-4}[kind]
    assert error(piflow(files, key), golden("students/piflow_tiny")[key]) <= bound


# Improved MeanFlow, whose network is another one.


def imf(files, key):
    data, flow_map = golden("students/imf_tiny"), _loaded(files["imf"], "imf")
    kind, name, *steps = key.split("/")
    if kind == "samples":
        omega, *ends = name.split("_interval")
        condition = Condition(data["inputs/labels"], torch.full((3,), float(omega.removeprefix("omega"))))
        if ends:
            condition = condition.guided(interval=tuple(float(v) for v in ends[0].split("-")))
        return flow_map.sample(data["inputs/z"], int(steps[0].removeprefix("steps")), condition)
    x, t, r, y, omega, low, high = (data[f"inputs/{k}"] for k in ("x", "t", "r", "y", "omega", "t_min", "t_max"))
    rows = []
    for i in range(4):  # each with an interval of its own
        condition = Condition(y[i : i + 1], omega[i : i + 1]).guided(interval=(float(low[i]), float(high[i])))
        evaluate = flow_map if name == "X" else flow_map.average_velocity
        if kind == "intermediates":
            module = IMF_MODULES.get(name, name.replace("shared", "shared_blocks.").replace("u_head", "u_heads."))
            module = f"network.{module.removesuffix('_out')}"
            call = functools.partial(evaluate, x[i : i + 1], t[i : i + 1], r[i : i + 1], condition)
            rows.append(recorded(flow_map, [module], call)[module])
        else:
            rows.append(evaluate(x[i : i + 1], t[i : i + 1], r[i : i + 1], condition))
    return torch.cat(rows)


IMF_MODULES = {
    "duration_embedding": "h_embedder",
    "omega_embedding": "omega_embedder",
    "t_min_embedding": "cfg_t_start_embedder",
    "t_max_embedding": "cfg_t_end_embedder",
    "y_embedding": "y_embedder",
    "patches": "x_embedder",
    "final_linear_out": "u_final_layer",
}


@pytest.mark.parametrize("key", outputs("students/imf_tiny"))
def test_imf(files, key):
    bound = 2e-5 if key.startswith("intermediates/") else 1e-5
    assert error(imf(files, key), golden("students/imf_tiny")[key]) <= bound


# Flow-anchored consistency models, whose network is LightningDiT.


def facm(files, key):
    data, flow_map = golden("students/facm_tiny"), _loaded(files["facm"], "facm")
    kind, name, *steps = key.split("/")
    zero, y = torch.zeros(4), torch.where(data["inputs/y"] == 1000, NULL_LABEL, data["inputs/y"])
    x, t, condition = data["inputs/x"], data["derived/t"], Condition(y)
    if kind == "samples":
        count, z, drawn = int(steps[0].removeprefix("steps")), data["inputs/z"], Condition(data["inputs/labels"])
        if name == "euler_of_jumps":  # which takes jumps for velocities
            for i in range(count):
                start = torch.full((3,), 1 - i / count)
                z = z - flow_map.average_velocity(z, start, torch.zeros(3), drawn) / count
            return z
        if "cfg" in name:
            flow_map = _loaded(files["facm"], "facm", guidance=1.6)
            drawn = drawn.guided(interval=(0.0, 0.9))  # in the authors' time from .1 on
        return flow_map.sample(z, count, drawn, renoise=data["noise/consistency"][: count - 1].float())
    if kind == "intermediates":
        module = FACM_MODULES.get(name) or re.sub(r"^block(\d)_(attn|mlp)_out$", r"blocks.\1.\2", name)
        module = "network." + re.sub(r"^block(\d)_out$", r"blocks.\1", module)
        call = functools.partial(flow_map.average_velocity, x, t, zero, condition)
        return recorded(flow_map, [module], call)[module]
    if name == "velocity":
        found = flow_map.velocity(x, t, condition)
    elif name == "X_to_data":
        found = flow_map(x, t, zero, condition)
    else:
        found = flow_map.average_velocity(x, t, zero, condition)
    return -found if kind == "outputs" else found


FACM_MODULES = {
    "t_embedding": "t_embedder",
    "y_embedding": "y_embedder",
    "tokens_in": "x_embedder",
    "final_layer_out": "final_layer",
}


@pytest.mark.parametrize("key", [key for key in outputs("students/facm_tiny") if key != "derived/t"])
def test_facm(files, key):
    found = facm(files, key)
    if key == "intermediates/tokens_in":
        found = found + _loaded(files["facm"], "facm").network.pos_embed
    assert error(found, golden("students/facm_tiny")[key]) <= (2e-5 if "cfg1" in key else 1e-5)
