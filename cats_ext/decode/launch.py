"""The operations of a decode step for one token, as plain functions: Triton on CUDA, the formula in PyTorch elsewhere.

``x`` is one row ``[H]``. A function with the argument ``delta`` takes ``x + delta`` as its input and returns that sum
too: ``delta`` is the previous block's output before the residual addition, which then needs no kernel of its own. A
``delta`` in float32 is rounded to x's dtype first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_ext.ops.definitions import packed_linear_step
from cats_ext.ops.plan import device_limits
from cats_ext.ops.reference import ACTIVATIONS, rms_norm_ref


@dataclass(frozen=True)
class Norm:
    """Root-mean-square normalisation: ``x / rms(x) * weight``."""

    weight: Tensor
    eps: float


@dataclass(frozen=True)
class PackedRows:
    """The weight of a product as packed rows (:mod:`cats_ext.rows`), uint8 ``[N, bytes]``."""

    data: Tensor
    row_format: str


Weight = Tensor | PackedRows  # [N, K]


@dataclass(frozen=True)
class Tile:
    """Launch configuration of a product: ``per_sm`` programs of ``warps`` warps on each multiprocessor.

    A program computes ``rows`` outputs at a time, in a pipeline of ``stages``: ``stages - 1`` tiles are being loaded to
    shared memory while one is computed. The first loads start before the previous kernel has ended.
    """

    rows: int
    warps: int
    per_sm: int
    stages: int


@dataclass
class AttentionPartials:
    """Partial results of an attention whose keys are split between programs, as in Flash-Decoding.

    The product that follows merges them. All layers of a step share one object.
    """

    weighted: Tensor  # [splits, heads, D], float32: the sum of values weighted by exp(score - largest)
    largest: Tensor  # [splits, heads], float32: the largest score
    total: Tensor  # [splits, heads], float32: the sum of the weights
    arrived: Tensor  # int32 [1]: programs of the product that have ended; zero between launches

    @classmethod
    def create(cls, splits: int, heads: int, head_dim: int, device: torch.device) -> AttentionPartials:
        floats = {"dtype": torch.float32, "device": device}
        return cls(
            torch.empty(splits, heads, head_dim, **floats),
            torch.empty(splits, heads, **floats),
            torch.empty(splits, heads, **floats),
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
    partials: AttentionPartials | None = field(default=None, repr=False)  # on CUDA


# --- launch configurations --------------------------------------------------------------------------------------------


# Measured on an H100 in steps of Mistral-7B's shape: bench/results/h100/decode_steps.log, runs 5, 8 and 10.
_TILE_BYTES = 32768  # weights of a tile
_STAGES = 4
_STAGES_AFTER_ATTENTION = 3  # leaves shared memory to start beside the attention: saves 0.7 to 1.7 us a layer
_OTHER_SHARED_BYTES = 12288  # shared memory that a product takes besides its tiles
_KEY_BLOCK_BYTES = 16384  # keys that a program of the attention loads at a time
_LEAST_ROWS = 16  # that a matrix instruction takes
_MAX_SPLITS = 4  # up to some 1,000 tokens, merging more takes longer than they save


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def attention_splits(kv_heads: int, device: torch.device) -> int:
    """How many programs share the keys of a KV head.

    They leave a quarter of the multiprocessors to the product that starts beside them. For 32 KV heads that makes 3:
    after 100 tokens a step takes 1 % less time than with 4, from 1,000 tokens on 1 % more.
    """
    return max(1, min(_MAX_SPLITS, device_limits(device).multiprocessors * 3 // 4 // kv_heads))


def _launch_options(x: Tensor) -> dict[str, bool]:
    pdl = device_limits(x.device).compute_capability >= 90
    return {"PDL": pdl, "launch_pdl": pdl}


def _check_rows(**tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.stride(-1) != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {list(t.stride())}")


def _tile(
    tile_bytes: int, per_sm: int, stages: int, inputs: int, outputs: int, itemsize: int, device: torch.device
) -> Tile:
    """At most ``tile_bytes`` of weights and ``stages``, or fewer, so that they fit into shared memory."""
    limits = device_limits(device)
    shared = limits.shared_bytes // per_sm - _OTHER_SHARED_BYTES
    row_bytes = _power_of_two(inputs) * itemsize
    each = max(1, outputs // (2 * limits.multiprocessors))  # so that each multiprocessor gets two tiles
    rows = max(1, min(tile_bytes // row_bytes, 1 << (each.bit_length() - 1)))
    while rows > 1 and 2 * rows * row_bytes > shared:
        rows //= 2
    return Tile(rows, 8, per_sm, max(2, min(stages, 1 + shared // (rows * row_bytes))))


def _grid(tile: Tile, blocks: int, device: torch.device) -> tuple[int]:
    return (min(blocks, tile.per_sm * device_limits(device).multiprocessors),)


# --- operations ------------------------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    *,
    norm: Norm,
    delta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Products of up to three weights with the normalised input.

    Args:
        x: ``[K]``.
        weights, biases: ``[N, K]`` and ``[N]`` each; either all products have a bias or none.
        norm: the normalisation of ``x + delta``.
        delta: ``[K]``, see the top of this file.

    Returns:
        The products ``[sum of N]``, one after the other, and ``x + delta``.

    Raises:
        ValueError: on CUDA, a row of ``x`` or of a weight is not contiguous.
    """
    kinds = [list(kind) for _, kind in groupby(zip(weights, biases, strict=True), lambda part: _row_format(part[0]))]
    if len(kinds) > 1:
        products = []
        for kind in kinds:
            y, x = linear(x, *zip(*kind, strict=True), norm=norm, delta=delta)
            products.append(y)
            delta = None
        return torch.cat(products), x
    if _row_format(weights[0]):
        return _packed_linear(x, weights, biases, norm, delta)
    if x.is_cuda:
        return _linear_cuda(x, weights, biases, norm=norm, delta=delta)
    row = x if delta is None else x + delta.to(x.dtype)
    inner = _rms_norm(row, norm)
    return torch.cat([F.linear(inner, w, b) for w, b in zip(weights, biases, strict=True)]), row


