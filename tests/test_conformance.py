"""Everything that is registered passes the conformance kit, and the kit fails what is wrong."""

import copy

import pytest
import student_files
import torch
from edm2_files import released
from packaged import packaged

import flowdistill
from flowdistill import (
    FLOW_MAPS,
    OBJECTIVES,
    PAIRS,
    STATE_SOURCES,
    TEACHERS,
    VELOCITY_ESTIMATORS,
    Condition,
)
from flowdistill.algorithms.freeflow import FreeFlow
from flowdistill.algorithms.trajectory import VelocityObjective
from flowdistill.data import ExactSamples
from flowdistill.flow_maps import NetworkFlowMap, from_teacher
from flowdistill.guidance import GuidedTeacher
from flowdistill.interfaces import FlowMap, GeneratingVelocity, Objective, ObjectiveOutput, OneStep
from flowdistill.networks import EDM2, MLP, SiT
from flowdistill.runs.exporting import export
from flowdistill.runs.loading import from_student
from flowdistill.students.imf import IMFFlowMap
from flowdistill.teachers.gaussian import (
    GaussianFlowMap,
    GaussianTeacher,
    ProductMixtureFlowMap,
    ProductMixtureTeacher,
)
from flowdistill.testing import (
    check_exact_start,
    check_flow_map,
    check_objective,
    check_pairs,
    check_teacher,
    check_velocity_estimator,
    objective_checks,
)
from flowdistill.velocities import ConditionalVelocity, FiniteDifference, OnlineNetwork, TeacherVelocity
from flowdistill.wrapped_teachers import NetworkTeacher


def classes():
    return GaussianTeacher([0.0, 0.0], 0.5, class_means=[[1.0, 0.0], [-1.0, 0.0]])


def student_of(teacher, conditioning="two_time"):
    torch.manual_seed(0)
    student = from_teacher(teacher, conditioning, network=MLP(dim=2, hidden_size=16, num_classes=teacher.num_classes))
    for parameter in student.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return student


TEACHER_ARGUMENTS = {
    "gaussian_mixture": {"means": [[1.0, 0.0], [0.0, 2.0]], "labels": [0, 1]},
    "guided": {"teacher": classes(), "scale": 2.0},
}


def sit_file(folder):
    network = SiT(8, 2, hidden_size=16, depth=2, num_heads=2, num_classes=5)
    torch.save(trained(network).state_dict(), folder / "sit.pt")
    return {"checkpoint": folder / "sit.pt", "num_heads": 2, "num_classes": 5}


def edm2_file(folder):
    network = EDM2(8, 3, 5, 8, (1, 2), num_blocks=1, attn_resolutions=(4,), channels_per_head=8)
    (folder / "edm2.pkl").write_bytes(released(trained(network)))
    return {"checkpoint": folder / "edm2.pkl"}


