"""The states of optimisers: any comes back bit for bit, into an optimiser that it fits and no other."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flowdistill import CheckpointError, CheckpointWriteError
from flowdistill.runs.checkpoints import load_optimizers, save_checkpoint
from flowdistill.runs.optimizer_states import pack, restore, unpack
from flowdistill.training.optimization import fuse, laid_out


class Odd(torch.optim.Optimizer):
    """Holds all that may be held, in types that are not the parameter's, some of it only after the third step."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "names": ["a", None], "limits": (0.0, float("inf"))})

    def step(self, closure=None):
        for group in self.param_groups:
            group.setdefault("later", 0.5)
            for p in group["params"]:
                state = self.state[p]
                state["sum"] = state.get("sum", torch.zeros_like(p, dtype=torch.float64)) + p.grad.double()
                state["codes"] = p.detach().mul(10).to(torch.int8)
                state["word"] = state.get("word", "") + "x"
                state["flag"], state["none"] = True, None
                state["history"] = [*state.get("history", []), p.grad.to(torch.bfloat16)]
                state["nested"] = {"count": len(state["history"]), 3: (1.5, [False, "y"])}
                if len(state["history"]) > 2:
                    state["average"] = p.detach().clone()
                p.data -= 1e-3 * state["sum"].to(p.dtype) + 1e-4 * len(state["word"])


BUILDERS = {
    "Adam": torch.optim.Adam,
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    **{n: getattr(torch.optim, n) for n in ("AdamW", "RAdam", "NAdam", "Adamax", "ASGD", "Rprop", "Adagrad")},
    **{n: getattr(torch.optim, n) for n in ("Adadelta", "RMSprop", "Adafactor") if hasattr(torch.optim, n)},
    "groups": lambda p: torch.optim.Adam(
        [{"params": [v for v in p if v.ndim > 1]}, {"params": [v for v in p if v.ndim < 2], "betas": (0.5, 0.9)}]
    ),
    "odd": Odd,
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))


def train(module, optimizer, steps):
    for number in range(steps):
        torch.manual_seed(number)
        module(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def saved(folder, optimizer):
    path = save_checkpoint(
        folder, 1, {"student": network().state_dict()}, {"student": optimizer.state_dict()}, {}, keep=1
    ).result()
    return load_optimizers(path)["student"]


@pytest.mark.parametrize("name", BUILDERS)
def test_any_optimiser_continues_bit_for_bit(tmp_path, name):
    build = BUILDERS[name]
    module = network()
    optimizer = build(list(module.parameters()))
    train(module, optimizer, 4)
    again = copy.deepcopy(module)
    other = build(list(again.parameters()))
    restore(other, saved(tmp_path, optimizer), build, tmp_path)
    assert same(other.state_dict(), optimizer.state_dict())
    train(module, optimizer, 3)
    train(again, other, 3)
    assert same(other.state_dict(), optimizer.state_dict())
    assert same(dict(again.state_dict()), dict(module.state_dict()))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(0, 9), inner),
)


@given(values)
def test_plain_values_come_back_through_json(value):
    assert same(unpack(json.loads(json.dumps(pack(value, {}))), {}), value)


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(CheckpointWriteError, match="holds a set, which is neither"):
        save_checkpoint(
            tmp_path, 1, {"student": network().state_dict()}, {"student": {"state": {0, 1}}}, {}, keep=1
        ).result()
    assert list((tmp_path / "checkpoints").iterdir()) == []


