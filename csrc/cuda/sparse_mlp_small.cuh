// The sparse gated MLP of layers so small that reading all rows is faster than deciding first: at H 576, I 1536 all
// weights take 2 us, and every read that has to wait for a decision takes 1 us. So every warp asks for the gate, up and
// down rows of its neurons at once. Neurons under the threshold are left out of the sum, but their rows are read. This
// is the only kernel that does so.
//
// All rows are prefetched into L2 before the previous kernel ends. Otherwise as in sparse_mlp_kernel.cuh.
#pragma once

#include "activation.cuh"
#include "finish.cuh"
#include "team.cuh"

namespace cats {

template <class Row, typename T, int kChunks, int kRows>
__global__ void __launch_bounds__(kSmallWarps * 32, 2)
    sparse_mlp_small_kernel(const __grid_constant__ SparseMlpParams p, const Workspace workspace) {
    using Packed = typename Row::Packed;
    constexpr int kPerChunk = Row::kPerChunk, kLanesPerDot = 32 / (2 * kRows);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, hidden = int(p.hidden_size);
    const int row_chunks = hidden / kPerChunk;
    const uint32_t intermediate = uint32_t(p.intermediate_size);
    // No CTA has more than one neuron more than another.
    const auto neuron = [&](int r) { return (r * kSmallWarps + warp) * gridDim.x + blockIdx.x; };

    launch_dependents();
    if (lane < 3 * kRows) {
        const uint32_t j = neuron(lane % kRows);
        if (j < intermediate)
            prefetch_l2(row_address<Row>(p, RowKind(lane / kRows), j), row_bytes(row_chunks, Row::kScaleBytes));
    }
    wait_for_previous_kernel();

    Values<T, kPerChunk> x_loaded[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; i++) {
        x_loaded[i] = {};
        if (i * 32 + lane < row_chunks)
            x_loaded[i] = Values<T, kPerChunk>::load(static_cast<const T *>(p.x) + (i * 32 + lane) * kPerChunk);
    }
    Packed gate[kRows][kChunks], up[kRows][kChunks], down[kRows][kChunks];
    const auto load = [&](RowKind kind, uint32_t j, Packed(&chunks)[kChunks]) {
        const uint8_t *row = row_address<Row>(p, kind, j);
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            chunks[i] = {};
            if (j < intermediate && i * 32 + lane < row_chunks) chunks[i] = Row::load(row + i * kTileBytes<Row>, lane);
        }
    };
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        load(RowKind::kGate, neuron(r), gate[r]);
        load(RowKind::kUp, neuron(r), up[r]);
        load(RowKind::kDown, neuron(r), down[r]);
    }
    // Lane l has dot product l / kLanesPerDot: gate products first, then up products.
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
    for (int i = 0; i < kChunks; i++) x_loaded[i].decode(x[i]);
    const auto dot = [&](const Packed(&chunks)[kChunks]) {
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
        add_to_output<kOutputCopies>(workspace, order.size(), c, total);
    }
    finish_output<kOutputCopies>(workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

} // namespace cats
