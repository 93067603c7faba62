"""Policies are exact where they can be, follow the teacher at the stated order where not, and learn by imitation."""

import contextlib
import math

import attrs
import pytest
import torch
from exact import gradient
from torch import nn

import flowdistill
from flowdistill import Condition, ConfigError, States
from flowdistill.algorithms.piflow import (
    DXHead,
    DXPolicy,
    GMFlowHead,
    GMFlowPolicy,
    PiFlow,
    Policy,
    PolicyFlowMap,
)
from flowdistill.algorithms.piflow import objective as module
from flowdistill.algorithms.piflow import policy as build
from flowdistill.algorithms.piflow.policies import shifted
from flowdistill.data import ExactSamples
from flowdistill.flow_maps import NetworkFlowMap, NetworkTeacher, from_teacher
from flowdistill.interfaces import FlowMap
from flowdistill.networks import EDM2, MLP, SiT, VelocityNetwork
from flowdistill.paths import expand_time
from flowdistill.states import NoisedData, Prior
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianMixtureTeacher, GaussianTeacher
from flowdistill.testing import check_flow_map, check_objective
from flowdistill.times import Always, Grid

VARIANCE = 0.15


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(count=5, dim=3, seed=0):
    g = generator(seed)
    means = torch.randn(count, dim, generator=g, dtype=torch.float64)
    weights = 0.2 + torch.rand(count, generator=g, dtype=torch.float64)
    return GaussianMixtureTeacher(means, torch.full((count, dim), VARIANCE, dtype=torch.float64), weights)


def random_states(dim=3, n=64, t_src=None, seed=1):
    """Any x_src and x, with t below t_src, both ends included."""
    g = generator(seed)
    x_src, x = 1.5 * torch.randn(2, n, dim, generator=g, dtype=torch.float64)
    upper = 0.05 + 0.95 * torch.rand(n, generator=g, dtype=torch.float64)
    t_src = upper if t_src is None else torch.full_like(upper, t_src)
    t = t_src * torch.linspace(0, 1, n, dtype=torch.float64)
    return x_src, t_src, x, t


def exact_policy(x, t, means, log_variance, log_weights):
    """The Gaussian-mixture policy whose velocity is that of a mixture of equal isotropic variances, everywhere."""
    t_ = expand_time(t, x)[:, None]
    variance = log_variance.exp()
    total = (1 - t_).square() * variance + t_.square()
    offset = x[:, None] - (1 - t_) * means
    logits = log_weights - (offset.square() / (2 * total)).sum(2)
    denoised = means + (1 - t_) * variance / total * offset
    outputs = (x[:, None] - denoised) / t_
    return GMFlowPolicy(x, t, outputs, logits[:, :, None], (variance / total[:, 0, 0]).log() / 2)


class ExactPolicyMap(PolicyFlowMap):
    """A student with the exact policy of a mixture, whose parameters are those of the mixture."""

    def __init__(self, teacher, substeps=16, segments=1, shift=1.0):
        FlowMap.__init__(self)
        self.sample_shape, self.num_classes = teacher.sample_shape, teacher.num_classes
        self.substeps, self.segments, self.shift = substeps, segments, shift
        self.means = nn.Parameter(teacher.means.clone())
        self.log_variance = nn.Parameter(teacher.variances[0, 0].log())
        self.log_weights = nn.Parameter(teacher.log_weights.clone())
        self.calls = []

    def policy(self, x, t, condition=None):
        self.calls.append((x, t))
        return exact_policy(x, t, self.means, self.log_variance, self.log_weights)


def prior(teacher, n=64, seed=0):
    x = teacher.sample_prior(n, generator(seed))
    return States(x=x, t=torch.ones(n, dtype=x.dtype), condition=Condition(), noise=x)


def judge(objective, student, teacher, states, seed=1):
    """Root mean square of the residual, and norm of the loss gradient."""
    output = objective.loss(student, teacher, states, step=0, generator=generator(seed))
    return float(output.metrics["error"].sqrt()), float(gradient(output.loss, student).norm())


# The mixture policy


