"""Exact derivatives and finite differences of flow maps, in float64."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from flowdistill import Condition, ConfigError, differentiation
from flowdistill.differentiation import backward, finite_difference, jvp
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import FlowMap, Jump
from flowdistill.networks import MLP, SiT, attention
from flowdistill.plumbing.precision import tf32
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.velocities import FiniteDifference, Jvp


def sit_map():
    torch.manual_seed(0)
    network = SiT(input_size=4, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    flow_map = NetworkFlowMap(network, "two_time").double()
    for parameter in flow_map.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return flow_map


def mlp_map():
    torch.manual_seed(0)
    flow_map = NetworkFlowMap(MLP(dim=3, hidden_size=16), "two_time").double()
    for parameter in flow_map.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return flow_map


MAPS = {
    "sit": (sit_map, (1, 4, 4)),
    "mlp": (mlp_map, (3,)),
    "gaussian": (lambda: GaussianFlowMap(GaussianTeacher(torch.ones(3).double(), torch.rand(3).double())), (3,)),
}


@pytest.fixture(params=MAPS)
def case(request):
    build, shape = MAPS[request.param]
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, *shape, generator=g, dtype=torch.float64)
    t = torch.linspace(0.5, 0.9, 8, dtype=torch.float64)
    s = torch.linspace(0.1, 0.4, 8, dtype=torch.float64)
    labels = torch.arange(8) % 3 if request.param == "sit" else None
    return build(), Jump(x, t, s, Condition(labels)), torch.randn(x.shape, generator=g, dtype=torch.float64)


DIRECTIONS = [{"ds": 1.0}, {"dt": 1.0}, {"dx": True, "dt": 1.0}]


def error(case, direction, h, scheme):
    student, jump, v = case
    direction = {**direction, **({"dx": v} if "dx" in direction else {})}
    _, exact = jvp(student, jump, **direction)
    _, slope = finite_difference(student, jump, h=h, scheme=scheme, **direction)
    return float((slope - exact).norm() / exact.norm())


@pytest.mark.parametrize("direction", DIRECTIONS, ids=["end", "start", "trajectory"])
@pytest.mark.parametrize(("scheme", "order"), [("backward", 1), ("central", 2)])
def test_difference_converges_at_its_order(case, direction, scheme, order):
    coarse, fine = (error(case, direction, h, scheme) for h in (4e-3, 1e-3))
    assert fine < 2e-2
    assert 4 ** (order - 0.25) < coarse / fine < 4 ** (order + 0.25)


@pytest.mark.parametrize("direction", DIRECTIONS, ids=["end", "start", "trajectory"])
def test_jvp_is_the_derivative(case, direction):
    assert error(case, direction, 1e-5, "central") < 1e-8


def test_value_carries_the_graph_and_the_derivative_none(case):
    student, jump, _ = case
    plain = student.average_velocity(*jump)
    wanted = torch.autograd.grad(plain.square().sum(), [p for p in student.parameters() if p.requires_grad])
    for average, slope in (
        jvp(student, jump, ds=1.0),
        finite_difference(student, jump, ds=1.0),
    ):
        assert not slope.requires_grad
        torch.testing.assert_close(average, plain)
        got = torch.autograd.grad(average.square().sum(), [p for p in student.parameters() if p.requires_grad])
        torch.testing.assert_close(got, wanted)


class _Recorder(torch.nn.Module):
    """A flow map that remembers where it was asked."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def average_velocity(self, x, t, s, condition=None):
        assert x.dtype == torch.float32
        self.asked.append((t.clone(), s.clone()))
        return x * 1.0


@given(
    h=st.floats(0.01, 0.5),
    scheme=st.sampled_from(["backward", "central"]),
    direction=st.sampled_from([{"ds": 1.0}, {"dt": 1.0}]),
    t=st.floats(0.0, 1.0),
    part=st.floats(0.0, 1.0),
)
@settings(max_examples=200)
def test_differences_stay_where_times_make_sense(h, scheme, direction, t, part):
    recorder = _Recorder()
    start, end = torch.full((2,), t), torch.full((2,), t * part)
    _, slope = finite_difference(recorder, Jump(torch.ones(2, 1), start, end), h=h, scheme=scheme, **direction)
    assert slope.isfinite().all()
    for time, other in recorder.asked:
        assert (time <= 1 + 1e-6).all()
        assert (other >= -1e-6).all()
        if "dt" not in direction or scheme == "backward":
            assert (other <= time + 1e-6).all()


def test_derivative_is_zero_on_the_diagonal():
    student = mlp_map()
    t = torch.tensor([0.3, 1.0]).double()
    for scheme in ("backward", "central"):
        _, slope = finite_difference(student, Jump(torch.ones(2, 3).double(), t, t), ds=1.0, scheme=scheme)
        assert not slope.any()


