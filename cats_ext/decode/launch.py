"""The operations of a decode step for one token, as plain functions: Triton on CUDA, the formula in PyTorch elsewhere.

``x`` is one row ``[H]``. Where a function takes ``delta``, its input is ``x + delta`` (the residual stream, to which
the previous block's output has not been added yet) and that sum is returned too: no kernel is spent on adding. A
``delta`` in float32 is rounded first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.ops.reference import ACTIVATIONS, rms_norm_ref


@dataclass(frozen=True)
class Norm:
    """Root-mean-square normalisation: ``x / rms(x) * weight``."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Tile:
    """How a product is cut: ``rows`` outputs at a time by programs of ``warps`` warps, ``per_sm`` a multiprocessor.

    ``stages - 1`` tiles of a program are on their way to shared memory while one is computed, the first of them since
    before the previous kernel ended.
    """

    rows: int
    warps: int
    per_sm: int
    stages: int


@dataclass
class Shares:
    """An attention in shares of the keys, joined by the product that takes it; one serves all layers of a step."""

    weighted: Tensor  # [shares, heads, D] in float32: values, weighted by exp(score - largest)
    largest: Tensor  # [shares, heads]: the largest score
    total: Tensor  # [shares, heads]: the sum of the weights
    arrived: Tensor  # int32 [1], zero between launches

    @classmethod
    def create(cls, count: int, heads: int, head_dim: int, device: torch.device) -> Shares:
        floats = {"dtype": torch.float32, "device": device}
        return cls(
            torch.empty(count, heads, head_dim, **floats),
            torch.empty(count, heads, **floats),
            torch.empty(count, heads, **floats),
            torch.zeros(1, dtype=torch.int32, device=device),
        )


@dataclass
class Attention:
    """One layer's attention: its shape, what it applies to queries and keys, and its cache ``[KV heads, L, D]``."""

    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    keys: Tensor
    values: Tensor
    cos: Tensor  # [L, D], the rotary embedding's, in the model's dtype
    sin: Tensor
    window: int | None = None  # a token sees itself and the window - 1 before it
    q_norm: Norm | None = None  # over each head
    k_norm: Norm | None = None
    shares: Shares | None = field(default=None, repr=False)  # on CUDA


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: Norm | None = None,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``weights`` (up to three, ``[N, K]`` each) times the normalised input, in one row; and ``x + delta``."""
    if x.is_cuda:
        return _linear_cuda(x, weights, biases, norm=norm, delta=delta)
    row = x if delta is None else x + delta.to(x.dtype)
    inner = row if norm is None else _rms_norm(row, norm)
    return torch.cat([F.linear(inner, w, b) for w, b in zip(weights, biases, strict=True)]), row


def add_linear(
    x: Tensor | Shares,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``residual + weight x``, ``[N]``; and that normalised, if ``norm`` is given, which takes shares on CUDA."""
    if weight.is_cuda:
        return _linear_cuda(x, [weight], [bias], residual=residual, out_norm=norm)
    y = residual + F.linear(x, weight, bias)
    return y, None if norm is None else _rms_norm(y, norm)


