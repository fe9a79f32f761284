// Launches sparse_mlp_columns: for each token the gates (gate_columns.cuh), then the pipelined kernel for the rows of
// the neurons that were kept.
#include "gate_columns.cuh"
#include "launch.h"
#include "sparse_mlp_launch.h"

namespace cats {

namespace {

int element_bytes(const SparseMlpParams &params) { return params.dtype == DType::kFloat32 ? 4 : 2; }

// Without memory.
KeptNeurons kept_neurons(const SparseMlpParams &params, const DeviceLimits &limits) {
    KeptNeurons kept{};
    kept.size = segment_size(params.intermediate_size, element_bytes(params), limits.multiprocessors);
    kept.segments = ceil_div(params.intermediate_size, kept.size);
    return kept;
}

size_t neurons_bytes(const KeptNeurons &kept) { return size_t(kept.segments) * kept.size * sizeof(KeptNeuron); }

template <typename T>
cudaError_t launch_gates(const SparseMlpParams &params, const LaunchSize &size, const LaunchTarget &target) {
    if (params.y_sum) return launch_kernel<gate_columns_kernel<T, true>>(size, target, params);
    return launch_kernel<gate_columns_kernel<T, false>>(size, target, params);
}

bool fits(const SparseMlpParams &params, const DeviceLimits &limits, int64_t shared_bytes) {
    const auto aligned = [&](const void *base, int64_t row) {
        return reinterpret_cast<uintptr_t>(base) % 16 == 0 && row * element_bytes(params) % 16 == 0;
    };
    return aligned(params.w_up, params.w_up_stride) && aligned(params.w_down_t, params.w_down_t_stride) &&
           aligned(params.x, params.hidden_size) && aligned(params.norm_weight, 0) &&
           aligned(params.w_gate, params.intermediate_size) && aligned(params.w_gate, params.w_gate_stride) &&
           params.w_gate_stride * element_bytes(params) < 1ll << 32 && params.intermediate_size < kMaxNeurons &&
           params.kept.segments <= kMaxSegments && shared_bytes <= limits.shared_bytes - 1024;
}

} // namespace

cudaError_t sparse_mlp_kept_bytes(const SparseMlpParams &params, size_t *bytes) {
    *bytes = 0;
    if (!params.input_threshold) return cudaSuccess;
    int device;
    DeviceLimits limits{};
    const cudaError_t error = device_limits(&device, &limits);
    const KeptNeurons kept = kept_neurons(params, limits);
    *bytes = (neurons_bytes(kept) + kept.segments * sizeof(uint32_t) + 255) / 256 * 256;
    return error;
}

cudaError_t sparse_mlp_columns_cuda(const SparseMlpParams &params, void *workspace, void *kept, cudaStream_t stream,
                                    const SparseMlpLaunchOptions &options) {
    int device;
    DeviceLimits limits;
    if (const cudaError_t error = device_limits(&device, &limits)) return error;
    const int columns_per_chunk = row_layout(params.dtype).columns_per_chunk;
    if (!columns_per_chunk) return cudaErrorInvalidValue;
    const int64_t shared_bytes = columns_shared_bytes(params.hidden_size, columns_per_chunk);
    const LaunchTarget target{stream, device, options.programmatic_launch && limits.compute_capability >= 90};
    SparseMlpParams first = params;
    first.tokens = 1;
    first.kept = kept_neurons(params, limits);
    first.kept.neurons = static_cast<KeptNeuron *>(kept);
    first.kept.counts = reinterpret_cast<uint32_t *>(static_cast<uint8_t *>(kept) + neurons_bytes(first.kept));
    if (!fits(first, limits, shared_bytes)) return cudaErrorNotSupported;
    const LaunchSize size{dim3(unsigned(first.kept.segments)), kColumnsThreads, int(shared_bytes)};
    const int64_t row_bytes = params.hidden_size * element_bytes(params);
    for (int64_t token = 0; token < params.tokens; token++) {
        first.x = static_cast<const uint8_t *>(params.x) + token * row_bytes;
        first.y = static_cast<uint8_t *>(params.y) + token * row_bytes;
        cudaError_t error = cudaErrorInvalidValue;
        switch (params.dtype) {
        case DType::kFloat32: error = launch_gates<float>(first, size, target); break;
        case DType::kFloat16: error = launch_gates<__half>(first, size, target); break;
        case DType::kBFloat16: error = launch_gates<__nv_bfloat16>(first, size, target); break;
        case DType::kFloat64: break;
        }
        if (error != cudaSuccess) return error;
        SparseMlpParams second = first;
        second.w_gate = second.gate_bias = nullptr, second.w_gate_stride = 0;
        if ((error = sparse_mlp_cuda(second, workspace, stream, options)) != cudaSuccess) return error;
    }
    return cudaSuccess;
}

} // namespace cats
