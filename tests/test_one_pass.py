"""Value and derivative in one pass: against two passes, and what must not be lost on the way."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_differentiation import Calls, Counting, Sine, brought
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flowdistill import Condition, ConfigError, differentiation
from flowdistill.differentiation import jvp
from flowdistill.duals import Refused, dual, parts, register_rule
from flowdistill.duals.engine import RULES
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import Jump
from flowdistill.networks import EDM2, MLP, SiT, add_lora


def sit(**options):
    return SiT(
        input_size=4, patch_size=1, in_channels=2, hidden_size=16, depth=3, num_heads=2, num_classes=3, **options
    )


def edm2(**options):
    return EDM2(
        8,
        img_channels=1,
        label_dim=3,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        channels_per_head=8,
        **options,
    )


NETWORKS = {
    "mlp": (lambda: MLP(dim=3, hidden_size=16, num_classes=3), ("two_time", "anchored", "expanded")),
    "sit": (sit, ("two_time", "decoupled", "to_data", "expanded")),
    "sit, normalised queries": (lambda: sit(qk_norm=True), ("two_time",)),
    "sit, low rank": (lambda: add_lora(sit(), rank=2), ("two_time",)),
    "edm2": (edm2, ("two_time", "decoupled")),
    "edm2, dropout": (lambda: edm2(dropout=0.3), ("two_time",)),
}
CASES = [(name, conditioning) for name, (_, conditionings) in NETWORKS.items() for conditioning in conditionings]
DIRECTIONS = {"end": {"ds": 1.0}, "trajectory": {"dx": True, "dt": 1.0}, "all": {"dx": True, "dt": 1.0, "ds": 0.5}}


def student_of(network, conditioning="two_time", dtype=torch.float64, guidance=1.5):
    torch.manual_seed(0)
    student = NetworkFlowMap(NETWORKS[network][0](), conditioning, guidance).to(dtype).train()
    for parameter in student.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    g = torch.Generator().manual_seed(1)
    x, dx = torch.randn(2, 3, *student.sample_shape, generator=g, dtype=torch.float64).to(dtype)
    t, s = torch.tensor([0.9, 0.8, 0.7], dtype=dtype), torch.tensor([0.1, 0.4, 0.2], dtype=dtype)
    condition = Condition(torch.tensor([0, 2, -1]), torch.tensor([1.0, 2.0, 1.5], dtype=dtype))
    return student, Jump(x, t, s, condition), dx


def gradients(student, average):
    loss = (average * torch.linspace(-1, 1, average.numel()).to(average).reshape(average.shape)).sum()
    found = torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad], allow_unused=True)
    return torch.cat([gradient.flatten() for gradient in found if gradient is not None])


def value_slope_gradients(student, jump, passes=1, seed=1, **direction):
    """By so many passes, or as was decided; nothing else is allowed to happen."""
    if passes == 1:
        differentiation._KEPT.pop(student, None)
    if passes == 2:
        differentiation._KEPT[student] = None
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        average, slope = jvp(student, jump, **direction)
    assert not slope.requires_grad
    assert type(average) is type(slope) is torch.Tensor
    return average.detach(), slope, gradients(student, average)


def distance(got, wanted):
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("network", "conditioning"), CASES)
def test_one_pass_is_two_passes(network, conditioning, direction, dtype):
    student, jump, dx = student_of(network, conditioning, dtype)
    direction = {name: dx if name == "dx" else value for name, value in DIRECTIONS[direction].items()}
    one = value_slope_gradients(student, jump, **direction)
    two = value_slope_gradients(student, jump, passes=2, **direction)
    assert torch.equal(one[0], two[0])
    for got, wanted in zip(one, two, strict=True):
        assert distance(got, wanted) < (1e-10 if dtype == torch.float64 else 1e-5)


# ---- networks that people bring


class Old(torch.autograd.Function):
    """A sine with a forward derivative, in the old style, without ``setup_context``."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.factor = factor
        return x.sin() * factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos() * ctx.factor, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent * ctx.saved_tensors[0].cos() * ctx.factor


STORED = Old.apply