@pytest.mark.parametrize("t_src", [1.0, 0.6, None])
@pytest.mark.parametrize("count", [1, 5])
def test_mixture_policy_is_the_exact_velocity_at_every_state(count, t_src):
    teacher = mixture(count)
    x_src, t_src, x, t = random_states(t_src=t_src)
    policy = exact_policy(x_src, t_src, teacher.means, teacher.variances[0, 0].log(), teacher.log_weights)
    wanted = teacher.velocity(x, t)
    assert float((policy.velocity(x, t) - wanted).abs().max()) < 1e-11 * float(wanted.abs().max())
    start = policy.velocity(x_src, t_src)
    torch.testing.assert_close(start, teacher.velocity(x_src, t_src), rtol=1e-11, atol=1e-12)


def test_mixture_policy_is_the_published_formula():
    """The form that divides by t, with precisions as in the paper, for parameters that belong to no mixture."""
    x_src, t_src, x, t = random_states()
    x_src, t_src, x, t = x_src[8:], t_src[8:], x[8:], t[8:]
    g = generator(3)
    outputs = torch.randn(len(x), 4, 3, generator=g, dtype=torch.float64)
    logits = torch.randn(len(x), 4, 1, generator=g, dtype=torch.float64)
    log_std = torch.randn(len(x), generator=g, dtype=torch.float64) - 1
    a, b, src, std = (1 - t)[:, None], (1 - t_src)[:, None], t_src[:, None], (t_src * log_std.exp())[:, None]
    nu = a * x / t[:, None] ** 2 - b * x_src / src**2
    zeta = (a / t[:, None]) ** 2 - (b / src) ** 2
    means = x_src[:, None] - src[:, None] * outputs
    denoised = (std[:, None] ** 2 * nu[:, None] + means) / (std**2 * zeta + 1)[:, None]
    exponent = (means * (nu[:, None] - zeta[:, None] * means / 2)).sum(2) / (std**2 * zeta + 1)
    weights = (logits[:, :, 0] + exponent).softmax(1)[:, :, None]
    wanted = (x - (weights * denoised).sum(1)) / t[:, None]
    got = GMFlowPolicy(x_src, t_src, outputs, logits, log_std).velocity(x, t)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


WRONG_POLICIES = {
    "right": {},
    "another standard deviation": {"log_std": lambda p: p.log_std + 0.2},
    "standard deviation of the denoised sample, not of the velocity": {"log_std": lambda p: p.log_std + p.t_src.log()},
    "equal weights": {"logits": lambda p: torch.zeros_like(p.logits)},
    "denoised samples for velocities": {
        "outputs": lambda p: p.x_src[:, None] - expand_time(p.t_src, p.outputs) * p.outputs
    },
    "evaluated elsewhere": {"x_src": lambda p: p.x_src + 0.1},
    "evaluated later": {"t_src": lambda p: (p.t_src + 0.1).clamp(max=1.0)},
}


@pytest.mark.parametrize("name", WRONG_POLICIES)
def test_mutants_of_the_mixture_policy(name):
    teacher = mixture()
    x_src, t_src, x, t = random_states(t_src=0.6)
    policy = exact_policy(x_src, t_src, teacher.means, teacher.variances[0, 0].log(), teacher.log_weights)
    policy = attrs.evolve(policy, **{field: change(policy) for field, change in WRONG_POLICIES[name].items()})
    error = float((policy.velocity(x, t) - teacher.velocity(x, t)).square().mean().sqrt())
    assert (error < 1e-10) == (name == "right")
    assert (error > 1e-2) == (name != "right")


def test_positions_have_mixtures_of_their_own():
    """On images the policy is that of each pixel's channels alone, but for the common standard deviation."""
    g = generator()
    x_src, x = torch.randn(2, 4, 3, 2, 2, generator=g, dtype=torch.float64)
    t_src, t = torch.full((4,), 0.9).double(), torch.linspace(0.1, 0.8, 4).double()
    outputs = torch.randn(4, 5, 3, 2, 2, generator=g, dtype=torch.float64)
    logits = torch.randn(4, 5, 1, 2, 2, generator=g, dtype=torch.float64)
    log_std = torch.randn(4, generator=g, dtype=torch.float64)
    image = GMFlowPolicy(x_src, t_src, outputs, logits, log_std).velocity(x, t)
    pixel = GMFlowPolicy(x_src[..., 1, 0], t_src, outputs[..., 1, 0], logits[..., 1, 0], log_std)
    torch.testing.assert_close(image[..., 1, 0], pixel.velocity(x[..., 1, 0], t))


