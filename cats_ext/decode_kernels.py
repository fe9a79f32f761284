"""Triton kernels of a decode step for one token: products with a normalisation before them, and attention over a cache.

Everything here is bound by the bytes of weights and cache it reads. Programs therefore ask for their first weights
before they wait for the previous kernel (programmatic dependent launch), so that memory stays busy across the ends of
kernels: weights must not be written by the kernel just before. Values are rounded to the model's dtype where
transformers rounds them.

Triton comes with CUDA builds of PyTorch; decode_ops.py imports this module only for CUDA tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _wait_for_previous(PDL: tl.constexpr):
    """Lets the next kernel start, then waits until the writes of the previous one are visible."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _prefetch(weight, block, n, stride, K: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Brings the rows of ``block`` into L2. A thread asks for one piece of a row."""
    PIECES: tl.constexpr = THREADS // ROWS
    PIECE: tl.constexpr = K // PIECES
    BYTES: tl.constexpr = PIECE * (weight.dtype.element_ty.primitive_bitwidth // 8)
    if PIECE * PIECES == K and BYTES % 16 == 0:
        i = tl.arange(0, THREADS)
        row = block * ROWS + i // PIECES
        at = (weight + row.to(tl.int64) * stride + i % PIECES * PIECE).to(tl.int64, bitcast=True)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [at, (row < n).to(tl.int32), BYTES],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _input_row(x, delta, x_new, norm, eps, first, K: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
               NORM: tl.constexpr):  # fmt: skip
    """The row ``[BLOCK_K]`` that a product takes: x, plus delta, normalised. Program 0 stores the sum in x_new."""
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    row = tl.load(x + k, mask=inside, other=0.0)
    if ADD:
        row = (row.to(tl.float32) + tl.load(delta + k, mask=inside, other=0.0).to(tl.float32)).to(row.dtype)
        if first:
            tl.store(x_new + k, row, mask=inside)
    if NORM:
        weight = tl.load(norm + k, mask=inside, other=0.0)
        wide = row.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide) / K + eps)
        row = ((wide * scale).to(row.dtype).to(tl.float32) * weight.to(tl.float32)).to(row.dtype)
    return row


@triton.jit
def rms_norm_kernel(x, delta, x_new, norm, y, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, ADD: tl.constexpr,
                    PDL: tl.constexpr):  # fmt: skip
    """y = norm(x + delta) in one program; x_new = x + delta."""
    _wait_for_previous(PDL)
    row = _input_row(x, delta, x_new, norm, eps, True, K, BLOCK_K, ADD, True)
    k = tl.arange(0, BLOCK_K)
    tl.store(y + k, row, mask=k < K)