def changed(x):
    h = x.sin()
    h += x
    h *= 2
    h[:, 0] = x[:, 1]
    h[:, 2] = 0.5
    h.mul_(3.0)
    return h.clamp_(-5, 5)


def without_graph(x):
    with torch.no_grad():
        y = x.sin()
    return x + y * x


def hooked(x):
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda gradient: 2 * gradient)
    return y


def tokens(x):
    return [x.flatten(2).mT.contiguous()[:, None] * k for k in (1, 2, 3)]


def own_kernel(x):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*tokens(x))[:, 0].mT.reshape(x.shape)


def own_precision(x):
    with torch.autocast("cpu", enabled=False):
        return F.linear(x, torch.eye(4, dtype=x.dtype)).sin()


def rotated(x):
    pairs = torch.view_as_complex((x + x.mean()).transpose(1, 3).unflatten(3, (3, 2)).contiguous())
    return (
        torch.view_as_real(pairs * torch.polar(torch.ones(3), torch.arange(3.0)).to(pairs)).flatten(3).transpose(1, 3)
    )


def broadcast_and_viewed(x):
    """A derivative that is the same for all channels takes no memory for each, and its views do not exist."""
    y = torch.ones_like(x) + x.sin().mean(1, keepdim=True)
    assert y.is_contiguous()
    y = y.view(len(x), -1).unflatten(1, (48, 2))
    return x * torch.view_as_real(torch.view_as_complex(y) * 2j).view_as(x)


def checkpointed(x):
    body = lambda y: F.silu(F.group_norm(y, 2)) + F.dropout(y * x, 0.3) + STORED(y, 2.0)  # noqa: E731
    return checkpoint(body, x, use_reentrant=False)


def last(body):
    """A body that sees its input with the channels next to each other in memory."""
    return nn.Sequential(Calls(lambda x: x.contiguous(memory_format=torch.channels_last)), body)


recurrent = nn.LSTM(4, 4).double()

FOLLOWED = {
    "function": lambda: Calls(lambda x: Old.apply(x, 2.0)),
    "function, stored": lambda: Calls(lambda x: STORED(x, 2.0)),
    "in place": lambda: Calls(changed),
    "activations in place": lambda: nn.Sequential(
        nn.Conv2d(6, 6, 1),
        nn.ReLU(True),
        nn.Conv2d(6, 6, 1),
        nn.ELU(inplace=True),
        nn.Conv2d(6, 6, 1),
        nn.Dropout(0.3, True),
    ),
    "without a graph": lambda: Calls(without_graph),
    "hook": lambda: Calls(hooked),
    "own attention kernel": lambda: Calls(own_kernel),
    "own precision": lambda: Calls(own_precision),
    "rotary embedding": lambda: Calls(rotated),
    "broadcast and viewed": lambda: Calls(broadcast_and_viewed),
    "checkpoint": lambda: Calls(checkpointed),
    "buffer": Counting,
    "batch": lambda: nn.BatchNorm2d(6),
    "batch, evaluated": lambda: nn.BatchNorm2d(6).eval(),
    "instance, running": lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    "instance, running, evaluated": lambda: nn.InstanceNorm2d(6, track_running_stats=True).eval(),
    "group": lambda: last(nn.GroupNorm(2, 6)),
    "root mean square": lambda: nn.RMSNorm((4, 4)),
    "weight normalisation": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1)),
    "dropout": lambda: nn.Dropout(0.4),
    "dropout, channels last": lambda: last(nn.Dropout(0.4)),
    "dropout of channels": lambda: nn.Dropout2d(0.4),
    "alpha dropout": lambda: last(nn.AlphaDropout(0.3)),
    "random slopes": nn.RReLU,
    "attention with dropout": lambda: Calls(
        lambda x: F.scaled_dot_product_attention(*tokens(x), dropout_p=0.3)[:, 0].mT.reshape(x.shape)
    ),
    "spectrum": lambda: Calls(lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=(4, 4)).sin()),
    "contraction": lambda: Calls(lambda x: (torch.einsum("bcij,bdij->bcd", x, x) @ x.flatten(2)).view(x.shape).sin()),
    "sorted": lambda: Calls(lambda x: x + x.max(1, keepdim=True).values * x.sort(2)[0]),
    "by sign": lambda: Calls(lambda x: x.sin() if x.mean() > 0 else x.cos()),
    "stop-gradient": lambda: Calls(lambda x: x * 1.0 + 0 * x.detach().mean().item()),
    "recurrent": lambda: Calls(lambda x: recurrent(x.flatten(0, 1))[0].view(x.shape)),
}


