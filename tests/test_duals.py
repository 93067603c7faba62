"""Each rule of the duals against PyTorch's forward mode, and what a single pass must never lose."""

import copy
import itertools
import re

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import mutually_broadcastable_shapes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from flowdistill import ConfigError, differentiation
from flowdistill.duals import Dual, Refused, dual, engine, parts, rules
from flowdistill.duals.engine import RULES, constant

G = torch.Generator()


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=G, dtype=torch.float64).to(dtype)


def case(*args, **kwargs):
    return args, kwargs


X, Y, V, S = normal(2, 4, 6, 6), normal(2, 4, 6, 6), normal(4), normal(())
LAST = X.contiguous(memory_format=torch.channels_last)
M, N, B = normal(3, 5), normal(5, 4), normal(2, 3, 5)
P = M.abs() + 0.5
Q, K, W = normal(2, 4, 7, 3), normal(2, 4, 5, 3), normal(2, 4, 5, 6)
MASK = torch.tensor([[True, False, True, True, True]] * 6 + [[False] * 5])
NUMBERS = torch.complex(M, normal(3, 5))

MIXED = [
    case(X.float(), Y),
    case(X.float(), S),
    case(X, Y.float()),
    case(X.bfloat16(), S.float()),
    case(X.float(), Y.bfloat16()),
]
PAIRS = [case(X, Y), case(X, Y[:1, :, :1]), case(X[:, :1], Y), case(X, 2.5), case(X, 2), case(X, S), case(S, X)]
CASES = {
    "reshape": [case(X, (8, -1)), case(X.mT, (8, -1))],
    "view": [case(X, 8, 36), case(X, (8, -1))],
    "view_as": [case(X, normal(8, 36))],
    "reshape_as": [case(X, normal(8, 36))],
    "expand_as": [case(X[:, :1], X)],
    "type_as": [case(X, X.float())],
    "to": [case(X, torch.float32), case(X, "cpu"), case(X, normal(1).float())],
    "flatten": [case(X, 1)],
    "unflatten": [case(X, 1, (2, 2))],
    "transpose": [case(X, 1, 2)],
    "permute": [case(X, (0, 2, 3, 1))],
    "broadcast_to": [case(X[:, :1], (2, 4, 6, 6))],
    "expand": [case(X[:, :1], (2, 4, 6, 6)), case(X[:, :1], -1, 4, -1, -1)],
    "chunk": [case(X, 2, 1)],
    "split": [case(X, 3, 1), case(X, [1, 3], 1)],
    "split_with_sizes": [case(X, [1, 3], 1)],
    "roll": [case(X, 1, 2)],
    "flip": [case(X, (2,))],
    "rot90": [case(X, 1, (2, 3))],
    "repeat": [case(X, (1, 2, 1, 1))],
    "tile": [case(X, (1, 2, 1, 1))],
    "repeat_interleave": [case(X, 2, 1)],
    "narrow": [case(X, 1, 1, 2)],
    "select": [case(X, 1, 1)],
    "trace": [case(M)],
    "sum": [case(X), case(X, 1), case(X, (2, 3), keepdim=True)],
    "mean": [case(X), case(X, 1), case(X, (2, 3), keepdim=True)],
    "cumsum": [case(X, 1)],
    "avg_pool1d": [case(X[0], 2)],
    "avg_pool2d": [case(X, 2), case(LAST, 2)],
    "avg_pool3d": [case(X, 2)],
    "adaptive_avg_pool1d": [case(X[0], 2)],
    "adaptive_avg_pool2d": [case(X, (2, 3))],
    "adaptive_avg_pool3d": [case(X, 2)],
    "interpolate": [case(X, scale_factor=2), case(X, size=(3, 3), mode="bilinear"), case(LAST, scale_factor=2)],
    "pixel_shuffle": [case(X, 2)],
    "pixel_unshuffle": [case(X, 2)],
    "channel_shuffle": [case(X, 2)],
    "unfold": [case(X, 2, 3, 2), case(X, 3)],
    "fold": [case(normal(2, 36, 16), (6, 6), 3)],
    "__getitem__": [case(X, (slice(None), 0)), case(X, (..., None)), case(M, M > 0), case(X, torch.tensor([1, 0]))],
    "index_select": [case(X, 1, torch.tensor([0, 2]))],
    "gather": [case(M, 1, torch.zeros(3, 2, dtype=torch.int64))],
    "take_along_dim": [case(M, torch.zeros(3, 2, dtype=torch.int64), 1)],
    "diag_embed": [case(M)],
    "unsqueeze": [case(X, 1)],
    "squeeze": [case(X[:, :1], 1)],
    "movedim": [case(X, 1, 2)],
    "swapaxes": [case(X, 1, 2)],
    "unbind": [case(X, 1)],
    "tensor_split": [case(X, 2, 1)],
    "t": [case(M)],
    "view_as_complex": [case(normal(3, 5, 2))],
    "view_as_real": [case(NUMBERS)],
    "conj": [case(NUMBERS)],
    "real": [case(NUMBERS)],
    "imag": [case(NUMBERS)],
    "H": [case(M), case(NUMBERS)],
    "T": [case(M)],
    "adjoint": [case(M)],
    "detach": [],
    "cat": [case([X, Y], 1), case((X, Y[:, :1]), dim=1)],
    "stack": [case([X, Y], 1)],
    "hstack": [case([M, M + 1])],
    "__rpow__": [case(P, 2.0), case(P, 0.5), case(P, 0.0), case(P, P + 1)],
    "where": [
        case(X > 0, X, Y),
        case(X > 0, X.float(), Y),
        case(X > 0, X.float(), S),
        case(X > 0, X, 0.5),
        case(X > 0, 0.5, Y[:, :1]),
    ],
    "add": [*PAIRS, *MIXED, case(X, Y, alpha=2.5)],
    "sub": [*PAIRS, *MIXED, case(X, Y, alpha=2.5)],
    "rsub": [case(X, Y), case(X, 2.5)],
    "mul": [*PAIRS, *MIXED],
    "div": [*PAIRS, *MIXED, case(X, Y, rounding_mode="floor")],
    "true_divide": PAIRS,
    "__rdiv__": [case(X, 2.5), case(X, Y)],
    "matmul": [case(M, N), case(B, N), case(M, N[:, 0]), case(Q, K.mT)],
    "__rmatmul__": [case(N, M)],
    "bmm": [case(B, normal(2, 5, 4))],
    "mm": [case(M, N)],
    "mv": [case(M, normal(5))],
    "dot": [case(V, V + 1)],
    "outer": [case(V, normal(3))],
    "einsum": [case("bij,jk->bik", B, N), case("ij->ji", M), case("i,j,k->ijk", V, V + 1, V + 2)],
    "linear": [case(B, normal(4, 5), V), case(B, normal(4, 5)), case(B, normal(4, 5), bias=V)],
    "conv1d": [case(B, normal(4, 3, 3), V, 1, 1)],
    "conv2d": [
        case(X, normal(4, 4, 3, 3), V, padding=1),
        case(X, normal(6, 2, 3, 3), groups=2),
        case(LAST, normal(2, 4, 1, 1)),
    ],
    "conv3d": [case(X[None], normal(3, 2, 3, 3, 3), normal(3))],
    "conv_transpose1d": [case(B, normal(3, 4, 3), V)],
    "conv_transpose2d": [case(X, normal(4, 2, 3, 3), normal(2), 2)],
    "conv_transpose3d": [case(X[None], normal(2, 3, 3, 3, 3), normal(3))],
    "log": [case(P)],
    "log1p": [case(P)],
    "sqrt": [case(P)],
    "rsqrt": [case(P)],
    "pow": [case(P, 2), case(P, 0), case(P, 1.5), case(P, P), case(2.0, P), case(X, 3)],
    "clamp": [case(X, -1, 0.5), case(X, min=0), case(X, max=0.3), case(X, Y, Y + 1)],
    "masked_fill": [case(X, X > 0, 2.0), case(X, X > 0, S)],
    "pad": [case(X, (1, 2), "constant", 3.0), case(X, (1, 1, 2, 0)), case(X, (1, 1, 1, 1), mode="reflect")],
    "softmax": [case(X, 1), case(X, dim=-1), case(X, -1, dtype=torch.float32)],
    "gelu": [case(X), case(X, approximate="tanh")],
    "softplus": [case(X), case(X, 2.0, 1.0)],
    "silu": [case(X), case(X, True), case(X, inplace=True)],
    "mish": [case(X)],
    "relu": [case(X)],
    "vector_norm": [
        case(X, dim=1, keepdim=True),
        case(X, dim=(1, 2)),
        case(X),
        case(X, ord=1, dim=1),
        case(X * 0, dim=1),
        case(X.float(), dim=1, dtype=torch.float64),
    ],
    "batch_norm": [
        case(X, None, None, V, V + 1, True),
        case(LAST, None, None, training=True),
        case(M, None, None, normal(5), normal(5), True),
    ],
    "instance_norm": [case(X), case(X, weight=V, bias=V + 1, eps=1e-3)],
    "torch batch_norm": [case(X, V, V + 1, None, None, True, 0.1, 1e-3, False)],
    "torch instance_norm": [case(X, V, V + 1, None, None, True, 0.1, 1e-3, False)],
    "group_norm": [case(X, 2, V, V + 1, 1e-3), case(LAST, 2), case(X.mT, 4), case(X[:, :, 0, 0], 2)],
    "rms_norm": [case(X, (6,), normal(6)), case(X, (6, 6), eps=1e-3), case(X.float(), (6,))],
    "layer_norm": [case(X, (6,), normal(6), normal(6), 1e-3), case(X, (6, 6)), case(X.transpose(1, 3), (4,))],
    "scaled_dot_product_attention": [
        case(Q, K, W),
        case(Q, K, W, MASK),
        case(Q, K, W, attn_mask=normal(7, 5)),
        case(Q, K, W, attn_mask=normal(2, 1, 1, 5), scale=0.3),
        case(Q, Q + 1, Q + 2, is_causal=True),
        case(Q, K[:, :2], W[:, :2], enable_gqa=True),
    ],
    "dropout": [case(X, 0.3), case(X, 0.3, False), case(X, 0.3, True, True), case(X, p=1.0), case(X, 0.0)],
    "multi_head_attention_forward": [
        case(
            *[normal(5, 2, 4) for _ in range(3)],
            4,
            2,
            normal(12, 4),
            normal(12),
            *[None] * 2,
            False,
            p,
            normal(4, 4),
            normal(4),
        )
        for p in (0.0, 0.3)
    ],
    "add_": [case(X, Y), case(X, 2.0), case(X, V[:, None, None], alpha=0.5)],
    "masked_fill_": [case(X, X > 0, 2.0)],
    "clamp_": [case(X, -1, 0.5)],
    "__setitem__": [case(X, (0, slice(2)), Y[0, :2]), case(X, (0, slice(2)), 1.0), case(X, X > 0, 0.0)],
    **{f"{name}_": [case(X, Y), case(X, 2.0)] for name in ("sub", "mul", "div")},
    **{f"{name}_": [case(P)] for name in ("sqrt", "rsqrt")},
    **{f"__i{name}__": [case(X, Y), case(X, 2.0)] for name in ("add", "sub", "mul", "div")},
}
SAME = {
    "moveaxis": "movedim",
    "swapdims": "swapaxes",
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "ger": "outer",
    "__add__": "add",
    "__radd__": "add",
    "__sub__": "sub",
    "__rsub__": "rsub",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__truediv__": "div",
    "__matmul__": "matmul",
    "concat": "cat",
    "concatenate": "cat",
    "vstack": "hstack",
    "dstack": "hstack",
    "clip": "clamp",
    "upsample": "interpolate",
}
UNNAMED = [case(X), case(X.mT)]


