#include "packed_linear.cuh"

#include <algorithm>

#include "launch.h"
#include "packed_linear_launch.h"
#include "sparse_mlp_launch.h"

namespace cats {

namespace {

template <WeightType kType, int kGroup, typename T, int kBlocks>
cudaError_t launch(const PackedLinearParams &p, const LaunchTarget &target, int multiprocessors) {
    constexpr int kTeams = max_teams(kBlocks, kGroup);
    int batches = 0;
    for (int part = 0; part < p.parts; part++) batches += ceil_div(p.outputs[part], kTeamRows);
    const int ctas = std::min(batches, multiprocessors), teams = std::min(kTeams, ceil_div(batches, ctas));
    const LaunchSize size{dim3(unsigned(ctas)), unsigned(teams * kTeamThreads),
                          packed_linear_shared_bytes(p.inputs, teams)};
    return launch_kernel<packed_linear_kernel<kType, kGroup, T, kBlocks, kTeams>>(size, target, p);
}

template <WeightType kType, int kGroup, typename T>
cudaError_t launch_blocks(const PackedLinearParams &p, const LaunchTarget &target, int multiprocessors) {
    const int each = ceil_div(ceil_div(p.inputs, kPackedColumns), kTeamWarps);
    return (each <= 2   ? launch<kType, kGroup, T, 2>
            : each <= 4 ? launch<kType, kGroup, T, 4>
                        : launch<kType, kGroup, T, 8>)(p, target, multiprocessors);
}

template <typename T>
cudaError_t launch_format(const PackedLinearParams &p, const LaunchTarget &target, int multiprocessors) {
    const auto group = [&]<WeightType kType> {
        return (p.format.group_size == 32   ? launch_blocks<kType, 32, T>
                : p.format.group_size == 64 ? launch_blocks<kType, 64, T>
                                            : launch_blocks<kType, 128, T>)(p, target, multiprocessors);
    };
    switch (p.format.type) {
    case WeightType::kInt4: return group.template operator()<WeightType::kInt4>();
    case WeightType::kInt8: return group.template operator()<WeightType::kInt8>();
    case WeightType::kFloat8: return launch_blocks<WeightType::kFloat8, 128, T>(p, target, multiprocessors);
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
    int device;
    DeviceLimits limits;
    if (const cudaError_t error = device_limits(&device, &limits)) return error;
    const LaunchTarget target{stream, device, limits.compute_capability >= 90};
    if (params.dtype == DType::kFloat16) return launch_format<__half>(params, target, limits.multiprocessors);
    if (params.dtype == DType::kBFloat16) return launch_format<__nv_bfloat16>(params, target, limits.multiprocessors);
    return cudaErrorNotSupported;
}

} // namespace cats