def difference(student, jump, dx, h=1e-6):
    """A central difference with the random numbers of seed 1."""
    ends = []
    for step in (h, -h):
        torch.manual_seed(1)
        with torch.no_grad():
            moved = jump.x + step * dx, jump.t + step, jump.s, jump.condition
            ends.append(copy.deepcopy(student).average_velocity(*moved))
    return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("kind", FOLLOWED)
def test_networks_that_people_bring_are_followed(kind):
    """Value and gradients are those of a plain pass to the bit, the slope is a difference."""
    student, jump, dx = brought(nn.Sequential(nn.Conv2d(6, 6, 1), FOLLOWED[kind]()))
    torch.manual_seed(1)
    plain = copy.deepcopy(student)
    average = plain.average_velocity(*jump)
    wanted = difference(student, jump, dx)
    value, slope, found = value_slope_gradients(student, jump, dx=dx, dt=1.0)
    assert torch.equal(value, average)
    assert torch.equal(found, gradients(plain, average))
    torch.testing.assert_close(dict(student.named_buffers()), dict(plain.named_buffers()), rtol=0, atol=0)
    assert distance(slope, wanted) < 1e-6


def through_a_view(x):
    h = x.sin()
    h[:, 0].mul_(2)
    return h


def by_its_view(x):
    h = x.sin()
    view = h.view(-1)
    h.mul_(2)
    return view.view(x.shape)


def into_another(x):
    h = torch.zeros_like(x)
    h[:, 0] = x[:, 1]
    return h + x


TWICE = {
    "changed through a view": (through_a_view, "changed in place and used by another name"),
    "used by a view": (by_its_view, "changed in place and used by another name"),
    "written into another": (into_another, "writes a moving tensor into another"),
    "vectorised": (torch.vmap(torch.sin), "passes the rules by"),
    "strided": (lambda x: x.contiguous().as_strided(x.shape, (96, 16, 1, 4)).sin(), "as_strided"),
    "derivative within": (lambda x: torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1], "forward"),
}


@pytest.mark.parametrize("kind", TWICE)
def test_what_cannot_be_followed_takes_two_passes_and_says_so_once(kind):
    function, reason = TWICE[kind]
    body = nn.Sequential(nn.Conv2d(6, 6, 1), Counts(), nn.Dropout(0.3), Calls(function))
    student, jump, dx = brought(body)
    same = copy.deepcopy(student)
    torch.manual_seed(1)
    with pytest.warns(RuntimeWarning, match=f"Brought take two passes, which cost more: .*{reason}"):
        average, slope = jvp(student, jump, dx=dx, dt=1.0)
    again = torch.get_rng_state()
    torch.manual_seed(1)
    plain = same.average_velocity(*jump)
    assert torch.equal(again, torch.get_rng_state())  # a first try leaves no trace
    assert torch.equal(average, plain)
    assert torch.equal(gradients(student, average), gradients(same, plain))
    assert student.body[1].calls == same.body[1].calls == 1
    assert distance(slope, difference(same, jump, dx)) < 1e-6
    value_slope_gradients(student, jump, passes=None, dx=dx, dt=1.0)  # without a warning


class Statistics(nn.Module):
    """Keeps statistics of what it sees: in place, as another buffer, and with a graph."""

    def __init__(self):
        super().__init__()
        self.register_buffer("first", torch.zeros(()))
        self.register_buffer("second", torch.zeros(()))
        self.last = None

    def forward(self, x):
        self.first.lerp_(x.detach().mean(), 0.1)
        self.second = 0.9 * self.second + 0.1 * x.detach().std()
        self.last = x.sin()
        return self.last - self.first * self.second