STILL = (constant, rules._number, rules._base, rules._out_of_sight, rules._detach)


def kinds():
    for func in RULES:
        if isinstance(func, type) or RULES[func] in STILL:
            continue
        name = func.__self__.__name__ if func.__name__ == "__get__" else func.__name__
        name = re.sub("^(fft|linalg|special)_", "", name)
        name = f"torch {name}" if func in (torch.batch_norm, torch.instance_norm) else name
        yield pytest.param(func, CASES.get(SAME.get(name, name), UNNAMED), id=name)


def fits(func, args, kwargs):
    """Whether this is a way to call a function, of several of its name."""
    try:
        return func(*args, **kwargs) is not NotImplemented
    except TypeError:
        return False


def leaf_like(value):
    """Something that needs a gradient, of the same layout, and that may be changed in place."""
    if not floats(value):
        return value
    leaf = value.clone().requires_grad_()
    leaves.append(leaf)
    return leaf * 1


def floats(value):
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


leaves = []


def called(func, args, kwargs):
    """The result, or what was changed in place."""
    result = func(*args, **kwargs)
    return args[0] if func is Tensor.__setitem__ else result


def run(func, args, kwargs, tangents, moving):
    """Values, tangents, gradients, and what is saved for them; without tangents, of a plain call."""
    leaves.clear()
    saved = []
    torch.manual_seed(0)

    def pack(value):
        saved.append((value.shape, value.dtype))
        return value

    args, kwargs = tree_map(leaf_like, (args, kwargs))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        if moving is not None:
            count = itertools.count()
            args, kwargs = tree_map(
                lambda v: dual(v, tangents[i]) if floats(v) and (i := next(count)) in moving else v, (args, kwargs)
            )
        numbers = tree_leaves(called(func, args, kwargs))
    values, results = zip(*map(parts, numbers), strict=True)
    loss = sum((v.real * torch.linspace(-1, 1, v.numel()).reshape(v.shape)).sum() for v in values if floats(v))
    gradients = (
        torch.autograd.grad(loss, leaves, allow_unused=True) if isinstance(loss, Tensor) and loss.requires_grad else ()
    )
    return values, results, gradients, saved


