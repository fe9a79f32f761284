// The end of every sparse MLP kernel. CTAs add their parts of y into an fp32 workspace, and the last CTA rounds it. The
// order of these additions varies from run to run. For results that do not vary, every CTA stores its part in a place
// of its own, and add_partial_sums_kernel adds the parts in order.
//
// y_sum, next_batch and done_ctas are zero at the start of every launch and left at zero. In the form for a step of
// decoding y_sum is the result, done_ctas is null, and nothing is left at zero.
#pragma once

#include "../sparse_mlp.h"
#include "mbarrier.cuh"
#include "values.cuh"

namespace cats {

constexpr int kOutputCopies = 4; // of y_sum; see add_to_output

struct Workspace {
    float *y_sum;         // fp32 y, in the order of OutputOrder
    unsigned *next_batch; // how many gate batches have been drawn
    unsigned *done_ctas;  // or null
    float *partial_sums;  // deterministic: [CTAs][size of y_sum], each CTA's part of y; otherwise null
    GateSums *gate_sums;  // where only gates are computed: [tokens][gate_places]; otherwise null
    int gate_places;      // no fewer than CTAs
};

__device__ __forceinline__ void add_to_global(float *to, float4 v) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
#else
    atomicAdd(to, v.x), atomicAdd(to + 1, v.y), atomicAdd(to + 2, v.z), atomicAdd(to + 3, v.w);
#endif
}

__device__ __forceinline__ void add_to_global(float *to, float2 v) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(v.x), "f"(v.y) : "memory");
#else
    atomicAdd(to, v.x), atomicAdd(to + 1, v.y);
#endif
}

// Release and acquire for the whole CTA, if it stands between two barriers of the CTA. Called by one thread: a fence is
// a trip to L2, and two fences by all threads instead take 1 us longer.
__device__ __forceinline__ unsigned count_up(unsigned *counter) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// Adds v to y_sum[i] and the values after it. size: of y_sum. kCopies: additions to one address wait for each other, so
// CTAs that all end at the same time are spread over so many sums of this size. It pays for one token where neurons are
// not drawn (bench/NOTES.md).
template <int kCopies = 1, typename Vector>
__device__ __forceinline__ void add_to_output(const Workspace &workspace, int64_t size, int64_t i, Vector v) {
    if (workspace.partial_sums) *reinterpret_cast<Vector *>(workspace.partial_sums + blockIdx.x * size + i) = v;
    else add_to_global(workspace.y_sum + (kCopies == 1 ? 0 : blockIdx.x % kCopies * size) + i, v);
}

// The order of y_sum. kTokenPadding 0: as y, [tokens, hidden_size]. 2, 4 or 8: columns first, [hidden_size,
// kTokenPadding], with the tokens padded. One vector of y_sum is then a column, or two of 2 tokens, and neighbouring
// threads have neighbouring columns of y.
template <int kTokenPadding> struct OutputOrder {
    static constexpr int kPadded = kTokenPadding ? kTokenPadding : 1, kVector = kPadded < 4 ? 4 : kPadded;
    int tokens, hidden_size;
    __host__ __device__ int size() const { return (kTokenPadding ? kTokenPadding : tokens) * hidden_size; }
    __device__ bool exists(int i) const { return !kTokenPadding || i % kPadded < tokens; }
    __device__ int place(int i) const { return kTokenPadding ? i % kPadded * hidden_size + i / kPadded : i; }
};

template <typename T, class Order>
__device__ __forceinline__ void round_to_output(const T *down_bias, T *y, Order order, int i, float sum) {
    if (!order.exists(i)) return;
    const int at = order.place(i);
    y[at] = round_to<T>(down_bias ? sum + to_float(down_bias[at % order.hidden_size]) : sum);
}

