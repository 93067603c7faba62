"""What one pass costs beside a plain one, and what a compiler makes of it."""

import re

import pytest
import torch
import torch.nn.functional as F
from test_one_pass import distance, gradients, student_of, value_slope_gradients
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from flowdistill.differentiation import jvp
from flowdistill.duals import dual, parts

FREE = re.findall(
    r"\w+",
    """view _unsafe_view t transpose permute expand unsqueeze slice select split unbind detach alias squeeze as_strided
    empty empty_like new_empty empty_strided lift_fresh _reshape_alias split_with_sizes unfold diagonal""",
)


class Kernels(TorchDispatchMode):
    """Counts what would start kernels, and the elements of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.count = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count += func._overloadpacket.__name__ not in FREE
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


def kernels(function):
    with Kernels() as counted:
        function()
    return counted.count


@pytest.mark.parametrize(("network", "most"), [("mlp", 1.6), ("sit", 1.6), ("edm2", 1.3)])
def test_a_derivative_adds_few_kernels_to_a_plain_step(network, most):
    student, jump, _ = student_of(network)
    plain = kernels(lambda: student.average_velocity(*jump).sum().backward())
    jvp(student, jump, ds=1.0)
    assert kernels(lambda: sum(v.sum() for v in jvp(student, jump, ds=1.0)).backward()) <= most * plain


def test_what_does_not_move_costs_nothing():
    """The blocks of a decoupled student that see t alone have no derivative in s."""
    student, jump, dx = student_of("sit", "decoupled")

    def tangents(**direction):
        whole = kernels(lambda: jvp(student, jump, **direction))
        return whole - kernels(lambda: student.average_velocity(*jump))

    assert tangents(ds=1.0) < 0.45 * tangents(dx=dx, dt=1.0, ds=1.0)


def test_a_derivative_keeps_nothing_for_the_backward_pass():
    def kept(evaluation):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: sizes.append((v.shape, v.dtype)) or v, lambda v: v):
            evaluation()
        return sizes

    for network in ("mlp", "sit", "edm2", "edm2, dropout"):
        student, jump, dx = student_of(network)
        assert kept(lambda: jvp(student, jump, dx=dx, dt=1.0)) == kept(lambda: student.average_velocity(*jump))  # noqa: B023


def test_the_tangent_of_attention_needs_no_matrix_of_all_tokens():
    q, k, v, *tangents = torch.randn(6, 1, 2, 1500, 8, generator=torch.Generator().manual_seed(0)).double()
    with Kernels() as counted:
        got = F.scaled_dot_product_attention(*(dual(a, b) for a, b in zip((q, k, v), tangents, strict=True)))
    assert counted.largest < 0.2 * 2 * 1500**2
    with sdpa_kernel(SDPBackend.MATH):
        _, wanted = torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), tuple(tangents))
    torch.testing.assert_close(parts(got)[1], wanted)


def test_evaluations_are_counted_as_two():
    for passes in (1, 2):
        student, jump, dx = student_of("mlp")
        value_slope_gradients(student, jump, passes, dx=dx)
        assert student.evaluations == 2 * len(jump.x)


# ---- compilers


@pytest.mark.parametrize(
    ("network", "tolerance"), [("mlp", 1e-5), ("sit", 1e-5), pytest.param("edm2", 2e-4, marks=pytest.mark.slow)]
)
def test_a_compiler_sees_one_graph(network, tolerance):
    """Without a break, and without another one at the next call; EDM2's weights are scaled at each, by about 1."""
    student, jump, dx = student_of(network, dtype=torch.float32)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda jump: jvp(student, jump, dx=dx, dt=1.0), backend=compiler, fullgraph=True)
    wanted = value_slope_gradients(student, jump, dx=dx, dt=1.0)
    for _ in range(2):
        average, slope = compiled(jump)
    assert len(graphs) == 1
    for got, expected in zip((average.detach(), slope, gradients(student, average)), wanted, strict=True):
        assert distance(got, expected) < tolerance
    assert not slope.requires_grad