def add_linear(
    x: Tensor | AttentionPartials,
    weight: Weight,
    bias: Tensor | None,
    residual: Tensor,
    *,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A product that is added to the residual stream, and its normalisation for the next product.

    Args:
        x: ``[K]``, or on CUDA what :func:`attention` returns.
        weight, bias, residual: ``[N, K]``, ``[N]``, ``[N]``.
        norm: of the sum; on CUDA only after an attention.

    Returns:
        ``residual + weight x + bias`` ``[N]``, and the same normalised if ``norm`` is given.

    Raises:
        ValueError: see :func:`linear`.
    """
    if isinstance(weight, PackedRows):
        y = _packed_add_linear(x, weight, bias, residual)
    elif weight.is_cuda:
        return _linear_cuda(x, [weight], [bias], residual=residual, out_norm=norm)
    else:
        y = residual + F.linear(x, weight, bias)
    return y, None if norm is None else _rms_norm(y, norm)


def _row_format(weight: Weight) -> str:
    return weight.row_format if isinstance(weight, PackedRows) else ""


def _packed_linear(
    x: Tensor, weights: Sequence[PackedRows], biases: Sequence[Tensor | None], norm: Norm, delta: Tensor | None
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(sum(len(w.data) for w in weights))
    x_new = None if delta is None else torch.empty_like(x)
    packed_linear_step(
        x, delta, norm.weight, norm.eps, [w.data for w in weights], weights[0].row_format,
        [b for b in biases if b is not None], None, None, None, y, x_new,
    )  # fmt: skip
    return y, x if x_new is None else x_new


def _packed_add_linear(
    x: Tensor | AttentionPartials, weight: PackedRows, bias: Tensor | None, residual: Tensor
) -> Tensor:
    y = torch.empty_like(residual)
    parts = (x.weighted, x.largest, x.total) if isinstance(x, AttentionPartials) else (x, None, None)
    biases = [] if bias is None else [bias]
    packed_linear_step(
        parts[0], None, None, 0.0, [weight.data], weight.row_format, biases, residual, *parts[1:], y, None
    )
    return y


def _linear_cuda(
    x: Tensor | AttentionPartials,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    *,
    norm: Norm | None = None,
    delta: Tensor | None = None,
    residual: Tensor | None = None,
    out_norm: Norm | None = None,
) -> tuple[Tensor, Tensor | None]:
    from cats_ext.decode.triton_kernels import linear_kernel

    partials = x if isinstance(x, AttentionPartials) else None
    x = weights[0] if partials is not None else x  # partial results replace x: any tensor of its dtype serves
    _check_rows(x=x, **{f"weights[{i}]": w for i, w in enumerate(weights)})
    outputs = [w.shape[0] for w in weights]
    inputs = weights[0].shape[1]
    heads, head_dim = partials.weighted.shape[1:] if partials else (1, inputs)
    padded_heads = _power_of_two(heads)
    padded_inputs = padded_heads * _power_of_two(head_dim)
    # Two programs of 4 stages keep loads of 192 KiB in flight on a multiprocessor: one loads while the other adds up. A
    # single program with as much in flight makes the step 1 % longer, with half as much 6 %.
    stages = _STAGES if partials is None else _STAGES_AFTER_ATTENTION
    tile = _tile(_TILE_BYTES, 2, stages, padded_inputs, sum(outputs), x.element_size(), x.device)
    blocks = sum(-(-n // tile.rows) for n in outputs)
    y = x.new_empty(sum(outputs))
    x_new = x if delta is None else torch.empty_like(x)
    normed = None if out_norm is None else torch.empty_like(y)
    padding = 3 - len(weights)
    none = weights[0]
    linear_kernel[_grid(tile, blocks, x.device)](
        x, x if delta is None else delta, x_new, x if norm is None else norm.weight, 0.0 if norm is None else norm.eps,
        partials.weighted if partials else none, partials.largest if partials else none,
        partials.total if partials else none, *weights, *[none] * padding, *[none if b is None else b for b in biases],
        *[none] * padding, *outputs, *[0] * padding, *[w.stride(0) for w in weights], *[0] * padding,
        x if residual is None else residual, y, none if out_norm is None else out_norm.weight,
        0.0 if out_norm is None else out_norm.eps, none if normed is None else normed,
        none if normed is None else partials.arrived, blocks,
        K=inputs, BLOCK_K=padded_inputs, ROWS=tile.rows, STAGES=tile.stages, PARTS=len(weights), ADD=delta is not None,
        NORM=norm is not None, SPLITS=len(partials.weighted) if partials else 0, HEADS=heads,
        PADDED_HEADS=padded_heads, BIAS=biases[0] is not None, RESIDUAL=residual is not None,
        OUT=0 if out_norm is None else outputs[0], BLOCK_OUT=1 if out_norm is None else _power_of_two(outputs[0]),
        num_warps=tile.warps, **_launch_options(x),
    )  # fmt: skip
    return y, normed if residual is not None else x_new


def gate_up(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    norm: Norm,
) -> Tensor:
    """The first half of a dense gated MLP, ``act(gate) * up`` ``[I]`` of the normalised input.

    Args:
        x: ``[H]``.
        w_gate, w_up, gate_bias, up_bias: ``[I, H]`` and ``[I]``; both biases or none.
        activation: a key of ``ACTIVATIONS``.
        norm: the normalisation of ``x``.

    Raises:
        ValueError: see :func:`linear`.
    """
    if not x.is_cuda:
        inner = _rms_norm(x, norm)
        return ACTIVATIONS[activation](F.linear(inner, w_gate, gate_bias)) * F.linear(inner, w_up, up_bias)
    from cats_ext.decode.triton_kernels import gate_up_kernel

    _check_rows(x=x, w_gate=w_gate, w_up=w_up)
    intermediate, hidden = w_gate.shape
    # 64 KiB of gate and up weights together a tile, and one program on a multiprocessor.
    tile = _tile(2 * _TILE_BYTES, 1, _STAGES, 2 * hidden, intermediate, x.element_size(), x.device)
    blocks = -(-intermediate // tile.rows)
    y = x.new_empty(intermediate)
    gate_up_kernel[_grid(tile, blocks, x.device)](
        x, norm.weight, norm.eps, w_gate, w_up, w_gate if gate_bias is None else gate_bias,
        w_up if up_bias is None else up_bias, intermediate, w_gate.stride(0), w_up.stride(0), y, blocks,
        K=hidden, BLOCK_K=_power_of_two(hidden), ROWS=tile.rows, STAGES=tile.stages, ACTIVATION=activation,
        BIAS=gate_bias is not None, num_warps=tile.warps, **_launch_options(x),
    )  # fmt: skip
    return y


def attention(qkv: Tensor, layer: Attention, position: Tensor) -> Tensor | AttentionPartials:
    """Attention of one token over the cache and itself; its key and value are written to the cache.

    Args:
        qkv: ``[(heads + 2 KV heads) * D]``, before the rotary embedding.
        layer: the layer's attention.
        position: the token's place, int64 ``[1]``.

    Returns:
        ``[heads * D]``; on CUDA the partial results, for :func:`add_linear`.

    Raises:
        ValueError: on CUDA, a row of ``qkv`` or of the cache is not contiguous.
    """
    if not qkv.is_cuda:
        return _attention_ref(qkv, layer, int(position))
    from cats_ext.decode.triton_kernels import attention_kernel

    _check_rows(qkv=qkv, keys=layer.keys, values=layer.values)
    group, partials, block_d = layer.heads // layer.kv_heads, layer.partials, _power_of_two(layer.head_dim)
    attention_kernel[(layer.kv_heads, len(partials.weighted))](
        qkv, qkv if layer.q_norm is None else layer.q_norm.weight,
        qkv if layer.k_norm is None else layer.k_norm.weight, layer.cos, layer.sin, position, layer.keys, layer.values,
        partials.weighted, partials.largest, partials.total, layer.scaling,
        0.0 if layer.q_norm is None else layer.q_norm.eps, 1 << 30 if layer.window is None else layer.window,
        layer.keys.stride(0), layer.keys.stride(1), layer.values.stride(0), layer.values.stride(1),
        KV_HEADS=layer.kv_heads, GROUP=group, BLOCK_G=max(_LEAST_ROWS, _power_of_two(group)), D=layer.head_dim,
        BLOCK_D=block_d, QK_NORM=layer.q_norm is not None, STAGES=3,
        BLOCK=max(_LEAST_ROWS, min(128, _KEY_BLOCK_BYTES // (block_d * qkv.element_size()))),
        num_warps=8, **_launch_options(qkv),
    )  # fmt: skip
    return partials


def _attention_ref(qkv: Tensor, layer: Attention, at: int) -> Tensor:
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