// Called by all threads of all CTAs, after their last add_to_output.
template <int kCopies = 1, typename T, class Order>
__device__ __forceinline__ void finish_output(const Workspace &workspace, const T *down_bias, T *y, Order order) {
    if (workspace.partial_sums) return;
    __shared__ bool last_cta;
    __syncthreads();
    if (threadIdx.x == 0) last_cta = count_up(workspace.done_ctas) == gridDim.x - 1;
    __syncthreads();
    if (!last_cta) return;
    const int size = order.size();
    if (size % 4 == 0) { // nothing hides a round trip at the end of a launch, so several loads are under way at a time
        constexpr int kQuads = Order::kVector / 4, kBatch = kCopies == 1 ? 4 : 2;
        float4 *sums = reinterpret_cast<float4 *>(workspace.y_sum);
        const int vectors = size / Order::kVector;
        for (int first = threadIdx.x; first < vectors; first += kBatch * blockDim.x) {
            float4 sum[kBatch][kQuads][kCopies];
#pragma unroll
            for (int b = 0; b < kBatch; b++)
#pragma unroll
                for (int q = 0; q < kQuads; q++)
#pragma unroll
                    for (int c = 0; c < kCopies; c++)
                        if (const int v = first + b * blockDim.x; v < vectors)
                            sum[b][q][c] = __ldcg(sums + c * (size / 4) + v * kQuads + q);
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int v = first + b * blockDim.x;
                if (v >= vectors) break;
#pragma unroll
                for (int q = 0; q < kQuads; q++) {
                    const int i = (v * kQuads + q) * 4;
                    float4 all = sum[b][q][0];
                    sums[i / 4] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                    for (int c = 1; c < kCopies; c++) {
                        const float4 &copy = sum[b][q][c];
                        all.x += copy.x, all.y += copy.y, all.z += copy.z, all.w += copy.w;
                        sums[c * (size / 4) + i / 4] = make_float4(0.f, 0.f, 0.f, 0.f);
                    }
                    round_to_output(down_bias, y, order, i, all.x);
                    round_to_output(down_bias, y, order, i + 1, all.y);
                    round_to_output(down_bias, y, order, i + 2, all.z);
                    round_to_output(down_bias, y, order, i + 3, all.w);
                }
            }
        }
    } else {
        for (int i = threadIdx.x; i < size; i += blockDim.x) {
            float sum = __ldcg(workspace.y_sum + i);
            workspace.y_sum[i] = 0.f;
            for (int c = 1; c < kCopies; c++) {
                sum += __ldcg(workspace.y_sum + c * size + i);
                workspace.y_sum[c * size + i] = 0.f;
            }
            round_to_output(down_bias, y, order, i, sum);
        }
    }
    if (threadIdx.x == 0) *workspace.done_ctas = 0, *workspace.next_batch = 0;
}

// Thread (c, g) of a block sums value c over the CTAs of group g. Then the groups are added in order.
constexpr int kPartialSumColumns = 64, kPartialSumGroups = 8;

template <typename T, class Order>
__global__ void __launch_bounds__(kPartialSumColumns *kPartialSumGroups)
    add_partial_sums_kernel(const float *partial_sums, int ctas, const T *down_bias, T *y, Order order) {
    __shared__ float sums[kPartialSumGroups][kPartialSumColumns];
    const int column = threadIdx.x % kPartialSumColumns, group = threadIdx.x / kPartialSumColumns;
    const int i = blockIdx.x * kPartialSumColumns + column, size = order.size();
    launch_dependents();
    wait_for_previous_kernel();
    float sum = 0.f;
    if (i < size)
#pragma unroll 8
        for (int cta = group; cta < ctas; cta += kPartialSumGroups)
            sum += __ldcg(partial_sums + int64_t(cta) * size + i);
    sums[group][column] = sum;
    __syncthreads();
    if (group || i >= size) return;
    for (int g = 1; g < kPartialSumGroups; g++) sum += sums[g][column];
    round_to_output(down_bias, y, order, i, sum);
}

} // namespace cats
