"""The Triton kernel for the tangent of attention: its numbers under Triton's interpreter, which runs on a CPU.

The interpreter must be chosen before triton is imported, so this file is a program too, run in a process of its own.
It prints the relative errors of all cases.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from flowdistill.duals import attention, dual, parts
from flowdistill.plumbing.flops import Flops

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or int(version("triton").split(".")[1]) < 9,
    reason="needs triton >= 3.9, of 1 GB, which comes with torch for CUDA; older interpreters fail beside numpy 2.4",
)

# ---- numbers


def drawn(n=40, m=50, width=16, lead=(1, 2), seed=0):
    """Queries, keys, values and their tangents, float64; keys and queries have a common part, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (n, m, m, n, m, m)
    numbers = [torch.randn(*lead, length, width, generator=generator, dtype=torch.float64) for length in lengths]
    return [numbers[0], numbers[1] + 1, *numbers[2:]]


def plain(q, k, v, scale, causal):
    scores = scale * q @ k.mT
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ v


def error(numbers, moving="qkv", dtype=torch.float32, scale=None, causal=False, transposed=()):
    """The relative error of the kernel's tangent."""
    from flowdistill.duals.triton_attention import attention_tangent

    numbers = [number.to(dtype) for number in numbers]
    for i in transposed:  # as heads lie that come out of one projection
        numbers[i] = numbers[i].transpose(-3, -2).contiguous().transpose(-3, -2)
    scale = numbers[0].shape[-1] ** -0.5 if scale is None else scale
    wide = [number.double() for number in numbers]
    directions = [wide[3 + i] if name in moving else torch.zeros_like(wide[i]) for i, name in enumerate("qkv")]
    value, wanted = torch.func.jvp(lambda *qkv: plain(*qkv, scale, causal), tuple(wide[:3]), tuple(directions))
    tangents = [numbers[3 + i] if name in moving else None for i, name in enumerate("qkv")]
    got = attention_tangent(*numbers[:3], value.to(numbers[0]), tangents, scale, causal)
    assert got.dtype == dtype
    return float((got - wanted).norm() / wanted.norm())


def through_duals(compiled=False, **settings):
    """The relative difference of the kernel, through attention of duals, from the rows."""
    q, k, v, dq, dk, dv = drawn(lead=(1, 4))
    if settings.get("enable_gqa"):
        k, v, dk, dv = (number[:, :2] for number in (k, v, dk, dv))
    pairs = [(a.float(), b.float()) for a, b in ((q, dq), (k, dk), (v, dv))]

    def tangent(pairs):
        return parts(F.scaled_dot_product_attention(*(dual(*pair) for pair in pairs), **settings))[1]

    attention.takes_kernel = lambda *values: False
    wanted = tangent(pairs)
    attention.takes_kernel = lambda *values: True
    graphs = []
    if compiled:
        tangent = torch.compile(tangent, backend=lambda graph, inputs: graphs.append(graph) or graph, fullgraph=True)
    got = tangent(pairs)
    assert len(graphs) == compiled
    return float((got - wanted).norm() / wanted.norm())


CASES = {
    **{f"width {width}": lambda width=width: error(drawn(70, 90, width)) for width in (16, 64, 72)},
    "whole blocks": lambda: error(drawn(64, 32)),
    "few queries": lambda: error(drawn(5, 130)),
    "few keys": lambda: error(drawn(130, 5)),
    "large scores": lambda: error(drawn(), scale=3.0),
    "negative scale": lambda: error(drawn(), scale=-0.5),
    **{f"moving {names}": lambda names=names: error(drawn(), names) for names in ("q", "k", "v", "qk", "kv", "qv")},
    "causal": lambda: error(drawn(50, 50), causal=True),
    "causal, more keys": lambda: error(drawn(), causal=True),
    "causal, more queries": lambda: error(drawn(50, 20), causal=True),
    "transposed": lambda: error(drawn(width=72, lead=(2, 3)), transposed=range(6)),
    "transposed, one head": lambda: error(drawn(lead=(2, 1)), transposed=range(6)),
    **{f"transposed {i}": lambda i=i: error(drawn(), transposed=(i, i + 3)) for i in range(3)},
    "transposed tangents": lambda: error(drawn(), transposed=(3, 4, 5)),
    "columns apart": lambda: error([x.mT.contiguous().mT for x in drawn(48, 48)]),
    **{f"{len(lead)} batches": lambda lead=lead: error(drawn(lead=lead)) for lead in ((), (2,), (2, 1, 2))},
    "duals": through_duals,
    "duals, scale": lambda: through_duals(scale=0.3),
    "duals, causal": lambda: through_duals(is_causal=True),
    "duals, shared heads": lambda: through_duals(enable_gqa=True),
    "duals, compiled": lambda: through_duals(compiled=True),
    **{
        f"float16, width {width}": lambda width=width: error(drawn(70, 90, width), dtype=torch.float16)
        for width in (16, 64, 72, 200)
    },
}


