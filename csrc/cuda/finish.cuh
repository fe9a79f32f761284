// The end of every sparse MLP kernel: CTAs add their share of y into an fp32 workspace, and the last one rounds it.
//
// The workspace is zero at the start of every launch and left at zero.
#pragma once

#include "row_format.cuh"

namespace cats {

// Data-center architectures have 163 or 227 KiB of shared memory for a CTA, the others 99. arch is as __CUDA_ARCH__.
__host__ __device__ constexpr bool has_large_shared_memory(int arch) {
    return arch == 800 || arch == 870 || (arch >= 900 && arch < 1200);
}

struct Workspace {
    float *y_sum;         // [tokens, hidden_size]
    unsigned *next_batch; // how many gate batches have been drawn; see sparse_mlp_kernel.cuh
    unsigned *done_ctas;
};

__device__ __forceinline__ void add_to_global(float *to, float4 v) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
#else
    atomicAdd(to, v.x), atomicAdd(to + 1, v.y), atomicAdd(to + 2, v.z), atomicAdd(to + 3, v.w);
#endif
}

// Called by all threads of all CTAs, after their last add_to_global.
template <typename T>
__device__ __forceinline__ void finish_output(const Workspace &workspace, const T *down_bias, T *y, int tokens,
                                              int hidden_size) {
    __shared__ bool last_cta;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last_cta = atomicAdd(workspace.done_ctas, 1) == gridDim.x - 1;
    __syncthreads();
    if (!last_cta) return;
    __threadfence();
    const int64_t size = int64_t(tokens) * hidden_size;
    const auto round_one = [&](int64_t i, float sum) {
        y[i] = from_float<T>(down_bias ? sum + to_float(down_bias[i % hidden_size]) : sum);
    };
    if (size % 4 == 0) { // four at a time: this is the tail of the launch, and every round trip shows
        float4 *sums = reinterpret_cast<float4 *>(workspace.y_sum);
        for (int64_t i = threadIdx.x; i < size / 4; i += blockDim.x) {
            const float4 sum = __ldcg(sums + i);
            sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
            round_one(4 * i, sum.x), round_one(4 * i + 1, sum.y), round_one(4 * i + 2, sum.z),
                round_one(4 * i + 3, sum.w);
        }
    } else {
        for (int64_t i = threadIdx.x; i < size; i += blockDim.x) {
            const float sum = __ldcg(workspace.y_sum + i);
            workspace.y_sum[i] = 0.f;
            round_one(i, sum);
        }
    }
    if (threadIdx.x == 0) *workspace.done_ctas = 0, *workspace.next_batch = 0;
}

} // namespace cats
