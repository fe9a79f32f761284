"""torch.ops.cats.gated_threshold and its backward against the formula in fp64, autograd and gradcheck."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.op_cases import ACTIVATIONS, DEVICES, DTYPES, assert_close, clear_of, normal
from torch import Tensor

from cats_ext import ops
from cats_ext.ops import reference

INF, NAN = float("inf"), float("nan")
SHAPES = [(1, 1), (17,), (3, 5), (2, 3, 42), (7, 123), (4, 1536), (2, 14336)]


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


def make_inputs(shape, dtype, device, rule="scalar, vector", activation="silu", seed=0):
    """grad_h, gate, up, and thresholds that no value is near to."""
    tensors = [normal(*shape, seed=seed + i, scale=1.5).to(dtype) for i in range(3)]
    _, gate, up = (t.double() for t in tensors)
    v = reference.ACTIVATIONS[activation](gate)

    def threshold(kind: str, values: Tensor, scale: float) -> Tensor:
        vector = torch.rand(shape[-1], generator=torch.Generator().manual_seed(seed)) * scale
        return clear_of(vector if kind == "vector" else vector[0], values.abs().reshape(-1, shape[-1]))

    first, _, second = rule.partition(", ")
    thresholds = threshold(first, v, 0.5), threshold(second, v * up, 0.5) if second else None
    return [t.to(device) for t in tensors], [t if t is None else t.to(device) for t in thresholds]


def check(tensors, thresholds, activation):
    """Forward, counts and backward against the reference in fp64."""
    grad_h, gate, up = tensors
    exact = [t.cpu().double() for t in tensors]
    rule = (*(t if t is None else t.cpu() for t in thresholds), activation, torch.float64)
    h = ops.gated_threshold(gate, up, *thresholds, activation)
    grads = ops.gated_threshold_backward(grad_h, gate, up, *thresholds, activation)
    expected = reference.gated_threshold_ref(*exact[1:], *rule), *reference.gated_threshold_backward_ref(*exact, *rule)
    counts = torch.tensor([1000, 2000, 3000], device=gate.device)
    assert torch.equal(ops.gated_threshold_counted(gate, up, counts, *thresholds, activation), h)
    added = reference.gated_threshold_counts_ref(*exact[1:], *rule[:-1])
    assert (counts.cpu() - torch.tensor([1000, 2000, 3000])).tolist() == added.tolist()
    for actual, wanted in zip((h, *grads), expected, strict=True):
        assert actual.shape == gate.shape and actual.dtype == gate.dtype and actual.is_contiguous()
        assert_close(actual, wanted)


@pytest.mark.parametrize("rule", ["scalar", "vector", "scalar, scalar", "scalar, vector", "vector, vector"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula(shape, dtype, rule, device):
    check(*make_inputs(shape, dtype, device, rule), "silu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_activations(dtype, activation, device):
    check(*make_inputs((5, 333), dtype, device, activation=activation), activation)


def halves(t: Tensor) -> Tensor:
    return torch.cat([torch.full_like(t, NAN), t], dim=-1)[..., t.shape[-1] :]


@pytest.mark.parametrize(
    "layout",
    [
        halves,  # rows with a stride, as of a merged projection's output
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),  # one element after an aligned address
        lambda t: torch.stack([t, t], dim=-1)[..., 0],  # no unit stride
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),  # rows that do not collapse
        lambda t: halves(t)[:, :1].expand(t.shape),  # the same rows again
    ],
    ids=["halves", "misaligned", "strided", "transposed", "expanded"],
)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_layouts(dtype, layout, device):
    tensors, (threshold, down_threshold) = make_inputs((2, 3, 33), dtype, device)
    tensors = [layout(t) for t in tensors]
    check(tensors, (threshold, torch.stack([down_threshold] * 3, dim=-1)[:, 1]), "silu")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0,)])
def test_empty(shape, device):
    gate = torch.empty(shape, device=device)
    assert ops.gated_threshold(gate, gate, torch.zeros((), device=device)).shape == shape
    assert ops.gated_threshold_backward(gate, gate, gate, torch.zeros((), device=device))[1].shape == shape


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("threshold", "down_threshold", "kept"),
    [
        (2.0, None, [2, 3, 4]),
        (2.0000002384185791, None, [3, 4]),
        (0.0, None, [0, 1, 2, 3, 4]),
        (-1.0, None, [0, 1, 2, 3, 4]),
        (NAN, None, [0, 1, 2, 3, 4]),
        (INF, None, []),
        (0.0, 6.0, [2, 3, 4]),
        (0.0, 6.000000476837158, [3, 4]),
        (3.0, 6.0, [3, 4]),
        (2.0, NAN, [2, 3, 4]),
        ([0.0, 1.5, 2.0, 2.5, 9.0], [0.0, 0.0, 7.0, 9.0, 0.0], [0, 3]),
    ],
)
def test_exactly_at_the_threshold(threshold, down_threshold, kept, dtype, device):
    gate = torch.arange(5, dtype=dtype, device=device).expand(2, 5)
    up, grad_h = torch.full_like(gate, -3), torch.ones_like(gate)
    rule = [t if t is None else torch.tensor(t, device=device) for t in (threshold, down_threshold)]
    h = ops.gated_threshold(gate, up, *rule, "relu")
    grad_gate, grad_up = ops.gated_threshold_backward(grad_h, gate, up, *rule, "relu")
    assert h.tolist() == [[-3 * j if j in kept else 0 for j in range(5)]] * 2
    assert grad_gate.tolist() == [[-3 if j in kept and j > 0 else 0 for j in range(5)]] * 2
    assert grad_up.tolist() == [[j if j in kept else 0 for j in range(5)]] * 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_nan_and_infinity_are_kept(dtype, activation, device):
    gate = torch.tensor([NAN, INF, 9.0, 9.0, 9.0, 0.1], dtype=dtype, device=device)
    up = torch.tensor([1.0, 1.0, NAN, INF, -INF, NAN], dtype=dtype, device=device)
    limits = torch.full((6,), 5.0, device=device), torch.full((6,), 1e3, device=device)
    h = ops.gated_threshold(gate, up, *limits, activation)
    torch.testing.assert_close(h.cpu().double(), torch.tensor([NAN, INF, NAN, INF, -INF, 0.0]).double(), equal_nan=True)


def all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_is_read_and_rounded_exactly(dtype, device):
    """relu(gate) * up of two halves is exact in fp32, so h must be PyTorch's rounding of it, bit for bit."""
    gate = all_halves(dtype).to(device)
    for factor in (1.0, 1.0078125, -1.9921875, 3.0, 0.0009765625, 100.0):
        up = torch.full_like(gate, factor)
        h = ops.gated_threshold(gate, up, torch.zeros((), device=device), None, "relu")
        expected = (gate.float().relu() * up.float()).to(dtype)
        torch.testing.assert_close(h, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_silu_of_every_half(dtype, device):
    """Accurate to rounding, as far as the result is not below 1e-30 or subnormal."""
    gate = all_halves(dtype).to(device)
    h = ops.gated_threshold(gate, torch.ones_like(gate), torch.zeros((), device=device), None, "silu")
    g = gate.cpu().double()
    exact = torch.where(g == -INF, NAN, g * torch.sigmoid(g))
    numbers = torch.finfo(dtype)
    tolerance = {"rtol": numbers.eps, "atol": max(1e-30, numbers.tiny * numbers.eps)}
    torch.testing.assert_close(h.cpu().double(), exact.to(dtype).double(), **tolerance, equal_nan=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fp32_activations_are_accurate_to_rounding(activation, device):
    """Relative to the value down to -8, where 1 + erf and 1 + tanh would have no digit left on the CPU."""
    gate = torch.cat([torch.linspace(-8, 20, 100_001), torch.logspace(-30, 3, 10_001), torch.tensor([1e30, 3e38])])
    gate = gate.to(device)
    value = ops.gated_threshold(gate, torch.ones_like(gate), torch.zeros_like(gate[0]), None, activation)
    g = gate.cpu().double()
    exact = {
        "silu": g * torch.sigmoid(g),
        "gelu": g * 0.5 * torch.special.erfc(-g / 2**0.5),
        "gelu_tanh": g * torch.sigmoid((8 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)),
        "relu": g.relu(),
    }
    # CUDA's are the usual forms, accurate relative to g.
    assert_close(value, exact[activation], rtol=1e-5, atol=0 if device == "cpu" else 1e-6)


@pytest.mark.parametrize("rule", ["scalar", "vector", "scalar, vector"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, rule, device):
    (_, gate, up), thresholds = make_inputs((2, 7), torch.float64, device, rule, activation)
    inputs = gate.requires_grad_(), up.requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: ops.gated_threshold(g, u, *thresholds, activation), inputs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_plain_formula(activation, dtype, device):
    tensors, thresholds = make_inputs((3, 42), dtype, device, activation=activation)
    grad_h, gate, up = tensors
    gate, up = gate.requires_grad_(), up.requires_grad_()
    ops.gated_threshold(gate, up, *thresholds, activation).backward(grad_h)

    g, u = (t.detach().double().requires_grad_() for t in (gate, up))
    v = reference.ACTIVATIONS[activation](g)
    h = v * u
    (h * ((v.abs() >= thresholds[0]) & (h.abs() >= thresholds[1])).double()).backward(grad_h.double())
    assert_close(gate.grad, g.grad)
    assert_close(up.grad, u.grad)


def test_gradient_for_one_input_only(device):
    (_, gate, up), thresholds = make_inputs((3, 42), torch.float32, device)
    for wanted in (gate, up):
        gate, up = gate.detach(), up.detach()
        leaf = (gate if wanted is gate else up).requires_grad_()
        ops.gated_threshold(gate, up, *thresholds).sum().backward()  # an expanded gradient
        assert leaf.grad.isfinite().all() and leaf.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    intermediate=st.integers(1, 300),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    rule=st.sampled_from(["scalar", "vector", "scalar, scalar", "vector, vector"]),
    activation=st.sampled_from(ACTIVATIONS),
    layout=st.sampled_from([lambda t: t, halves]),
    seed=st.integers(0, 1000),
)
def test_any_case_equals_the_formula(rows, intermediate, dtype, rule, activation, layout, seed, device):
    tensors, thresholds = make_inputs((rows, intermediate), dtype, device, rule, activation, seed)
    check([layout(t) for t in tensors], thresholds, activation)


@pytest.mark.gpu
def test_in_a_thread_that_has_not_used_cuda():
    (_, gate, up), thresholds = make_inputs((3, 42), torch.float32, "cuda")
    here = ops.gated_threshold_forward(gate, up, *thresholds)
    with ThreadPoolExecutor(1) as thread:
        there = thread.submit(ops.gated_threshold_forward, gate, up, *thresholds).result()
    assert torch.equal(there, here)
