"""SiT and REPA against their authors' code: every tensor that it computed."""

import copy
import functools

import pytest
import torch
from golden_files import error, golden, outputs, recorded

from flowdistill import NETWORKS, Condition
from flowdistill.guidance import GuidedTeacher
from flowdistill.solvers import Dopri5, Euler, EulerMaruyama, Heun, RungeKutta4
from flowdistill.wrapped_teachers import NetworkTeacher

ARGUMENTS = ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes")


@functools.cache
def network(file: str):
    data = golden(file)
    config = data.metadata["config"]
    repa = file == "sit_repa_tiny"
    built = NETWORKS.build(
        "sit",
        **{name: config[name] for name in ARGUMENTS},
        learn_sigma=config.get("learn_sigma", False),
        qk_norm=config.get("qk_norm", False),
        noise_time=1 if repa else 0,
    )
    weights = {k: v for k, v in data.part("state_dict").items() if not k.startswith("projectors.")}
    built.load_state_dict(weights)
    return built.eval().requires_grad_(False)


def teacher(file: str, dtype=torch.float32):
    return NetworkTeacher(copy.deepcopy(network(file)).to(dtype))


# One evaluation.


@functools.cache
def forward(file: str):
    data, net = golden(file), network(file)
    names = ["t_embedder", "y_embedder", "final_layer", *(f"blocks.{i}" for i in range(len(net.blocks)))]
    result = {}

    def call():
        result["forward"] = net(data["inputs/x"], data["inputs/t"], data["inputs/y"])

    result |= recorded(net, names, call)
    return result


def projected(data):
    """REPA's projector, which this library drops, on our tokens of the block that it looks at."""
    w = data.part("state_dict")
    hidden = forward("sit_repa_tiny")[f"blocks.{data.metadata['config']['encoder_depth'] - 1}"]
    for i in (0, 2, 4):
        layer = f"projectors.0.{i}"
        hidden = hidden @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]
        hidden = torch.nn.functional.silu(hidden) if i < 4 else hidden
    return hidden


def evaluation(file: str, name: str):
    data, net = golden(file), network(file)
    kind, _, rest = name.partition("/")
    if name == "outputs/forward":
        return forward(file)["forward"]
    if name == "outputs/zs0":
        return projected(data)
    if kind == "intermediates":
        if rest == "tokens_in":
            return net.x_embedder(data["inputs/x"]) + net.pos_embed
        module = {"t_embedding": "t_embedder", "y_embedding": "y_embedder", "final_layer_out": "final_layer"}
        return forward(file)[module.get(rest, rest.replace("block", "blocks.").replace("_out", ""))]
    x, t, y = (data[f"inputs/cfg_{k}"] for k in "xty")
    half = len(x) // 2
    x, t = x[:half], 1 - t[:half]
    labelled, null = Condition(y[:half]), Condition(y[half:])
    plain = teacher(file)
    if rest == "cfg_cond":
        return -plain.velocity(x, t, labelled)
    if rest == "cfg_uncond":
        return -plain.velocity(x, t, null)
    scale = float(rest.removeprefix("cfg_scale"))
    guided = -GuidedTeacher(plain, scale, channels=3).velocity(x, t, labelled)
    second = torch.cat([guided[:, :3], -plain.velocity(x, t, null)[:, 3:]], dim=1)
    return torch.cat([guided, second])


@pytest.mark.parametrize("name", outputs("sit_tiny"))
def test_sit(name):
    tolerance = {"outputs/cfg_scale1.5": 2e-5, "outputs/cfg_scale4.0": 5e-5}.get(name, 1e-5)
    assert error(evaluation("sit_tiny", name), golden("sit_tiny")[name]) <= tolerance


@pytest.mark.parametrize("name", [n for n in outputs("sit_repa_tiny") if not n.startswith("samples/")])
def test_repa(name):
    assert error(evaluation("sit_repa_tiny", name), golden("sit_repa_tiny")[name]) <= 1e-5


# Whole trajectories.


class GivenNoise(EulerMaruyama):
    """The sampler with the increments of the authors' run."""

    def _noise(self, x, generator):
        return next(generator).to(x.dtype)


def sit_sample(name: str, dtype: torch.dtype):
    data = golden("sit_tiny_samples")
    _, guidance, method = name.split("/")
    model, x, condition = teacher("sit_tiny", dtype), data["inputs/z"].to(dtype), Condition(data["inputs/y"])
    if guidance != "nocfg":
        model = GuidedTeacher(model, 1.5, channels=4 if guidance.endswith("all_channels") else 3)
    if method.startswith("dopri5"):
        # The authors' step control also sees the second half of their doubled batch, of which only the first is in the
        # file: under guidance ours takes other steps, so it is asked for an accurate solution; theirs is 9e-4 from it.
        default = {"atol": 1e-6, "rtol": 1e-3 if guidance == "nocfg" else 1e-6}
        tolerances = {"atol": 1e-8, "rtol": 1e-8} if method.endswith("tight") else default
        return Dopri5(**tolerances).solve(model, x, condition)
    if method.startswith("sde"):
        solver = GivenNoise(steps=9, diffusion=method.split("_")[1])
        return solver.solve(model, x, condition, generator=iter(data["noise/sde"]))
    kind, steps = method.removesuffix("_trajectory").split("_num_steps")
    steps = int(steps) - 1  # the authors count points
    solver = {"euler": Euler, "heun2": Heun, "rk4": RungeKutta4}[kind](steps=steps)
    if method.endswith("_trajectory"):
        states = [x]
        for i in range(steps):
            states.append(
                Euler(steps=1).solve(model, states[-1], condition, start=1 - i / steps, end=1 - (i + 1) / steps)
            )
        return torch.stack(states)
    return solver.solve(model, x, condition)


@pytest.mark.parametrize("name", outputs("sit_tiny_samples"))
def test_sit_samples(name):
    tolerance = {"dopri5_tight": 1e-5, "dopri5_default": 5e-3}.get(name.split("/")[-1], 1e-6)
    assert error(sit_sample(name, torch.float64), golden("sit_tiny_samples")[name]) <= tolerance


@pytest.mark.parametrize("name", [n for n in outputs("sit_tiny_samples") if "dopri5" not in n])
def test_sit_samples_in_single_precision(name):
    """Without the adaptive solver, whose tolerance would be below the rounding."""
    assert error(sit_sample(name, torch.float32), golden("sit_tiny_samples")[name]) <= 1e-5


@pytest.mark.parametrize("name", [n for n in outputs("sit_repa_tiny") if n.startswith("samples/")])
def test_repa_samples(name):
    """States in float64, the network in float32, as the authors have it."""
    data = golden("sit_repa_tiny")
    _, guidance, method = name.split("/")
    model = teacher("sit_repa_tiny")
    if guidance != "nocfg":
        model = GuidedTeacher(model, 1.8, (0.2, 0.7) if guidance == "cfg_interval" else (0.0, 1.0))
    solver = {"euler": Euler(steps=8), "heun": Heun(steps=8, repa=True), "euler_maruyama": GivenNoise(steps=8)}[method]
    noise = iter(data["noise/euler_maruyama"]) if method == "euler_maruyama" else None
    samples = solver.solve(model, data["inputs/latents"].double(), Condition(data["inputs/labels"]), generator=noise)
    assert error(samples, data[name]) <= 2e-5