@pytest.fixture(scope="module")
def errors():
    done = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_triton
@pytest.mark.parametrize("case", CASES)
def test_the_tangent_is_that_of_plain_attention(errors, case):
    assert errors[case] < (2e-3 if "float16" in case else 1e-5)


# ---- where it is used


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of some generation, on which fake tensors lie."""

    def of(major):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))

    monkeypatch.setattr(attention, "_TRITON", True)
    of(9)
    return of


def fake(*shapes, device="cuda", dtype=torch.bfloat16):
    with FakeTensorMode():
        return [torch.empty(shape, device=device, dtype=dtype) for shape in shapes]


def qkv(keys=512, width=64, value_width=None, queries=8, **settings):
    value = (1, 2, keys, value_width or width)
    return fake((1, 2, queries, width), (1, 2, keys, width), value, **settings)


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({}, True),
        ({"keys": 511, "queries": 1024}, False),
        ({"width": 256}, True),
        ({"width": 257}, False),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, True),
        ({"dtype": torch.float32, "width": 128}, True),
        ({"dtype": torch.float32, "width": 129}, False),
        ({"dtype": torch.float64}, False),
        ({"value_width": 32}, False),
        ({"device": "cpu"}, False),
    ],
)
def test_it_is_taken_for_many_keys_on_a_gpu(gpu, settings, taken):
    assert attention.takes_kernel(*qkv(**settings), None) is taken


def test_it_is_not_taken_with_a_mask_on_old_gpus_or_without_triton(gpu, monkeypatch):
    assert not attention.takes_kernel(*qkv(), fake((8, 512))[0])
    gpu(7)
    assert not attention.takes_kernel(*qkv(), None)
    gpu(8)
    assert attention.takes_kernel(*qkv(), None)
    monkeypatch.setattr(attention, "_TRITON", False)
    assert not attention.takes_kernel(*qkv(), None)


@needs_triton
@pytest.mark.parametrize(("moving", "products"), [("q", 3), ("k", 3), ("v", 2), ("qk", 4), ("qkv", 5)])
def test_its_products_are_counted(gpu, moving, products):
    """On a GPU of fake tensors, through the attention of duals."""
    with FakeTensorMode():
        q, k, v = (torch.empty((2, 3, n, 72), device="cuda", dtype=torch.bfloat16) for n in (600, 700, 700))
        duals = [
            dual(x, torch.empty_like(x) if name in moving else None) for name, x in zip("qkv", (q, k, v), strict=True)
        ]
        with Flops() as plain:
            F.scaled_dot_product_attention(q, k, v)
        with Flops() as both:
            value, tangent = parts(F.scaled_dot_product_attention(*duals))
    assert tangent.shape == value.shape
    assert tangent.stride() == value.stride()
    assert both.total - plain.total == products * 2 * 2 * 3 * 600 * 700 * 72


@needs_triton
def test_loads_are_aligned_also_of_single_heads():
    """A single entry's stride can be any number, and no load would be aligned by it."""
    from flowdistill.duals.triton_attention import _heads, _strides

    assert _strides(torch.empty_strided((2, 1, 8, 16), (128, 1, 16, 1))) == [128, 0, 16]
    assert _heads(torch.empty(2, 3, 16, 8).mT, (2, 3)).stride() == (384, 128, 16, 1)


# ---- compiled

COMPILE = """
import inspect, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flowdistill.duals.triton_attention import _blocks, _kernel

DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
for dtype, width, capability in (("bf16", 64, 90), ("bf16", 72, 80), ("fp16", 256, 86), ("fp32", 128, 89)):
    blocks = _blocks(width, DTYPES[dtype])
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    moves = {f"{name}_moves": True for name in ("query", "key", "value")}
    constants = {"unit": 8, "width": width, "precision": "tf32x3", "causal": False, **moves, **blocks}
    signature = {}
    for place, name in enumerate(_kernel.arg_names):
        number = "fp32" if name == "scale" else "i32"
        signature[name] = "constexpr" if name in constants else f"*{dtype}" if place < 8 else number
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(8)}
    source = ASTSource(_kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "mma" in compiled.asm["ptx"], "tensor cores"
    assert "cp.async" in compiled.asm["ptx"], "loads while computing"
    print(compiled.metadata.shared)
"""


@needs_triton
def test_it_compiles_for_gpus(tmp_path):
    """Which needs none: the interpreter accepts more than the compiler does. Shared memory has 99 KiB at least."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert max(map(int, done.stdout.split())) <= 99 * 1024


if __name__ == "__main__":
    print(json.dumps({name: case() for name, case in CASES.items()}))
