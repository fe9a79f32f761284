"""Triton kernels of a decode step for one token: products with a normalisation before them, and attention over a cache.

All of them are bound by the bytes of weights and cache that they read. Programs therefore start to load their first
weights before they wait for the previous kernel (programmatic dependent launch), so that memory stays busy between two
kernels: the kernel just before must not write weights. Values are rounded to the model's dtype where transformers
rounds them.

Triton comes with CUDA builds of PyTorch; launch.py imports this module only for CUDA tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from cats_ext.ops.triton_activations import activate

LOWEST = tl.constexpr(-1e30)  # below any score, and finite: exp(LOWEST - largest) is 0, not NaN


@triton.jit
def _wait_for_previous():
    """Waits until what the previous kernel wrote is visible.

    From Triton 3.9 on, a loop with Triton's own gdc_wait is not pipelined, and no weights are loaded before the wait.
    """
    tl.inline_asm_elementwise("griddepcontrol.wait; // dummy $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _norm_weight(norm, K: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr):
    """The weight of a normalisation, loaded before the wait for the previous kernel: it comes from global memory."""
    weight = tl.zeros([BLOCK_K], norm.dtype.element_ty)
    if NORM:
        k = tl.arange(0, BLOCK_K)
        weight = tl.load(norm + k, mask=k < K, other=0.0)
    return weight


@triton.jit
def _normalised(row, weight, eps, K: tl.constexpr):
    wide = row.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / K + eps)
    return ((wide * scale).to(row.dtype).to(tl.float32) * weight.to(tl.float32)).to(row.dtype)


@triton.jit
def _input_row(x, delta, x_new, norm_weight, eps, first, K: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
               NORM: tl.constexpr):  # fmt: skip
    """The input row ``[BLOCK_K]`` of a product: x + delta in x's dtype, normalised. Program 0 stores the sum."""
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    row = tl.load(x + k, mask=inside, other=0.0)
    if ADD:
        more = tl.load(delta + k, mask=inside, other=0.0).to(row.dtype)
        row = (row.to(tl.float32) + more.to(tl.float32)).to(row.dtype)
        if first:
            tl.store(x_new + k, row, mask=inside)
    if NORM:
        row = _normalised(row, norm_weight, eps, K)
    return row.to(tl.float32)


@triton.jit
def _columns(K: tl.constexpr, BLOCK_K: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr):
    """The columns of a row that is padded to ``[PADDED_HEADS, BLOCK_K // PADDED_HEADS]``, and which of them exist."""
    D: tl.constexpr = K // HEADS
    BLOCK_D: tl.constexpr = BLOCK_K // PADDED_HEADS
    i = tl.arange(0, BLOCK_K)
    if D == BLOCK_D:
        return i, i < K
    return i // BLOCK_D * D + i % BLOCK_D, (i // BLOCK_D < HEADS) & (i % BLOCK_D < D)


@triton.jit
def _tile(weight, rows, n, stride, k, inside):
    at = weight + rows.to(tl.int64)[:, None] * stride + k[None, :]
    return tl.load(at, mask=(rows < n)[:, None] & inside[None, :], other=0.0)


