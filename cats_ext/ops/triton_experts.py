"""Triton kernels of routed experts for few tokens: a row's expert is read on the device.

Three launches for all rows ``s`` (pairs of a token and one of its experts) of a layer: gate and up projections with the
mask, down projections over parts of the neurons, and the sum of a token's partial results in a fixed order, so that
each run gives the same bits. The weights of skipped neurons are not read. Triton comes with CUDA builds of PyTorch;
experts.py imports this module only for CUDA tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cats_ext.ops.triton_activations import activate


@triton.jit
def _dot(weight, x, rows, wanted, stride, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Products ``[ROWS]`` of the wanted rows with ``x``; the other rows are not read and give 0."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.static_range(0, H, BLOCK):
        k = start + tl.arange(0, BLOCK)
        at = weight + rows.to(tl.int64)[:, None] * stride + k[None, :]
        tile = tl.load(at, mask=wanted[:, None] & (k < H)[None, :], other=0.0, eviction_policy="evict_first")
        total += tile.to(tl.float32) * tl.load(x + k, mask=k < H, other=0.0).to(tl.float32)[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def gate_up_kernel(
    x, experts, w_gate_up, expert_stride, row_stride, up_offset, threshold, down_threshold, h, intermediate, count,
    TOP_K: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
    DOWN: tl.constexpr,
):  # fmt: skip
    """``h`` (float32 ``[S, I]``): ``act(gate) * up`` of kept neurons, and 0. A program takes ROWS neurons of a row."""
    s = tl.program_id(1)
    expert = tl.load(experts + s).to(tl.int64)
    neurons = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = neurons < tl.where((expert >= 0) & (expert < count), intermediate, 0)
    weight, row = w_gate_up + expert * expert_stride, x + s // TOP_K * H
    gate = activate(_dot(weight, row, neurons, inside, row_stride, H, ROWS, BLOCK), ACTIVATION)
    keep = inside & ~(tl.abs(gate) < tl.load(threshold))  # NaN is kept
    result = tl.zeros([ROWS], tl.float32)
    if tl.sum(keep.to(tl.int32)) > 0:
        up = _dot(weight + up_offset, row, neurons, keep, row_stride, H, ROWS, BLOCK)
        result = tl.where(keep, gate * up, 0.0)
        if DOWN:
            result = tl.where(tl.abs(result) < tl.load(down_threshold), 0.0, result)
    tl.store(h + s * intermediate + neurons, result, mask=neurons < intermediate)


@triton.jit
def down_kernel(
    h, experts, routing, w_down, expert_stride, row_stride, pieces, intermediate, count, blocks,
    H: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """``pieces`` (float32 ``[S, SPLITS, H]``): the routing weight times ``h Wd`` over a part of the neurons."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split, s = tl.program_id(1), tl.program_id(2)
    expert = tl.load(experts + s).to(tl.int64)
    weight = w_down + expert * expert_stride
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for block in range(blocks):
        neurons = (split * blocks + block) * ROWS + tl.arange(0, ROWS)
        values = tl.load(h + s * intermediate + neurons, mask=neurons < intermediate, other=0.0)
        at = weight + neurons.to(tl.int64)[:, None] * row_stride + columns[None, :]
        wanted = (values != 0)[:, None] & (columns < H)[None, :]
        total += values[:, None] * tl.load(at, mask=wanted, other=0.0, eviction_policy="evict_first").to(tl.float32)
    result = tl.sum(total, axis=0) * tl.load(routing + s).to(tl.float32)
    result = tl.where((expert >= 0) & (expert < count), result, float("nan"))  # no such expert
    tl.store(pieces + (s * SPLITS + split) * H + columns, result, mask=columns < H)


@triton.jit
def sum_kernel(pieces, y, count, H: tl.constexpr, COLUMNS: tl.constexpr):
    """``y[t]``: the sum of a token's pieces, rounded once."""
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.program_id(1)
    total = tl.zeros([COLUMNS], tl.float32)
    for piece in range(count):
        total += tl.load(pieces + (token * count + piece) * H + columns, mask=columns < H, other=0.0)
    tl.store(y + token * H + columns, total.to(y.dtype.element_ty), mask=columns < H)


def launch(
    x: Tensor,
    experts: Tensor,
    routing: Tensor,
    w_gate_up: Tensor,
    w_down_t: Tensor,
    threshold: Tensor,
    down_threshold: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """The three kernels; arguments as those of ``cats::sparse_experts``.

    Of five tile sizes measured with Mixtral's shape on an H100 these are the fastest at 50 % sparsity, and 0.3 us
    slower than the fastest at 90 % (bench/results/h100/experts_tiles.csv).
    """
    x, experts, routing = x.contiguous(), experts.contiguous(), routing.contiguous()
    (tokens, hidden), top_k, intermediate = x.shape, experts.shape[1], w_down_t.shape[1]
    pairs, power = tokens * top_k, triton.next_power_of_2(hidden)
    h = torch.empty(pairs, intermediate, dtype=torch.float32, device=x.device)
    y, rows = torch.empty_like(x), 2
    if x.numel() == 0 or top_k == 0:
        return y.zero_()
    with torch.cuda.device(x.device):
        gate_up_kernel[(triton.cdiv(intermediate, rows), pairs)](
            x,
            experts,
            w_gate_up,
            w_gate_up.stride(0),
            w_gate_up.stride(1),
            w_gate_up.stride(1) * intermediate,
            threshold,
            threshold if down_threshold is None else down_threshold,
            h,
            intermediate,
            len(w_down_t),
            TOP_K=top_k,
            H=hidden,
            ROWS=rows,
            BLOCK=min(1024, power),
            ACTIVATION=activation,
            DOWN=down_threshold is not None,
            num_warps=2,
        )
        rows, columns = 32, min(128, power)
        splits = 4 if intermediate < 4096 else 16
        pieces = torch.empty(pairs, splits, hidden, dtype=torch.float32, device=x.device)
        down_kernel[(triton.cdiv(hidden, columns), splits, pairs)](
            h,
            experts,
            routing,
            w_down_t,
            w_down_t.stride(0),
            w_down_t.stride(1),
            pieces,
            intermediate,
            len(w_down_t),
            triton.cdiv(intermediate, rows * splits),
            H=hidden,
            ROWS=rows,
            COLUMNS=columns,
            SPLITS=splits,
            num_warps=4,
        )
        grid = (triton.cdiv(hidden, columns), tokens)
        sum_kernel[grid](pieces, y, top_k * splits, H=hidden, COLUMNS=columns, num_warps=1)
    return y
