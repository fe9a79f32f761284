// Picks and launches an instance of activated_mlp.cuh for each group of tokens.
#include "activated_mlp.cuh"

#include <algorithm>
#include <iterator>
#include <utility>

#include "launch.h"
#include "sparse_mlp_launch.h"

namespace cats {

namespace {

constexpr int kCounters = 4;       // next_batch, done_ctas, and two for the alignment of what follows
constexpr int kStaticBytes = 8192; // of shared memory, at most

int64_t y_sum_size(const ActivatedMlpParams &params) { return int64_t(kMaxTokensPerLaunch) * params.hidden_size; }

template <typename T> bool is_aligned(const ActivatedMlpParams &p) {
    const auto fits = [](const void *base, int64_t stride) {
        const int64_t bytes = stride * int64_t(sizeof(T));
        return reinterpret_cast<uintptr_t>(base) % 16 == 0 && bytes % 16 == 0 && bytes < 1ll << 32;
    };
    return fits(p.x, p.hidden_size) && fits(p.w_up, p.w_up_stride) && fits(p.w_down_t, p.w_down_t_stride);
}

struct Target {
    LaunchTarget launch;
    DeviceLimits limits;
};

// cudaErrorNotSupported if the list does not fit.
template <typename T, int kTokens, int kChunks, int kThreads, bool kCutoff>
cudaError_t launch_instance(const ActivatedMlpParams &p, const Workspace &workspace, const Target &target, int *ctas) {
    const int row_chunks = int(p.hidden_size / DenseRow<T>::kPerChunk);
    const int threads = std::max(round_up(ceil_div(row_chunks, kChunks), 32), kCutoff ? 32 : kLeastScanThreads);
    *ctas = int(max_ctas(p.intermediate_size, target.limits));
    const int64_t shared_bytes =
        (kCutoff ? 0 : scan_bytes(p.intermediate_size, threads)) + list_bytes(p.intermediate_size, *ctas);
    if (shared_bytes > target.limits.shared_bytes - kStaticBytes) return cudaErrorNotSupported;
    const LaunchSize size{dim3(unsigned(*ctas)), unsigned(threads), int(shared_bytes)};
    return launch_kernel<activated_mlp_kernel<T, kTokens, kChunks, kThreads, kCutoff>>(size, target.launch, p,
                                                                                       workspace);
}

// Of the instances that fit the row, the smallest that takes all tokens, otherwise the largest.
template <typename T, size_t... i>
cudaError_t launch_vectors(ActivatedMlpParams &p, const Workspace &workspace, const Target &target, int *ctas,
                           std::index_sequence<i...>) {
    const int64_t row_chunks = p.hidden_size / DenseRow<T>::kPerChunk;
    const ActivatedInstance *chosen = nullptr;
    for (const ActivatedInstance &instance : kActivatedInstances) {
        if (row_chunks > int64_t(instance.threads) * instance.chunks) continue;
        if (chosen && (instance.chunks > chosen->chunks || chosen->tokens >= p.tokens)) continue;
        chosen = &instance;
    }
    if (!chosen) return cudaErrorNotSupported;
    p.tokens = std::min<int64_t>(p.tokens, chosen->tokens);
    cudaError_t error = cudaErrorNotSupported;
    const auto launch = [&](auto index, auto cutoff) {
        constexpr ActivatedInstance kInstance = kActivatedInstances[decltype(index)::value];
        return launch_instance<T, kInstance.tokens, kInstance.chunks, kInstance.threads, decltype(cutoff)::value>(
            p, workspace, target, ctas);
    };
    ((chosen == &kActivatedInstances[i]
          ? void(error = p.cutoff ? launch(std::integral_constant<size_t, i>{}, std::true_type{})
                                  : launch(std::integral_constant<size_t, i>{}, std::false_type{}))
          : void()),
     ...);
    return error;
}

// One launch for the first tokens of p, whose number it sets.
template <typename T> cudaError_t launch(ActivatedMlpParams &p, const Workspace &workspace, const Target &target) {
    int ctas = 0;
    cudaError_t error = cudaErrorNotSupported;
    const bool has_groups = !p.cutoff || p.intermediate_size % kScanNeurons == 0;
    if (is_aligned<T>(p) && has_groups && p.intermediate_size < kMaxNeurons)
        error =
            launch_vectors<T>(p, workspace, target, &ctas, std::make_index_sequence<std::size(kActivatedInstances)>{});
    if (error == cudaErrorNotSupported) {
        LaunchTarget alone = target.launch;
        alone.overlap = false; // the kernel does not wait for the previous one
        ctas = int(max_ctas(p.intermediate_size, target.limits));
        error = launch_kernel<activated_mlp_generic_kernel<T>>({dim3(unsigned(ctas)), kGenericThreads}, alone, p,
                                                               workspace);
    }
    if (error != cudaSuccess || !workspace.partial_sums) return error;
    using Order = OutputOrder<0>;
    const Order order{int(p.tokens), int(p.hidden_size)};
    const LaunchSize size{dim3(unsigned(ceil_div(order.size(), kPartialSumColumns))),
                          kPartialSumColumns * kPartialSumGroups};
    return launch_kernel<add_partial_sums_kernel<T, Order>>(
        size, target.launch, static_cast<const float *>(workspace.partial_sums), ctas,
        static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

template <typename T>
cudaError_t launch_all(const ActivatedMlpParams &params, const Workspace &workspace, const Target &target) {
    const auto rows_on = [](const void *base, int64_t rows, int64_t columns) {
        return base ? static_cast<const T *>(base) + rows * columns : nullptr;
    };
    for (int64_t first = 0; first < params.tokens;) {
        ActivatedMlpParams part = params;
        part.tokens = std::min<int64_t>(params.tokens - first, kMaxTokensPerLaunch);
        part.v = rows_on(params.v, first, params.intermediate_size);
        if (params.cutoff) part.gate_sums = params.gate_sums + first * params.gate_places;
        part.x = rows_on(params.x, first, params.hidden_size);
        part.y = static_cast<T *>(params.y) + first * params.hidden_size;
        if (const cudaError_t error = launch<T>(part, workspace, target)) return error;
        first += part.tokens;
    }
    return cudaSuccess;
}

} // namespace

size_t activated_mlp_workspace_bytes(const ActivatedMlpParams &params) {
    return size_t(kCounters + y_sum_size(params)) * sizeof(float);
}

cudaError_t activated_mlp_partial_sums_bytes(const ActivatedMlpParams &params, size_t *bytes) {
    int device;
    DeviceLimits limits{};
    const cudaError_t error = device_limits(&device, &limits);
    *bytes = size_t(max_ctas(params.intermediate_size, limits) * y_sum_size(params)) * sizeof(float);
    return error;
}

cudaError_t activated_mlp_cuda(const ActivatedMlpParams &params, void *workspace, void *partial_sums,
                               cudaStream_t stream) {
    int device;
    Target target{};
    if (const cudaError_t error = device_limits(&device, &target.limits)) return error;
    target.launch = {stream, device, target.limits.compute_capability >= 90};
    Workspace parts{};
    parts.next_batch = static_cast<unsigned *>(workspace);
    parts.done_ctas = parts.next_batch + 1;
    parts.y_sum = static_cast<float *>(workspace) + kCounters;
    parts.partial_sums = static_cast<float *>(partial_sums);
    switch (params.dtype) {
    case DType::kFloat32: return launch_all<float>(params, parts, target);
    case DType::kFloat16: return launch_all<__half>(params, parts, target);
    case DType::kBFloat16: return launch_all<__nv_bfloat16>(params, parts, target);
    case DType::kFloat64: break;
    }
    return cudaErrorInvalidValue;
}

} // namespace cats
