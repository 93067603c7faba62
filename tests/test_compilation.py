"""Compiled networks: the same numbers, one graph for each kind of evaluation, and no more graphs later."""

import copy

import pytest
import torch
from runs import write
from test_one_pass import distance, gradients, student_of
from torch._dynamo.utils import counters

import flowdistill
from flowdistill import ConfigError
from flowdistill.differentiation import finite_difference, jvp
from flowdistill.networks.compilation import compile_networks
from flowdistill.plumbing import config
from flowdistill.training.loop import configured_loop


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    """Their number so far; none may have been cut."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def evaluations(student, jump, dx):
    """Value, slope and gradient, and the value without a graph."""
    average, slope = jvp(student, jump, dx=dx, dt=1.0)
    with torch.no_grad():
        plain = student.average_velocity(*jump)
    return average.detach(), slope, gradients(student, average), plain


@pytest.mark.parametrize("network", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sit", "edm2"))])
def test_each_kind_of_evaluation_is_one_graph(network):
    student, jump, dx = student_of(network)
    compiled = copy.deepcopy(student)
    compile_networks(compiled, "eager")
    for number in range(3):
        for got, wanted in zip(evaluations(compiled, jump, dx), evaluations(student, jump, dx), strict=True):
            assert distance(got, wanted) < 1e-10
            assert type(got) is torch.Tensor
        assert graphs() == 2
        assert compiled.evaluations == student.evaluations == 9 * (number + 1)
        for model in (student, compiled):  # as an optimiser does
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
    again = copy.deepcopy(compiled)
    evaluations(again, jump, dx)
    assert graphs() == 2  # copies share them
    evaluations(compiled, jump[:2], dx[:2])
    assert graphs() == 4  # a batch of another size
    compile_networks(compiled, None)
    evaluations(compiled, jump[:1], dx[:1])
    assert graphs() == 4


def test_a_derivative_with_a_graph_is_not_compiled():
    student, jump, dx = student_of("mlp")
    compiled = copy.deepcopy(student)
    compile_networks(compiled, "eager")
    for got, wanted in zip(
        jvp(compiled, jump, dx=dx, dt=1.0, graph=True), jvp(student, jump, dx=dx, dt=1.0, graph=True), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert graphs() == 0


@pytest.mark.slow
def test_forced_weights_are_replaced_before_compiled_evaluations():
    """And twice in one graph of the loss, which an in-place change within the compiled function would break."""
    student, jump, _ = student_of("edm2")
    student.requires_grad_(True)
    compiled = copy.deepcopy(student)
    compile_networks(compiled, "eager")
    for model in (student, compiled):
        (model.average_velocity(*jump).sum() + model.average_velocity(*jump).square().sum()).backward()
    for (name, ours), theirs in zip(compiled.named_parameters(), student.parameters(), strict=True):
        if "logvar" in name:  # takes no part
            continue
        torch.testing.assert_close(ours, theirs, msg=name)
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_a_compiled_training_is_the_same_training(tmp_path):
    gin_file, results = write(tmp_path / "ring.gin"), {}
    for name, backend in (("plain", None), ("compiled", "eager")):
        bindings = ["train.steps = 3", "train.checkpoint_every = 3", f"train.compile = {backend!r}"]
        results[name] = flowdistill.train(gin_file, gin_bindings=bindings, workdir=tmp_path / name, report=False)
        assert bool(graphs()) is (name == "compiled")
    plain, compiled = results["plain"], results["compiled"]
    for name, value in plain.flow_map.state_dict().items():
        assert torch.equal(value, compiled.flow_map.state_dict()[name])
    assert {**compiled.metrics, "steps_per_second": 0} == {**plain.metrics, "steps_per_second": 0}


def test_student_teacher_and_their_copies_are_compiled_and_the_average_is_not(tmp_path):
    gin_file = write(tmp_path / "ring.gin")
    with config.parsed([gin_file], ["train.compile = 'eager'"]):
        loop = configured_loop(tmp_path / "run", "cpu")
    (online,) = loop.objective.modules().values()
    assert loop.student.network._backend == online.network._backend == online.network.network._backend == "eager"
    assert loop.averages["ema"].module.network._backend is None


def test_an_unknown_backend_is_told_by_a_plan_too(tmp_path):
    gin_file = write(tmp_path / "ring.gin")
    for call in (flowdistill.plan, flowdistill.train):
        with pytest.raises(ConfigError, match=r"such as .*inductor.*, not 'fast'"):
            call(gin_file, gin_bindings=["train.compile = 'fast'"])
    assert flowdistill.plan(gin_file, gin_bindings=["train.compile = 'inductor'"]).flops > 0
    assert graphs() == 0


@pytest.mark.slow
def test_the_compiler_of_pytorch_agrees_and_shares_dropout_masks():
    """A difference divides by its step, so that masks which differ would show."""
    student, jump, dx = student_of("edm2, dropout")
    compiled = copy.deepcopy(student)
    compile_networks(compiled, "inductor")
    torch.manual_seed(3)
    wanted = finite_difference(student, jump, dx=dx, dt=1.0, h=1e-4)
    torch.manual_seed(3)
    got = finite_difference(compiled, jump, dx=dx, dt=1.0, h=1e-4)
    for ours, theirs in zip(got, wanted, strict=True):
        assert distance(ours.detach(), theirs.detach()) < 1e-6
    torch.manual_seed(4)
    one = evaluations(compiled, jump, dx)
    torch.manual_seed(4)
    for ours, theirs in zip(one, evaluations(student, jump, dx), strict=True):
        assert distance(ours, theirs) < 1e-8
