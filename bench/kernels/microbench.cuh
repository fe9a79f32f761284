// What microbench.cu measures with: random weights, the projections that thresholds are chosen from, a streaming read
// kernel for the read limit, and a timer.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#define CHECK_CUDA(call)                                                                                               \
    do {                                                                                                               \
        cudaError_t error_ = (call);                                                                                   \
        if (error_ != cudaSuccess) {                                                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_));                 \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

namespace {

template <typename T> __host__ __device__ float as_float(T v) { return float(v); }

__device__ float random_normal(uint64_t seed, uint64_t i) { // sum of four uniforms of a mixed counter; variance 1
    uint64_t z = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xd1342543de82ef95ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    const float sum = (z & 0xffff) + (z >> 16 & 0xffff) + (z >> 32 & 0xffff) + (z >> 48 & 0xffff);
    return (sum / 65536.f - 2.f) * 1.7320508f;
}

template <typename T> __global__ void fill_random(T *to, int64_t size, uint64_t seed, float scale) {
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size; i += int64_t(gridDim.x) * blockDim.x)
        to[i] = T(random_normal(seed, i) * scale);
}

// One warp a row: dot products of every row with every token, for choosing thresholds.
template <typename T> __global__ void project(const T *w, const T *x, float *out, int rows, int hidden, int tokens) {
    const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    for (int m = 0; m < tokens; m++) {
        float sum = 0;
        for (int c = threadIdx.x % 32; c < hidden; c += 32)
            sum += as_float(w[int64_t(row) * hidden + c]) * as_float(x[int64_t(m) * hidden + c]);
        for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
        if (threadIdx.x % 32 == 0) out[int64_t(m) * rows + row] = sum;
    }
}

template <int kUnroll> __global__ void read_all(const uint4 *from, int64_t size, uint4 *sink) {
    uint4 sum = make_uint4(0, 0, 0, 0);
    const int64_t step = int64_t(gridDim.x) * blockDim.x;
    for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < size; i += step * kUnroll) {
        uint4 v[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; u++)
            v[u] = i + u * step < size ? __ldcs(from + i + u * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int u = 0; u < kUnroll; u++) sum.x ^= v[u].x, sum.y ^= v[u].y, sum.z ^= v[u].z, sum.w ^= v[u].w;
    }
    if ((sum.x ^ sum.y ^ sum.z ^ sum.w) == 0x12345678) *sink = sum; // keeps the loads
}

struct Timer {
    cudaEvent_t start, stop;
    Timer() {
        CHECK_CUDA(cudaEventCreate(&start));
        CHECK_CUDA(cudaEventCreate(&stop));
    }
    template <typename F> double median_us(cudaStream_t stream, int repeats, F &&work) {
        std::vector<float> times;
        for (int i = 0; i < repeats + 3; i++) {
            CHECK_CUDA(cudaEventRecord(start, stream));
            work();
            CHECK_CUDA(cudaEventRecord(stop, stream));
            CHECK_CUDA(cudaEventSynchronize(stop));
            float ms;
            CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
            if (i >= 3) times.push_back(ms * 1e3f);
        }
        std::sort(times.begin(), times.end());
        return times[times.size() / 2];
    }
};

double silu(double g) { return g / (1 + std::exp(-g)); }

// A value between the k-th and the k+1-th smallest, so that rounding cannot flip the mask; 0 keeps everything.
float threshold_for(std::vector<double> magnitudes, double share) {
    const size_t k = size_t(share * magnitudes.size());
    if (k == 0) return 0.f;
    std::nth_element(magnitudes.begin(), magnitudes.begin() + k, magnitudes.end());
    const double above = magnitudes[k];
    const double below = *std::max_element(magnitudes.begin(), magnitudes.begin() + k);
    return float((above + below) / 2);
}

} // namespace