def by_pytorch(func, args, kwargs, tangents, moving):
    flat = [v for v in tree_leaves((args, kwargs)) if floats(v)]

    def function(*values):
        given = dict(zip(moving, values, strict=True))
        count = itertools.count()
        again = lambda v: given.get(i, v).clone() if floats(v) and (i := next(count)) is not None else v  # noqa: E731
        return [v for v in tree_leaves(called(func, *tree_map(again, (args, kwargs)))) if floats(v)]

    torch.manual_seed(0)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), differentiation._Rules(graph=False):
        primals = tuple(flat[i].detach() for i in moving)
        return torch.func.jvp(function, primals, tuple(tangents[i] for i in moving))[1]


def sets(number, func):
    """Arguments that move together: all sets of a few, and the first of those that are changed in place."""
    sizes = range(1, number + 1) if number < 5 else (1, 2, number)
    found = itertools.chain.from_iterable(itertools.combinations(range(number), size) for size in sizes)
    in_place = getattr(RULES[func], "func", None) is engine.in_place or func is Tensor.__setitem__
    return [moving for moving in found if 0 in moving or not in_place]


TOLERANCES = {torch.float16: 0.01, torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.05}


def close(got, wanted):
    return float((got - wanted).abs().max()) <= TOLERANCES[wanted.real.dtype] * (1 + float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("func", "cases"), list(kinds()))