def changed(state, place, value):
    """A copy with one entry changed, or taken away."""
    state = copy.deepcopy(state)
    *path, key = place
    inner = state
    for part in path:
        inner = inner[part]
    if value is None:
        del inner[key]
    else:
        inner[key] = value
    return state


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (["state"], None, "no state"),
        (["param_groups"], None, "no groups"),
        (["param_groups"], [], "0 groups of parameters, not 1"),
        (["param_groups", 0, "params"], [0, 1, 2], "other parameters"),
        (["param_groups", 0, "lr"], "fast", "lr of group 0 is a str, not a float"),
        (["param_groups", 0, "betas"], (0.9,), "betas of group 0 has 1 entries, not 2"),
        (["param_groups", 0, "betas"], (0.9, "x"), "betas of group 0 is a str"),
        (["param_groups", 0, "momentum"], 0.9, r"group 0 has \['momentum'\]"),
        (["state", 7], {}, "no parameter 7"),
        (["state", 0], 3, "state of parameter 0 is a int"),
        (["state", 0, "exp_avg"], None, "state of parameter 0 lacks exp_avg"),
        (["state", 0, "exp_avg"], torch.zeros(1), r"exp_avg in .* of shape \(1,\), not .* of shape \(4, 3\)"),
        (["state", 0, "exp_avg"], torch.zeros(4, 3).double(), "torch.float64 .* not torch.float32"),
        (["state", 0, "exp_avg"], "x", "is a str, not torch.float32"),
        (["state", 0, "step"], torch.zeros(9), r"step in .* shape \(9,\)"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(tmp_path, place, value, message):
    module = network()
    optimizer = torch.optim.Adam(module.parameters())
    train(module, optimizer, 1)
    state = optimizer.state_dict()
    with pytest.raises(CheckpointError, match=message):
        restore(torch.optim.Adam(network().parameters()), changed(state, place, value), torch.optim.Adam, tmp_path)


@pytest.mark.parametrize("name", ["SGD", "momentum", "RAdam", "groups", "odd"])
def test_the_state_of_another_optimiser_is_refused(tmp_path, name):
    module = network()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, 1)
    other = BUILDERS[name](list(network().parameters()))
    with pytest.raises(CheckpointError, match="another optimiser"):
        restore(other, saved(tmp_path, optimizer), BUILDERS[name], tmp_path)


# ---- one kernel for all parameters


def convolution():
    torch.manual_seed(0)
    return torch.nn.Conv2d(3, 4, 3).double()


def updated(optimizer, module, steps=3):
    """With gradients in the order of memory that convolutions give them."""
    for number in range(steps):
        for parameter in module.parameters():
            gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).double()
            layout = torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
            parameter.grad = gradient.contiguous(memory_format=layout)
        laid_out(optimizer)
        optimizer.step()
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_a_fused_update_is_the_same_update(name):
    plain, fused = (convolution() for _ in range(2))
    one, other = (getattr(torch.optim, name)(module.parameters(), lr=0.1) for module in (plain, fused))
    fuse(other, "cpu")
    assert other.param_groups[0]["fused"] is True
    for ours, theirs in zip(updated(other, fused), updated(one, plain), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_is_chosen_or_cannot_be_is_not_fused():
    module = convolution()
    fuse(optimizer := torch.optim.AdamW(module.parameters()))  # on another device
    assert optimizer.param_groups[0]["fused"] is None
    for optimizer in (
        torch.optim.AdamW(module.parameters(), fused=False),
        torch.optim.AdamW(module.parameters(), foreach=True),
        torch.optim.SGD(module.parameters(), differentiable=True),
        torch.optim.Adagrad(module.parameters()),
        torch.optim.RMSprop(module.parameters()),
    ):
        fuse(optimizer, "cpu")
        assert not optimizer.param_groups[0].get("fused")


def test_a_state_leaves_its_device_without_the_kernels_of_it(tmp_path):
    module = convolution()
    optimizer = torch.optim.AdamW(module.parameters())
    fuse(optimizer, "cpu")
    updated(optimizer, module)
    other = torch.optim.AdamW(convolution().parameters())
    restore(other, saved(tmp_path, optimizer), torch.optim.AdamW, tmp_path)
    assert other.param_groups[0]["fused"] is None
    assert same(other.state_dict()["state"], optimizer.state_dict()["state"])
