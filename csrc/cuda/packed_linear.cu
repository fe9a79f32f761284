#include "packed_linear.cuh"

#include <algorithm>
#include <cstdlib>

#include "launch.h"
#include "packed_linear_launch.h"

namespace cats {

namespace {

// Shared memory that leaves room for the kernels before and after.
constexpr int kRingBytes = 104 << 10;

struct LinearTarget {
    LaunchTarget launch;
    int multiprocessors, shared_bytes; // of a block at most
};

int tune(const char *name, int otherwise) {
    const char *value = std::getenv(name);
    return value ? std::atoi(value) : otherwise;
}

template <WeightType kType, int kGroup, typename T, int kBlocks>
cudaError_t launch_old(const PackedLinearParams &p, const LinearTarget &target) {
    int batches = 0;
    for (int part = 0; part < p.parts; part++) batches += ceil_div(p.outputs[part], kTeamRows);
    constexpr int kTeams = 2;
    const int ctas = std::min(batches, target.multiprocessors), teams = std::min(kTeams, ceil_div(batches, ctas));
    const LaunchSize size{dim3(unsigned(ctas)), unsigned(teams * kTeamThreads),
                          packed_linear_shared_bytes(p.inputs, teams)};
    return launch_kernel<packed_linear_kernel<kType, kGroup, T, kBlocks, kTeams>>(size, target.launch, p);
}

template <WeightType kType, int kGroup, typename T, int kBlocks>
cudaError_t launch(const PackedLinearParams &p, const LinearTarget &target) {
    if constexpr (kBlocks == 4 && kGroup == 128 && std::is_same_v<T, __nv_bfloat16> && kType != WeightType::kFloat8)
        if (tune("CATS_TUNE_LINEAR", 1) == 0) return launch_old<kType, kGroup, T, kBlocks>(p, target);
    int64_t rows = 0;
    for (int part = 0; part < p.parts; part++) rows += p.outputs[part];
    const int ctas = int(std::min<int64_t>(rows, target.multiprocessors));
    const int row_bytes = p.format.row_bytes(p.inputs);
    // A lane reads 16 bytes of a row, 4 lanes of a row: rows half a line apart are read from different banks.
    LinearRing ring{0, row_bytes, round_up(row_bytes + 64, 128) - 64};
    const int slot_bytes = linear_slot_bytes(ring) + 16, other = linear_shared_bytes(ring, p.inputs);
    const int wanted = std::max(3, (tune("CATS_TUNE_LINEAR_KB", kRingBytes >> 10) << 10) / slot_bytes);
    ring.slots = std::min(
        {ceil_div(ceil_div(rows, ctas), kLinearRows), wanted, (target.shared_bytes - 1024 - other) / slot_bytes});
    if (ring.slots < 1) return cudaErrorNotSupported;
    const LaunchSize size{dim3(unsigned(ctas)), kLinearThreads, linear_shared_bytes(ring, p.inputs)};
    return launch_kernel<ring_linear_kernel<kType, kGroup, T, kBlocks>>(size, target.launch, p, ring);
}

template <WeightType kType, int kGroup, typename T>
cudaError_t launch_blocks(const PackedLinearParams &p, const LinearTarget &target) {
    const int each = ceil_div(ceil_div(p.inputs, kPackedColumns), kLinearWarps);
    return (each <= 2   ? launch<kType, kGroup, T, 2>
            : each <= 4 ? launch<kType, kGroup, T, 4>
                        : launch<kType, kGroup, T, 8>)(p, target);
}

template <typename T> cudaError_t launch_format(const PackedLinearParams &p, const LinearTarget &target) {
    const auto group = [&]<WeightType kType> {
        return (p.format.group_size == 32   ? launch_blocks<kType, 32, T>
                : p.format.group_size == 64 ? launch_blocks<kType, 64, T>
                                            : launch_blocks<kType, 128, T>)(p, target);
    };
    switch (p.format.type) {
    case WeightType::kInt4: return group.template operator()<WeightType::kInt4>();
    case WeightType::kInt8: return group.template operator()<WeightType::kInt8>();
    case WeightType::kFloat8: return launch_blocks<WeightType::kFloat8, 128, T>(p, target);
    case WeightType::kDense: break;
    }
    return cudaErrorInvalidValue;
}

bool is_aligned(const PackedLinearParams &p) {
    const void *const vectors[] = {p.x, p.delta, p.x_new, p.norm_weight, p.weighted};
    return std::all_of(std::begin(vectors), std::end(vectors),
                       [](const void *at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; });
}

} // namespace

cudaError_t packed_linear_cuda(const PackedLinearParams &params, cudaStream_t stream) {
    if (params.inputs > kMaxPackedInputs || params.inputs % 8 || params.head_dim % 8 || !is_aligned(params))
        return cudaErrorNotSupported;
    int device, capability;
    LinearTarget target;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    const auto attribute = [&](cudaDeviceAttr which, int *value) {
        return cudaDeviceGetAttribute(value, which, device);
    };
    if (const cudaError_t error = attribute(cudaDevAttrComputeCapabilityMajor, &capability)) return error;
    if (const cudaError_t error = attribute(cudaDevAttrMultiProcessorCount, &target.multiprocessors)) return error;
    if (const cudaError_t error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &target.shared_bytes))
        return error;
    target.launch = {stream, device, capability >= 9};
    if (params.dtype == DType::kFloat16) return launch_format<__half>(params, target);
    if (params.dtype == DType::kBFloat16) return launch_format<__nv_bfloat16>(params, target);
    return cudaErrorNotSupported;
}

} // namespace cats
