"""Pickles of IMM's and TVM's networks, right, damaged and hostile; nothing of them is executed.

The files are made here, with the classes, names and records of the authors' files, and with code that must not run.
"""

import copyreg
import io
import os
import pickle
from collections import OrderedDict
from contextlib import suppress

import attrs
import pytest
import torch
from edm2_files import CODE, Call, EasyDict, Layer, Precond, persistent, writing
from edm2_hostile_files import cycle, deep, laughs, tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from student_files import ARGUMENTS, load, pickled, state, written

from flowdistill import CheckpointError, Condition, ConfigError, Jump
from flowdistill.differentiation import finite_difference, jvp
from flowdistill.networks.embeddings import position_table
from flowdistill.plumbing.dry import without_files
from flowdistill.students import FAMILIES
from flowdistill.testing import flow_map_checks

COMMAND = 'touch "$CANARY"'


def drawn(flow_map):
    x = torch.randn(3, *flow_map.sample_shape, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([0.994, 0.8, 0.5]), torch.tensor([0.0, 0.3, 0.2])
    return flow_map(x, t, s, Condition(torch.tensor([1, 5, 9])))


def file(folder, data, name="imagenet256_ts_a2.pkl"):
    (folder / name).write_bytes(data)
    return folder / name


def refused(path, kind=CheckpointError, **kwargs):
    with pytest.raises(kind) as error:
        load(path, **{**ARGUMENTS["imm_ts"], **kwargs})
    assert str(path) in str(error.value)
    return str(error.value)


def test_this_test_knows_files_that_run_code(canary):
    """Python's own reader runs the code that each file carries."""
    with writing():
        pickle.loads(pickle.dumps(persistent("DiT_XL_2"), 4))
    assert canary.exists()
    canary.unlink()
    assert CODE.encode() in pickled(state("imm_ts"))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_protocols(tmp_path, protocol):
    expected = drawn(load(written("imm_ts", tmp_path), **ARGUMENTS["imm_ts"]))
    path = file(tmp_path, pickled(state("imm_ts"), protocol))
    assert torch.equal(drawn(load(path, **ARGUMENTS["imm_ts"])), expected)


def test_what_the_files_say(tmp_path):
    """The stored heads, the grid that begins at 0.994, guidance by two evaluations, and whitened latents."""
    student = load(written("imm_ts", tmp_path), **ARGUMENTS["imm_ts"])
    assert student.network.arguments["num_heads"] == 4
    assert (student.conditioning, student.first_time, student.guidance) == ("two_time", 0.994, 1.5)
    assert student.guidance_input == "null_label"
    assert load(written("imm_s", tmp_path), **ARGUMENTS["imm_s"]).conditioning == "end_time"
    mean, std = (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)
    raw = student.decoder.latents(torch.ones(1, 4, 8, 8))[0, :, 0, 0]
    torch.testing.assert_close(raw, torch.tensor(mean) + torch.tensor(std))
    assert student.decoder.rounding == "down"


def test_the_name_of_the_file_or_the_call_says_what_is_embedded(tmp_path):
    path = file(tmp_path, pickled(state("imm_ts")), "imm.pkl")
    assert "say which, as in load_flow_map(" in refused(path, ConfigError)
    for name in ("imm_ts", "imm_s"):
        named = load(name, checkpoint=path, **ARGUMENTS[name])
        assert torch.equal(drawn(named), drawn(load(written(name, tmp_path), **ARGUMENTS[name])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    tensors = {k: v.to(dtype) for k, v in state("imm_ts").items()}
    student = load(file(tmp_path, pickled(tensors)), **ARGUMENTS["imm_ts"])
    exact = load(written("imm_s", tmp_path).rename(tmp_path / "x_ts_.pkl"), **ARGUMENTS["imm_ts"])
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    for (name, ours), theirs in zip(student.state_dict().items(), exact.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs.to(dtype).float()), name


def test_a_release_with_much_beside_the_network(tmp_path):
    def change(release):
        return EasyDict(release, loss_fn=persistent("IMMLoss", k=12), dataset_kwargs=EasyDict(path="x.zip"), net=None)

    student = load(file(tmp_path, pickled(state("imm_ts"), change=change)), **ARGUMENTS["imm_ts"])
    assert torch.equal(drawn(student), drawn(load(written("imm_ts", tmp_path), **ARGUMENTS["imm_ts"])))


# Terminal velocity matching.

TVM = ARGUMENTS["tvm"]


def tvm(folder, name="im256_w2.pkl", **said):
    return file(folder, pickled(state("tvm"), network="TVMWrapper", **said), name)


def test_what_the_files_of_tvm_say(tmp_path):
    """The scale in the file's name, whether it multiplies the output, and the latents of each size."""
    student = load(written("tvm", tmp_path), **TVM)
    assert student.network.arguments["num_heads"] == 3
    assert (student.guidance, student.guidance_input, student.guidance_output) == (1.75, "inverse", True)
    assert (student.conditioning, student.first_time) == ("two_time", 1.0)
    plain = load(tvm(tmp_path, "im512_w2p5.pkl", do_scale_param=False), **TVM)
    assert (plain.guidance, plain.guidance_output) == (2.5, False)
    assert load(tvm(tmp_path), **TVM, guidance=3.0).guidance == 3.0
    path = tvm(tmp_path, "tvm.pkl")
    assert "does not tell the guidance scale" in refused(path, ConfigError)
    assert torch.equal(drawn(load(path, **TVM, guidance=1.75)), drawn(student))
    x, t, s, labels = torch.randn(2, 4, 8, 8), torch.ones(2), torch.zeros(2), torch.tensor([1, 2])
    at_two = Condition(labels, torch.full((2,), 2.0))
    doubled, once = (m.average_velocity(x, t, s, at_two) for m in (student, plain))
    torch.testing.assert_close(doubled, 2 * once)


@pytest.mark.parametrize(("tokens", "mean", "std"), [(4, 0.86488, 4.85503674), (32, 1.56, 5.27)])
def test_the_latents_of_tvm(tmp_path, tokens, mean, std):
    tensors = state("tvm")
    tensors["model.pos_embed"] = position_table(tokens, 60)
    path = file(tmp_path, pickled(tensors, network="TVMWrapper"), "im_w2.pkl")
    raw = load(path, **TVM).decoder.latents(torch.ones(1, 4, 2 * tokens, 2 * tokens))
    assert float(raw[0, 0, 0, 0]) == pytest.approx(mean + std)


def test_a_published_architecture_of_tvm(tmp_path, monkeypatch):
    """Which has 18 heads, of 64 features each, where SiT has 16."""
    with without_files():
        student = load("tvm-xl/2-256", checkpoint="im256_w2.pkl", guidance=2.0)
        assert student.network.arguments["num_heads"] == 18
        assert student.network.blocks[0].attn.q_norm.scale.shape == (64,)
    # the same with small numbers
    sizes = {"xl": {"hidden_size": 60, "depth": 4, "num_heads": 4}}
    monkeypatch.setattr("flowdistill.students.sit.SIZES", sizes)
    tensors = state("tvm")
    tensors["model.pos_embed"] = position_table(16, 60)
    path = file(tmp_path, pickled(tensors, network="TVMWrapper"), "im256_w2.pkl")
    tvm_family = attrs.evolve(FAMILIES["tvm"], published={"num_heads": 3})
    monkeypatch.setitem(FAMILIES, "tvm", tvm_family)
    assert load("tvm-xl/2-256", checkpoint=path, **TVM).sample_shape == (4, 32, 32)
    monkeypatch.setitem(FAMILIES, "tvm", attrs.evolve(tvm_family, published={}))
    with pytest.raises(CheckpointError, match="is not tvm-xl/2-256: it has num_heads 3 in place of 4"):
        load("tvm-xl/2-256", checkpoint=path, **TVM)


class OptimizedModule(torch.nn.Module):
    """Stands for PyTorch's, which once was pickled as any other module."""

    def __reduce__(self):
        return copyreg.__newobj__, (type(self),), vars(self)


@pytest.mark.parametrize("as_argument", [True, False])
def test_compiled_networks(tmp_path, as_argument):
    """Whose pickles hold much of the compiler."""

    def change(release):
        if as_argument:
            return {"net": torch.compile(release["ema"])}
        wrapped = OptimizedModule()
        wrapped._orig_mod, wrapped.dynamo_ctx = release["ema"], Call(getattr, "x", "y")
        return {"net": wrapped}

    with pytest.MonkeyPatch.context() as patch:
        if not as_argument:
            patch.setattr(torch._dynamo.eval_frame, "OptimizedModule", OptimizedModule)
            patch.setattr(OptimizedModule, "__module__", "torch._dynamo.eval_frame")
        path = tvm(tmp_path, change=change)
    assert torch.equal(drawn(load(path, **TVM)), drawn(load(tvm(tmp_path, "y_w2.pkl"), **TVM)))


def test_a_compiled_network_that_is_none(tmp_path):
    def change(_):
        empty = OptimizedModule()
        del empty._modules
        return {"net": empty}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.eval_frame, "OptimizedModule", OptimizedModule)
        patch.setattr(OptimizedModule, "__module__", "torch._dynamo.eval_frame")
        path = tvm(tmp_path, change=change)
    refused(path)


# Damage.


def edm2(release):
    return {"ema": Precond(unet=Layer())}


def only(network):
    return lambda release: {"ema": network}


def changed(change):
    """A release whose network is changed in place."""

    def make(release):
        change(release["ema"])
        return release

    return make


def shared(network):
    """Two layers with one parameter."""
    first, second = network.model.blocks[0].mlp, network.model.blocks[1].mlp
    second.fc1.weight = first.fc1.weight


NOTHING = {"_parameters": {}, "_buffers": {}, "_modules": {}}
WRONG = {
    "another class": ("has a network of the class Precond, and is no student of", edm2),
    "a layer by name": ("a class that the pickle does not carry", only(torch.nn.Linear(1, 1))),
    "a text": ("a class that the pickle does not carry", only("IMMPrecond")),
    "no network": ("no network under the key", lambda release: {"encoder": release["ema"]}),
    "a list": ("no network under the key", lambda release: [release["ema"]]),
    "another version": ("version", only(persistent("IMMPrecond", 5, _modules={}))),
    "no modules": ("of type nonetype", only(persistent("IMMPrecond"))),
    "os.system as a value": ("it wants to run", lambda release: release | {"x": Call(os.system, COMMAND)}),
    "os.system as network": ("it wants to run", lambda release: {"ema": Call(os.system, COMMAND)}),
    "os.system as a key": ("it wants to run", lambda release: release | {Call(os.system, COMMAND): 3}),
    "eval": ("it wants to run", lambda release: release | {"x": Call(eval, CODE)}),
    "a parameter by os.system": (
        "it wants to run",
        changed(lambda network: network.model._parameters.update(pos_embed=Call(os.system, COMMAND))),
    ),
    "a text as parameter": ("not a tensor", changed(lambda net: net.model._parameters.update(pos_embed="x"))),
    "a tensor that is not all there": (
        "is not a released student",
        changed(lambda net: net.model._parameters.update(pos_embed=tensor(b""))),
    ),
    "modules in a cycle": ("occurs twice", changed(lambda net: net._modules.update(model=cycle()))),
    "exponentially many modules": ("occurs twice", changed(lambda net: net._modules.update(model=laughs()))),
    "a module in a module 20 times": ("too deep", changed(lambda net: net._modules.update(model=deep(20)))),
    "a parameter in two modules": ("together with another", changed(shared)),
    "no tensors": (
        "lacks blocks, final_layer",
        only(persistent("IMMPrecond", _parameters={}, _buffers={}, _modules={})),
    ),
    "a block less": ("read as a student of", changed(lambda net: net.model.blocks[1]._modules.pop("attn"))),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("named", [False, True])
def test_wrong_and_hostile_pickles(tmp_path, kind, named):
    message, change = WRONG[kind]
    path = file(tmp_path, pickled(state("imm_ts"), change=change))
    with pytest.raises((CheckpointError, ConfigError)) as error:
        load("imm_ts", checkpoint=path, **ARGUMENTS["imm_ts"]) if named else load(path, **ARGUMENTS["imm_ts"])
    assert str(path) in str(error.value)
    if named:
        assert error.type is CheckpointError
        assert message in str(error.value)


def test_files_of_something_else(tmp_path):
    buffer = io.BytesIO()
    torch.save(OrderedDict(state("imm_ts")), buffer)
    for data in (b"", b"<html>404</html>", bytes(1000), buffer.getvalue(), pickle.dumps([1.0, 2.0], 4)):
        refused(file(tmp_path, data))
    assert "7 bytes follow" in refused(file(tmp_path, pickled(state("imm_ts")) + b"\x80\x04K\x01.os"))
    with pytest.raises(
        CheckpointError, match="has a network of the class IMMPrecond, and is no student of Decoupled MeanFlow"
    ):
        load("dmf", checkpoint=file(tmp_path, pickled(state("imm_ts"))), **ARGUMENTS["imm_ts"])


def test_truncated_at_many_points(tmp_path):
    data = pickled(state("imm_ts"))
    for part in (0, 1, 3, 100, 1000, len(data) // 3, len(data) // 2, len(data) - 1000, len(data) - 40, len(data) - 1):
        refused(file(tmp_path, data[:part]))


SMALL = pickled({k: v for k, v in state("imm_ts").items() if "blocks.3" not in k})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_altered_bytes_are_read_or_refused(tmp_path, data):
    altered = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 3))):
        altered[data.draw(st.integers(0, len(altered) - 1))] = data.draw(st.integers(0, 255))
    with suppress(CheckpointError, ConfigError):
        load(file(tmp_path, bytes(altered)), **ARGUMENTS["imm_ts"])


def test_a_student_of_tvm_passes_the_conformance_kit(tmp_path):
    for check in flow_map_checks(load(written("tvm", tmp_path), **TVM)):
        check()


@pytest.mark.parametrize("name", ["imm_ts", "imm_s"])
def test_a_student_passes_the_conformance_kit(tmp_path, name):
    """But for the kit's finite difference, whose step is too long for times in thousandths."""
    student = load(written(name, tmp_path), guidance=1.0, **ARGUMENTS[name])
    for check in flow_map_checks(student):
        if check.name != "forward_mode_is_the_derivative":
            check()
    x = torch.randn(3, *student.sample_shape, dtype=torch.float64)
    t, s = (torch.tensor(v, dtype=torch.float64) for v in ([0.9, 0.7, 0.5], [0.1, 0.5, 0.2]))
    jump = Jump(x, t, s, Condition(torch.tensor([1, 5, 9])))
    with torch.no_grad():
        _, exact = jvp(student.double(), jump, ds=1.0)
        _, central = finite_difference(student.double(), jump, ds=1.0, h=1e-7, scheme="central")
    torch.testing.assert_close(central, exact, rtol=1e-5, atol=1e-4)
