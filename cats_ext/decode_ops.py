"""The operations of a decode step for one token, as plain functions: Triton on CUDA, the formula in PyTorch elsewhere.

``x`` is one row ``[H]``. Where a function takes ``delta``, its input is ``x + delta`` (the residual stream, to which
the previous block's output has not been added yet) and that sum is returned too: no kernel is spent on adding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.reference import ACTIVATIONS


@dataclass(frozen=True)
class Norm:
    """Root-mean-square normalisation: ``x / rms(x) * weight``."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Tile:
    """How a product is cut: ``rows`` outputs at a time by programs of ``warps`` warps, ``per_sm`` a multiprocessor.

    Before the previous kernel ends, a program loads its first rows and brings ``ahead`` more blocks into L2.
    """

    rows: int
    warps: int
    per_sm: int | None  # None: a program for every tile
    ahead: int = 0


@dataclass
class AttentionWorkspace:
    """Where the shares of an attention are gathered; one serves all layers of a step, one after the other."""

    splits: int
    partial_out: Tensor  # [KV heads, splits, group, D]
    partial_max: Tensor  # [KV heads, splits, group]
    partial_sum: Tensor
    arrived: Tensor  # [kv heads]; zero between launches

    @classmethod
    def create(cls, kv_heads: int, group: int, head_dim: int, device: torch.device) -> AttentionWorkspace:
        wanted = max(1, _multiprocessors(device) // kv_heads)
        splits = min(1 << (wanted.bit_length() - 1), 16)  # a power of two; the last to arrive holds all in registers
        rows = kv_heads * splits * _power_of_two(group)
        floats = {"dtype": torch.float32, "device": device}
        return cls(
            splits,
            torch.empty(rows, _power_of_two(head_dim), **floats),
            torch.empty(rows, **floats),
            torch.empty(rows, **floats),
            torch.zeros(kv_heads, dtype=torch.int32, device=device),
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
    workspace: AttentionWorkspace | None = field(default=None, repr=False)


def add_rms_norm(x: Tensor, norm: Norm, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``norm(x + delta)`` and ``x + delta``."""
    if x.is_cuda:
        return _add_rms_norm_cuda(x, norm, delta)
    row = x if delta is None else x + delta
    return _rms_norm(row, norm), row


def linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: Norm | None = None,
    delta: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``weights`` (up to three, ``[N, K]`` each) times the input, in one row, plus ``residual``; and ``x + delta``."""
    if x.is_cuda:
        return _linear_cuda(x, weights, biases, norm, delta, residual)
    row = x if delta is None else x + delta
    inner = row if norm is None else _rms_norm(row, norm)
    y = torch.cat([F.linear(inner, w, b) for w, b in zip(weights, biases, strict=True)])
    return (y if residual is None else y + residual), row


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


def attention(qkv: Tensor, layer: Attention, position: Tensor) -> Tensor:
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
    wide = x.float()
    return norm.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


# --- launches -------------------------------------------------------------------------------------------------------


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _block_of_group(group: int) -> int:
    return max(16, _power_of_two(group))  # 16 is the least that a matrix instruction takes


def _launch_options(x: Tensor) -> dict[str, bool]:
    pdl = torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"PDL": pdl, "launch_pdl": pdl}


def _check_rows(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.stride(-1) != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {list(t.stride())}")


def linear_tile(inputs: int, outputs: int, device: torch.device, ahead: int) -> Tile:
    """32 KiB of half precision weights a program, two programs a multiprocessor.

    On an H100, in steps of Mistral-7B's shape, 16 to 32 KiB in two to six programs differ by 1 %; a program for each
    tile, instead of programs that go on to the next, costs 2 % (bench/results/h100/decode_steps.log, run 3).
    """
    return Tile(_rows(16384, inputs, outputs, device), 8 if inputs <= 16384 else 16, 2, ahead)


def gate_up_tile(inputs: int, outputs: int, device: torch.device) -> Tile:
    """A program for each 8 KiB of gate and of up weights: 1 % faster than programs that go on (the same file)."""
    warps = 4 if inputs <= 4096 else 8 if inputs <= 8192 else 16
    return Tile(_rows(4096, inputs, outputs, device), warps, None)


def _rows(elements: int, inputs: int, outputs: int, device: torch.device) -> int:
    """Rows of a tile of so many elements, but no more than leave two tiles for each multiprocessor."""
    each = max(1, outputs // (2 * _multiprocessors(device)))
    return max(1, min(elements // _power_of_two(inputs), 1 << (each.bit_length() - 1)))


def _grid(tile: Tile, blocks: int, device: torch.device) -> tuple[int]:
    return (blocks if tile.per_sm is None else min(blocks, tile.per_sm * _multiprocessors(device)),)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _add_rms_norm_cuda(x: Tensor, norm: Norm, delta: Tensor | None) -> tuple[Tensor, Tensor]:
    from cats_ext.decode_kernels import rms_norm_kernel

    y = torch.empty_like(x)
    x_new = x if delta is None else torch.empty_like(x)
    rms_norm_kernel[(1,)](
        x,
        x if delta is None else delta,
        x_new,
        norm.weight,
        y,
        norm.eps,
        K=x.numel(),
        BLOCK_K=_power_of_two(x.numel()),
        ADD=delta is not None,
        num_warps=8,
        **_launch_options(x),
    )
    return y, x_new


def _linear_cuda(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm: Norm | None,
    delta: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from cats_ext.decode_kernels import linear_kernel

    _check_rows(x=x, **{f"weights[{i}]": w for i, w in enumerate(weights)})
    outputs = [w.shape[0] for w in weights]
    inputs = weights[0].shape[1]
    tile = linear_tile(inputs, sum(outputs), x.device, ahead=int(norm is None))
    blocks = sum(-(-n // tile.rows) for n in outputs)
    y = x.new_empty(sum(outputs))
    x_new = x if delta is None else torch.empty_like(x)
    padding = 3 - len(weights)
    linear_kernel[_grid(tile, blocks, x.device)](
        x,
        x if delta is None else delta,
        x_new,
        x if norm is None else norm.weight,
        0.0 if norm is None else norm.eps,
        *weights,
        *[weights[0]] * padding,
        *[weights[0] if b is None else b for b in biases],
        *[weights[0]] * padding,
        *outputs,
        *[0] * padding,
        *[w.stride(0) for w in weights],
        *[0] * padding,
        x if residual is None else residual,
        y,
        blocks,
        K=inputs,
        BLOCK_K=_power_of_two(inputs),
        ROWS=tile.rows,
        THREADS=tile.warps * 32,
        AHEAD=tile.ahead,
        PARTS=len(weights),
        ADD=delta is not None,
        NORM=norm is not None,
        BIAS=biases[0] is not None,
        RESIDUAL=residual is not None,
        num_warps=tile.warps,
        **_launch_options(x),
    )
    return y, x_new


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
    from cats_ext.decode_kernels import gate_up_kernel

    _check_rows(x=x, w_gate=w_gate, w_up=w_up)
    intermediate, hidden = w_gate.shape
    tile = gate_up_tile(hidden, intermediate, x.device)
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
        ACTIVATION=activation,
        ADD=delta is not None,
        NORM=True,
        BIAS=gate_bias is not None,
        num_warps=tile.warps,
        **_launch_options(x),
    )
    return y, x_new


def _attention_cuda(qkv: Tensor, layer: Attention, position: Tensor) -> Tensor:
    from cats_ext.decode_kernels import attention_kernel

    _check_rows(qkv=qkv, keys=layer.keys, values=layer.values)
    group, work = layer.heads // layer.kv_heads, layer.workspace
    out = qkv.new_empty(layer.heads * layer.head_dim)
    attention_kernel[(layer.kv_heads, work.splits)](
        qkv,
        qkv if layer.q_norm is None else layer.q_norm.weight,
        qkv if layer.k_norm is None else layer.k_norm.weight,
        layer.cos,
        layer.sin,
        position,
        layer.keys,
        layer.values,
        out,
        work.partial_out,
        work.partial_max,
        work.partial_sum,
        work.arrived,
        layer.scaling,
        0.0 if layer.q_norm is None else layer.q_norm.eps,
        1 << 30 if layer.window is None else layer.window,
        layer.keys.stride(0),
        layer.keys.stride(1),
        layer.values.stride(0),
        layer.values.stride(1),
        KV_HEADS=layer.kv_heads,
        GROUP=group,
        PADDED_GROUP=_power_of_two(group),
        BLOCK_G=_block_of_group(group),
        D=layer.head_dim,
        BLOCK_D=_power_of_two(layer.head_dim),
        BLOCK=32,
        SPLITS=work.splits,
        ALONE=4,
        QK_NORM=layer.q_norm is not None,
        num_warps=4,
        **_launch_options(qkv),
    )
    return out