def test_rules(func, cases, dtype):
    """Each against PyTorch's, for each set of arguments that move; values, graphs and gradients are a plain call's."""
    cases = [(args, kwargs) for args, kwargs in cases if fits(func, *tree_map(copy.deepcopy, (args, kwargs)))]
    assert cases
    for args, kwargs in cases:
        args, kwargs = tree_map(lambda v: v.to(dtype) if floats(v) and v.dtype == torch.float64 else v, (args, kwargs))
        flat = [v for v in tree_leaves((args, kwargs)) if floats(v)]
        tangents = [torch.randn(v.shape, generator=G).to(v.dtype) for v in flat]
        plain = run(func, args, kwargs, tangents, None)
        for moving in sets(len(flat), func):
            values, slopes, gradients, saved = run(func, args, kwargs, tangents, moving)
            torch.testing.assert_close((values, gradients), (plain[0], plain[2]), rtol=0, atol=0)
            assert saved == plain[3]
            wanted = by_pytorch(func, args, kwargs, tangents, moving)
            for value, slope in zip(values, slopes, strict=True):
                if not floats(value):
                    continue
                expected = wanted.pop(0)
                slope = torch.zeros_like(expected) if slope is None else slope
                assert (slope.shape, slope.dtype, slope.requires_grad) == (value.shape, value.dtype, False)
                assert close(slope, expected), (args, moving)


