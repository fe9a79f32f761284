// The first launch of sparse_mlp_columns and of sparse_mlp_columns_step: the gates of one token, from the rows of a
// transposed gate whose input is kept, and the list of the neurons that pass the first threshold. In a step every CTA
// normalises x first.
//
// A CTA has some neurons, a segment, which are the same columns of every row. It lists the kept inputs in shared
// memory, in order, and its threads read the segment's chunks of those rows, as many rows side by side as there are
// threads. So what a thread asks for does not depend on a load before, and no copy engine is needed. Each gate is
// summed in a fixed order: the same bits in every run. The last step lists the neurons that are kept, in order, too.
#pragma once

#include <type_traits>

#include "activation.cuh"
#include "mbarrier.cuh"
#include "plan.h"
#include "rows/dense.cuh"

namespace cats {

// 16 bytes of weights, which are read once. Coherent: the previous kernel may write them while this one waits for it.
__device__ __forceinline__ uint4 load_once(const void *from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(__cvta_generic_to_global(from)));
    return v;
}

// Of this thread's values, in the order of threads: how many come before it, and how many there are. `turn` is 0 and 1
// in turns. Synchronises all threads.
__device__ __forceinline__ uint32_t count_before(uint32_t mine, int turn, uint32_t *all) {
    constexpr uint32_t kAll = 0xffffffffu;
    __shared__ uint32_t of_warps[2][kColumnsThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    uint32_t up_to = mine;
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const uint32_t other = __shfl_up_sync(kAll, up_to, o);
        if (lane >= o) up_to += other;
    }
    if (lane == 31) of_warps[turn][warp] = up_to;
    __syncthreads();
    uint32_t before = up_to - mine, total = 0;
#pragma unroll
    for (int w = 0; w < kColumnsThreads / 32; w++) {
        const uint32_t count = of_warps[turn][w];
        if (w < warp) before += count;
        total += count;
    }
    *all = total;
    return before;
}

// Of all threads, to all. Synchronises them.
__device__ __forceinline__ float sum_over_threads(float value) {
    __shared__ float of_warps[kColumnsThreads / 32];
#pragma unroll
    for (int o = 16; o; o /= 2) value += __shfl_xor_sync(0xffffffffu, value, o);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kColumnsThreads / 32; w++) sum += of_warps[w];
    return sum;
}

