// The sparse gated MLP for whatever the pipelined kernel does not take: a hidden size that is no multiple of 16 bytes,
// misaligned rows, rows too long for its registers. Element by element, one CTA a neuron; right first, no more.
#pragma once

#include "../sparse_mlp.h"
#include "activation.cuh"
#include "finish.cuh"
#include "row_format.cuh"

namespace cats {

constexpr int kGenericThreads = 256;

__device__ __forceinline__ float block_sum(float v) {
    __shared__ float warp_sums[kGenericThreads / 32];
    for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    __syncthreads(); // the last sum has been read
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = v;
    __syncthreads();
    float sum = 0.f;
    for (int w = 0; w < kGenericThreads / 32; w++) sum += warp_sums[w];
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(kGenericThreads)
    sparse_mlp_generic_kernel(const __grid_constant__ SparseMlpParams p, const Workspace workspace) {
    unsigned long long evaluated = 0, kept = 0, kept_down = 0;
    const int hidden = int(p.hidden_size);
    const OutputOrder<0> order{int(p.tokens), hidden};
    // Thread c has columns c, c + kGenericThreads, ... of its CTA's share to itself.
    float *share = workspace.shares ? workspace.shares + blockIdx.x * int64_t(order.size()) : nullptr;
    if (share)
        for (int m = 0; m < p.tokens; m++)
            for (int c = threadIdx.x; c < hidden; c += kGenericThreads) share[m * hidden + c] = 0.f;
    auto row_of = [&](const void *base, int64_t stride, int64_t j) {
        return static_cast<const T *>(base) + j * stride;
    };
    for (int64_t j = blockIdx.x; j < p.intermediate_size; j += gridDim.x) {
        for (int m = 0; m < p.tokens; m++) {
            const T *x = static_cast<const T *>(p.x) + int64_t(m) * hidden;
            auto dot = [&](const T *w, const void *bias) {
                float sum = 0.f;
                for (int c = threadIdx.x; c < hidden; c += kGenericThreads)
                    sum = fmaf(to_float(w[c]), to_float(x[c]), sum);
                return block_sum(sum) + (bias ? to_float(static_cast<const T *>(bias)[j]) : 0.f);
            };
            evaluated++;
            const float v = activate(dot(row_of(p.w_gate, p.w_gate_stride, j), p.gate_bias), p.activation);
            if (!keep(v, p.threshold[j * p.threshold_stride])) continue;
            kept++;
            const float h = v * dot(row_of(p.w_up, p.w_up_stride, j), p.up_bias);
            if (p.down_threshold && !keep(h, p.down_threshold[j * p.down_threshold_stride])) continue;
            kept_down++;
            const T *down = row_of(p.w_down_t, p.w_down_t_stride, j);
            for (int c = threadIdx.x; c < hidden; c += kGenericThreads) {
                const float product = to_float(down[c]) * h;
                if (share) share[m * hidden + c] += product;
                else atomicAdd(workspace.y_sum + m * hidden + c, product);
            }
        }
    }
    if (p.counts && threadIdx.x == 0) {
        auto *counts = reinterpret_cast<unsigned long long *>(p.counts);
        atomicAdd(counts, evaluated), atomicAdd(counts + 1, kept), atomicAdd(counts + 2, kept_down);
    }
    finish_output(workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

} // namespace cats