SAME_NUMBERS = [case(X, Y), case(X, 0.5)]
CONSTANTS = {
    **dict.fromkeys("eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__".split(), SAME_NUMBERS),  # noqa: SIM905
    **dict.fromkeys(("floor_divide", "__floordiv__", "logical_and", "logical_or", "result_type"), (case(X, Y),)),
    **dict.fromkeys(("equal", "allclose", "isclose", "is_same_size", "is_set_to"), (case(X, Y),)),
    **dict.fromkeys(("__bool__", "__int__"), (case(S),)),
    **dict.fromkeys(("new_zeros", "new_ones"), (case(X, (2, 3)),)),
    "new_empty": [case(X, (0, 3))],
    "new_full": [case(X, (2, 3), 2.0)],
    "new_tensor": [case(X, [1.0, 2.0])],
    "full_like": [case(X, 2.0)],
    "randint_like": [case(X, 5)],
    "__contains__": [case(M, 0.5)],
    "__format__": [case(S, ".2f")],
    "register_hook": [],
    "register_post_accumulate_grad_hook": [],
    "retain_grad": [],
    "backward": [],
    "__index__": [],
    "empty_like": [case(X[:0])],
    "__hash__": [],
}
UNKNOWN = ("floor_divide", "__floordiv__", "randint_like")  # to PyTorch
ATTRIBUTES = {name for name in dir(Tensor) if getattr(getattr(Tensor, name), "__get__", None) in RULES}


@pytest.mark.parametrize(
    ("func", "cases"),
    [
        pytest.param(func, CONSTANTS.get(func.__name__, UNNAMED), id=func.__name__)
        for func, rule in RULES.items()
        if rule is constant and func.__name__ != "__get__"
    ],
)
def test_constants(func, cases):
    """What does not move is what it is of a tensor, and PyTorch gives it no derivative either."""
    for args, kwargs in cases:
        numbers = [dual(v, torch.ones_like(v)) if floats(v) else v for v in args]
        torch.manual_seed(0)
        got = func(*numbers, **kwargs)
        torch.manual_seed(0)
        wanted = func(*args, **kwargs)
        if isinstance(wanted, Tensor):
            torch.testing.assert_close(got, wanted, equal_nan=True)
            if floats(wanted) and func.__name__ not in UNKNOWN:
                tangents = by_pytorch(func, args, kwargs, [torch.ones_like(v) for v in args if floats(v)], (0,))
                assert not tangents[0].any()
        else:
            assert got == wanted
        assert not isinstance(got, Dual)


@pytest.mark.parametrize("name", sorted(ATTRIBUTES - {"_python_dispatch"}))  # which tells of the class
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attributes(name):
    """They are those of the value, or move, or are refused."""
    value = NUMBERS if name == "imag" else M
    number = dual(value, torch.ones_like(value))
    if name == "_base":
        assert number._base is None
        hidden = dual(value[0], torch.ones_like(value[0]))._base
        with pytest.raises(ConfigError, match=r"no derivative goes through Tensor\._base"):
            hidden + 1
    elif name == "data":
        with pytest.raises(ConfigError, match=rf"no derivative goes through Tensor\.{name}"):
            getattr(number, name)
    elif name in ("T", "mT", "H", "mH", "real", "imag"):
        assert torch.equal(parts(getattr(number, name))[1], getattr(torch.ones_like(value), name))
    else:
        assert getattr(number, name) == getattr(value, name)


