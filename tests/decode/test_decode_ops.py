"""The operations of a decode step: Triton on CUDA against the formula in float32, over sizes, dtypes and lengths.

Each case of these compiles a kernel on the GPU, so sizes, forms and dtypes take turns instead of all combinations.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.decode import launch as ops
from cats_ext.decode.launch import Attention, AttentionPartials, Norm
from cats_ext.ops.reference import ACTIVATIONS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # relative, of the whole row
F32, F16, BF16 = TOLERANCE


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def rounded(t: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``t`` is after a round trip through ``dtype``, so that references start from the same values."""
    return t.to(dtype).float()


def check(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.shape == expected.shape
    error = (got.float().cpu() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype], f"relative error {error:.1e}"


def merged(partials: AttentionPartials) -> Tensor:
    """The attention ``[heads * D]`` that partial results stand for."""
    weights = partials.largest.double().exp()[..., None]
    return ((partials.weighted * weights).sum(0) / (partials.total[..., None] * weights).sum(0)).flatten().float().cpu()


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("inputs", "outputs", "form", "dtype"),
    [
        (64, (64, 32, 32), "delta, bias", F32),
        (64, (64, 32, 32), "", F16),
        (576, (576, 192, 192), "delta", BF16),
        (80, (33,), "", F32),
        (4096, (7, 5), "bias", BF16),
        (4096, (3000,), "delta", BF16),
        (5120, (9,), "", BF16),
    ],
)
def test_linear(device, inputs, outputs, form, dtype):
    x, delta, weight = (rounded(random(inputs, seed=s), dtype) for s in range(3))
    weights = [rounded(random(n, inputs, seed=i) / inputs**0.5, dtype) for i, n in enumerate(outputs)]
    biases = [rounded(random(n, seed=i), dtype) for i, n in enumerate(outputs)]
    row = rounded(x + delta, dtype) if "delta" in form else x
    inner = rms(row, weight)
    expected = torch.cat(
        [F.linear(inner, w, b if "bias" in form else None) for w, b in zip(weights, biases, strict=True)]
    )

    def there(t: Tensor) -> Tensor:
        return t.to(device, dtype)

    y, x_new = ops.linear(
        there(x),
        [there(w) for w in weights],
        [there(b) if "bias" in form else None for b in biases],
        norm=Norm(there(weight), 1e-5),
        delta=there(delta) if "delta" in form else None,
    )
    check(y, expected, dtype)
    assert torch.equal(x_new.float().cpu(), row)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("inputs", "outputs", "bias", "dtype"),
    [(80, 33, True, BF16), (1536, 576, False, F16), (11008, 64, False, BF16), (14336, 600, True, BF16)],
)
def test_add_linear(device, inputs, outputs, bias, dtype):
    x, weight, b, residual = (
        rounded(t, dtype)
        for t in (random(inputs), random(outputs, inputs) / inputs**0.5, random(outputs), random(outputs, seed=9))
    )
    there = [t.to(device, dtype) for t in (x, weight, b, residual)]
    y, normed = ops.add_linear(there[0], there[1], there[2] if bias else None, there[3])
    check(y, F.linear(x, weight, b if bias else None) + residual, dtype)
    assert normed is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("heads", "head_dim", "outputs", "dtype"),
    [(4, 16, 50, F32), (32, 128, 4096, BF16), (9, 64, 576, F16), (32, 96, 40, BF16), (28, 128, 33, BF16)],
)
def test_merging_partials(device, heads, head_dim, outputs, dtype):
    """The output projection of an attention from partial results, some of them without keys, and its normalisation."""
    count = 4
    partials = AttentionPartials.create(count, heads, head_dim, torch.device(device))
    partials.weighted.copy_(random(count, heads, head_dim))
    partials.largest.copy_(random(count, heads, seed=1) * 5)
    partials.total.copy_(random(count, heads, seed=2).abs() + 1)
    for field, empty in ((partials.weighted, 0), (partials.largest, -1e30), (partials.total, 0)):
        field[1, ::2] = empty
    row = merged(partials)
    weight = random(outputs, heads * head_dim) / (heads * head_dim) ** 0.5
    weight, residual, norm = (rounded(t, dtype) for t in (weight, random(outputs), random(outputs, seed=3)))
    expected = F.linear(rounded(row, dtype), weight) + residual
    x = partials if device == "cuda" else row.to(dtype)
    weight, residual, norm = (t.to(device, dtype) for t in (weight, residual, norm))
    for _ in range(2):  # the second time with what the first has left
        y, normed = ops.add_linear(x, weight, None, residual, norm=Norm(norm, 1e-5))
        check(y, expected, dtype)
        check(normed, rms(y.float().cpu(), norm.float().cpu()), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("hidden", "intermediate", "bias", "activation", "dtype"),
    [
        (64, 176, True, "silu", F32),
        (64, 176, True, "relu", F16),
        (576, 1536, False, "silu", BF16),
        (576, 1536, False, "gelu", F32),
        (4096, 11, False, "gelu_tanh", BF16),
        (4096, 11, False, "gelu_tanh", F32),
    ],
)
def test_gate_up(device, hidden, intermediate, bias, activation, dtype):
    x, weight = (rounded(random(hidden, seed=s), dtype) for s in range(2))
    w_gate, w_up = (rounded(random(intermediate, hidden, seed=s) * 1.5 / hidden**0.5, dtype) for s in range(2))
    gate_bias, up_bias = (rounded(random(intermediate, seed=s), dtype) if bias else None for s in range(2))
    inner = rms(x, weight)
    act = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"), "relu": F.relu}
    expected = act[activation](F.linear(inner, w_gate, gate_bias)) * F.linear(inner, w_up, up_bias)
    operands = [None if t is None else t.to(device, dtype) for t in (x, w_gate, w_up, gate_bias, up_bias)]
    h = ops.gate_up(*operands, activation, Norm(weight.to(device, dtype), 1e-5))
    check(h, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_up_keeps_nan(device, activation):
    w_gate, w_up = (random(48, 64, seed=s).to(device) for s in range(2))
    w_gate[5, 3] = float("nan")
    norm = Norm(torch.ones(64, device=device), 1e-5)
    h = ops.gate_up(random(64).to(device), w_gate, w_up, None, None, activation, norm)
    assert h.isnan().nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "normed", "dtype"),
    [
        (2, 2, 16, True, F32),
        (8, 4, 128, False, BF16),
        (3, 3, 64, False, F32),
        (48, 1, 32, False, BF16),
        (4, 1, 80, True, BF16),
        (1, 7, 32, False, F16),
    ],
)
def test_attention(device, kv_heads, group, head_dim, normed, dtype):
    heads, length = kv_heads * group, 1300
    keys, values = (rounded(random(kv_heads, length, head_dim, seed=s), dtype) for s in range(2))
    angles = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    cos, sin = (rounded(torch.cat((t, t), dim=1), dtype) for t in (angles.cos(), angles.sin()))
    q_norm, k_norm = (rounded(random(head_dim, seed=s).abs() + 0.5, dtype) for s in (5, 6))
    partials = None
    if device == "cuda":
        partials = AttentionPartials.create(
            ops.attention_splits(kv_heads, torch.device(device)), heads, head_dim, torch.device(device)
        )
    for position, window in (
        (0, None),
        (1, None),
        (31, None),
        (32, 7),
        (33, 1),
        (500, None),
        (1299, None),
        (1299, 600),
    ):
        qkv = rounded(random((heads + 2 * kv_heads) * head_dim, seed=position), dtype)
        layer = Attention(
            heads, kv_heads, head_dim, head_dim**-0.5, keys.to(device, dtype), values.to(device, dtype),
            cos.to(device, dtype), sin.to(device, dtype), window,
            Norm(q_norm.to(device, dtype), 1e-5) if normed else None,
            Norm(k_norm.to(device, dtype), 1e-5) if normed else None,
            partials,
        )  # fmt: skip
        got = ops.attention(qkv.to(device, dtype), layer, torch.tensor([position], device=device))
        got = merged(got).to(dtype) if isinstance(got, AttentionPartials) else got

        q, k, v = qkv.view(-1, head_dim).split([heads, kv_heads, kv_heads])
        if normed:
            q, k = rms(q, q_norm), rms(k, k_norm)
        q, k = (
            t * cos[position] + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin[position] for t in (q, k)
        )
        start = 0 if window is None else max(0, position - window + 1)
        all_keys, all_values = (
            torch.cat((cache[:, start:position], new[:, None]), dim=1).repeat_interleave(group, 0)
            for cache, new in ((keys, k), (values, v))
        )
        expected = F.scaled_dot_product_attention(q[:, None], all_keys, all_values, scale=head_dim**-0.5).flatten()
        check(got, expected, dtype)
        check(layer.keys[:, position], k, dtype)
        assert torch.equal(layer.values[:, position].float().cpu(), v)
        untouched = torch.arange(length) != position
        assert torch.equal(layer.keys[:, untouched].float().cpu(), keys[:, untouched])


@pytest.mark.gpu
def test_rows_must_be_contiguous():
    weight = random(64, 64).cuda().t()
    with pytest.raises(ValueError, match=r"weights\[0\] must have unit stride in its last dimension, got strides"):
        ops.linear(random(64).cuda(), [weight], [None], norm=Norm(weight[0], 1e-5))