def test_what_a_network_keeps_is_what_it_keeps_of_a_plain_pass():
    student, jump, dx = brought(Statistics())
    same = copy.deepcopy(student)
    for _ in range(3):
        average, _, _ = value_slope_gradients(student, jump, dx=dx, dt=1.0)
        plain = same.average_velocity(*jump)
        assert torch.equal(average, plain)
        for got, wanted in zip(kept_by(student.body), kept_by(same.body), strict=True):
            assert type(got) is torch.Tensor
            assert torch.equal(got, wanted)


def kept_by(body):
    return body.first, body.second, body.last


def test_inference_decides_nothing():
    student, jump, dx = student_of("mlp")
    with torch.inference_mode():
        _, slope = jvp(student, jump, dx=dx)
    assert student not in differentiation._KEPT
    torch.testing.assert_close(slope.clone(), value_slope_gradients(student, jump, dx=dx)[1])


class Counts(nn.Module):
    """Counts its calls, which a product could not."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        if not torch._C._are_functorch_transforms_active():
            self.calls += 1
        return x


def written_out(x):
    h = torch.empty_like(x)
    with torch.no_grad():
        torch.sin(x, out=h)
    return h + x


def negated(x):
    h = torch.empty_like(x)
    with torch.no_grad():
        torch.neg(x, out=h)
    return h + x


def captured(x):
    one = torch.ones(1, dtype=x.dtype, requires_grad=True)
    return checkpoint(lambda y: y * x, one, use_reentrant=True)


REFUSED = {
    "function": (Sine.apply, r"cannot differentiate body\.1 \(Calls\)"),
    "captured": (captured, r"cannot differentiate body\.1 \(Calls\)"),
    "out": (written_out, r"cannot differentiate body\.1 \(Calls\)"),
    "out, with a rule": (negated, r"cannot differentiate body\.1 \(Calls\)"),
    "numpy": (lambda x: x * float(x.detach().cpu().square().numpy().mean()), r"cannot differentiate body\.1 \(Calls\)"),
    "data": (lambda x: x * x.data, r"no derivative goes through Tensor\.data.*x\.detach\(\)"),
    "item": (lambda x: x * x.mean().item(), r"no derivative goes through Tensor\.item.*x\.detach\(\)"),
    "float": (lambda x: x * float(x.mean()), r"no derivative goes through Tensor\.__float__"),
    "list": (lambda x: x * x.mean((0, 2, 3)).tolist()[0], r"no derivative goes through Tensor\.tolist"),
    "no derivative": (
        lambda x: x * torch.special.bessel_j0(x),
        "no forward derivative of special_bessel_j0.*register_rule",
    ),
    "operator in place": (lambda x: doubled(x), "no forward derivative of double.*register_rule"),
    "operator in two passes": (lambda x: sine(through_a_view(x)), r"cannot differentiate body\.1 \(Calls\).*sine"),
    "operator": (lambda x: torch.ops.flowdistill_test.sine(x), "no forward derivative of sine.*register_rule"),
}


@torch.library.custom_op("flowdistill_test::sine", mutates_args=())
def sine(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@torch.library.custom_op("flowdistill_test::double", mutates_args=("x",))
def double(x: torch.Tensor) -> None:
    x.mul_(2)


def doubled(x):
    y = x.sin()
    double(y)
    return y


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", REFUSED)
def test_no_derivative_is_wrong_in_silence(kind):
    function, message = REFUSED[kind]
    student, jump, dx = brought(nn.Sequential(nn.Conv2d(6, 6, 1), Calls(function)))
    with pytest.raises(ConfigError, match=message):
        jvp(student, jump, dx=dx, dt=1.0)


class Product(torch.autograd.Function):
    """Of its argument, and of what it is not given."""

    @staticmethod
    def forward(ctx, x, other):
        return x * other()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent


def test_functions_that_take_more_than_their_arguments_are_refused():
    x = dual(torch.tensor(2.0), torch.tensor(1.0))
    with pytest.raises(Refused, match="takes tensors past its arguments"):
        Product.apply(x, lambda: x)
    with pytest.raises(Refused, match="Product takes tensors past its arguments"):
        Product.apply(torch.ones(()), lambda: x)


@pytest.fixture
def rules():
    """The table, which is afterwards as it was."""
    before = dict(RULES)
    yield RULES
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize("name", [sine, torch.ops.flowdistill_test.sine, torch.ops.flowdistill_test.sine.default])
@pytest.mark.parametrize("called", [sine, torch.ops.flowdistill_test.sine, torch.ops.flowdistill_test.sine.default])
def test_operators_may_be_given_a_rule(rules, name, called):
    @register_rule(name)
    def _(result, tangents, x):
        return tangents[0] * x.cos()

    value, slope = parts(called(dual(torch.tensor(0.5), torch.tensor(2.0))))
    assert (value.item(), slope.item()) == pytest.approx((0.479426, 2 * 0.877583), abs=1e-6)


def test_functions_may_be_given_a_rule(rules):
    """Which is asked for its first result alone, and knows what moves."""

    class Halves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y, (x > 0)

        @staticmethod
        def backward(ctx, gradient, _):
            x, y = ctx.saved_tensors
            return gradient * y, gradient * x

    @register_rule(Halves)
    def _(result, tangents, x, y):
        dx, dy = tangents
        assert dy is None
        assert not torch.is_grad_enabled()
        return dx * y, None

    x, y = torch.tensor(3.0, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    product, positive = Halves.apply(dual(x, torch.tensor(1.0)), y)
    value, slope = parts(product)
    assert (value.item(), slope.item(), positive.item()) == (12.0, 4.0, True)
    assert torch.autograd.grad(value, (x, y)) == (4.0, 3.0)
    assert Halves.apply(x, y)[0].item() == 12.0  # without duals nothing is changed


def test_a_tangent_of_a_wrong_shape_is_refused(rules):
    @register_rule(sine)
    def _(result, tangents, x):
        return torch.ones(7)

    with pytest.raises(RuntimeError, match="expanded size"):
        sine(dual(torch.ones(3), torch.ones(3)))


# ---- precision


class Body(nn.Module):
    """A convolutional network with attention, which has some of its layers in full precision."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(6, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 6, 1)
        self.qkv, self.layer_norm = nn.Linear(8, 24), nn.LayerNorm(8)

    def forward(self, x):
        x = F.silu(self.norm(self.first(x)))
        q, k, v = self.qkv(self.layer_norm(x.flatten(2).mT))[:, None].chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)
        with torch.autocast("cpu", enabled=False):
            x = x.float() * torch.softmax(x.float(), 1)
        return self.last(x)


