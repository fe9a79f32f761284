// Asks plan() for a kernel for each group of tokens and launches it. The kernel instances are in
// sparse_mlp_{bf16,fp16,fp32}.cu.
#include "sparse_mlp_launch.h"

#include <algorithm>
#include <mutex>

#include "rows/dense.cuh"
#include "sparse_mlp_dispatch.h"

namespace cats {

namespace {

bool is_aligned(const SparseMlpParams &p, const RowLayout &row) {
    const auto fits = [&](const void *base, int64_t stride) {
        const int64_t bytes = stride * (p.gate_format.packed() ? 1 : row.storage_bytes);
        return reinterpret_cast<uintptr_t>(base) % 16 == 0 && bytes % 16 == 0 && bytes < 1ll << 32;
    };
    return fits(p.norm_weight, 0) && fits(p.y_sum, 0) && fits(p.x, 0) && fits(p.w_gate, p.w_gate_stride) &&
           fits(p.w_up, p.w_up_stride) && fits(p.w_down_t, p.w_down_t_stride);
}

// plan() and the kernels must agree on a format.
template <class Row> constexpr bool has_layout(RowLayout b) {
    constexpr RowLayout a = layout_of<Row>();
    return a.columns_per_chunk == b.columns_per_chunk && a.storage_bytes == b.storage_bytes &&
           a.scale_bytes == b.scale_bytes && a.mma_operand == b.mma_operand;
}
static_assert(has_layout<DenseRow<float>>(row_layout(DType::kFloat32)));
static_assert(has_layout<DenseRow<__half>>(row_layout(DType::kFloat16)));
static_assert(has_layout<DenseRow<__nv_bfloat16>>(row_layout(DType::kBFloat16)));

template <typename T>
cudaError_t launch_packed(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                          const LaunchTarget &target) {
    if (choice.kernel == Kernel::kGeneric)
        return launch_packed<WeightType::kDense, T>(choice, params, workspace, target);
    if constexpr (sizeof(T) == 2) switch (params.gate_format.type) {
        case WeightType::kInt4: return launch_packed<WeightType::kInt4, T>(choice, params, workspace, target);
        case WeightType::kInt8: return launch_packed<WeightType::kInt8, T>(choice, params, workspace, target);
        case WeightType::kFloat8: return launch_packed<WeightType::kFloat8, T>(choice, params, workspace, target);
        case WeightType::kDense: break;
        }
    return cudaErrorNotSupported;
}

template <typename T>
cudaError_t launch_rows(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                        const LaunchTarget &target) {
    return (params.gate_format.packed() ? launch_packed<T> : launch_choice<DenseRow<T>, T>)(choice, params, workspace,
                                                                                            target);
}

cudaError_t launch_format(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                          const LaunchTarget &target) {
    switch (params.dtype) {
    case DType::kFloat32: return launch_rows<float>(choice, params, workspace, target);
    case DType::kFloat16: return launch_rows<__half>(choice, params, workspace, target);
    case DType::kBFloat16: return launch_rows<__nv_bfloat16>(choice, params, workspace, target);
    case DType::kFloat64: break;
    }
    return cudaErrorInvalidValue;
}

static_assert(kOutputCopies <= kMaxTokensPerLaunch, "y_sum has room for the copies of one token's sums");

// Values of y_sum: the batched kernel pads the tokens.
int64_t y_sum_size(const SparseMlpParams &params) { return int64_t(kMaxTokensPerLaunch) * params.hidden_size; }

constexpr int kCounters = 4; // next_batch, done_ctas, and two for the alignment of what follows

} // namespace

cudaError_t device_limits(int *device, DeviceLimits *limits) {
    static std::mutex mutex;
    static DeviceLimits known[kMaxDevices];
    if (const cudaError_t error = cudaGetDevice(device)) return error;
    if (*device >= kMaxDevices) return cudaErrorInvalidDevice;
    const std::lock_guard<std::mutex> lock(mutex);
    DeviceLimits &found = known[*device];
    if (found.multiprocessors == 0) {
        cudaDeviceProp properties;
        if (const cudaError_t error = cudaGetDeviceProperties(&properties, *device)) return error;
        found = {10 * properties.major + properties.minor, properties.multiProcessorCount,
                 int(properties.sharedMemPerBlockOptin)};
    }
    *limits = found;
    return cudaSuccess;
}

size_t sparse_mlp_workspace_bytes(const SparseMlpParams &params) {
    return size_t(kCounters + y_sum_size(params)) * sizeof(float);
}

cudaError_t sparse_mlp_partial_sums_bytes(const SparseMlpParams &params, size_t *bytes) {
    int device;
    DeviceLimits limits{};
    const cudaError_t error = device_limits(&device, &limits);
    *bytes = size_t(max_ctas(params.intermediate_size, limits) * y_sum_size(params)) * sizeof(float);
    return error;
}

cudaError_t sparse_mlp_cuda(const SparseMlpParams &params, void *workspace, cudaStream_t stream,
                            const SparseMlpLaunchOptions &options) {
    int device;
    DeviceLimits limits;
    if (const cudaError_t error = device_limits(&device, &limits)) return error;
    const RowLayout row = row_layout(params.dtype);
    if (!row.columns_per_chunk) return cudaErrorInvalidValue;
    const bool step = params.y_sum;

    Workspace parts{};
    parts.next_batch = static_cast<unsigned *>(workspace);
    parts.done_ctas = parts.next_batch + 1;
    parts.y_sum = static_cast<float *>(workspace) + kCounters;
    parts.partial_sums = static_cast<float *>(options.partial_sums);
    parts.gate_places = int(max_ctas(params.intermediate_size, limits));
    if (!params.gates != !options.gate_sums) return cudaErrorInvalidValue;
    if (step) { // the sum and the counter are the launch's own
        if (params.tokens != 1 || params.counts || params.down_bias || parts.partial_sums) return cudaErrorInvalidValue;
        parts.y_sum = params.y_sum, parts.done_ctas = nullptr;
        parts.next_batch = reinterpret_cast<unsigned *>(params.y_sum + params.hidden_size);
    }

    const LaunchTarget target{stream, device, options.programmatic_launch && limits.compute_capability >= 90};
    Shape shape{params.tokens,
                params.hidden_size,
                params.intermediate_size,
                row,
                is_aligned(params, row),
                step,
                parts.partial_sums != nullptr,
                {params.gate_format, params.up_format, params.down_format},
                params.exact,
                params.kept.neurons != nullptr};
    const int64_t x_row_bytes = params.hidden_size * (params.dtype == DType::kFloat32 ? 4 : 2);
    for (int64_t first = 0; first < params.tokens;) {
        shape.tokens = params.tokens - first;
        const Choice choice = plan(shape, limits, options);
        if (choice.kernel == Kernel::kNone) return cudaErrorNotSupported;
        SparseMlpParams part = params;
        part.tokens = choice.tokens;
        part.x = static_cast<const uint8_t *>(params.x) + first * x_row_bytes;
        part.y = static_cast<uint8_t *>(params.y) + first * x_row_bytes;
        if (params.gates) {
            part.gates = static_cast<uint8_t *>(params.gates) +
                         first * params.intermediate_size * (params.dtype == DType::kFloat32 ? 4 : 2);
            parts.gate_sums = options.gate_sums + first * parts.gate_places;
        }
        if (const cudaError_t error = launch_format(choice, part, parts, target)) return error;
        first += choice.tokens;
    }
    return cudaSuccess;
}

} // namespace cats
