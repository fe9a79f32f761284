// Launches exact_mlp: the pipelined kernel alone, or with a cutoff, which needs all gates of a token first, that kernel
// for the gates and their sums (gate_sums.cuh) and the kernel of activated_mlp for the rest.
#include "sparse_mlp_launch.h"

#include <algorithm>

namespace cats {

namespace {

int64_t element_bytes(const SparseMlpParams &params) { return params.dtype == DType::kFloat32 ? 4 : 2; }

// Of the gates of at most kMaxTokensPerLaunch tokens, before their sums.
int64_t gates_bytes(const SparseMlpParams &params) {
    const int64_t tokens = std::min<int64_t>(params.tokens, kMaxTokensPerLaunch);
    return (tokens * params.intermediate_size * element_bytes(params) + 255) / 256 * 256;
}

// With a cutoff, for at most kMaxTokensPerLaunch tokens.
cudaError_t launch_both(const SparseMlpParams &params, void *workspace, void *gates, cudaStream_t stream,
                        const SparseMlpLaunchOptions &options) {
    int device;
    DeviceLimits limits{};
    if (const cudaError_t error = device_limits(&device, &limits)) return error;
    SparseMlpParams first = params;
    first.gates = gates;
    first.w_up = first.w_down_t = nullptr, first.w_up_stride = first.w_down_t_stride = 0;
    SparseMlpLaunchOptions first_options = options;
    first_options.partial_sums = nullptr; // every gate is summed by one team, in the same order
    // To bring more gate rows into L2 while the previous kernel runs delays what that kernel reads (bench/NOTES.md).
    if (!first_options.first_batches) first_options.first_batches = 1;
    first_options.gate_sums = reinterpret_cast<GateSums *>(static_cast<uint8_t *>(gates) + gates_bytes(params));
    if (const cudaError_t error = sparse_mlp_cuda(first, workspace, stream, first_options)) return error;

    ActivatedMlpParams second{};
    second.tokens = params.tokens, second.hidden_size = params.hidden_size;
    second.intermediate_size = params.intermediate_size;
    second.v = gates, second.cutoff = true, second.deviations = params.deviations;
    second.gate_sums = first_options.gate_sums;
    second.gate_places = int32_t(max_ctas(params.intermediate_size, limits));
    second.gate_weight = 1. / double(params.intermediate_size);
    second.activation = params.activation, second.squared = params.squared;
    if (params.w_up) second.x = params.x;
    second.w_up = params.w_up, second.w_up_stride = params.w_up_stride, second.up_bias = params.up_bias;
    second.w_down_t = params.w_down_t, second.w_down_t_stride = params.w_down_t_stride;
    second.down_bias = params.down_bias, second.y = params.y, second.dtype = params.dtype;
    return activated_mlp_cuda(second, workspace, options.partial_sums, stream);
}

} // namespace

cudaError_t exact_mlp_gates_bytes(const SparseMlpParams &params, size_t *bytes) {
    *bytes = 0;
    if (!params.cutoff) return cudaSuccess;
    int device;
    DeviceLimits limits{};
    const cudaError_t error = device_limits(&device, &limits);
    const size_t tokens = size_t(std::min<int64_t>(params.tokens, kMaxTokensPerLaunch));
    const size_t sums_bytes = tokens * size_t(max_ctas(params.intermediate_size, limits)) * sizeof(GateSums);
    *bytes = size_t(gates_bytes(params)) + (sums_bytes + 255) / 256 * 256;
    return error;
}

cudaError_t exact_mlp_cuda(const SparseMlpParams &params, void *workspace, void *gates, cudaStream_t stream,
                           const SparseMlpLaunchOptions &options) {
    if (!params.cutoff) return sparse_mlp_cuda(params, workspace, stream, options);
    const int64_t row_bytes = params.hidden_size * element_bytes(params);
    for (int64_t first = 0; first < params.tokens; first += kMaxTokensPerLaunch) {
        SparseMlpParams part = params;
        part.tokens = std::min<int64_t>(params.tokens - first, kMaxTokensPerLaunch);
        part.x = static_cast<const uint8_t *>(params.x) + first * row_bytes;
        part.y = static_cast<uint8_t *>(params.y) + first * row_bytes;
        if (const cudaError_t error = launch_both(part, workspace, gates, stream, options)) return error;
    }
    return cudaSuccess;
}

} // namespace cats