def trained(network, change=0.3):
    """A network whose weights are no longer the fresh ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(change * torch.randn_like(parameter))
    return network


CHECKPOINTS = {"sit_teacher": sit_file, "edm2_teacher": edm2_file}
TRAINED = {"digits_teacher": 0.5, "mnist_sit": 1.0, "mnist_edm2": 2.0, "fashion_sit": 1.0}  # only near what is exact


@pytest.mark.parametrize("name", packaged(TEACHERS))
def test_teachers(name, tmp_path):
    arguments = TEACHER_ARGUMENTS.get(name, {})
    if name in CHECKPOINTS:
        arguments = CHECKPOINTS[name](tmp_path)
    teacher = TEACHERS.build(name, **arguments)
    check_teacher(teacher)
    if name not in CHECKPOINTS:
        check_exact_start(teacher, TRAINED.get(name, 1e-4))


def policy_of(teacher):
    torch.manual_seed(0)
    network = MLP(dim=2, hidden_size=16, num_classes=teacher.num_classes)
    return FLOW_MAPS.build("policy", teacher=teacher, velocity=NetworkFlowMap(network, "instantaneous"), substeps=4)


FLOW_MAP_BUILDERS = {
    "network": lambda: NetworkFlowMap(MLP(dim=2, hidden_size=16)),
    "from_teacher": lambda: student_of(classes()),
    "policy": lambda: policy_of(classes()),
    "policy_map": lambda: policy_of(classes()),
    "exact_gaussian": lambda: GaussianFlowMap(GuidedTeacher(classes(), 2.0, (0.2, 0.7))),
    "exact_product_mixture": lambda: ProductMixtureFlowMap(ProductMixtureTeacher()),
}


IMF = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "shared_depth": 1, "head_depth": 1}
IMF |= {"num_heads": 2, "mlp_size": 16, "num_classes": 3}
STUDENTS = {"sit_student": "dmf", "piflow_student": "piflow_repa", "imf_student": "imf", "facm_student": "facm"}


@pytest.mark.parametrize("name", packaged(FLOW_MAPS))
def test_flow_maps(name, tmp_path):
    if name == "from_student":
        check_flow_map(from_student(export(NetworkFlowMap(MLP(dim=2, hidden_size=16)), tmp_path / "student")))
    elif name == "imf_map":
        check_flow_map(IMFFlowMap(IMF, guidance=2.0))
    elif name in STUDENTS:
        student = STUDENTS[name]
        check_flow_map(student_files.load(student_files.written(student, tmp_path), **student_files.ARGUMENTS[student]))
    else:
        check_flow_map(FLOW_MAP_BUILDERS[name]())


@pytest.mark.parametrize("conditioning", ["two_time", "end_time", "anchored", "to_data", "instantaneous"])
def test_conditionings(conditioning):
    check_flow_map(student_of(classes(), conditioning))


ESTIMATOR_ARGUMENTS = {
    "exact": lambda: {"distribution": classes()},
    "online_network": lambda: {"network": lambda: MLP(dim=2, hidden_size=16, num_classes=2)},
}


@pytest.mark.parametrize("name", packaged(VELOCITY_ESTIMATORS))
def test_velocity_estimators(name):
    estimator = VELOCITY_ESTIMATORS.build(name, **ESTIMATOR_ARGUMENTS.get(name, dict)())
    conditioning = "two_time" if name == "pseudo_velocity" else "anchored"
    check_velocity_estimator(estimator, student_of(classes(), conditioning), classes())


@pytest.mark.parametrize("kwargs", [{"scheme": "central"}, {"final_h": 0.01, "anneal": (0.0, 0.5)}])
def test_finite_differences(kwargs):
    check_velocity_estimator(FiniteDifference(**kwargs), student_of(classes(), "anchored"), classes())


def test_online_network_with_low_rank_updates():
    teacher = flowdistill.load_teacher("digits_teacher")
    estimator = OnlineNetwork(lora_rank=2)
    torch.manual_seed(0)
    check_velocity_estimator(estimator, from_teacher(teacher, "anchored", 1.25), teacher)


PARTS = {
    "combined": lambda: {
        "prediction": OBJECTIVES.build("freeflow_prediction"),
        "correction": OBJECTIVES.build("freeflow_correction"),
    },
}


def objective_of(name, **arguments):
    return OBJECTIVES.build(name, **PARTS.get(name, dict)(), **arguments)


def network_teacher():
    return NetworkTeacher(trained(MLP(dim=2, hidden_size=16, num_classes=2), 0.1)).eval().requires_grad_(False)


def student_for(objective, teacher):
    """The student that an objective asks for, away from its start."""
    return trained(FLOW_MAPS.get(objective.flow_map)(teacher), 0.1)


CHECKS = [check.name for check in objective_checks(None, None, None)]  # which touch nothing until they are called


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", packaged(OBJECTIVES))
def test_objectives(name, check):
    objective, teacher = objective_of(name), network_teacher()
    student = student_for(objective, teacher)
    checks = objective_checks(objective, student, teacher if objective.needs_teacher else None)
    next(found for found in checks if found.name == check)()


@pytest.mark.parametrize("name", packaged(OBJECTIVES))
def test_objectives_are_cited(name):
    assert objective_of(name).citation.startswith("@")


TARGETED = [name for name in packaged(OBJECTIVES) if isinstance(objective_of(name), VelocityObjective)]


@pytest.mark.parametrize("source", packaged(STATE_SOURCES))
@pytest.mark.parametrize("name", TARGETED)
def test_objectives_of_the_teachers_velocity_take_states_from_anywhere(name, source):
    """With the teacher's velocity they need no data, whatever they are made for."""
    teacher = network_teacher()
    arguments = {"dataset": ExactSamples(classes())} if source == "noised_data" else {}
    states = STATE_SOURCES.build(source, **arguments)
    objective = objective_of(name, target=TeacherVelocity())
    assert objective.needs_teacher
    assert not objective.needs_data
    if states.knows_all_times or not objective.needs_all_times:
        check_objective(objective, student_for(objective, teacher), teacher, states)


@pytest.mark.parametrize("name", TARGETED)
def test_objectives_of_the_datas_velocity_need_no_teacher(name):
    """With the velocity of the data they need no teacher, whatever they are made for."""
    objective = objective_of(name, target=ConditionalVelocity())
    assert objective.needs_data
    assert not objective.needs_teacher
    check_objective(objective, student_for(objective, network_teacher()), None)


def test_freeflow_on_a_guided_teacher():
    teacher = GuidedTeacher(flowdistill.load_teacher("digits_teacher"), 1.25)
    torch.manual_seed(0)
    check_objective(FreeFlow(), from_teacher(teacher, "anchored", 1.25), teacher)


@pytest.mark.parametrize("name", packaged(PAIRS))
def test_laws_of_times(name):
    check_pairs(PAIRS.build(name))


# The kit fails what is wrong.


