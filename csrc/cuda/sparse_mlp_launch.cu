// Splits the tokens into groups and picks the kernel for each; the instances are in sparse_mlp_{bf16,fp16,fp32}.cu.
#include "sparse_mlp_launch.h"

#include <algorithm>
#include <mutex>

#include "sparse_mlp_dispatch.h"

namespace cats {

namespace {

cudaError_t device_limits(DeviceLimits *limits) {
    constexpr int kMaxDevices = 64;
    static std::mutex mutex;
    static DeviceLimits known[kMaxDevices];
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    const std::lock_guard<std::mutex> lock(mutex);
    if (known[device].multiprocessors == 0) {
        DeviceLimits found{};
        int major, minor;
        const auto get = [&](int *value, cudaDeviceAttr attribute) {
            if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
        };
        get(&major, cudaDevAttrComputeCapabilityMajor);
        get(&minor, cudaDevAttrComputeCapabilityMinor);
        get(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
        get(&found.multiprocessors, cudaDevAttrMultiProcessorCount);
        if (error != cudaSuccess) return error;
        found.index = device;
        found.compute_capability = 10 * major + minor;
        found.large_shared_memory = has_large_shared_memory(10 * found.compute_capability);
        found.shared_bytes -= 1024; // for what the kernels declare statically
        known[device] = found;
    }
    *limits = known[device];
    return cudaSuccess;
}

int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Copies of 16 bytes need every row, and x, to start at a multiple of 16 bytes and to be as long; the pipelined
// kernel's row numbers have 24 bits, its strides 32.
bool fits_pipelined_kernel(const SparseMlpParams &p) {
    const int bytes = element_bytes(p.dtype);
    const auto fits = [&](const void *base, int64_t stride) {
        return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * bytes % 16 == 0 && stride * bytes < 1ll << 32;
    };
    return p.intermediate_size < 1 << 24 && fits(p.norm_weight, 0) && fits(p.y_sum, 0) && fits(p.x, p.hidden_size) &&
           fits(p.w_gate, p.w_gate_stride) && fits(p.w_up, p.w_up_stride) && fits(p.w_down_t, p.w_down_t_stride);
}

cudaError_t launch_group_of_dtype(const SparseMlpParams &params, const DeviceLimits &device, SparseMlpKernel kernel,
                                  const Workspace &workspace, cudaStream_t stream,
                                  const SparseMlpLaunchOptions &options) {
    switch (params.dtype) {
    case DType::kFloat32: return launch_group<DenseRow<float>>(params, device, kernel, workspace, stream, options);
    case DType::kFloat16: return launch_group<DenseRow<__half>>(params, device, kernel, workspace, stream, options);
    case DType::kBFloat16:
        return launch_group<DenseRow<__nv_bfloat16>>(params, device, kernel, workspace, stream, options);
    case DType::kFloat64: break;
    }
    return cudaErrorInvalidValue;
}

// Values of y_sum: the batched kernel pads the tokens.
int64_t y_sum_size(const SparseMlpParams &params) { return int64_t(kMaxTokensPerLaunch) * params.hidden_size; }

constexpr int kCounters = 4; // next_batch, done_ctas, and two for the alignment of what follows

} // namespace

size_t sparse_mlp_workspace_bytes(const SparseMlpParams &params) {
    return size_t(kCounters + y_sum_size(params)) * sizeof(float);
}

cudaError_t sparse_mlp_shares_bytes(const SparseMlpParams &params, size_t *bytes) {
    DeviceLimits device{};
    const cudaError_t error = device_limits(&device);
    *bytes = size_t(max_ctas(params, device) * y_sum_size(params)) * sizeof(float);
    return error;
}

cudaError_t sparse_mlp_cuda(const SparseMlpParams &params, void *workspace, cudaStream_t stream,
                            const SparseMlpLaunchOptions &options) {
    DeviceLimits device;
    cudaError_t error = device_limits(&device);
    if (error != cudaSuccess) return error;
    SparseMlpKernel kernel = options.kernel;
    if (kernel == SparseMlpKernel::kAuto)
        kernel = device.compute_capability >= 90 ? SparseMlpKernel::kBulkCopy : SparseMlpKernel::kAsyncCopy;
    if (!fits_pipelined_kernel(params)) kernel = SparseMlpKernel::kGeneric;

    Workspace parts{};
    parts.next_batch = static_cast<unsigned *>(workspace);
    parts.done_ctas = parts.next_batch + 1;
    parts.y_sum = static_cast<float *>(workspace) + kCounters;
    parts.shares = static_cast<float *>(options.shares);
    if (params.y_sum) { // the sum and the counter are the launch's own
        if (params.tokens != 1 || params.counts || params.down_bias || parts.shares) return cudaErrorInvalidValue;
        parts.y_sum = params.y_sum, parts.done_ctas = nullptr;
        parts.next_batch = reinterpret_cast<unsigned *>(params.y_sum + params.hidden_size);
        return launch_group_of_dtype(params, device, kernel, parts, stream, options);
    }

    const int64_t row_bytes = params.hidden_size * element_bytes(params.dtype);
    int group = kMaxTokensPerLaunch;
    for (int64_t first = 0; first < params.tokens;) {
        SparseMlpParams part = params;
        part.tokens = std::min<int64_t>(group, params.tokens - first);
        part.x = static_cast<const uint8_t *>(params.x) + first * row_bytes;
        part.y = static_cast<uint8_t *>(params.y) + first * row_bytes;
        error = launch_group_of_dtype(part, device, kernel, parts, stream, options);
        if (error == cudaErrorNotSupported && group > 1) {
            group /= 2;
        } else if (error == cudaErrorNotSupported && kernel != SparseMlpKernel::kGeneric) {
            kernel = SparseMlpKernel::kGeneric, group = kMaxTokensPerLaunch;
        } else if (error != cudaSuccess) {
            return error;
        } else {
            first += part.tokens;
        }
    }
    return cudaSuccess;
}

} // namespace cats
