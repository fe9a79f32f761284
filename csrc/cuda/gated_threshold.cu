// h = mask * act(gate) * up and its gradients, elementwise: the dense masked path of prefill and training.
#include <algorithm>
#include <initializer_list>

#include "activation.cuh"
#include "launch.h"
#include "sparse_mlp_launch.h"
#include "values.cuh"

namespace cats {

namespace {

constexpr int kMaxThreads = 256;
constexpr int kBlocks = 4096; // about, with many rows: several for every multiprocessor
constexpr int kMaxWidth = 8;  // elements that a thread treats at once: 16 bytes of a 2-byte type

template <typename T, int kWidth> struct alignas(sizeof(T) * kWidth) Pack {
    T v[kWidth];
};

enum class Pass { kForward, kCounted, kBackward };

// Adds the CTA's counts to p.counts. lanes: the threads of this warp that have neurons; the others have ended.
__device__ __forceinline__ void add_counts(const GatedThresholdParams &p, uint32_t lanes, uint32_t kept,
                                           uint32_t kept_down) {
    __shared__ unsigned totals[2];
    if (threadIdx.x == 0) totals[0] = totals[1] = 0;
    __syncthreads();
    kept = __reduce_add_sync(lanes, kept), kept_down = __reduce_add_sync(lanes, kept_down);
    if (threadIdx.x % 32 == 0) atomicAdd(totals, kept), atomicAdd(totals + 1, kept_down);
    __syncthreads();
    if (threadIdx.x) return;
    auto *counts = reinterpret_cast<unsigned long long *>(p.counts);
    if (blockIdx.x == 0 && blockIdx.y == 0) atomicAdd(counts, (unsigned long long)(p.rows * p.intermediate_size));
    atomicAdd(counts + 1, (unsigned long long)totals[0]);
    atomicAdd(counts + 2, (unsigned long long)totals[1]);
}

// The thresholds of neurons first, ..., first + kWidth - 1; 0, which keeps all, without any.
template <int kWidth, typename C>
__device__ __forceinline__ void load_thresholds(const float *from, int64_t stride, int64_t first, C (&out)[kWidth]) {
    if constexpr (kWidth % 4 == 0 && std::is_same_v<C, float>)
        if (from && stride == 1 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
            for (int e = 0; e < kWidth; e += 4) {
                const float4 four = *reinterpret_cast<const float4 *>(from + first + e);
                out[e] = four.x, out[e + 1] = four.y, out[e + 2] = four.z, out[e + 3] = four.w;
            }
            return;
        }
#pragma unroll
    for (int e = 0; e < kWidth; e++) out[e] = from ? C(from[(first + e) * stride]) : C(0);
}

// silu to some 5e-6, which rounding to 16 bits hides. Division and exp() to the last bit take many more instructions.
__device__ __forceinline__ float quick_silu(float g) { return __fdividef(g, 1.f + __expf(-g)); }

// Each thread keeps the thresholds of kWidth neurons in registers and computes every gridDim.y-th row. The next row is
// loaded while one is computed.
template <typename T, int kWidth, Pass kPass>
__global__ void __launch_bounds__(kMaxThreads) gated_threshold_kernel(const __grid_constant__ GatedThresholdParams p) {
    using C = std::conditional_t<std::is_same_v<T, double>, double, float>; // the type of the arithmetic
    using Packed = Pack<T, kWidth>;
    constexpr bool kBackward = kPass == Pass::kBackward;
    const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
    uint32_t lanes = 0, kept_up = 0, kept_both = 0;
    if constexpr (kPass == Pass::kCounted) lanes = __ballot_sync(0xffffffffu, first < p.intermediate_size);
    if (first >= p.intermediate_size) return;
    C threshold[kWidth], down_threshold[kWidth];
    load_thresholds(p.threshold, p.threshold_stride, first, threshold);
    load_thresholds(p.down_threshold, p.down_threshold_stride, first, down_threshold);
    const auto load = [&](const void *base, int64_t stride, int64_t row) {
        return *reinterpret_cast<const Packed *>(static_cast<const T *>(base) + row * stride + first);
    };
    int64_t row = blockIdx.y;
    Packed gate = load(p.gate, p.gate_stride, row), up = load(p.up, p.up_stride, row), grad{};
    if constexpr (kBackward) grad = load(p.grad_h, p.intermediate_size, row);
    while (true) {
        const int64_t next = row + gridDim.y;
        Packed next_gate, next_up, next_grad{};
        if (next < p.rows) {
            next_gate = load(p.gate, p.gate_stride, next), next_up = load(p.up, p.up_stride, next);
            if constexpr (kBackward) next_grad = load(p.grad_h, p.intermediate_size, next);
        }
        Packed out{}, grad_up{};
        C activated[kWidth];
        if (sizeof(T) == 2 && p.activation == Activation::kSilu) { // one branch for all elements
#pragma unroll
            for (int e = 0; e < kWidth; e++) activated[e] = quick_silu(float(gate.v[e]));
        } else {
#pragma unroll
            for (int e = 0; e < kWidth; e++) activated[e] = activate(static_cast<C>(gate.v[e]), p.activation);
        }
#pragma unroll
        for (int e = 0; e < kWidth; e++) {
            const C g = static_cast<C>(gate.v[e]), u = static_cast<C>(up.v[e]);
            const C v = activated[e], h = v * u;
            const bool keeps_up = keep(v, threshold[e]), kept = keeps_up && keep(h, down_threshold[e]);
            if constexpr (kPass == Pass::kCounted) kept_up += keeps_up, kept_both += kept;
            if constexpr (kBackward) {
                const C d = static_cast<C>(grad.v[e]);
                out.v[e] = round_to<T>(kept ? d * u * activate_grad(g, p.activation) : C(0));
                grad_up.v[e] = round_to<T>(kept ? d * v : C(0));
            } else {
                out.v[e] = round_to<T>(kept ? h : C(0));
            }
        }
        const auto store = [&](void *base, const Packed &value) {
            *reinterpret_cast<Packed *>(static_cast<T *>(base) + row * p.intermediate_size + first) = value;
        };
        if constexpr (kBackward) store(p.grad_gate, out), store(p.grad_up, grad_up);
        else store(p.h, out);
        if (next >= p.rows) break;
        row = next, gate = next_gate, up = next_up, grad = next_grad;
    }
    if constexpr (kPass == Pass::kCounted) add_counts(p, lanes, kept_up, kept_both);
}

template <typename T, int kWidth> cudaError_t launch(const GatedThresholdParams &p, cudaStream_t stream) {
    const int64_t packs = p.intermediate_size / kWidth;
    if (packs == 0 || p.rows == 0) return cudaSuccess;
    const int64_t threads = std::min<int64_t>((packs + 31) / 32 * 32, kMaxThreads),
                  blocks = (packs + threads - 1) / threads;
    const int64_t row_blocks = std::clamp<int64_t>(kBlocks / blocks, 1, std::min<int64_t>(p.rows, 65535));
    const LaunchSize size{dim3(unsigned(blocks), unsigned(row_blocks)), unsigned(threads)};
    const LaunchTarget target{stream};
    return p.grad_h   ? launch_kernel<gated_threshold_kernel<T, kWidth, Pass::kBackward>>(size, target, p)
           : p.counts ? launch_kernel<gated_threshold_kernel<T, kWidth, Pass::kCounted>>(size, target, p)
                      : launch_kernel<gated_threshold_kernel<T, kWidth, Pass::kForward>>(size, target, p);
}

template <typename T> cudaError_t launch_width(const GatedThresholdParams &p, cudaStream_t stream) {
    constexpr int kWidth = std::min<int>(kMaxWidth, 16 / sizeof(T));
    bool wide = p.intermediate_size % kWidth == 0 && p.gate_stride % kWidth == 0 && p.up_stride % kWidth == 0;
    for (const void *base : std::initializer_list<const void *>{p.gate, p.up, p.h, p.grad_h, p.grad_gate, p.grad_up})
        wide = wide && reinterpret_cast<uintptr_t>(base) % 16 == 0;
    return wide ? launch<T, kWidth>(p, stream) : launch<T, 1>(p, stream);
}

} // namespace

cudaError_t gated_threshold_cuda(const GatedThresholdParams &params, cudaStream_t stream) {
    switch (params.dtype) {
    case DType::kFloat32: return launch_width<float>(params, stream);
    case DType::kFloat16: return launch_width<__half>(params, stream);
    case DType::kBFloat16: return launch_width<__nv_bfloat16>(params, stream);
    case DType::kFloat64: return launch_width<double>(params, stream);
    }
    return cudaErrorInvalidValue;
}

} // namespace cats
