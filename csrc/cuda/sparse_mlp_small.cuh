// The sparse gated MLP of layers so small that to read them is faster than to ask twice: at H 576, I 1536 all weights
// take 2 us, and every read that has to wait for a decision takes 1. So every warp has its neurons, and asks for their
// gate, up and down rows at once. Neurons under the threshold are left out of the sum, but their rows are read. This is
// the only kernel that does so.
//
// All of it is on its way into L2 before the previous kernel ends; otherwise as in sparse_mlp_kernel.cuh.
#pragma once

#include "../sparse_mlp.h"
#include "activation.cuh"
#include "finish.cuh"
#include "row_format.cuh"
#include "team.cuh"

namespace cats {

constexpr int kSmallWarps = 8; // and room for two CTAs on a multiprocessor: the next kernel's wait ready beside these

template <class Row, int kChunks, int kRows>
__global__ void __launch_bounds__(kSmallWarps * 32, 2)
    sparse_mlp_small_kernel(const __grid_constant__ SparseMlpParams p, const Workspace workspace) {
    using T = typename Row::Element;
    constexpr int kPerChunk = Row::kPerChunk, kLanesPerDot = 32 / (2 * kRows);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, hidden = int(p.hidden_size);
    const int row_chunks = hidden / kPerChunk;
    const uint32_t intermediate = uint32_t(p.intermediate_size);
    // The CTAs' loads are even, down to one row.
    const auto neuron = [&](int r) { return (r * kSmallWarps + warp) * gridDim.x + blockIdx.x; };
    const auto row_of = [&](const void *base, int64_t stride, uint32_t j) {
        return reinterpret_cast<const uint4 *>(static_cast<const T *>(base) + j * stride);
    };

    launch_dependents();
    if (lane < 3 * kRows) {
        const uint32_t j = neuron(lane % kRows);
        const int kind = lane / kRows;
        if (j < intermediate)
            prefetch_l2(kind == 0   ? row_of(p.w_gate, p.w_gate_stride, j)
                        : kind == 1 ? row_of(p.w_up, p.w_up_stride, j)
                                    : row_of(p.w_down_t, p.w_down_t_stride, j),
                        row_chunks * 16);
    }
    wait_for_previous_kernel();

    uint4 x_packed[kChunks], gate[kRows][kChunks], up[kRows][kChunks], down[kRows][kChunks];
    const auto load = [&](const uint4 *row, bool exists, uint4(&chunks)[kChunks]) {
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            chunks[i] = make_uint4(0, 0, 0, 0);
            if (exists && i * 32 + lane < row_chunks) chunks[i] = row[i * 32 + lane];
        }
    };
    load(static_cast<const uint4 *>(p.x), true, x_packed);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        const bool exists = neuron(r) < intermediate;
        load(row_of(p.w_gate, p.w_gate_stride, neuron(r)), exists, gate[r]);
        load(row_of(p.w_up, p.w_up_stride, neuron(r)), exists, up[r]);
        load(row_of(p.w_down_t, p.w_down_t_stride, neuron(r)), exists, down[r]);
    }
    // Lane l has to do with dot product l / kLanesPerDot: gate products first, then up products.
    const int my_row = lane / kLanesPerDot % kRows;
    const bool is_up = lane / kLanesPerDot >= kRows;
    const uint32_t mine = neuron(my_row);
    float bias = 0.f, threshold = 0.f, down_threshold = 0.f;
    if (mine < intermediate) {
        const void *biases = is_up ? p.up_bias : p.gate_bias;
        if (biases) bias = to_float(static_cast<const T *>(biases)[mine]);
        threshold = p.threshold[mine * p.threshold_stride];
        if (p.down_threshold) down_threshold = p.down_threshold[mine * p.down_threshold_stride];
    }

    float x[kChunks][kPerChunk], dots[2 * kRows];
#pragma unroll
    for (int i = 0; i < kChunks; i++) Row::decode(x_packed[i], x[i]);
    const auto dot = [&](const uint4(&chunks)[kChunks]) {
        float even = 0.f, odd = 0.f;
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            float w[kPerChunk];
            Row::decode(chunks[i], w);
#pragma unroll
            for (int e = 0; e < kPerChunk; e += 2) {
                even = fmaf(w[e], x[i][e], even);
                odd = fmaf(w[e + 1], x[i][e + 1], odd);
            }
        }
        return even + odd;
    };
#pragma unroll
    for (int r = 0; r < kRows; r++) dots[r] = dot(gate[r]), dots[kRows + r] = dot(up[r]);
    const float sum = warp_sum(dots) + bias;
    const float g = activate(__shfl_sync(0xffffffffu, sum, my_row * kLanesPerDot), p.activation);
    const float h = g * __shfl_sync(0xffffffffu, sum, (kRows + my_row) * kLanesPerDot);
    const bool kept = mine < intermediate && keep(g, threshold);
    const bool kept_down = kept && (!p.down_threshold || keep(h, down_threshold));

    float acc[kChunks][kPerChunk] = {};
    const uint32_t keeps = __ballot_sync(0xffffffffu, kept_down);
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        const float value = __shfl_sync(0xffffffffu, h, r * kLanesPerDot);
        if (!(keeps >> r * kLanesPerDot & 1)) continue; // no 0 * inf
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            float w[kPerChunk];
            Row::decode(down[r][i], w);
#pragma unroll
            for (int e = 0; e < kPerChunk; e++) acc[i][e] = fmaf(w[e], value, acc[i][e]);
        }
    }
    if (p.counts) {
        auto *counts = reinterpret_cast<unsigned long long *>(p.counts);
        const bool counted = lane < kRows * kLanesPerDot && lane % kLanesPerDot == 0;
        const uint32_t ups = __ballot_sync(0xffffffffu, counted && kept);
        const uint32_t downs = __ballot_sync(0xffffffffu, counted && kept_down);
        if (threadIdx.x == 0 && blockIdx.x == 0) atomicAdd(counts, (unsigned long long)intermediate);
        if (lane == 0 && ups) atomicAdd(counts + 1, (unsigned long long)__popc(ups));
        if (lane == 0 && downs) atomicAdd(counts + 2, (unsigned long long)__popc(downs));
    }

    extern __shared__ __align__(16) float warp_sums[]; // [kSmallWarps][hidden]
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        if (i * 32 + lane >= row_chunks) break;
        float *to = warp_sums + warp * hidden + (i * 32 + lane) * kPerChunk;
#pragma unroll
        for (int e = 0; e < kPerChunk; e += 4)
            *reinterpret_cast<float4 *>(to + e) = make_float4(acc[i][e], acc[i][e + 1], acc[i][e + 2], acc[i][e + 3]);
    }
    __syncthreads();
    const OutputOrder<0> order{1, hidden};
    for (int c = threadIdx.x * 4; c < hidden; c += kSmallWarps * 32 * 4) {
        float4 total = *reinterpret_cast<const float4 *>(warp_sums + c);
#pragma unroll
        for (int w = 1; w < kSmallWarps; w++) {
            const float4 other = *reinterpret_cast<const float4 *>(warp_sums + w * hidden + c);
            total.x += other.x, total.y += other.y, total.z += other.z, total.w += other.w;
        }
        add_share(workspace, order.size(), c, total);
    }
    finish_output(workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

} // namespace cats