@pytest.mark.parametrize("head", [GMFlowHead, DXHead])
def test_policies_are_finite_down_to_the_end_and_in_float32_under_autocast(head):
    g = generator()
    student = PolicyFlowMap(NetworkFlowMap(MLP(dim=2, hidden_size=16), "instantaneous"), head)
    x = torch.randn(6, 2, generator=g)
    for start in (1.0, 1e-3, 0.0):
        t = torch.full((6,), start)
        policy = student.policy(x, t)
        for fraction in (1.0, 0.5, 1e-6, 0.0):
            assert policy.velocity(x, fraction * t).isfinite().all()
    policy = student.policy(x, torch.ones(6))
    plain = policy.velocity(0.5 * x, torch.full((6,), 0.3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(policy.velocity(0.5 * x, torch.full((6,), 0.3)), plain)
        outputs = student.policy(x, torch.ones(6)).outputs
        assert outputs.dtype == torch.float32
        assert student(x, torch.ones(6), torch.zeros(6)).dtype == torch.float32


def test_dropout_drops_components_at_all_positions_and_never_all():
    n, count = 2000, 4
    policy = GMFlowPolicy(
        torch.zeros(n, 3, 2, 2),
        torch.ones(n),
        torch.zeros(n, count, 3, 2, 2),
        torch.zeros(n, count, 1, 2, 2),
        torch.zeros(n),
    )
    for rate in (0.2, 0.9):
        dropped = policy.dropout(rate, generator()).logits.isinf()
        assert torch.equal(dropped, dropped[..., :1, :1].expand_as(dropped))
        kept = count - dropped[:, :, 0, 0, 0].sum(1)
        assert kept.min() >= 1
        expected = count * (1 - rate) + rate**count  # where all were to go, one stays
        assert abs(float(kept.float().mean()) - expected) < 4 * math.sqrt(count * rate * (1 - rate) / n)
    assert policy.dropout(0.0, generator()) is policy
    single = attrs.evolve(policy, outputs=policy.outputs[:, :1], logits=policy.logits[:, :1])
    assert not single.dropout(0.9, generator()).logits.isinf().any()
    interpolated = DXPolicy(policy.x_src, policy.t_src, torch.zeros(n), policy.outputs)
    assert interpolated.dropout(0.5, generator()) is interpolated


# Interpolated denoised samples


def trajectories(points, shift, n=64):
    """The DX policy with the exact denoised samples of a Gaussian, and the exact states and velocities of its path."""
    teacher = GaussianTeacher(torch.tensor([1.0, -0.5]).double(), torch.tensor([0.3, 2.5]).double())
    exact = GaussianFlowMap(teacher)
    x_src, t_src, end = teacher.sample_prior(n, generator()), torch.full((n,), 0.9).double(), torch.full((n,), 0.2)
    first, last = shifted(torch.tensor([0.2, 0.9]).double(), 1 / shift)
    outputs = []
    for raw in torch.linspace(float(first), float(last), points, dtype=torch.float64):
        t = shifted(raw, shift).expand(n)
        x = exact(x_src, t_src, t)
        outputs.append((x_src - (x - expand_time(t, x) * teacher.velocity(x, t))) / expand_time(t_src, x))
    policy = DXPolicy(x_src, t_src, end.double(), torch.stack(outputs, 1).detach(), shift)

    def on_path(t):
        x = exact(x_src, t_src, t).detach()
        return x, teacher.velocity(x, t)

    return teacher, policy, on_path


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_interpolation_is_of_order_two_on_the_trajectory(shift):
    t = 0.2 + 0.7 * torch.rand(64, generator=generator(1), dtype=torch.float64)
    errors = []
    for points in (21, 41, 81):
        _, policy, on_path = trajectories(points, shift)
        x, velocity = on_path(t)
        errors.append(float((policy.velocity(x, t) - velocity).square().mean().sqrt()))
    assert 3.4 < errors[0] / errors[1] < 4.6
    assert 3.4 < errors[1] / errors[2] < 4.6
    _, policy, on_path = trajectories(81, shift)
    wrong = attrs.evolve(policy, shift=2 * shift)
    assert float((wrong.velocity(x, t) - velocity).square().mean().sqrt()) > 10 * errors[2]


def test_interpolation_is_wrong_off_the_trajectory_whatever_the_number_of_points():
    t = torch.full((64,), 0.5).double()
    errors = []
    for points in (21, 81):
        teacher, policy, on_path = trajectories(points, 1.0)
        x = on_path(t)[0] + 0.1
        errors.append(float((policy.velocity(x, t) - teacher.velocity(x, t)).abs().mean()))
    assert min(errors) > 0.02
    assert abs(errors[0] - errors[1]) < 0.01


def test_interpolation_holds_the_outermost_samples():
    _, policy, _ = trajectories(11, 1.0)
    x = policy.x_src
    for time, index in ((0.95, -1), (0.1, 0)):
        t = torch.full((64,), time).double()
        denoised = x - 0.9 * policy.outputs[:, index]
        torch.testing.assert_close(policy.velocity(x, t), (x - denoised) / time)


# The flow map


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rollout_is_of_order_one(shift):
    teacher = GaussianMixtureTeacher(torch.tensor([[1.0, -0.5]]).double(), torch.full((1, 2), 0.3).double())
    exact = GaussianFlowMap(GaussianTeacher(teacher.means[0], teacher.variances[0, 0]))
    x = teacher.sample_prior(32, generator())
    t, s = torch.full((32,), 0.8).double(), torch.zeros(32).double()
    errors = [
        float((ExactPolicyMap(teacher, substeps, shift=shift)(x, t, s) - exact(x, t, s)).detach().abs().max())
        for substeps in (32, 64, 128)
    ]
    assert 1.8 < errors[0] / errors[1] < 2.2
    assert 1.8 < errors[1] / errors[2] < 2.2


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_average_velocity_is_that_of_euler_steps(shift):
    teacher = mixture()
    student = ExactPolicyMap(teacher, substeps=8, shift=shift)
    x, t, _, _ = random_states(n=6)
    s = 0.3 * t
    raw = [shifted(time, 1 / shift) for time in (t, s)]
    state, now = x, t
    policy = student.policy(x, t)
    for i in range(8):
        following = shifted(raw[0] + (raw[1] - raw[0]) * (i + 1) / 8, shift)
        state = state + (following - now)[:, None] * policy.velocity(state, now)
        now = following
    torch.testing.assert_close(student(x, t, s), state)
    torch.testing.assert_close(student.average_velocity(x, t, t), policy.velocity(x, t))
    torch.testing.assert_close(student.velocity(x, t), teacher.velocity(x, t))


def networks():
    small = {"input_size": 4, "patch_size": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    torch.manual_seed(0)
    built = {
        "mlp": MLP(dim=2, hidden_size=16, num_classes=3),
        "sit": SiT(in_channels=2, **small),
        "repa": SiT(in_channels=2, learn_sigma=False, noise_time=1, **small),
        "edm2": EDM2(8, 2, 3, 8, (1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8),
    }
    for network in built.values():
        for parameter in network.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
    return built


def batch(network, n=6):
    x = torch.randn(n, *network.sample_shape, generator=generator(1))
    return x, torch.linspace(0.1, 1.0, n), torch.arange(n) % 3


@pytest.mark.parametrize("name", networks())
def test_widened_networks_repeat_their_velocity(name):
    network, wide = networks()[name], networks()[name]
    x, t, labels = batch(network)
    wide.widen_output(3, 2)
    got, velocity = wide.velocity(x, t, labels), network.velocity(x, t, labels)
    torch.testing.assert_close(got, torch.cat([velocity.repeat(1, 3, *[1] * (x.ndim - 2)), 0 * got[:, -2:]], 1))
    assert list(wide.state_dict()) == list(network.state_dict())
    got.square().sum().backward()
    assert all(p.grad is not None for n, p in wide.named_parameters() if p.requires_grad and "logvar" not in n)
    loss = (wide.velocity(x, t, labels)[:, -2:] - 1).square().sum()
    loss.backward()  # the further channels can leave 0
    output = wide.get_submodule({"mlp": "output", "edm2": "unet"}.get(name, "final_layer.linear"))
    gradient_of = {"edm2": lambda: output.out_gain.grad.flatten()}.get(name, lambda: output.bias.grad)
    assert (gradient_of()[-2:].abs() > 1e-3).all()


def test_a_network_without_an_output_layer_cannot_be_widened():
    class Fixed(VelocityNetwork):
        def velocity(self, x, t, labels=None, embedding=None, late_time=None):
            return x

    with pytest.raises(ConfigError, match="Fixed"):
        Fixed().widen_output(2)


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("head", [GMFlowHead, DXHead])
def test_student_starts_as_its_teacher(name, head):
    """At (x_src, t_src), and up to the draw that tells components apart."""
    teacher = NetworkTeacher(networks()[name])
    start = lambda teacher: from_teacher(teacher, "instantaneous")  # noqa: E731
    student = build(teacher, start, lambda *shape: head(*shape, 4))
    x, t, labels = batch(teacher)
    condition = Condition(labels)
    velocity, policy = teacher.velocity(x, t, condition), student.policy(x, t, condition)
    assert policy.outputs.shape == (6, 4, *teacher.sample_shape)
    if head is GMFlowHead:
        offset = student.head.offset.detach()
        assert 0.02 < float(offset.std()) < 0.09
        assert not policy.logits.any()
        torch.testing.assert_close(policy.log_std, torch.full((6,), math.log(0.05)))
        torch.testing.assert_close(policy.outputs, velocity[:, None] + offset)
        velocity = velocity + offset.mean(0)
    torch.testing.assert_close(policy.velocity(x, t), velocity, rtol=1e-3, atol=1e-4)
    assert teacher.velocity(x, t, condition).shape == x.shape  # the teacher keeps its own output layer
    field = start(teacher)
    PolicyFlowMap(field, head)
    assert field.velocity(x, t, condition).shape == x.shape  # and so does what the student was made of
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("fresh", [False, True])
def test_without_the_draw_all_components_stay_equal(fresh):
    teacher = mixture(dim=2)
    moved = []
    for draw in (True, False):
        torch.manual_seed(0)
        network = MLP(dim=2, hidden_size=16) if fresh else networks()["mlp"]
        student = PolicyFlowMap(NetworkFlowMap(network, "instantaneous"), lambda *shape: GMFlowHead(*shape, 4), 4)
        if not draw:
            nn.init.zeros_(student.head.offset)
        states = prior(mixture(dim=2).float())
        PiFlow().loss(student, teacher, states, step=0, generator=generator()).loss.backward()
        rows = student.wide.network.output.weight.grad[:8].reshape(4, 2, -1)
        moved.append(float((rows - rows.mean(0)).abs().max() / rows.abs().max()))
    assert moved[0] > 1e-2
    assert moved[1] < 1e-5


def test_standard_deviation_hears_time_and_label_and_not_the_state():
    student = PolicyFlowMap(NetworkFlowMap(networks()["mlp"], "instantaneous"))
    nn.init.normal_(student.head.log_std.weight)
    nn.init.normal_(student.head.label_embedding.embedding_table.weight)
    x, t, labels = batch(student)

    def value(x, t, labels):
        return student.policy(x, t, Condition(labels)).log_std

    assert torch.equal(value(x, t, labels), value(x + 1, t, labels))
    assert not torch.allclose(value(x, t, labels), value(x, 0.5 * t, labels))
    assert not torch.allclose(value(x, t, labels), value(x, t, labels.flip(0)))
    assert torch.equal(student.policy(x, t).log_std, value(x, t, torch.full((6,), -1)))


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("head", ["gmflow", "gmflow shifted", "dx"])
def test_conformance(name, head):
    """With two points; with more, a central difference sees the kinks of the interpolation."""
    torch.manual_seed(0)
    heads = {"dx": lambda *shape: DXHead(*shape, 2)}
    shift = 3.0 if head == "gmflow shifted" else 1.0
    field = NetworkFlowMap(networks()[name], "instantaneous")
    student = PolicyFlowMap(field, heads.get(head, lambda *shape: GMFlowHead(*shape, 3)), substeps=6, shift=shift)
    check_flow_map(student)


def test_one_evaluation_a_jump():
    student = PolicyFlowMap(NetworkFlowMap(MLP(), "instantaneous"), substeps=5, segments=3)
    student.sample(torch.randn(5, 2), steps=3)
    assert student.evaluations == 15


def test_samples_jump_between_the_edges_of_the_segments():
    student = ExactPolicyMap(mixture(dim=2), segments=4, shift=3.0)
    student.sample(torch.randn(5, 2).double(), steps=4)
    starts = torch.stack([t[0] for _, t in student.calls])
    torch.testing.assert_close(starts, shifted(torch.tensor([1.0, 0.75, 0.5, 0.25]), 3.0).double())
    for t, following in zip(starts, [*starts[1:], torch.zeros(())], strict=True):
        assert float((student.segment_end(t[None].float()) - following).abs()) < 1e-6
    assert float(student.segment_end(torch.zeros(1))) == 0.0
    middle = shifted(torch.tensor([0.6]), 3.0)
    torch.testing.assert_close(student.segment_end(middle), shifted(torch.tensor([0.5]), 3.0))


def test_wrong_students():
    with pytest.raises(ConfigError, match="instantaneous"):
        PolicyFlowMap(NetworkFlowMap(MLP()))
    field = NetworkFlowMap(MLP(), "instantaneous")
    for wrong in ({"substeps": 0}, {"segments": 0}, {"shift": 0.0}):
        with pytest.raises(ConfigError, match="at least 1"):
            PolicyFlowMap(field, **wrong)
    for head in (lambda *shape: DXHead(*shape, 1), lambda *shape: GMFlowHead(*shape, 0)):
        with pytest.raises(ConfigError, match="at least"):
            PolicyFlowMap(field, head)
    with pytest.raises(ConfigError, match="@policy"):
        PiFlow().setup(field, None)


# The objective


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("count", [1, 5])
def test_exact_policy_has_no_residual_and_no_gradient(count, segments, dropout):
    """On and off the trajectory: with dropout the states are not where the exact policy leads."""
    teacher = mixture(count)
    student = ExactPolicyMap(teacher, segments=segments)
    objective = PiFlow(dropout=dropout)
    residual, slope = judge(objective, student, teacher, prior(teacher))
    assert residual < 1e-11
    assert slope < 1e-11
    for name in ("means", "log_variance", *(["log_weights"] if count > 1 else [])):
        moved = ExactPolicyMap(teacher, segments=segments)
        with torch.no_grad():
            getattr(moved, name).flatten()[0] += 0.3
        residual, slope = judge(objective, moved, teacher, prior(teacher))
        assert residual > 1e-3
        assert slope > 1e-3


def test_exact_policy_from_noised_data():
    teacher = mixture()
    source = NoisedData(dataset=ExactSamples(teacher), times=Grid(steps=2))
    source.setup(ExactPolicyMap(teacher), teacher)
    states = source.sample(64, generator())
    student = ExactPolicyMap(teacher, segments=2)
    residual, slope = judge(PiFlow(sequence=False), student, teacher, states)
    assert residual < 1e-11
    assert slope < 1e-11
    ((x, t),) = student.calls
    assert x is states.x
    assert set(t.tolist()) == {0.5, 1.0}


class _Wrong(ExactPolicyMap):
    """A student whose policy has a fault."""

    def __init__(self, teacher, fault):
        super().__init__(teacher)
        self.fault = fault

    def policy(self, x, t, condition=None):
        right = super().policy(x, t, condition)
        return attrs.evolve(right, **{name: f(right) for name, f in WRONG_POLICIES[self.fault].items()})


@pytest.mark.parametrize("name", [n for n in WRONG_POLICIES if "later" not in n and "not of the velocity" not in n])
def test_objective_sees_wrong_policies(name):
    teacher = mixture()
    residual, slope = judge(PiFlow(dropout=0.0), _Wrong(teacher, name), teacher, prior(teacher))
    assert (residual > 1e-2) == (name != "right")
    assert (slope > 1e-3) == (name != "right")


TEACHERS = {
    "right": (lambda u, x, t: u(x, t), False),
    "in the other sign": (lambda u, x, t: -u(x, t), True),
    "at the start": (lambda u, x, t: u(x, torch.ones_like(t)), True),
    "with time reversed": (lambda u, x, t: u(x, 1 - t), True),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_mutants_of_the_target(name, monkeypatch):
    change, wrong = TEACHERS[name]
    teacher = mixture()
    right = teacher.velocity
    student = ExactPolicyMap(teacher)
    monkeypatch.setattr(teacher, "velocity", lambda x, t, condition: change(right, x, t))
    residual, slope = judge(PiFlow(), student, teacher, prior(teacher))
    assert (residual > 0.1) == wrong
    assert (slope > 1e-2) == wrong


def wanted_gradient(objective, student, teacher, states):
    """The gradient of 1/2 |pi - u|^2 at fixed states, by the rules of the method written out for one segment."""
    g = generator(1)
    policy = student.policy(states.x, states.t)
    leader = policy.dropout(objective.dropout, g)
    losses = []
    for _ in range(2):
        t = torch.rand(len(states), generator=g).double()
        x, now = states.x, states.t
        for i in range(student.substeps):
            following = states.t + (t - states.t) * (i + 1) / student.substeps
            x, now = x + (following - now)[:, None] * leader.velocity(x, now), following
        x = x.detach()
        losses.append((policy.velocity(x, t) - teacher.velocity(x, t)).square().mean() / 2)
    return gradient(sum(losses) / 2, student)


def moved_student(teacher):
    student = ExactPolicyMap(teacher)
    with torch.no_grad():
        student.means += 0.3
        student.log_variance += 0.5
    return student


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_reaches_the_policy_at_fixed_states(dropout, monkeypatch):
    """And loss and metric are the mean squares; a rollout with a graph is seen, and dropout in the trained policy."""
    teacher = mixture()
    objective, student, states = PiFlow(dropout=dropout), moved_student(teacher), prior(teacher)
    wanted = wanted_gradient(objective, student, teacher, states)
    output = objective.loss(student, teacher, states, step=0, generator=generator(1))
    torch.testing.assert_close(output.loss, output.metrics["error"] / 2)
    torch.testing.assert_close(gradient(output.loss, student), wanted, rtol=1e-9, atol=1e-12)
    with monkeypatch.context() as patched:
        patched.setattr(module.torch, "no_grad", contextlib.nullcontext)
        mutant = objective.loss(student, teacher, states, step=0, generator=generator(1))
    assert float((gradient(mutant.loss, student) - wanted).norm()) > 0.05 * float(wanted.norm())
    if not dropout:
        return
    policy, g = (
        student.policy(states.x, states.t),
        generator(1),
    )  # the same leader and times, but for the trained policy
    monkeypatch.setattr(student, "policy", lambda *_: policy.dropout(dropout, g))
    mutant = PiFlow(dropout=0.0).loss(student, teacher, states, step=0, generator=g)
    assert float((gradient(mutant.loss, student) - wanted).norm()) > 0.05 * float(wanted.norm())


def test_segments_follow_each_other():
    """Each starts where the policy of the one before led, without a graph; the loss is their mean."""
    teacher = mixture()
    student = moved_student(teacher)
    student.segments = 3
    states = prior(teacher)
    output = PiFlow(dropout=0.0).loss(student, teacher, states, step=0, generator=generator(1))
    (x0, t0), (x1, t1), (x2, t2) = student.calls
    assert x0 is states.x
    for t, wanted in ((t0, 1.0), (t1, 2 / 3), (t2, 1 / 3)):
        torch.testing.assert_close(t, torch.full_like(t, wanted))
    torch.testing.assert_close(x1, student(x0, t0, t1))
    torch.testing.assert_close(x2, student(x1, t1, t2))
    assert not x1.requires_grad
    assert not x2.requires_grad
    single, losses = moved_student(teacher), []
    single.segments, g = 3, generator(1)
    for x, t in ((x0, t0), (x1, t1), (x2, t2)):
        part = States(x=x, t=t, condition=Condition())
        losses.append(PiFlow(dropout=0.0, sequence=False).loss(single, teacher, part, step=0, generator=g).loss)
    torch.testing.assert_close(output.loss, sum(losses) / 3)


def test_a_sequence_starts_at_the_noise_of_its_states():
    teacher = mixture()
    student = ExactPolicyMap(teacher)
    noise, x = prior(teacher).x, prior(teacher, seed=2).x
    states = States(x=x, t=torch.full((64,), 0.5).double(), condition=Condition(), noise=noise)
    PiFlow().loss(student, teacher, states, step=0, generator=generator())
    assert student.calls[0][0] is noise
    assert (student.calls[0][1] == 1).all()


@pytest.mark.parametrize("position", [0.0, 0.25, 1.0])
def test_times_are_positions_in_the_segment(position, monkeypatch):
    teacher = mixture()
    student = ExactPolicyMap(teacher, segments=2, shift=3.0)
    seen = []
    right = teacher.velocity
    monkeypatch.setattr(teacher, "velocity", lambda x, t, condition: seen.append((x, t)) or right(x, t))
    states = prior(teacher)
    objective = PiFlow(times=Always(value=position), dropout=0.0, states_per_segment=3)
    objective.loss(student, teacher, states, step=0, generator=generator())
    assert len(seen) == 6
    for (x, t), raw in zip(seen, [0.5 + position / 2] * 3 + [position / 2] * 3, strict=True):
        torch.testing.assert_close(t, torch.full_like(t, float(shifted(torch.tensor(raw), 3.0))))
        if raw >= 0.5:
            torch.testing.assert_close(x, student(states.x, states.t, t))


@pytest.mark.parametrize("segments", [1, 2])
def test_network_evaluations(segments):
    """Of each sample and segment: one of the student, one of the teacher for each state."""
    teacher = mixture(dim=2).float()
    student = PolicyFlowMap(NetworkFlowMap(MLP(), "instantaneous"), segments=segments, substeps=3)
    PiFlow().loss(student, teacher, prior(teacher, n=8), step=0, generator=generator())
    assert student.evaluations == 8 * segments
    assert teacher.evaluations == 8 * segments * 2


@pytest.mark.parametrize("head", [GMFlowHead, DXHead])
@pytest.mark.parametrize("sequence", [True, False])
def test_objective_conforms(head, sequence):
    teacher = GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]])
    torch.manual_seed(0)
    field = NetworkFlowMap(MLP(dim=2, hidden_size=16, num_classes=2), "instantaneous")
    states = Prior() if sequence else NoisedData(dataset=ExactSamples(teacher), times=Grid(steps=2))
    check_objective(PiFlow(sequence=sequence), PolicyFlowMap(field, head, substeps=3, segments=2), teacher, states)


def test_a_run_loads_again(tmp_path):
    result = flowdistill.train(
        gin_file="piflow/plane.gin",
        gin_bindings=[
            "train.steps = 2",
            "train.batch_size = 8",
            "evaluation.num_samples = 20",
            "policy.substeps = 3",
            "gmflow.components = 3",
            "mlp.hidden_size = 16",
        ],
        workdir=tmp_path / "run",
    )
    noise = torch.randn(4, 2)
    loaded = flowdistill.load_flow_map(tmp_path / "run")
    assert isinstance(loaded, PolicyFlowMap)
    assert torch.equal(loaded.sample(noise), result.flow_map.sample(noise))
    assert isinstance(loaded.policy(noise, torch.ones(4)), Policy)