def test_generating_velocity_is_the_velocity_of_the_end():
    """dX(x, t, s)/ds by the estimators against the exact map's end, moved."""
    teacher = GaussianTeacher(torch.tensor([1.0]).double(), torch.tensor([0.2]).double())
    student = GaussianFlowMap(teacher)
    x, t, s = torch.randn(5, 1).double(), torch.ones(5).double(), torch.linspace(0.1, 0.9, 5).double()
    moved = (student(x, t, s + 1e-6) - student(x, t, s - 1e-6)) / 2e-6
    for estimator, tolerance in ((Jvp(), 1e-8), (FiniteDifference(h=1e-4), 1e-3)):
        estimator.setup(student, teacher)
        _, velocity = estimator.estimate(Jump(x, t, s))
        torch.testing.assert_close(velocity, moved.detach(), rtol=0, atol=tolerance)
    torch.testing.assert_close(velocity, teacher.velocity(student(x, t, s), s).detach(), rtol=0, atol=1e-3)


def test_differences_are_in_full_precision_under_autocast():
    torch.manual_seed(0)
    student = mlp_map().float()
    x, t, s = torch.randn(16, 3), torch.ones(16), torch.full((16,), 0.3)
    _, plain = finite_difference(student, Jump(x, t, s), ds=1.0, h=0.01)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, autocast = finite_difference(student, Jump(x, t, s), ds=1.0, h=0.01)
    assert torch.equal(plain, autocast)


@pytest.mark.parametrize("allowed", [True, False])
def test_differences_of_small_steps_are_made_without_tf32(allowed):
    """As flags of PyTorch, which mean nothing on a CPU."""
    flags = lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)  # noqa: E731

    class Flags(FlowMap):
        def average_velocity(self, x, t, s, condition=None):
            seen.append(flags())
            return x

    before = flags()
    with tf32(allowed):
        for h, expected in ((0.03, allowed), (0.029, False)):
            seen: list[tuple[bool, bool]] = []
            finite_difference(Flags(), Jump(torch.ones(2, 3), torch.ones(2), torch.zeros(2)), ds=1.0, h=h)
            assert seen == 2 * [(expected, expected)]
        assert flags() == (allowed, allowed)
    assert flags() == before


def test_step_size_anneals_geometrically():
    estimator = FiniteDifference(h=0.1, final_h=0.001, anneal=(0.1, 0.2))
    assert [round(estimator.step_size(p), 6) for p in (0, 0.1, 0.15, 0.2, 0.99)] == [0.1, 0.1, 0.01, 0.001, 0.001]
    assert FiniteDifference(h=0.1).step_size(1.0) == 0.1


@pytest.mark.parametrize("scheme", ["backward", "central", "jvp"])
def test_dropout_has_the_same_masks_in_a_derivative(scheme):
    """Of an average velocity that is linear in t - s the difference is exact if all masks are the same."""

    class Dropped(FlowMap):
        sample_shape, num_classes = (50,), None

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.dropout = torch.nn.Dropout(0.5)

        def average_velocity(self, x, t, s, condition=None):
            return self.dropout(x) * (t - s)[:, None]

    student = Dropped().train()
    x, t, s = torch.ones(4, 50), torch.full((4,), 0.8), torch.full((4,), 0.3)
    if scheme == "jvp":
        average, slope = jvp(student, Jump(x, t, s), ds=1.0)
    else:
        average, slope = finite_difference(student, Jump(x, t, s), ds=1.0, scheme=scheme)
    assert 0.2 < (average == 0).float().mean() < 0.8
    torch.testing.assert_close(slope, -average / 0.5)


def test_attention_is_written_out_where_a_derivative_has_a_graph(monkeypatch):
    """PyTorch's plain kernel, which other derivatives take, gives no gradients under autocast on a GPU."""
    student, calls = sit_map(), []
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t, s = torch.full((4,), 0.8, dtype=torch.float64), torch.full((4,), 0.3, dtype=torch.float64)

    def gradients():
        average, slope = jvp(student, Jump(x, t, s), dx=x, dt=1.0, graph=True)
        return torch.autograd.grad((average + slope).square().sum(), list(student.network.blocks.parameters()))

    expected = gradients()
    monkeypatch.setattr(attention, "_MOST_PLAIN_TOKENS", 0)  # PyTorch's kernels, as on a GPU
    monkeypatch.setattr(differentiation, "plain_attention", lambda *a: calls.append(a) or attention.plain_attention(*a))
    torch.testing.assert_close(gradients(), expected)
    assert len(calls) == len(student.network.blocks)