def test_hooks_and_backward_passes_are_those_of_the_value():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = dual(x, torch.ones(2)) ** 2
    seen = []
    y.register_hook(seen.append)
    y.retain_grad()
    y.sum().backward()
    torch.testing.assert_close((seen[0], x.grad, y.grad), (torch.ones(2), torch.tensor([2.0, 4.0]), torch.ones(2)))


@pytest.mark.parametrize("func", [func for func, rule in RULES.items() if rule is rules._out_of_sight])
def test_what_goes_past_the_derivative_is_refused(func):
    number = dual(M, torch.ones_like(M))
    for argument in (number, number.detach()):
        rest = {"grad": (argument,), "as_strided": ((2,), (1,))}.get(func.__name__, ())
        with pytest.raises(Refused, match=f"{func.__name__} goes past the derivative"):
            func(argument, *rest)


@pytest.mark.parametrize("func", [func for func, rule in RULES.items() if rule is rules._number])
def test_numbers_are_taken_of_constants_alone(func):
    number = dual(S, torch.ones_like(S))
    with pytest.raises(ConfigError, match="no derivative goes through"):
        func(number)
    if func.__name__ != "__get__":
        assert func(number.detach()) == func(S)


@given(
    shapes=mutually_broadcastable_shapes(num_shapes=2, max_dims=3, max_side=3),
    dtypes=st.tuples(*[st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64])] * 2),
    moving=st.sampled_from([(0,), (1,), (0, 1)]),
    func=st.sampled_from([torch.add, torch.sub, torch.mul, torch.div, torch.rsub, torch.maximum, torch.matmul]),
)
@settings(max_examples=150, deadline=None)
def test_arithmetic_of_any_shapes_and_types(shapes, dtypes, moving, func):
    """The dtypes and the shapes are PyTorch's, and tangents are those of the same in float64."""
    shapes = shapes.input_shapes
    args = [(2 + torch.rand(shape, generator=G).double()).to(d) for shape, d in zip(shapes, dtypes, strict=True)]
    moving = [i for i in moving if floats(args[i])]
    try:
        value = func(*args)
    except RuntimeError:
        reject()  # no matrices, or of several types
    if not moving:
        reject()
    tangents = [torch.randn(v.shape, generator=G).to(v.dtype if floats(v) else torch.float64) for v in args]
    numbers = [dual(v, d) if i in moving else v for i, (v, d) in enumerate(zip(args, tangents, strict=True))]
    got, slope = parts(func(*numbers))
    assert torch.equal(got, value)
    assert (slope.shape, slope.dtype) == (value.shape, value.dtype)
    wide = [v.double() for v in args]
    _, wanted = torch.func.jvp(
        lambda *given: func(*[given[moving.index(i)] if i in moving else v for i, v in enumerate(wide)]),
        tuple(wide[i] for i in moving),
        tuple(tangents[i].double() for i in moving),
    )
    tolerance = 0.05 if torch.bfloat16 in (*dtypes, value.dtype) else 1e-5
    assert float((slope.double() - wanted).abs().sum()) <= tolerance * (1 + float(wanted.abs().sum()))


@pytest.mark.parametrize(
    "view", [torch.view_as_complex, lambda z: z.unflatten(0, (3, 1)), lambda z: z.view(6), lambda z: z.view_as(z)]
)
def test_views_of_tangents_that_are_the_same_in_places(view):
    value, tangent = normal(3, 2), normal(3, 1)
    wanted = view(tangent.repeat(1, 2))
    torch.testing.assert_close(parts(view(dual(value, tangent)))[1], wanted)
