// The sparse gated MLP for what the other kernels do not take: misaligned rows, rows of no whole number of 16-byte
// chunks, rows too long for the registers. Column by column, one CTA a neuron: simple, not fast.
#pragma once

#include "activation.cuh"
#include "gate_sums.cuh"
#include "rows/row.cuh"

namespace cats {

template <typename V> __device__ __forceinline__ V block_sum(V v) {
    __shared__ V warp_sums[kGenericThreads / 32];
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    __syncthreads(); // every thread has read the last sum
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = v;
    __syncthreads();
    V sum = 0;
    for (int w = 0; w < kGenericThreads / 32; w++) sum += warp_sums[w];
    return sum;
}

template <class Row, typename T>
__global__ void __launch_bounds__(kGenericThreads)
    sparse_mlp_generic_kernel(const __grid_constant__ SparseMlpParams p, const Workspace workspace) {
    unsigned long long evaluated = 0, kept = 0, kept_down = 0;
    const int hidden = int(p.hidden_size);
    const OutputOrder<0> order{int(p.tokens), hidden};
    // Only thread c touches columns c, c + kGenericThreads, ... of its CTA's part.
    float *part = workspace.partial_sums ? workspace.partial_sums + blockIdx.x * int64_t(order.size()) : nullptr;
    if (part)
        for (int m = 0; m < order.tokens; m++)
            for (int c = threadIdx.x; c < hidden; c += kGenericThreads) part[m * hidden + c] = 0.f;
    auto row_of = [&](const void *base, int64_t stride, int64_t j) {
        return static_cast<const typename Row::Storage *>(base) + j * stride;
    };
    for (int64_t j = blockIdx.x; j < p.intermediate_size; j += gridDim.x) {
        for (int m = 0; m < p.tokens; m++) {
            const T *x = static_cast<const T *>(p.x) + int64_t(m) * hidden;
            auto dot = [&](RowKind kind, const void *w, const void *bias) {
                float sum = 0.f;
                for (int c = threadIdx.x; c < hidden; c += kGenericThreads)
                    sum = fmaf(Row::column(p, kind, w, c), to_float(x[c]), sum);
                return block_sum(sum) + (bias ? to_float(static_cast<const T *>(bias)[j]) : 0.f);
            };
            evaluated++;
            const float g = dot(RowKind::kGate, row_of(p.w_gate, p.w_gate_stride, j), p.gate_bias);
            if (p.gates) {
                if (threadIdx.x == 0) static_cast<T *>(p.gates)[m * p.intermediate_size + j] = round_to<T>(g);
                continue;
            }
            const float v = p.exact ? exact_activation<T>(to_float(round_to<T>(g)), p.activation, p.squared)
                                    : activate(g, p.activation);
            if (p.exact ? v == 0.f : !keep(v, p.threshold[j * p.threshold_stride])) continue;
            kept++;
            float h = v;
            if (p.w_up) {
                const float u = dot(RowKind::kUp, row_of(p.w_up, p.w_up_stride, j), p.up_bias);
                h *= p.relu_up && u < 0.f ? 0.f : u; // NaN stays NaN
            }
            if (p.relu_up && h == 0.f) continue;
            if (p.down_threshold && !keep(h, p.down_threshold[j * p.down_threshold_stride])) continue;
            kept_down++;
            const void *down = row_of(p.w_down_t, p.w_down_t_stride, j);
            for (int c = threadIdx.x; c < hidden; c += kGenericThreads) {
                const float product = Row::column(p, RowKind::kDown, down, c) * h;
                if (part) part[m * hidden + c] += product;
                else atomicAdd(workspace.y_sum + m * hidden + c, product);
            }
        }
    }
    if (p.counts && threadIdx.x == 0) {
        auto *counts = reinterpret_cast<unsigned long long *>(p.counts);
        atomicAdd(counts, evaluated), atomicAdd(counts + 1, kept), atomicAdd(counts + 2, kept_down);
    }
    if (!p.gates) finish_output(workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

// After the generic kernel, which has more CTAs than there are places for: the sums of its gates. CTA (i, m) has place
// i of token m.
template <typename T>
__global__ void __launch_bounds__(kGenericThreads)
    sum_gates_kernel(const __grid_constant__ SparseMlpParams p, const Workspace workspace) {
    const T *gates = static_cast<const T *>(p.gates) + blockIdx.y * p.intermediate_size;
    GateSums sums{};
    for (int64_t j = blockIdx.x * kGenericThreads + threadIdx.x; j < p.intermediate_size;
         j += int64_t(gridDim.x) * kGenericThreads)
        add_gate(sums, to_float(gates[j]));
    sums = {block_sum(sums.sum), block_sum(sums.squares)};
    if (threadIdx.x == 0) leave_gate_sums(workspace, blockIdx.y, sums);
}

} // namespace cats