LAYERS = {
    "layer": functools.partial(nn.LayerNorm, (4, 4)),
    "instance": functools.partial(nn.InstanceNorm2d, 6),
    "instance, affine": functools.partial(nn.InstanceNorm2d, 6, affine=True),
    "batch": functools.partial(nn.BatchNorm2d, 6, track_running_stats=False),
    "group": functools.partial(nn.GroupNorm, 2, 6),
    "root mean square": functools.partial(nn.RMSNorm, (4, 4)),
    "gated linear unit": functools.partial(nn.GLU, 1),
}


def layer_of(kind, seed=0):
    torch.manual_seed(seed)
    layer = LAYERS[kind](eps=1e-3) if kind != "gated linear unit" else LAYERS[kind]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_written_out_layers_are_the_layers(kind, autocast, dtype):
    """In values and dtypes."""
    layer = layer_of(kind).to(dtype)
    x = (3 * torch.randn(5, 6, 4, 4, generator=torch.Generator().manual_seed(1)) + 1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        wanted = layer(x)
        with differentiation._Rules(graph=True):
            got = layer(x)
    assert got.dtype == wanted.dtype
    torch.testing.assert_close(got, wanted, **({"rtol": 0.02, "atol": 5e-3} if dtype == torch.bfloat16 else {}))


class Brought(FlowMap):
    """A map of images around a module that somebody brings."""

    sample_shape, num_classes = (6, 4, 4), None

    def __init__(self, body):
        super().__init__()
        self.mixing, self.time, self.body = nn.Conv2d(6, 6, 1), nn.Linear(2, 6), body

    def average_velocity(self, x, t, s, condition=None):
        condition = self.time(torch.stack([t, s], 1))[:, :, None, None]
        return x * self.body(self.mixing(x) + condition).mean(1, keepdim=True)


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Attention(nn.Module):
    """Attention over the pixels, which leaves their channels next to each other in memory."""

    def __init__(self, **options):
        super().__init__()
        self.qkv, self.options = nn.Linear(6, 18), options

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2).mT).reshape(len(x), 16, 3, 2, 3).transpose(1, 3).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, **self.options)
        result = attended.transpose(1, 2).reshape(len(x), 4, 4, 6).permute(0, 3, 1, 2)
        assert not result.is_contiguous()
        return result


