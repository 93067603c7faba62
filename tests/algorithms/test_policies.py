"""Policies are exact where they can be, and follow the teacher at the stated order where not; their flow maps."""

import math

import attrs
import pytest
import torch
from exact import loss_of
from exact_policy import WRONG_POLICIES, ExactPolicyMap, exact_policy, generator, mixture, prior, random_states
from torch import nn

from flowdistill import Condition, ConfigError
from flowdistill.algorithms.piflow import (
    DXHead,
    DXPolicy,
    GMFlowHead,
    GMFlowPolicy,
    PiFlow,
    PolicyFlowMap,
)
from flowdistill.algorithms.piflow import policy as build
from flowdistill.flow_maps import NetworkFlowMap, from_teacher
from flowdistill.networks import EDM2, MLP, SiT, VelocityNetwork
from flowdistill.paths import expand_time, shifted
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianMixtureTeacher, GaussianTeacher
from flowdistill.testing import check_flow_map
from flowdistill.wrapped_teachers import NetworkTeacher

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
        loss_of(PiFlow(), student, teacher, states, step=0, generator=generator()).loss.backward()
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