@triton.jit
def _tile(weight, rows, n, stride, k, K: tl.constexpr):
    at = weight + rows.to(tl.int64)[:, None] * stride + k[None, :]
    return tl.load(at, mask=(rows < n)[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _part(block, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, n_0, n_1, n_2, stride_0, stride_1, stride_2,
          ROWS: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Of the weight that a block of rows is in: pointer, bias, rows, stride, the block there, and where y begins."""
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
def linear_kernel(
    x, delta, x_new, norm, eps,
    weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, n_0, n_1, n_2, stride_0, stride_1, stride_2,
    residual, y, blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr, AHEAD: tl.constexpr,
    PARTS: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """y = input weight^T + bias + residual for up to three weights of one input, one after the other in y.

    A program holds the input row in registers and takes every gridDim-th block of ROWS outputs, the next on its way
    while one is computed. Before it waits for the previous kernel it asks for the first and brings AHEAD more into L2.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, BLOCK_K)
    weight, bias, n, stride, block, offset = _part(
        program, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, n_0, n_1, n_2, stride_0, stride_1, stride_2,
        ROWS, PARTS)  # fmt: skip
    rows = block * ROWS + tl.arange(0, ROWS)
    tile = _tile(weight, rows, n, stride, k, K)
    if PDL:
        for i in tl.static_range(1, AHEAD + 1):
            ahead, _, ahead_n, ahead_stride, ahead_block, _ = _part(
                program + i * programs, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, n_0, n_1, n_2,
                stride_0, stride_1, stride_2, ROWS, PARTS)  # fmt: skip
            _prefetch(ahead, ahead_block, ahead_n, ahead_stride, K, ROWS, THREADS)
    _wait_for_previous(PDL)
    row = _input_row(x, delta, x_new, norm, eps, program == 0, K, BLOCK_K, ADD, NORM)
    for current in range(program, blocks, programs):
        next_weight, next_bias, next_n, next_stride, next_block, next_offset = _part(
            current + programs, weight_0, weight_1, weight_2, bias_0, bias_1, bias_2, n_0, n_1, n_2,
            stride_0, stride_1, stride_2, ROWS, PARTS)  # fmt: skip
        next_rows = next_block * ROWS + tl.arange(0, ROWS)
        next_tile = _tile(next_weight, next_rows, next_n, next_stride, k, K)
        inside = rows < n
        out = tl.sum(tile.to(tl.float32) * row.to(tl.float32)[None, :], axis=1)
        if BIAS:
            out += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
        result = out.to(y.dtype.element_ty)
        if RESIDUAL:
            before = tl.load(residual + rows, mask=inside, other=0.0)
            result = (result.to(tl.float32) + before.to(tl.float32)).to(y.dtype.element_ty)
        tl.store(y + offset + rows, result, mask=inside)
        tile, rows, n, offset = next_tile, next_rows, next_n, next_offset
        if BIAS:
            bias = next_bias


@triton.jit
def gate_up_kernel(
    x, delta, x_new, norm, eps,
    w_gate, w_up, gate_bias, up_bias, intermediate, gate_stride, up_stride, y, blocks,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, ACTIVATION: tl.constexpr, ADD: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = act(gate) * up of the normalised row; programs take blocks of ROWS neurons as in linear_kernel."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, BLOCK_K)
    rows = program * ROWS + tl.arange(0, ROWS)
    gate_tile = _tile(w_gate, rows, intermediate, gate_stride, k, K)
    up_tile = _tile(w_up, rows, intermediate, up_stride, k, K)
    _wait_for_previous(PDL)
    row = _input_row(x, delta, x_new, norm, eps, program == 0, K, BLOCK_K, ADD, NORM)
    for current in range(program, blocks, programs):
        next_rows = (current + programs) * ROWS + tl.arange(0, ROWS)
        next_gate = _tile(w_gate, next_rows, intermediate, gate_stride, k, K)
        next_up = _tile(w_up, next_rows, intermediate, up_stride, k, K)
        wide = row.to(tl.float32)[None, :]
        gate = tl.sum(gate_tile.to(tl.float32) * wide, axis=1)
        up = tl.sum(up_tile.to(tl.float32) * wide, axis=1)
        inside = rows < intermediate
        if BIAS:
            gate += tl.load(gate_bias + rows, mask=inside, other=0.0).to(tl.float32)
            up += tl.load(up_bias + rows, mask=inside, other=0.0).to(tl.float32)
        gate = gate.to(y.dtype.element_ty).to(tl.float32)
        if ACTIVATION == "silu":
            gate = gate / (1 + tl.exp(-gate))
        elif ACTIVATION == "gelu":
            gate = 0.5 * gate * (1 + tl.erf(gate * 0.7071067811865476))
        elif ACTIVATION == "gelu_tanh":
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            gate = gate * (1 - 1 / (1 + tl.exp(2 * inner)))
        else:
            gate = tl.maximum(gate, 0)
        up = up.to(y.dtype.element_ty).to(tl.float32)
        h = gate.to(y.dtype.element_ty).to(tl.float32) * up
        tl.store(y + rows, h.to(y.dtype.element_ty), mask=inside)
        gate_tile, up_tile, rows = next_gate, next_up, next_rows


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
    scores = tl.where(seen[None, :], scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, axis=1))
    p = tl.exp(scores - larger[:, None])
    shrink = tl.exp(largest - larger)
    total = total * shrink + tl.sum(p, axis=1)
    acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return larger, total, acc


@triton.jit
def _cached(cache, row, row_stride, seen, d, D: tl.constexpr):
    return tl.load(cache + row[:, None] * row_stride + d[None, :], mask=seen[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def attention_kernel(
    qkv, q_norm, k_norm, cos_table, sin_table, position, keys, values, out,
    partial_out, partial_max, partial_sum, arrived,
    scaling, eps, window, key_head_stride, key_row_stride, value_head_stride, value_row_stride,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
    ALONE: tl.constexpr, QK_NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one query token over the first ``position`` cached ones and itself, which it adds to the cache.

    qkv is ``[(KV_HEADS * GROUP + 2 * KV_HEADS) * D]`` before the rotary embedding. Program (h, s) has the s-th share of
    the keys of KV head h. How many there are is read from memory, so that one captured launch serves every length, and
    so do as many programs as there is work for: one for up to ALONE blocks of keys. The last program of a head to
    arrive joins their shares in order.

    The position and the cached keys were written by earlier steps, so they are read before the previous kernel ends.
    """
    head, split = tl.program_id(0), tl.program_id(1)
    keys += head.to(tl.int64) * key_head_stride
    values += head.to(tl.int64) * value_head_stride
    length = tl.load(position).to(tl.int32)
    start = tl.maximum(length - window + 1, 0)
    first_block = start // BLOCK
    blocks = tl.cdiv(length, BLOCK) - first_block
    share = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
    if blocks <= ALONE:
        share = ALONE
    programs = tl.maximum(tl.cdiv(blocks, share), 1)
    if split >= programs:
        return
    if PDL:
        if programs > 1:  # one program is faster alone than beside the next kernel's loads
            gdc_launch_dependents()
    last_block = first_block + tl.minimum(blocks, (split + 1) * share)
    first_block += split * share

    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    row = first_block * BLOCK + tl.arange(0, BLOCK)
    seen = (row >= start) & (row < length)
    k = _cached(keys, row, key_row_stride, seen, d, D)
    v = _cached(values, row, value_row_stride, seen, d, D)
    in_head = (d < D)[None, :]
    cos = tl.load(cos_table + length * D + d[None, :], mask=in_head, other=0.0).to(tl.float32)
    sin = tl.load(sin_table + length * D + d[None, :], mask=in_head, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()

    k_offset: tl.constexpr = KV_HEADS * GROUP * D
    v_offset: tl.constexpr = k_offset + KV_HEADS * D
    query_heads = head * GROUP + g
    inside = (g < GROUP)[:, None] & in_head
    one = tl.arange(0, 1)
    q, q_swapped = _head_pair(qkv, query_heads, g < GROUP, D, BLOCK_D)
    k_new, k_swapped = _head_pair(qkv + k_offset, head + one, one == 0, D, BLOCK_D)
    v_new = tl.load(qkv + v_offset + head * D + d[None, :], mask=in_head, other=0.0)
    q = _rotate(q, q_swapped, q_norm, cos, sin, eps, D, BLOCK_D, QK_NORM)
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if split == 0:
        k_new = _rotate(k_new, k_swapped, k_norm, cos, sin, eps, D, BLOCK_D, QK_NORM)
        tl.store(keys + length * key_row_stride + d[None, :], k_new, mask=in_head)
        tl.store(values + length * value_row_stride + d[None, :], v_new, mask=in_head)
        largest = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), axis=1) * scaling
        total += 1
        acc += v_new.to(tl.float32)
    if blocks > 0:
        largest, total, acc = _attend(q, k, v, seen, largest, total, acc, scaling)
    for block in range(first_block + 1, last_block):
        row = block * BLOCK + tl.arange(0, BLOCK)
        seen = row < length
        k = _cached(keys, row, key_row_stride, seen, d, D)
        v = _cached(values, row, value_row_stride, seen, d, D)
        largest, total, acc = _attend(q, k, v, seen, largest, total, acc, scaling)

    if PDL:
        gdc_launch_dependents()
    to = out + query_heads[:, None] * D + d[None, :]
    if programs == 1:
        tl.store(to, (acc / total[:, None]).to(q.dtype), mask=inside)
        return
    at = (head * SPLITS + split) * PADDED_GROUP + g
    tl.store(partial_max + at, largest, mask=g < GROUP)
    tl.store(partial_sum + at, total, mask=g < GROUP)
    tl.store(partial_out + at[:, None] * BLOCK_D + d[None, :], acc, mask=inside)
    tl.debug_barrier()
    if tl.atomic_add(arrived + head, 1, sem="acq_rel") == programs - 1:
        # All loads before the first use: each of them is a trip to L2, and there is nothing else to do meanwhile.
        h = tl.arange(0, PADDED_GROUP)
        splits = tl.arange(0, SPLITS)
        shares = (head * SPLITS + splits[:, None]) * PADDED_GROUP + h[None, :]
        present = (splits < programs)[:, None] & (h < GROUP)[None, :]
        parts = tl.load(partial_out + shares[:, :, None] * BLOCK_D + d[None, None, :], mask=present[:, :, None],
                        other=0.0)  # fmt: skip
        maxima = tl.load(partial_max + shares, mask=present, other=float("-inf"))
        sums = tl.load(partial_sum + shares, mask=present, other=0.0)
        weights = tl.where(present, tl.exp(maxima - tl.max(maxima, axis=0)[None, :]), 0.0)
        weights /= tl.sum(weights * sums, axis=0)[None, :]
        joined = tl.sum(weights[:, :, None] * parts, axis=0)
        joined_to = out + (head * GROUP + h[:, None]) * D + d[None, :]
        tl.store(joined_to, joined.to(q.dtype), mask=(h < GROUP)[:, None] & in_head)
        tl.store(arrived + head, 0)
