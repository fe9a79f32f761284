"""The MLP of one token in a decode step: its input normalised by the kernel, its output left as a sum in float32.

Both steps of dense weights: ``sparse_mlp_step``, and ``sparse_mlp_columns_step`` with an ``input_sparsity``.
"""

from __future__ import annotations

import pytest
import torch
from support.columns_cases import make_columns_case
from support.op_cases import DEVICES, clear_of, make_case, normal

from cats_ext import ops
from cats_ext.ops import reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TOLERANCE = {
    F32: 1e-5,
    F16: 2e-3,
    BF16: 1e-2,
}  # relative, of the whole row: an element of the normalised row may round up
EPS = 1e-5


def arguments(
    device,
    hidden=64,
    intermediate=48,
    dtype=F32,
    rule="scalar",
    activation="silu",
    bias=False,
    sparsity=0.5,
    input_sparsity=None,
):
    """What the op takes, with a zero sum, and the float64 result."""
    x, norm = normal(hidden, seed=7, scale=3.0).to(dtype), (1 + normal(hidden, seed=8, scale=0.2)).to(dtype)
    make = make_case if input_sparsity is None else make_columns_case
    case = make(1, hidden, intermediate, dtype, rule="all kept", activation=activation, bias=bias)
    if input_sparsity is not None:  # a gap, over which rounding moves none
        small = normal(hidden, seed=9).argsort().argsort() < input_sparsity * hidden
        x = torch.where(small, 0.02 * x.sign(), x.sign() + x)
        case.input_threshold = torch.tensor({0.0: 0.0, 1.0: float("inf")}.get(input_sparsity, 0.03))
    case.x, case.biases[2] = reference.rms_norm_ref(x, norm, EPS), None
    v, h = case.values()
    margin = 1e-5 if dtype == F32 else 3e-3
    if rule != "all kept":
        case.threshold = clear_of(v.flatten().quantile(sparsity), v, margin)
    if rule == "vector, vector":
        case.threshold, case.down_threshold = (
            clear_of(values.flatten().quantile(sparsity) * (0.5 + torch.rand(intermediate)), values, margin)
            for values in (v, h)
        )
    expected = case.expected()
    y_sum = torch.zeros(-(-(hidden + 1) // 4) * 4, device=device)
    there = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t  # noqa: E731
    weights, rest = case.args()[1:4], case.args()[4:-1]
    return [*map(there, (x, norm)), EPS, *map(there, weights), y_sum, *map(there, rest)], expected


def check(args, expected):
    x, y_sum = args[0], args[6]
    got = y_sum[: x.numel()].double().cpu()
    assert (got - expected).norm() <= TOLERANCE[x.dtype] * expected.norm()


def op_of(args):
    return ops.sparse_mlp_columns_step if len(args) == 13 else ops.sparse_mlp_step


@pytest.mark.parametrize("input_sparsity", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("hidden", "intermediate", "dtype", "rule", "activation", "bias"),
    [
        (64, 2200, F32, "scalar", "silu", False),
        (64, 2200, F16, "all kept", "gelu_tanh", True),
        (576, 2304, BF16, "scalar", "silu", False),
        (1000, 333, F32, "vector, vector", "gelu", True),
        (2048, 700, BF16, "vector, vector", "silu", False),
        (4096, 2000, BF16, "scalar", "silu", True),
        (4096, 600, F32, "scalar", "relu", False),
        (5120, 500, F16, "scalar", "silu", False),
        (8192, 300, BF16, "vector, vector", "silu", False),
    ],
)
def test_adds_the_mlp_of_the_normalised_row(
    device, hidden, intermediate, dtype, rule, activation, bias, input_sparsity
):
    if input_sparsity is not None:
        intermediate -= intermediate % 8
    args, expected = arguments(
        device, hidden, intermediate, dtype, rule, activation, bias, input_sparsity=input_sparsity
    )
    for _ in range(3):
        args[6].zero_()
        op_of(args)(*args)
        check(args, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("input_sparsity", [None, 0.4])
def test_sums_of_several_layers_in_one_graph(input_sparsity):
    layers = [arguments("cuda", 576, 2496, BF16, sparsity=s, input_sparsity=input_sparsity) for s in (0.2, 0.5, 0.8)]
    sums = torch.zeros(len(layers), 580, device="cuda")
    for (args, _), row in zip(layers, sums, strict=True):
        args[6] = row
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums.zero_()
        for args, _ in layers:
            op_of(args)(*args)
    for _ in range(5):
        graph.replay()
    for args, expected in layers:
        check(args, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "intermediate"), [(60, 2200), (64, 48)])  # rows of 120 bytes; the small kernel's
def test_layers_without_a_kernel_say_so(hidden, intermediate):
    args, _ = arguments("cuda", hidden, intermediate, F16)
    with pytest.raises(RuntimeError, match=r"sparse_mlp_step: cudaErrorNotSupported"):
        ops.sparse_mlp_step(*args)


@pytest.mark.parametrize("input_sparsity", [None, 0.4])
@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize(
    ("which", "change", "message"),
    [
        (0, lambda t: torch.stack((t, t)), r"x must be one contiguous row, got shape \[2, 64\]"),
        (1, lambda t: t[1:], r"norm_weight must have shape \[64\], got \[63\]"),
        (1, lambda t: t.half(), r"norm_weight must have x's dtype"),
        (6, lambda t: t[:64], r"y_sum must be contiguous float32 of shape \[H \+ 1\] on .* of shape \[64\]"),
        (
            6,
            lambda t: t.double(),
            r"y_sum must be contiguous float32 of shape \[H \+ 1\] on .*, got torch.float64",
        ),
    ],
)
def test_errors(device, which, change, message, input_sparsity):
    args, _ = arguments("cpu", input_sparsity=input_sparsity)
    args = [t.to(device) if isinstance(t, torch.Tensor) else t for t in args]
    args[which] = change(args[which])
    name = op_of(args).default._schema.name.removeprefix("cats::")
    with pytest.raises(RuntimeError, match=f"{name}: {message}"):
        op_of(args)(*args)


@pytest.mark.parametrize("input_sparsity", [None, 0.4])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device, input_sparsity):
    args, _ = arguments(device, 64, 2200, input_sparsity=input_sparsity)
    torch.library.opcheck(op_of(args), tuple(args))


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "intermediate"), [(60, 2200), (64, 2204)])  # rows of no whole 16 bytes
def test_columns_without_a_kernel_say_so(hidden, intermediate):
    args, _ = arguments("cuda", hidden, intermediate, F16, input_sparsity=0.4)
    with pytest.raises(RuntimeError, match=r"^sparse_mlp_columns_step: .*16 bytes"):
        ops.sparse_mlp_columns_step(*args)
