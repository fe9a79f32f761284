"""The operations of a decode step: Triton on CUDA against the formula in float32, over sizes, dtypes and lengths.

Each case of these compiles a kernel on the GPU, so sizes, forms and dtypes take turns instead of all combinations.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext import decode_ops as ops
from cats_ext.decode_ops import Attention, AttentionWorkspace, Norm

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


def rms(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("hidden", "with_delta", "dtype"), [(64, True, F32), (576, False, F16), (4096, True, BF16), (5120, False, BF16)]
)
def test_add_rms_norm(device, hidden, with_delta, dtype):
    x, weight, delta = (rounded(random(hidden, seed=s), dtype) for s in range(3))
    row = rounded(x + delta, dtype) if with_delta else x
    norm = Norm(weight.to(device, dtype), 1e-5)
    y, x_new = ops.add_rms_norm(x.to(device, dtype), norm, delta.to(device, dtype) if with_delta else None)
    check(y, rms(row, weight), dtype)
    assert torch.equal(x_new.float().cpu(), row)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("inputs", "outputs", "form", "dtype"),
    [
        (64, (64, 32, 32), "norm, delta, bias", F32),
        (64, (64, 32, 32), "norm", F16),
        (576, (576, 192, 192), "norm, delta", BF16),
        (80, (33,), "residual, bias", BF16),
        (80, (33,), "plain", F32),
        (1536, (576,), "residual", F16),
        (11008, (64,), "residual", BF16),
        (4096, (7, 5), "norm, bias", BF16),
        (5120, (9,), "norm", BF16),
    ],
)
def test_linear(device, inputs, outputs, form, dtype):
    x, delta, weight = (rounded(random(inputs, seed=s), dtype) for s in range(3))
    weights = [rounded(random(n, inputs, seed=i) / inputs**0.5, dtype) for i, n in enumerate(outputs)]
    biases = [rounded(random(n, seed=i), dtype) for i, n in enumerate(outputs)]
    residual = rounded(random(sum(outputs), seed=9), dtype)
    row = rounded(x + delta, dtype) if "delta" in form else x
    inner = rms(row, weight) if "norm" in form else row
    expected = torch.cat(
        [F.linear(inner, w, b if "bias" in form else None) for w, b in zip(weights, biases, strict=True)]
    )
    expected = expected + residual if "residual" in form else expected

    def there(t: Tensor) -> Tensor:
        return t.to(device, dtype)

    y, x_new = ops.linear(
        there(x),
        [there(w) for w in weights],
        [there(b) if "bias" in form else None for b in biases],
        norm=Norm(there(weight), 1e-5) if "norm" in form else None,
        delta=there(delta) if "delta" in form else None,
        residual=there(residual) if "residual" in form else None,
    )
    check(y, expected, dtype)
    assert torch.equal(x_new.float().cpu(), row)


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
    h, _ = ops.gate_up(*operands, activation, Norm(weight.to(device, dtype), 1e-5))
    check(h, expected, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "normed", "dtype"),
    [
        (2, 2, 16, True, F32),
        (8, 4, 128, False, BF16),
        (3, 3, 64, False, F32),
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
    work = AttentionWorkspace.create(kv_heads, group, head_dim, torch.device("cuda")) if device == "cuda" else None
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
            work,
        )  # fmt: skip
        got = ops.attention(qkv.to(device, dtype), layer, torch.tensor([position], device=device))

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
def test_attention_is_the_same_every_time():
    """The shares of a head are joined in their order, whoever comes last."""
    keys, values = (random(8, 2048, 128, seed=s).cuda().bfloat16() for s in range(2))
    ones = torch.ones(2048, 128, device="cuda", dtype=torch.bfloat16)
    work = AttentionWorkspace.create(8, 4, 128, torch.device("cuda"))
    layer = Attention(32, 8, 128, 128**-0.5, keys, values, ones, ones * 0, workspace=work)
    qkv, position = random(48 * 128).cuda().bfloat16(), torch.tensor([2000], device="cuda")
    first = ops.attention(qkv, layer, position)
    assert all(torch.equal(ops.attention(qkv, layer, position), first) for _ in range(50))
    assert not work.arrived.any()


@pytest.mark.gpu
def test_rows_must_be_contiguous():
    weight = random(64, 64).cuda().t()
    with pytest.raises(ValueError, match=r"weights\[0\] must have unit stride in its last dimension, got strides"):
        ops.linear(random(64).cuda(), [weight], [None])
