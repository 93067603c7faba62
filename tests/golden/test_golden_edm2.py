"""EDM2 against its authors' code: every tensor that it computed."""

import functools
import math

import pytest
import torch
from golden_files import error, golden, outputs, recorded

from flowdistill import NETWORKS, Condition
from flowdistill.guidance import GuidedTeacher
from flowdistill.networks import edm2
from flowdistill.networks.edm2 import MPConv
from flowdistill.solvers import Edm
from flowdistill.wrapped_teachers import NetworkTeacher

FILE, SAMPLES = "edm2_tiny", "edm2_tiny_samples"


def build(config, weights, **kwargs):
    built = NETWORKS.build("edm2", **config, **kwargs)
    built.load_state_dict(weights)
    return built.eval().requires_grad_(False)


@functools.cache
def network(part="state_dict", **kwargs):
    file, key = (FILE, "config") if part == "state_dict" else (SAMPLES, f"{part}_config")
    return build(golden(file).metadata[key], golden(file).part(part), **kwargs)


def halved():
    """Weights as the released files have them, read as `read_release` reads them."""
    weights = {name: v.half().float() for name, v in golden(FILE).part("state_dict").items()}
    for name in weights:
        if name.endswith(("emb_gain", "out_gain")):
            linear = name.replace("emb_gain", "emb_linear.weight").replace("out_gain", "out_conv.weight")
            root = math.sqrt(weights[linear][0].numel())
            weights[name] = (weights[name].half() / root).float() * root
    return build(golden(FILE).metadata["config"], weights)


@functools.cache
def denoised():
    data, net = golden(FILE), network()
    parts = [f"unet.{side}.{name}" for side in ("enc", "dec") for name in getattr(net.unet, side)]
    parts += ["unet", "unet.emb_fourier", "unet.emb_noise", "unet.emb_label"]
    result = {}

    def call():
        result["D"] = net.denoise(data["inputs/x"], data["inputs/sigma"], data["inputs/labels"])

    return result | recorded(net, parts, call)


def labels():
    one_hot = golden(FILE)["inputs/labels"]
    return torch.where(one_hot.any(1), one_hot.argmax(1), -1)


def operation(name: str):
    data = golden(FILE)
    a, b, c, w = (data[f"inputs/op_{k}"] for k in "abcw")
    conv = MPConv(6, 5, (3, 3))
    conv.load_state_dict({"weight": w})
    kernel = (1, 3, 3, 1) if name.endswith("1331)") else (1, 1)
    if name.startswith("mp_conv"):
        if name.startswith("mp_conv_train"):
            trained = conv(b)
            return conv.weight if name.endswith("after") else trained
        return conv.eval()(b, torch.tensor(float(name.removesuffix(")").split("gain=")[1])))
    if name == "dec_in1_big_input":
        return network().unet.dec["8x8_in1"](data["inputs/op_big"], data["intermediates/emb"][:1])
    return {
        "mp_silu(a)": lambda: edm2.mp_silu(a),
        "mp_sum(a,b,t=0.3)": lambda: edm2.mp_sum(a, b, 0.3),
        "mp_sum(a,b,t=0.5)": lambda: edm2.mp_sum(a, b, 0.5),
        "mp_cat(a,c,t=0.3)": lambda: edm2.mp_cat(a, c, 0.3),
        "mp_cat(a,c,t=0.5)": lambda: edm2.mp_cat(a, c, 0.5),
        "normalize(b,all_but_first)": lambda: edm2.normalize(b),
        "normalize(b,dim=1)": lambda: edm2.normalize(b, dim=[1]),
    }.get(name, lambda: edm2.resample(a, "up" if "up" in name else "down", kernel))()


def derived(name: str, dtype: torch.dtype):
    """The same network as a velocity of the linear path, in either unit; all noise levels are told."""
    data = golden(FILE)
    _, unit, quantity = name.split("/")
    net = network(data_scale=1.0 if unit == "unit" else 0.5, noise_levels=(1e-9, 1e9))
    t = data["inputs/t"]
    sigma = net.data_scale * t / (1 - t)
    if quantity == "sigma":
        return sigma
    z = net.data_scale * data["inputs/x_t"] / (1 - t)[:, None, None, None]
    if quantity == "D_official":
        return net.denoise(z, sigma, data["inputs/labels"])
    if quantity == "F":
        c_in = 1 / (sigma.square() + net.sigma_data**2).sqrt()
        return net._raw(z * c_in[:, None, None, None], sigma.log() / 4, data["inputs/labels"])
    return net.velocity(data["inputs/x_t"].to(dtype), t.to(dtype), labels())


def compute(name: str):
    data, net = golden(FILE), network()
    kind, _, rest = name.partition("/")
    if kind == "ops":
        return operation(rest)
    if kind == "derived":
        return derived(name, torch.float64)
    if kind == "intermediates":
        if rest == "emb":
            return net.unet.embed(data["inputs/sigma"].log() / 4, data["inputs/labels"], None)
        if rest == "F":
            return denoised()["unet"]
        found = denoised()[f"unet.{rest}"]
        return found[[2, 4]] if rest.startswith(("enc", "dec")) else found
    sigma = data["inputs/sigma"]
    return {
        "D": lambda: denoised()["D"],
        "D_label_none": lambda: net.denoise(data["inputs/x"], sigma),
        "logvar": lambda: net.log_variance(sigma),
        "D_fp16_weights": lambda: halved().denoise(data["inputs/x"], sigma, data["inputs/labels"]),
        "logvar_fp16_weights": lambda: halved().log_variance(sigma),
    }[rest]()


@pytest.mark.parametrize("name", outputs(FILE))
def test_edm2(name):
    tolerance = 3e-3 if name == "ops/dec_in1_big_input" else 5e-5 if name.endswith("/u") else 2e-5
    with torch.no_grad():
        assert error(compute(name), golden(FILE)[name]) <= tolerance


@pytest.mark.parametrize("unit", ["unit", "data_scaled"])
def test_velocity_in_single_precision(unit):
    name = f"derived/{unit}/u"
    assert error(derived(name, torch.float32), golden(FILE)[name]) <= 5e-5


@pytest.mark.parametrize("name", outputs(SAMPLES))
def test_edm2_samples(name):
    data = golden(SAMPLES)
    if name.startswith("derived/"):
        assert error(Edm(steps=8).levels(), data[name]) <= 1e-12
        return
    _, steps, dtype, guidance = name.split("/")
    model = NetworkTeacher(network())
    if guidance != "guidance1":
        guide = NetworkTeacher(network(guidance.removesuffix("_guidance1.7")))
        model = GuidedTeacher(model, 1.7, guide=guide)
    solver = Edm(steps=int(steps.removeprefix("steps")))
    noise = data["inputs/noise"].to(getattr(torch, dtype))
    before = model.evaluations
    samples = solver.solve(model, noise, Condition(data["inputs/labels"].argmax(1))) * solver.data_scale
    assert samples.dtype == noise.dtype
    assert model.evaluations - before == len(noise) * (2 * solver.steps - 1) * (1 if guidance == "guidance1" else 2)
    assert error(samples, data[name]) <= (2e-5 if solver.steps == 32 else 5e-5)