template <typename T, bool kStep>
__global__ void __launch_bounds__(kColumnsThreads, 1) gate_columns_kernel(const __grid_constant__ SparseMlpParams p) {
    using Row = DenseRow<T>;
    constexpr int kPerChunk = Row::kPerChunk;
    constexpr int kAhead = 8; // rows on their way to a thread; 12 and 16 take as long
    extern __shared__ __align__(16) uint8_t smem[];
    auto *inputs = reinterpret_cast<KeptInput *>(smem); // later the sums
    const int tid = threadIdx.x, hidden = int(p.hidden_size), intermediate = int(p.intermediate_size);
    const int size = p.kept.size, first = blockIdx.x * size, neurons = min(size, intermediate - first);

    launch_dependents();
    const auto load = [&](const void *row, int column) { // of a row of T: this thread's values, or zeros behind its end
        using Columns = Values<T, kPerChunk>;
        return column < hidden ? Columns::load(static_cast<const T *>(row) + column) : Columns{};
    };
    Values<T, kPerChunk> norm{}; // of the first tile
    if constexpr (kStep) norm = load(p.norm_weight, tid * kPerChunk);
    wait_for_previous_kernel();
    Values<T, kPerChunk> held = load(p.x, tid * kPerChunk); // likewise
    const float input_threshold = *p.input_threshold;
    float threshold = 0.f, bias = 0.f; // of neuron first + tid
    if (tid < neurons) {
        threshold = p.threshold[(first + tid) * p.threshold_stride];
        if (p.gate_bias) bias = to_float(static_cast<const T *>(p.gate_bias)[first + tid]);
    }
    float scale = 1.f;
    if constexpr (kStep) { // rounds where separate operations do
        float squares = 0.f;
        for (int column = tid * kPerChunk; column < hidden; column += kColumnsThreads * kPerChunk) {
            float x[kPerChunk];
            (column < kColumnsThreads * kPerChunk ? held : load(p.x, column)).decode(x);
#pragma unroll
            for (int e = 0; e < kPerChunk; e++) squares = fmaf(x[e], x[e], squares);
        }
        scale = rsqrtf(sum_over_threads(squares) / float(hidden) + p.norm_eps);
    }
    uint32_t kept = 0;
    int turn = 0;
    for (int tile = 0; tile < hidden; tile += kColumnsThreads * kPerChunk, turn ^= 1) {
        const int column = tile + tid * kPerChunk;
        if (tile) held = load(p.x, column);
        float x[kPerChunk];
        held.decode(x);
        if constexpr (kStep) {
            if (tile) norm = load(p.norm_weight, column);
            float w[kPerChunk];
            norm.decode(w);
#pragma unroll
            for (int e = 0; e < kPerChunk; e++)
                x[e] = to_float(round_to<T>(to_float(round_to<T>(x[e] * scale)) * w[e]));
        }
        uint32_t keeps = 0;
#pragma unroll
        for (int e = 0; e < kPerChunk; e++) keeps |= uint32_t(keep(x[e], input_threshold)) << e;
        if (column >= hidden) keeps = 0;
        uint32_t all;
        KeptInput *to = inputs + kept + count_before(__popc(keeps), turn, &all);
#pragma unroll
        for (int e = 0; e < kPerChunk; e++)
            if (keeps >> e & 1) *to++ = {uint32_t(column + e), x[e]};
        kept += all;
    }
    __syncthreads();

    // Thread t has chunk t % chunks of the rows t / chunks, t / chunks + rows, ...
    const int chunks = size / kPerChunk, rows = kColumnsThreads / chunks;
    const int chunk = tid % chunks, row = tid / chunks;
    float sums[kPerChunk] = {};
    if (row < rows && chunk * kPerChunk < neurons) {
        const auto *weights = reinterpret_cast<const uint8_t *>(static_cast<const T *>(p.w_gate) + first) + chunk * 16;
        const uint32_t stride = uint32_t(p.w_gate_stride * sizeof(T));
        const auto add_rows = [&](uint32_t i, auto whole) { // kAhead rows from i on, or those of them that there are
            constexpr bool kWhole = decltype(whole)::value;
            uint4 packed[kAhead];
            float x[kAhead];
#pragma unroll
            for (int a = 0; a < kAhead; a++) {
                if (!kWhole && i + a * rows >= kept) break;
                const KeptInput input = inputs[i + a * rows];
                x[a] = input.value;
                packed[a] = load_once(weights + uint64_t(input.input) * stride);
            }
#pragma unroll
            for (int a = 0; a < kAhead; a++) {
                if (!kWhole && i + a * rows >= kept) break; // no 0 * inf
                float w[kPerChunk];
                Row::decode(packed[a], w);
#pragma unroll
                for (int e = 0; e < kPerChunk; e++) sums[e] = fmaf(w[e], x[a], sums[e]);
            }
        };
        uint32_t i = row;
        for (; i + (kAhead - 1) * rows < kept; i += kAhead * rows) add_rows(i, std::true_type{});
        if (i < kept) add_rows(i, std::false_type{});
    }
    __syncthreads();                                 // the list has been read
    auto *partial = reinterpret_cast<float *>(smem); // [rows, size]
    if (row < rows)
#pragma unroll
        for (int e = 0; e < kPerChunk; e += 4)
            *reinterpret_cast<float4 *>(partial + row * size + chunk * kPerChunk + e) =
                make_float4(sums[e], sums[e + 1], sums[e + 2], sums[e + 3]);
    __syncthreads();

    float v = 0.f;
    bool is_kept = false;
    if (tid < neurons) {
        float even = 0.f, odd = 0.f;
        int r = 0;
#pragma unroll 8
        for (; r + 1 < rows; r += 2) even += partial[r * size + tid], odd += partial[(r + 1) * size + tid];
        if (r < rows) even += partial[r * size + tid];
        v = activate(even + odd + bias, p.activation);
        is_kept = keep(v, threshold);
    }
    uint32_t count;
    const uint32_t at = count_before(is_kept, turn, &count);
    KeptNeuron *list = p.kept.neurons + int64_t(blockIdx.x) * size;
    if (is_kept) list[at] = {uint32_t(first + tid), v};
    if (const uint32_t filler = count + tid; filler < uint32_t(round_up(count, kKeptMultiple)))
        list[filler] = {UINT32_MAX, 0.f};
    if (tid) return;
    p.kept.counts[blockIdx.x] = count;
    if (!p.counts) return;
    auto *counts = reinterpret_cast<unsigned long long *>(p.counts);
    atomicAdd(counts + 1, count);
    if (blockIdx.x == 0) atomicAdd(counts + kNumCounts, kept);
}

} // namespace cats
