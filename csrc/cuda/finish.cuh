// The end of every sparse MLP kernel. CTAs add their share of y into an fp32 workspace, and the last one rounds it. The
// order of these additions varies from run to run; for results that do not, every CTA stores its share in a place of
// its own, and sum_shares_kernel adds them in order.
//
// y_sum, next_batch and done_ctas are zero at the start of every launch and left at zero; but in the form for a step of
// decoding y_sum is the result, done_ctas is null, and nothing is left at zero.
#pragma once

#include "mbarrier.cuh"
#include "row_format.cuh"

namespace cats {

struct Workspace {
    float *y_sum;         // fp32 y, in an order of the kernel's own
    unsigned *next_batch; // how many gate batches have been drawn
    unsigned *done_ctas;  // or null
    float *shares;        // deterministic: [CTAs][size of y_sum]; otherwise null
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

// Release and acquire for the whole CTA, between barriers of it. One thread's, as every fence is a trip to L2 and
// shows: two fences by all threads instead take 1 us longer.
__device__ __forceinline__ unsigned count_up(unsigned *counter) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}

// What this CTA has to add to y_sum[i] and the values after it. size: of y_sum.
template <typename Vector>
__device__ __forceinline__ void add_share(const Workspace &workspace, int64_t size, int64_t i, Vector v) {
    if (workspace.shares) *reinterpret_cast<Vector *>(workspace.shares + blockIdx.x * size + i) = v;
    else add_to_global(workspace.y_sum + i, v);
}

// The order of y_sum: as y, a [tokens, hidden_size] matrix, or columns first, [hidden_size, kInside], with the tokens
// padded to kInside = 4 or 8. One vector of y_sum is then a column, which threads next to each other have next to each
// other in y.
template <int kInside> struct OutputOrder {
    static constexpr int kVector = kInside ? kInside : 4;
    int tokens, hidden_size;
    __host__ __device__ int size() const { return (kInside ? kInside : tokens) * hidden_size; }
    __device__ bool exists(int i) const { return !kInside || i % kVector < tokens; }
    __device__ int place(int i) const { return kInside ? i % kVector * hidden_size + i / kVector : i; }
};

template <typename T, class Order>
__device__ __forceinline__ void round_to_output(const T *down_bias, T *y, Order order, int i, float sum) {
    if (!order.exists(i)) return;
    const int at = order.place(i);
    y[at] = from_float<T>(down_bias ? sum + to_float(down_bias[at % order.hidden_size]) : sum);
}

// Called by all threads of all CTAs, after their last add_share.
template <typename T, class Order>
__device__ __forceinline__ void finish_output(const Workspace &workspace, const T *down_bias, T *y, Order order) {
    if (workspace.shares) return;
    __shared__ bool last_cta;
    __syncthreads();
    if (threadIdx.x == 0) last_cta = count_up(workspace.done_ctas) == gridDim.x - 1;
    __syncthreads();
    if (!last_cta) return;
    const int size = order.size();
    if (size % 4 == 0) { // this is the tail of the launch, and every round trip shows: several loads at a time
        constexpr int kQuads = Order::kVector / 4, kBatch = 4;
        float4 *sums = reinterpret_cast<float4 *>(workspace.y_sum);
        const int vectors = size / Order::kVector;
        for (int first = threadIdx.x; first < vectors; first += kBatch * blockDim.x) {
            float4 sum[kBatch][kQuads];
#pragma unroll
            for (int b = 0; b < kBatch; b++)
#pragma unroll
                for (int q = 0; q < kQuads; q++)
                    if (const int v = first + b * blockDim.x; v < vectors) sum[b][q] = __ldcg(sums + v * kQuads + q);
#pragma unroll
            for (int b = 0; b < kBatch; b++) {
                const int v = first + b * blockDim.x;
                if (v >= vectors) break;
#pragma unroll
                for (int q = 0; q < kQuads; q++) {
                    const int i = (v * kQuads + q) * 4;
                    sums[i / 4] = make_float4(0.f, 0.f, 0.f, 0.f);
                    round_to_output(down_bias, y, order, i, sum[b][q].x);
                    round_to_output(down_bias, y, order, i + 1, sum[b][q].y);
                    round_to_output(down_bias, y, order, i + 2, sum[b][q].z);
                    round_to_output(down_bias, y, order, i + 3, sum[b][q].w);
                }
            }
        }
    } else {
        for (int i = threadIdx.x; i < size; i += blockDim.x) {
            const float sum = __ldcg(workspace.y_sum + i);
            workspace.y_sum[i] = 0.f;
            round_to_output(down_bias, y, order, i, sum);
        }
    }
    if (threadIdx.x == 0) *workspace.done_ctas = 0, *workspace.next_batch = 0;
}

// Thread (c, g) of a block sums value c over the CTAs' shares of group g; then the groups are added in order.
constexpr int kShareColumns = 64, kShareGroups = 8;

template <typename T, class Order>
__global__ void __launch_bounds__(kShareColumns *kShareGroups)
    sum_shares_kernel(const float *shares, int ctas, const T *down_bias, T *y, Order order) {
    __shared__ float sums[kShareGroups][kShareColumns];
    const int column = threadIdx.x % kShareColumns, group = threadIdx.x / kShareColumns, size = order.size();
    const int i = blockIdx.x * kShareColumns + column;
    launch_dependents();
    wait_for_previous_kernel();
    float sum = 0.f;
    if (i < size)
#pragma unroll 8
        for (int cta = group; cta < ctas; cta += kShareGroups) sum += __ldcg(shares + int64_t(cta) * size + i);
    sums[group][column] = sum;
    __syncthreads();
    if (group || i >= size) return;
    for (int g = 1; g < kShareGroups; g++) sum += sums[g][column];
    round_to_output(down_bias, y, order, i, sum);
}

} // namespace cats
