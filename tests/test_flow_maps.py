import pytest
import torch

import flowdistill
from flowdistill import Condition, ConfigError
from flowdistill.flow_maps import NetworkFlowMap, from_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.networks import EDM2, MLP, SiT
from flowdistill.teachers.gaussian import GaussianFlowMap, GaussianTeacher
from flowdistill.testing import check_flow_map
from flowdistill.wrapped_teachers import FlowMapTeacher, NetworkTeacher


@pytest.fixture
def digits():
    return flowdistill.load_teacher("digits_teacher")


def times(n, gap):
    t = torch.linspace(0.3, 1.0, n)
    return t, t * (1 - gap)


def network_teacher(family):
    torch.manual_seed(0)
    if family == "edm2":
        network = EDM2(8, 2, 10, 8, (1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8)
    else:
        network = SiT(8, 2, 2, hidden_size=16, depth=4, num_heads=2, num_classes=10)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return NetworkTeacher(network)


CONDITIONINGS = ["two_time", "anchored", "decoupled", "instantaneous"]


@pytest.mark.parametrize("family", ["sit", "edm2"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("guidance", [None, 1.5])
def test_student_of_a_network_starts_as_its_teacher(family, conditioning, guidance):
    teacher = network_teacher(family)
    student = from_teacher(teacher, conditioning, guidance)
    x, condition = teacher.sample_prior(6), Condition(torch.arange(6))
    for gap in (0.0,) if conditioning == "decoupled" else (0.0, 0.7):
        t, s = times(6, gap)
        t = torch.ones(6) if conditioning == "anchored" else t
        got = student.average_velocity(x, t, s, condition)
        torch.testing.assert_close(got, teacher.velocity(x, t, condition), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["sit", "edm2"])
def test_decoupled_early_blocks_see_t_and_late_ones_s(family):
    teacher = network_teacher(family)
    student = from_teacher(teacher, "decoupled")
    assert len(list(student.parameters())) == len(list(teacher.parameters()))
    x, t, s = teacher.sample_prior(6), torch.full((6,), 0.9), torch.full((6,), 0.2)
    network = student.network
    if family == "sit":
        early, late = network.blocks[network.early_blocks - 1], network.blocks[-1]
    else:
        early, late = network.unet.enc["4x4_block0"], network.unet.dec["4x4_in0"]
    seen = {}
    for name, block in (("early", early), ("late", late)):
        block.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(out))
    outputs = [student.average_velocity(x, t, end) for end in (t, s)]
    assert torch.equal(*seen["early"])
    assert not torch.allclose(*seen["late"])
    assert not torch.allclose(*outputs)
    all_early = from_teacher(teacher, "decoupled", early_blocks=1000)
    if family == "edm2":  # every block of the U-Net is early then, and nothing else sees a time
        assert torch.equal(all_early.average_velocity(x, t, s), teacher.velocity(x, t))
    with pytest.raises(ConfigError, match="early_blocks"):
        from_teacher(teacher, "two_time", early_blocks=2)


@pytest.mark.parametrize("family", ["sit", "edm2"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_students_of_networks_pass_the_conformance_kit(family, conditioning):
    student = from_teacher(network_teacher(family), conditioning, guidance=1.5)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "embedding" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    check_flow_map(student)


def test_student_of_an_exact_teacher_starts_as_its_teacher():
    teacher = GaussianTeacher([1.0, 0.0], 0.5)
    student = from_teacher(teacher, network=MLP(dim=2, hidden_size=16))
    x, (t, s) = torch.randn(6, 2), times(6, 0.7)
    assert torch.equal(student.average_velocity(x, t, s), teacher.velocity(x, t))
    with pytest.raises(ConfigError, match="no network"):
        from_teacher(teacher)
    with pytest.raises(ConfigError, match="shape"):
        from_teacher(teacher, network=MLP(dim=3))


def test_student_is_a_trainable_copy(digits):
    student = from_teacher(GuidedTeacher(digits, 2.0), "anchored")
    assert sum(p.requires_grad for p in student.parameters()) > 10
    assert not any(p.requires_grad for p in digits.parameters())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    assert digits.velocity(digits.sample_prior(1), torch.ones(1)).abs().max() < 10


def test_new_embeddings_see_duration_and_guidance():
    torch.manual_seed(0)
    student = NetworkFlowMap(MLP(dim=2, hidden_size=16), "two_time", guidance=1.5)
    with torch.no_grad():
        for p in student.parameters():
            torch.nn.init.normal_(p, std=0.5)
    x, t = torch.randn(4, 2), torch.ones(4)

    def value(s, guidance):
        return student.average_velocity(x, t, torch.full((4,), s), Condition(guidance=guidance))

    default = value(0.2, None)
    assert torch.equal(default, value(0.2, torch.full((4,), 1.5)))
    assert not torch.allclose(default, value(0.2, torch.full((4,), 1.0)))
    assert not torch.allclose(default, value(0.5, None))


def test_evaluations_are_counted_per_sample():
    student = from_teacher(GaussianTeacher([0.0], 1.0), network=MLP(dim=1, hidden_size=8))
    student.sample(torch.randn(5, 1), steps=3)
    assert student.evaluations == 15


def test_sampling_on_a_grid():
    """An exact map composes: any grid of times gives the same samples."""
    flow_map = GaussianFlowMap(GaussianTeacher(torch.tensor([1.0]).double(), 0.2))
    noise = torch.randn(8, 1, dtype=torch.float64)
    one = flow_map.sample(noise)
    torch.testing.assert_close(flow_map.sample(noise, steps=7), one)
    torch.testing.assert_close(flow_map.sample(noise, times=torch.tensor([1.0, 0.9, 0.2, 0.0])), one)
    for grid in ([1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0]):
        with pytest.raises(ConfigError, match="grid"):
            flow_map.sample(noise, times=torch.tensor(grid))
    with pytest.raises(ConfigError, match="steps"):
        flow_map.sample(noise, steps=0)


def test_an_anchored_map_has_one_step_and_no_velocity(digits):
    student = from_teacher(digits, "anchored")
    with pytest.raises(ConfigError, match="anchored"):
        student.sample(digits.sample_prior(1), steps=2)
    with pytest.raises(ConfigError, match="anchored"):
        student.velocity(digits.sample_prior(1), torch.ones(1))
    with pytest.raises(ConfigError, match="anchored"):
        FlowMapTeacher(student)


def test_a_flow_map_is_a_teacher_on_its_diagonal():
    teacher = GaussianTeacher([1.0], 0.3)
    as_teacher = FlowMapTeacher(GaussianFlowMap(teacher))
    x, t = torch.randn(5, 1), torch.linspace(0.1, 1, 5)
    torch.testing.assert_close(as_teacher.velocity(x, t), teacher.velocity(x, t))


@pytest.mark.parametrize("conditioning", ["instantaneous", "decoupled", "two_time"])
def test_the_network_of_a_flow_map_is_copied_where_it_is_its_velocity(conditioning):
    network = SiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=3, num_heads=2, num_classes=3)
    teacher = FlowMapTeacher(NetworkFlowMap(network, conditioning))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.normal_(std=0.2)
    if conditioning == "two_time":
        with pytest.raises(ConfigError, match="no network that is its velocity"):
            from_teacher(teacher)
        return
    x, t = torch.randn(5, 1, 4, 4), torch.linspace(0.1, 1, 5)
    torch.testing.assert_close(from_teacher(teacher).velocity(x, t), teacher.velocity(x, t))


def test_a_network_is_a_teacher():
    network = SiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    teacher = NetworkTeacher(network)
    assert teacher.sample_shape == (1, 4, 4)
    assert not any(p.requires_grad for p in teacher.parameters())
    teacher.train()
    assert not teacher.training


def test_unknown_conditioning():
    with pytest.raises(ConfigError, match="two_time"):
        NetworkFlowMap(MLP(), "both")
