"""Exact derivatives and finite differences of flow maps, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdistill import Condition, differentiation
from flowdistill.differentiation import finite_difference, jvp
from flowdistill.flow_maps import NetworkFlowMap
from flowdistill.interfaces import FlowMap, Jump
from flowdistill.networks import MLP, SiT, attention
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