class _Wrong(GaussianTeacher):
    """A Gaussian teacher with a fault."""

    def __init__(self, fault):
        super().__init__([1.0, 0.0], 0.5)
        self.fault = fault
        self.calls = 0

    def velocity(self, x, t, condition=None):
        self.calls += 1
        right = super().velocity(x, t, condition)
        return {
            "shape": lambda: right[:, :1],
            "dtype": lambda: right.double(),
            "infinite": lambda: right / t[:, None],
            "rows": lambda: right + x.mean(),
            "random": lambda: right + self.calls,
            "sign": lambda: -right,
            "time": lambda: super(_Wrong, self).velocity(x, 1 - t, condition),
        }[self.fault]()


@pytest.mark.parametrize("fault", ["shape", "dtype", "infinite", "rows", "random"])
def test_kit_finds_wrong_teachers(fault):
    with pytest.raises(AssertionError, match="_Wrong"):
        check_teacher(_Wrong(fault))


@pytest.mark.parametrize("fault", ["sign", "time"])
def test_kit_finds_teachers_in_another_convention(fault):
    with pytest.raises(AssertionError, match="noise"):
        check_exact_start(_Wrong(fault))


class _WrongMap(FlowMap):
    """A flow map with a fault."""

    sample_shape = (2,)

    def __init__(self, fault):
        super().__init__()
        self.fault = fault

    def average_velocity(self, x, t, s, condition=None):
        if self.fault == "detached":
            return x * (t - s.detach()).unsqueeze(1)
        if self.fault == "rows":
            return x * t.mean()
        return (x * t.unsqueeze(1)).float()

    def forward(self, x, t, s, condition=None):
        jump = (t - s).unsqueeze(1) * self.average_velocity(x, t, s, condition)
        return x + jump if self.fault == "sign" else x - jump


@pytest.mark.parametrize("fault", ["detached", "rows", "dtype", "sign"])
def test_kit_finds_wrong_flow_maps(fault):
    with pytest.raises(AssertionError, match="_WrongMap"):
        check_flow_map(_WrongMap(fault))


class _WrongObjective(Objective):
    """An objective with a fault."""

    def __init__(self, fault):
        self.fault = fault
        self.module = torch.nn.Linear(2, 2)
        self.pairs = OneStep()

    def modules(self):
        return {"extra": self.module}

    def loss(self, states, step):
        average = self.student.average_velocity(*states.to(0.0))
        teacher = self.teacher
        per_row = (average - teacher.velocity(states.x, states.t, states.condition).detach()).square().mean(1)
        if self.fault == "shape":
            return ObjectiveOutput(per_row)
        loss = per_row.mean()
        if self.fault == "random":
            loss = loss * torch.rand(())
        if self.fault == "module":
            loss = loss + self.module(states.x).square().mean()
        if self.fault == "teacher":
            return ObjectiveOutput(
                (average - states.x * next(iter(teacher.parameters()))).square().mean(), {"error": loss.detach()}
            )
        return ObjectiveOutput(loss, {"error": loss if self.fault == "metric" else loss.detach()})

    def auxiliary_loss(self, name, states, step):
        samples = self.student(*states.to(0.0))
        samples = samples if self.fault == "student" else samples.detach()
        return ObjectiveOutput((self.module(samples) - states.x).square().mean())


class _Trainable(GaussianTeacher):
    """A teacher with a parameter."""

    def __init__(self):
        super().__init__([1.0, 0.0], 0.5)
        self.scale = torch.nn.Parameter(torch.ones(()))


def test_kit_passes_the_objective_without_a_fault():
    check_objective(_WrongObjective("none"), student_of(_Trainable()), _Trainable())


@pytest.mark.parametrize("fault", ["shape", "random", "module", "teacher", "metric", "student"])
def test_kit_finds_wrong_objectives(fault):
    with pytest.raises(AssertionError, match="_WrongObjective"):
        check_objective(_WrongObjective(fault), student_of(_Trainable()), _Trainable())


class _WrongEstimator(GeneratingVelocity):
    """A generating velocity with a fault."""

    def __init__(self, fault):
        self.fault = fault

    def derivative(self, jump, *, dx=None, dt=0.0, ds=0.0, progress=0.0):
        average = self.student.average_velocity(*jump)
        if self.fault == "value":
            return average + 1, torch.zeros_like(average)
        if self.fault == "no graph":
            return average.detach(), torch.zeros_like(average)
        slope = average if self.fault == "graph" else torch.full_like(average, torch.nan)
        return average, slope


@pytest.mark.parametrize("fault", ["value", "no graph", "graph", "infinite"])
def test_kit_finds_wrong_estimators(fault):
    with pytest.raises(AssertionError, match="_WrongEstimator"):
        check_velocity_estimator(_WrongEstimator(fault), student_of(classes()), classes())


def test_kit_leaves_what_it_checks_as_it_was():
    student, teacher = student_of(classes()), classes()
    before = copy.deepcopy(student.state_dict())
    teacher = network_teacher()
    check_objective(FreeFlow(), student, teacher)
    check_flow_map(student)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in student.parameters())
    x = torch.zeros(2, 2)
    teacher.velocity(x, torch.ones(2), Condition(torch.zeros(2, dtype=torch.long)))