@triton.jit
def _part(block, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, n_0, n_1, n_2, stride_0, stride_1, stride_2,
          ROWS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """The weight that a block of rows lies in: pointer, bias, rows, stride, the block in it, its offset in y."""
    weight, bias, n, stride, offset = weight_0, bias_0, n_0, stride_0, 0
    if PARTS > 1:
        before = tl.cdiv(n_0, ROWS)
        if PARTS > 2:
            if block >= before + tl.cdiv(n_1, ROWS):
                weight, bias, n, stride, offset = weight_2, bias_2, n_2, stride_2, n_0 + n_1
                block -= before + tl.cdiv(n_1, ROWS)
            elif block >= before:
                weight, bias, n, stride, offset, block = weight_1, bias_1, n_1, stride_1, n_0, block - before
        else:
            if block >= before:
                weight, bias, n, stride, offset, block = weight_1, bias_1, n_1, stride_1, n_0, block - before
    return weight, bias, n, stride, block, offset


@triton.jit
def _merged_row(partial_rows, partial_max, partial_sum, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
                HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr):  # fmt: skip
    """The attention of all heads ``[BLOCK_K]``, in float32, from the partial results of attention_kernel."""
    D: tl.constexpr = K // HEADS
    BLOCK_D: tl.constexpr = BLOCK_K // PADDED_HEADS
    head, d = tl.arange(0, PADDED_HEADS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    largest = tl.full([PADDED_HEADS, 1], LOWEST, tl.float32)
    total = tl.zeros([PADDED_HEADS, 1], tl.float32)
    row = tl.zeros([PADDED_HEADS, BLOCK_D], tl.float32)
    for split in tl.static_range(SPLITS):
        at = split * HEADS + head
        part = tl.load(partial_rows + at * D + d, mask=(head < HEADS) & (d < D), other=0.0)
        part_largest = tl.load(partial_max + at, mask=head < HEADS, other=LOWEST)
        part_total = tl.load(partial_sum + at, mask=head < HEADS, other=1.0)
        larger = tl.maximum(largest, part_largest)
        shrink, weight = tl.exp(largest - larger), tl.exp(part_largest - larger)
        largest, total, row = larger, total * shrink + part_total * weight, row * shrink + part * weight
    return tl.reshape(row / total, [BLOCK_K])


@triton.jit
def linear_kernel(
    x, delta, x_new, norm, eps, partial_rows, partial_max, partial_sum,
    weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, n_0, n_1, n_2, stride_0, stride_1, stride_2,
    residual, y, out_norm, out_eps, normed, arrived, blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
    ADD: tl.constexpr, NORM: tl.constexpr, SPLITS: tl.constexpr, HEADS: tl.constexpr, PADDED_HEADS: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, OUT: tl.constexpr, BLOCK_OUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = input weight^T + bias + residual for up to three weights of one input, one after the other in y.

    A program holds the input row in registers and takes every gridDim-th block of ROWS outputs. STAGES - 1 blocks are
    being loaded while one is computed; the first loads start before the wait for the previous kernel. The last program
    to end normalises y ``[OUT]``, unless OUT is 0.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    k, exists = _columns(K, BLOCK_K, HEADS, PADDED_HEADS)
    row = tl.zeros([BLOCK_K], tl.float32)
    norm_weight = _norm_weight(norm, K, BLOCK_K, NORM)
    out_weight = _norm_weight(out_norm, OUT, BLOCK_OUT, OUT > 0)
    if PDL:
        gdc_launch_dependents()
    for current in tl.range(program, blocks, programs, num_stages=STAGES):
        weight, bias, n, stride, block, offset = _part(
            current, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, n_0, n_1, n_2, stride_0, stride_1, stride_2,
            ROWS, PARTS)  # fmt: skip
        rows = block * ROWS + tl.arange(0, ROWS)
        tile = _tile(weight, rows, n, stride, k, exists)
        if current == program:
            if PDL:
                _wait_for_previous()
            if SPLITS > 0:
                row = _merged_row(partial_rows, partial_max, partial_sum, K, BLOCK_K, SPLITS, HEADS, PADDED_HEADS)
                row = row.to(y.dtype.element_ty).to(tl.float32)
            else:
                row = _input_row(x, delta, x_new, norm_weight, eps, program == 0, K, BLOCK_K, ADD, NORM)
        inside = rows < n
        before = tl.zeros([ROWS], y.dtype.element_ty)
        if RESIDUAL:  # loaded now, needed after the product
            if block * ROWS < n:  # always true; a load in a branch is not moved before the wait with the loop's loads
                before = tl.load(residual + rows, mask=inside, other=0.0)
        out = tl.sum(tile.to(tl.float32) * row[None, :], axis=1)
        if BIAS:
            out += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        result = out.to(y.dtype.element_ty)
        if RESIDUAL:
            result = (result.to(tl.float32) + before.to(tl.float32)).to(y.dtype.element_ty)
        tl.store(y + offset + rows, result, mask=inside)
    if OUT > 0:
        tl.debug_barrier()
        if tl.atomic_add(arrived, 1, sem="acq_rel") == programs - 1:
            o = tl.arange(0, BLOCK_OUT)
            whole = tl.load(y + o, mask=o < OUT, other=0.0, cache_modifier=".cg")
            tl.store(normed + o, _normalised(whole, out_weight, out_eps, OUT), mask=o < OUT)
            tl.store(arrived, 0)


@triton.jit
def gate_up_kernel(
    x, norm, eps, w_gate, w_up, gate_bias, up_bias, intermediate, gate_stride, up_stride, y, blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = act(gate) * up of the normalised row; programs take blocks of ROWS neurons as in linear_kernel."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, BLOCK_K)
    row = tl.zeros([BLOCK_K], tl.float32)
    norm_weight = _norm_weight(norm, K, BLOCK_K, True)
    if PDL:
        gdc_launch_dependents()
    for current in tl.range(program, blocks, programs, num_stages=STAGES):
        rows = current * ROWS + tl.arange(0, ROWS)
        gate_tile = _tile(w_gate, rows, intermediate, gate_stride, k, k < K)
        up_tile = _tile(w_up, rows, intermediate, up_stride, k, k < K)
        if current == program:
            if PDL:
                _wait_for_previous()
            row = _normalised(tl.load(x + k, mask=k < K, other=0.0), norm_weight, eps, K).to(tl.float32)
        gate = tl.sum(gate_tile.to(tl.float32) * row[None, :], axis=1)
        up = tl.sum(up_tile.to(tl.float32) * row[None, :], axis=1)
        inside = rows < intermediate
        if BIAS:
            gate += tl.load(gate_bias + rows, mask=inside, other=0.0).to(tl.float32)
            up += tl.load(up_bias + rows, mask=inside, other=0.0).to(tl.float32)
        gate = gate.to(y.dtype.element_ty).to(tl.float32)
        gate = activate(gate, ACTIVATION)
        up = up.to(y.dtype.element_ty).to(tl.float32)
        h = gate.to(y.dtype.element_ty).to(tl.float32) * up
        tl.store(y + rows, h.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _head_pair(vectors, heads, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Heads ``[rows, BLOCK_D]``, as they are and with their halves swapped."""
    d = tl.arange(0, BLOCK_D)
    half: tl.constexpr = D // 2
    mask = inside[:, None] & (d < D)[None, :]
    straight = tl.load(vectors + heads[:, None] * D + d[None, :], mask=mask, other=0.0)
    swapped = tl.load(vectors + heads[:, None] * D + tl.where(d < half, d + half, d - half)[None, :], mask=mask,
                      other=0.0)  # fmt: skip
    return straight, swapped


@triton.jit
def _rotate(straight, swapped, norm, cos, sin, eps, D: tl.constexpr, BLOCK_D: tl.constexpr, NORM: tl.constexpr):
    """The rotary embedding of heads, which are normalised one by one before; cos and sin ``[1, BLOCK_D]``."""
    d = tl.arange(0, BLOCK_D)
    half: tl.constexpr = D // 2
    dtype = straight.dtype
    if NORM:
        wide = straight.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + eps)[:, None]
        weight = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        other = tl.where(d < half, d + half, d - half)
        swapped_weight = tl.load(norm + other, mask=d < D, other=0.0).to(tl.float32)[None, :]
        straight = ((wide * scale).to(dtype).to(tl.float32) * weight).to(dtype)
        swapped = ((swapped.to(tl.float32) * scale).to(dtype).to(tl.float32) * swapped_weight).to(dtype)
    along = (straight.to(tl.float32) * cos).to(dtype).to(tl.float32)
    across = (swapped.to(tl.float32) * tl.where(d[None, :] < half, -sin, sin)).to(dtype).to(tl.float32)
    return (along + across).to(dtype)


@triton.jit
def _attend(q, k, v, seen, largest, total, acc, scaling):
    """Online softmax over one more block of keys: the largest score, the sum and the weighted values so far."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    larger = tl.maximum(largest, tl.max(tl.where(seen[None, :], scores, LOWEST), axis=1))
    p = tl.where(seen[None, :], tl.exp(scores - larger[:, None]), 0.0)
    shrink = tl.exp(largest - larger)
    total = total * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return larger, total, acc


@triton.jit
def _cached(cache, row, row_stride, seen, d, D: tl.constexpr):
    return tl.load(cache + row[:, None] * row_stride + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def attention_kernel(
    qkv, q_norm, k_norm, cos_table, sin_table, position, keys, values, partial_rows, partial_max, partial_sum,
    scaling, eps, window, key_head_stride, key_row_stride, value_head_stride, value_row_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, QK_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one query token over the first ``position`` cached ones and itself, which it adds to the cache.

    qkv is ``[(KV_HEADS * GROUP + 2 * KV_HEADS) * D]`` before the rotary embedding. Program (h, s) takes the s-th part
    of KV head h's cached keys, and the last one the token's own key too. Each stores the largest score, the sum of the
    weights and the weighted values of its query heads. linear_kernel merges them: merging here would have to wait for
    all programs. The number of keys is read from memory, so that one captured launch serves every length.

    The position and the cached keys were written by earlier steps, so they are read before the previous kernel ends.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    length = tl.load(position).to(tl.int32)
    keys += head.to(tl.int64) * key_head_stride
    values += head.to(tl.int64) * value_head_stride
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    in_head = (d < D)[None, :]
    cos = tl.load(cos_table + length * D + d[None, :], mask=in_head, other=0.0).to(tl.float32)
    sin = tl.load(sin_table + length * D + d[None, :], mask=in_head, other=0.0).to(tl.float32)
    query_heads = head * GROUP + g
    inside = (g < GROUP)[:, None] & in_head
    at = split * KV_HEADS * GROUP + query_heads
    largest = tl.full([BLOCK_G], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    start = tl.maximum(length - window + 1, 0)
    first, end = start // BLOCK, tl.cdiv(length, BLOCK)
    each = tl.cdiv(end - first, tl.num_programs(1))
    first += split * each
    end = tl.minimum(end, first + each)
    q = tl.zeros([BLOCK_G, BLOCK_D], qkv.dtype.element_ty)
    for block in tl.range(first, tl.maximum(end, first + 1), num_stages=STAGES):  # a split may have no keys
        row = block * BLOCK + tl.arange(0, BLOCK)
        seen = (row >= start) & (row < length) & (block < end)
        k = _cached(keys, row, key_row_stride, seen, d, D)
        v = _cached(values, row, value_row_stride, seen, d, D)
        if block == first:
            if PDL:
                _wait_for_previous()
            q, q_swapped = _head_pair(qkv, query_heads, g < GROUP, D, BLOCK_D)
            q = _rotate(q, q_swapped, q_norm, cos, sin, eps, D, BLOCK_D, QK_NORM)
        largest, total, acc = _attend(q, k, v, seen, largest, total, acc, scaling)
    if split == tl.num_programs(1) - 1:  # it has the fewest cached keys
        k_offset: tl.constexpr = KV_HEADS * GROUP * D
        v_offset: tl.constexpr = k_offset + KV_HEADS * D
        one = tl.arange(0, 1)
        k_new, k_swapped = _head_pair(qkv + k_offset, head + one, one == 0, D, BLOCK_D)
        v_new = tl.load(qkv + v_offset + head * D + d[None, :], mask=in_head, other=0.0)
        k_new = _rotate(k_new, k_swapped, k_norm, cos, sin, eps, D, BLOCK_D, QK_NORM)
        tl.store(keys + length * key_row_stride + d[None, :], k_new, mask=in_head)
        tl.store(values + length * value_row_stride + d[None, :], v_new, mask=in_head)
        score = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scaling
        larger = tl.maximum(largest, score)
        shrink, weight = tl.exp(largest - larger), tl.exp(score - larger)
        largest, total = larger, total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * v_new.to(tl.float32)
    tl.store(partial_max + at, largest, mask=g < GROUP)
    tl.store(partial_sum + at, total, mask=g < GROUP)
    tl.store(partial_rows + at[:, None] * D + d[None, :], acc, mask=inside)