def gate_up(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    norm: Norm,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``act(gate) * up`` of the normalised input ``[I]``; and ``x + delta``."""
    if x.is_cuda:
        return _gate_up_cuda(x, w_gate, w_up, gate_bias, up_bias, activation, norm, delta)
    row = x if delta is None else x + delta
    inner = _rms_norm(row, norm)
    act = ACTIVATIONS[activation]
    return act(F.linear(inner, w_gate, gate_bias)) * F.linear(inner, w_up, up_bias), row


def attention(qkv: Tensor, layer: Attention, position: Tensor) -> Tensor | Shares:
    """Attention of the token at ``position`` (int64 ``[1]``), ``[heads * D]``; its key and value go into the cache.

    ``qkv`` is ``[(heads + 2 KV heads) * D]``, before the rotary embedding.
    """
    if qkv.is_cuda:
        return _attention_cuda(qkv, layer, position)
    at = int(position)
    heads = qkv.view(-1, layer.head_dim)
    q, k, v = heads.split([layer.heads, layer.kv_heads, layer.kv_heads])
    if layer.q_norm is not None:
        q = _rms_norm(q, layer.q_norm)
    if layer.k_norm is not None:
        k = _rms_norm(k, layer.k_norm)
    q, k = (t * layer.cos[at] + _rotate_half(t) * layer.sin[at] for t in (q, k))
    layer.keys[:, at], layer.values[:, at] = k, v
    start = 0 if layer.window is None else max(0, at - layer.window + 1)
    keys, values = (
        c[:, start : at + 1].repeat_interleave(layer.heads // layer.kv_heads, 0) for c in (layer.keys, layer.values)
    )
    return F.scaled_dot_product_attention(q[:, None], keys, values, scale=layer.scaling).reshape(-1)


def _rms_norm(x: Tensor, norm: Norm) -> Tensor:
    return rms_norm_ref(x, norm.weight, norm.eps)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


# --- launches -------------------------------------------------------------------------------------------------------


# Measured on an H100 in steps of Mistral-7B's shape: bench/results/h100/decode_steps.log, runs 5, 8 and 10.
_TILE = 32768  # bytes of weights
_STAGES = 4
_STAGES_AFTER_ATTENTION = 3  # its programs then start beside the attention's: 0.7 to 1.7 us a layer, dense or sparse
_SPARE = 12288  # bytes of shared memory that a product takes beside its tiles
_KEYS = 16384  # bytes of keys that a program of the attention takes at a time
_KEY_SHARES = 4  # at most: with more, joining them takes longer than they save, up to some 1,000 tokens


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def attention_shares(kv_heads: int, device: torch.device) -> int:
    """Shares of the keys, of which a quarter of the multiprocessors is left to the product that starts beside them.

    With 32 KV heads that makes 3: after 100 tokens a step takes 1 % less time than with 4, from 1,000 on 1 % more.
    """
    return max(1, min(_KEY_SHARES, _multiprocessors(device) * 3 // 4 // kv_heads))


def _block_of_group(group: int) -> int:
    return max(16, _power_of_two(group))  # 16 is the least that a matrix instruction takes


def _launch_options(x: Tensor) -> dict[str, bool]:
    pdl = torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"PDL": pdl, "launch_pdl": pdl}


def _check_rows(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.stride(-1) != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {list(t.stride())}")


def linear_tile(inputs: int, outputs: int, itemsize: int, device: torch.device) -> Tile:
    """32 KiB of weights a tile: with two programs, 192 KiB are on their way to a multiprocessor.

    Two programs hide each other's sums: one with as much on its way takes 1 % of the step longer, with half 6 %.
    """
    return _tile(_TILE, 2, inputs, outputs, itemsize, device)


def gate_up_tile(inputs: int, outputs: int, itemsize: int, device: torch.device) -> Tile:
    """64 KiB of gate and up weights together, and one program a multiprocessor."""
    return _tile(2 * _TILE, 1, 2 * inputs, outputs, itemsize, device)


def _tile(tile_bytes: int, per_sm: int, inputs: int, outputs: int, itemsize: int, device: torch.device) -> Tile:
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin // per_sm - _SPARE
    row_bytes = _power_of_two(inputs) * itemsize
    each = max(1, outputs // (2 * _multiprocessors(device)))  # no more rows than leave two tiles a multiprocessor
    rows = max(1, min(tile_bytes // row_bytes, 1 << (each.bit_length() - 1)))
    while rows > 1 and 2 * rows * row_bytes > shared:
        rows //= 2
    return Tile(rows, 8, per_sm, max(2, min(_STAGES, 1 + shared // (rows * row_bytes))))


def _grid(tile: Tile, blocks: int, device: torch.device) -> tuple[int]:
    return (min(blocks, tile.per_sm * _multiprocessors(device)),)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _linear_cuda(
    x: Tensor | Shares,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: Norm | None = None,
    delta: Tensor | None = None,
    residual: Tensor | None = None,
    out_norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None]:
    from cats_ext.decode.triton_kernels import linear_kernel

    shares = x if isinstance(x, Shares) else None
    x = weights[0] if shares is not None else x  # of a row, or of nothing
    _check_rows(x=x, **{f"weights[{i}]": w for i, w in enumerate(weights)})
    outputs = [w.shape[0] for w in weights]
    inputs = weights[0].shape[1]
    heads, head_dim = shares.weighted.shape[1:] if shares else (1, inputs)
    padded_heads = _power_of_two(heads)
    padded_inputs = padded_heads * _power_of_two(head_dim)
    tile = linear_tile(padded_inputs, sum(outputs), x.element_size(), x.device)
    if shares is not None:
        tile = replace(tile, stages=min(tile.stages, _STAGES_AFTER_ATTENTION))
    blocks = sum(-(-n // tile.rows) for n in outputs)
    y = x.new_empty(sum(outputs))
    x_new = x if delta is None else torch.empty_like(x)
    normed = None if out_norm is None else torch.empty_like(y)
    padding = 3 - len(weights)
    none = weights[0]
    linear_kernel[_grid(tile, blocks, x.device)](
        x,
        x if delta is None else delta,
        x_new,
        x if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        shares.weighted if shares else none,
        shares.largest if shares else none,
        shares.total if shares else none,
        *weights,
        *[none] * padding,
        *[none if b is None else b for b in biases],
        *[none] * padding,
        *outputs,
        *[0] * padding,
        *[w.stride(0) for w in weights],
        *[0] * padding,
        x if residual is None else residual,
        y,
        none if out_norm is None else out_norm.weight,
        0.0 if out_norm is None else out_norm.eps,
        none if normed is None else normed,
        none if normed is None else shares.arrived,
        blocks,
        K=inputs,
        BLOCK_K=padded_inputs,
        ROWS=tile.rows,
        STAGES=tile.stages,
        PARTS=len(weights),
        ADD=delta is not None,
        NORM=norm is not None,
        SHARES=len(shares.weighted) if shares else 0,
        HEADS=heads,
        PADDED_HEADS=padded_heads,
        BIAS=biases[0] is not None,
        RESIDUAL=residual is not None,
        OUT=0 if out_norm is None else outputs[0],
        BLOCK_OUT=1 if out_norm is None else _power_of_two(outputs[0]),
        num_warps=tile.warps,
        **_launch_options(x),
    )
    return y, normed if residual is not None else x_new


def _gate_up_cuda(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    norm: Norm,
    delta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from cats_ext.decode.triton_kernels import gate_up_kernel

    _check_rows(x=x, w_gate=w_gate, w_up=w_up)
    intermediate, hidden = w_gate.shape
    tile = gate_up_tile(hidden, intermediate, x.element_size(), x.device)
    blocks = -(-intermediate // tile.rows)
    y = x.new_empty(intermediate)
    x_new = x if delta is None else torch.empty_like(x)
    gate_up_kernel[_grid(tile, blocks, x.device)](
        x,
        x if delta is None else delta,
        x_new,
        norm.weight,
        norm.eps,
        w_gate,
        w_up,
        w_gate if gate_bias is None else gate_bias,
        w_up if up_bias is None else up_bias,
        intermediate,
        w_gate.stride(0),
        w_up.stride(0),
        y,
        blocks,
        K=hidden,
        BLOCK_K=_power_of_two(hidden),
        ROWS=tile.rows,
        STAGES=tile.stages,
        ACTIVATION=activation,
        ADD=delta is not None,
        NORM=True,
        BIAS=gate_bias is not None,
        num_warps=tile.warps,
        **_launch_options(x),
    )
    return y, x_new


def _attention_cuda(qkv: Tensor, layer: Attention, position: Tensor) -> Shares:
    from cats_ext.decode.triton_kernels import attention_kernel

    _check_rows(qkv=qkv, keys=layer.keys, values=layer.values)
    group, shares = layer.heads // layer.kv_heads, layer.shares
    attention_kernel[(layer.kv_heads, len(shares.weighted))](
        qkv,
        qkv if layer.q_norm is None else layer.q_norm.weight,
        qkv if layer.k_norm is None else layer.k_norm.weight,
        layer.cos,
        layer.sin,
        position,
        layer.keys,
        layer.values,
        shares.weighted,
        shares.largest,
        shares.total,
        layer.scaling,
        0.0 if layer.q_norm is None else layer.q_norm.eps,
        1 << 30 if layer.window is None else layer.window,
        layer.keys.stride(0),
        layer.keys.stride(1),
        layer.values.stride(0),
        layer.values.stride(1),
        KV_HEADS=layer.kv_heads,
        GROUP=group,
        BLOCK_G=_block_of_group(group),
        D=layer.head_dim,
        BLOCK_D=_power_of_two(layer.head_dim),
        QK_NORM=layer.q_norm is not None,
        BLOCK=max(16, min(128, _KEYS // (_power_of_two(layer.head_dim) * qkv.element_size()))),
        STAGES=3,
        num_warps=8,
        **_launch_options(qkv),
    )
    return shares