@pytest.mark.parametrize("network", ["mlp", "sit", "edm2", "brought"])
def test_under_autocast_the_value_is_a_plain_one_and_the_slope_is_close(network):
    if network == "brought":
        student, jump, dx = brought(Body())
        student, dx = student.float(), dx.float()
        jump = Jump(*(v.float() for v in (jump.x, jump.t, jump.s)))
    else:
        student, jump, dx = student_of(network, dtype=torch.float32)
        for parameter in student.parameters():
            parameter.data *= 0.3
    exact = value_slope_gradients(student, jump, dx=dx, dt=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        average = student.average_velocity(*jump)
        wanted = gradients(student, average)
    with torch.autocast("cpu", torch.bfloat16):  # a new cache of weights
        value, slope, found = value_slope_gradients(student, jump, dx=dx, dt=1.0)
    assert value.dtype == slope.dtype == average.dtype
    assert torch.equal(value, average)
    assert torch.equal(found, wanted)
    assert 0 < distance(slope.float(), exact[1]) < 0.05


def test_a_compiler_loses_no_graph(rules):
    """That of a function with a backward pass of its own, which a compiler cannot be kept from entering."""
    register_rule(Sine)(lambda result, tangents, x: tangents[0] * x.cos())
    student, jump, dx = brought(Calls(Sine.apply))
    value_slope_gradients(student, jump, dx=dx)
    torch._dynamo.reset()
    compiled = torch.compile(lambda jump: jvp(student, jump, dx=dx), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="records no graph"):
        compiled(jump)