class Encoder(nn.Module):
    """PyTorch's transformer block on the pixels."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x.flatten(2).mT).mT.reshape(x.shape)


class Recurrent(nn.Module):
    """Reads the rows of each channel."""

    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 4)

    def forward(self, x):
        return self.layer(x.flatten(0, 1))[0].view(x.shape)


RESIZED = ("nearest", "bilinear", "bicubic", "area")
BROUGHT = {
    **{f"attention and {kind}": lambda kind=kind: nn.Sequential(Attention(), layer_of(kind)) for kind in LAYERS},
    "attention and batch, evaluated": lambda: nn.Sequential(Attention(), nn.BatchNorm2d(6)).eval(),
    "masked attention": lambda: Attention(attn_mask=torch.ones(16, 16, dtype=torch.bool).tril()),
    "causal attention": lambda: Attention(is_causal=True, scale=0.5),
    "encoder": Encoder,
    "recurrent": Recurrent,
    "encoder, evaluated": lambda: Encoder().eval(),
    "in place": lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.SiLU(inplace=True)),
    "weight normalisation": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1)),
    **{
        f"resized, {mode}": lambda mode=mode: nn.Sequential(
            Attention(),
            Calls(lambda x: F.interpolate(F.interpolate(x.sin(), scale_factor=2, mode=mode), size=(4, 4), mode=mode)),
        )
        for mode in RESIZED
    },
}


def brought(body):
    torch.manual_seed(0)
    student = Brought(body).double()
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.5)
    g = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, 3, 6, 4, 4, generator=g, dtype=torch.float64)
    t, s = torch.linspace(0.5, 0.9, 3).double(), torch.linspace(0.1, 0.4, 3).double()
    return student, Jump(x, t, s), dx


@pytest.mark.parametrize("kind", BROUGHT)
def test_derivatives_of_networks_that_people_bring(kind):
    """The derivative against a central difference, and its gradient against one along a direction of the weights."""
    student, jump, dx = brought(BROUGHT[kind]())
    average, slope = jvp(student, jump, dx=dx, dt=1.0)
    _, difference = finite_difference(student, jump, dx=dx, dt=1.0, h=1e-5, scheme="central")
    assert float((slope - difference).norm() / slope.norm()) < 1e-7

    same, graphed = jvp(student, jump, dx=dx, dt=1.0, graph=True)
    torch.testing.assert_close(same, average)
    torch.testing.assert_close(graphed, slope)
    weights = torch.randn(slope.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    parameters = list(student.parameters())
    backward(loss(graphed, weights))
    moves = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)).double() for p in parameters]
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            torch._foreach_add_(parameters, moves, alpha=sign * 1e-6)
            values.append(float(loss(jvp(student, jump, dx=dx, dt=1.0)[1], weights)))
    along = sum(float((p.grad * move).sum()) for p, move in zip(parameters, moves, strict=True) if p.grad is not None)
    assert along == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def loss(slope, weights):
    """Not linear in the derivative."""
    return (weights * slope + slope.square()).mean()


class Sine(torch.autograd.Function):
    """Without a forward derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class Counting(nn.Module):
    """Changes a buffer in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x.sin()


NARROW = {
    "function": (lambda: Calls(Sine.apply), "Calls"),
    "checkpoint": (lambda: Calls(lambda x: checkpoint(torch.sin, x, use_reentrant=True)), "Calls"),
    "distances": (lambda: Calls(lambda x: x + torch.cdist(x, x).mean()), "Calls"),
    "numpy": (lambda: Calls(lambda x: x * float(x.detach().numpy().mean())), "Calls"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("kind", NARROW)
def test_modules_without_a_forward_derivative_are_named(kind, graph):
    """And are trained by differences."""
    build, name = NARROW[kind]
    student, jump, dx = brought(nn.Sequential(nn.Conv2d(6, 6, 1), build()))
    with pytest.raises(ConfigError, match=rf"cannot differentiate body\.1 \({name}\).*estimator = @finite_difference"):
        jvp(student, jump, dx=dx, dt=1.0, graph=graph)
    average, slope = finite_difference(student, jump, dx=dx, dt=1.0)
    backward((average - slope).square().mean())


CHANGING = {"batch": (lambda: nn.BatchNorm2d(6), "BatchNorm2d"), "buffer": (Counting, "Counting")}


@pytest.mark.parametrize("kind", CHANGING)
def test_buffers_may_change_once_where_a_derivative_has_no_graph(kind):
    build, name = CHANGING[kind]
    student, jump, dx = brought(nn.Sequential(nn.Conv2d(6, 6, 1), build()))
    same = copy.deepcopy(student)
    _, slope = jvp(student, jump, dx=dx, dt=1.0)
    same.average_velocity(*jump)
    torch.testing.assert_close(dict(student.named_buffers()), dict(same.named_buffers()), rtol=0, atol=0)
    _, difference = finite_difference(student, jump, dx=dx, dt=1.0, h=1e-5, scheme="central")
    assert float((slope - difference).norm() / slope.norm()) < 1e-7
    with pytest.raises(ConfigError, match=rf"cannot differentiate body\.1 \({name}\).*estimator = @finite_difference"):
        jvp(student, jump, dx=dx, dt=1.0, graph=True)


@pytest.mark.parametrize(
    "function",
    [F.hardsigmoid, lambda x: checkpoint(lambda y: (2 * y).sin() * y, x, use_reentrant=False)],
    ids=["hardsigmoid", "checkpoint"],
)
def test_derivatives_without_a_gradient_are_told(function):
    student, jump, dx = brought(Calls(function))
    _, slope = jvp(student, jump, dx=dx, dt=1.0)
    _, difference = finite_difference(student, jump, dx=dx, dt=1.0, h=1e-5, scheme="central")
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-6)
    _, slope = jvp(student, jump, dx=dx, dt=1.0, graph=True)
    with pytest.raises(ConfigError, match=r"no gradient of this loss.*estimator = @finite_difference"):
        backward(slope.square().mean())


def test_running_statistics_are_not_forgotten_in_a_derivative_with_a_graph():
    student, jump, dx = brought(nn.InstanceNorm2d(6, track_running_stats=True))
    with pytest.raises(ConfigError, match=r"body \(InstanceNorm2d\).*running statistics"):
        jvp(student, jump, dx=dx, dt=1.0, graph=True)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.layer_norm(x, (4, 4)),
        lambda x: torch.native_layer_norm(x, (4, 4), None, None, 1e-5)[0],
        lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
        lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    ],
)
def test_fused_normalisations_without_a_right_gradient_are_refused(function):
    student, jump, dx = brought(Calls(function))
    jvp(student, jump, dx=dx, dt=1.0)
    with pytest.raises(ConfigError, match=r"body \(Calls\).*has wrong gradients here"):
        jvp(student, jump, dx=dx, dt=1.0, graph=True)


@pytest.mark.parametrize("graph", [False, True])
def test_mistakes_of_a_network_are_its_own(graph):
    student, jump, dx = brought(Calls(lambda x: x @ x[:, :, :3]))
    with pytest.raises(RuntimeError, match="size"):
        jvp(student, jump, dx=dx, dt=1.0, graph=graph)
