// Picks the kernel instance and plans the launch for one shape, one token group and one row format.
// Included by one file per dtype, so that the instances compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "sparse_mlp_generic.cuh"
#include "sparse_mlp_kernel.cuh"
#include "sparse_mlp_launch.h"

namespace cats {

struct DeviceLimits {
    int compute_capability; // 90 for 9.0
    int multiprocessors;
    int shared_bytes; // per CTA, after opting in
};

template <class Row, template <int> class PipeOf, int kTokens, int kTeams, int kTeamWarps, int kChunks>
cudaError_t launch_instance(const SparseMlpParams &params, const DeviceLimits &device, void *workspace,
                            cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    using Pipe = PipeOf<kChunks>;
    constexpr int kWarps = kTeams * kTeamWarps;
    const int row_chunks = int(params.hidden_size) / Row::kPerChunk;
    const auto ceil_div = [](int64_t a, int64_t b) { return int((a + b - 1) / b); };
    const auto shared_bytes = [&](const SparseMlpPlan &plan) {
        return SharedLayout(plan, kWarps, kTeams, kTokens, Pipe::kBarrierBytes, kChunks * Row::kPerChunk).total;
    };

    KernelArguments args{};
    args.mlp = params;
    args.y_sum = static_cast<float *>(workspace);
    args.done_ctas = reinterpret_cast<unsigned *>(args.y_sum + kMaxTokensPerLaunch * params.hidden_size);
    SparseMlpPlan &plan = args.plan;
    // One CTA a multiprocessor: the ring needs all of its shared memory. Fewer where there are fewer neurons than teams.
    plan.ctas = std::min(device.multiprocessors, ceil_div(params.intermediate_size, kTeams));
    plan.neurons_per_team = ceil_div(params.intermediate_size, plan.ctas * kTeams);
    // Equal segments, whole 128-byte lines.
    plan.segment_chunks = ceil_div(ceil_div(row_chunks, kTeamWarps), 8) * 8;
    plan.slots = options.slots ? std::min(options.slots, kMaxSlots) : kMaxSlots;
    while (plan.slots > 2 && int(shared_bytes(plan)) > device.shared_bytes) plan.slots--;
    plan.prefetch_rows = options.prefetch_rows >= 0 ? options.prefetch_rows : plan.slots;
    const int smem = int(shared_bytes(plan));
    if (smem > device.shared_bytes) return cudaErrorInvalidConfiguration;

    auto *kernel = sparse_mlp_kernel<Row, Pipe, kTokens, kTeams, kTeamWarps, kChunks>;
    if (smem > 48 * 1024) {
        const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
        if (error != cudaSuccess) return error;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = plan.ctas;
    config.blockDim = kWarps * 32;
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    if (options.programmatic_launch && device.compute_capability >= 90) config.attrs = &overlap, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, args);
}

// 16 warps while x and the accumulators of a thread (fp32 each) leave room in 128 registers, else 8 warps with 255.
constexpr int warps_for(int values_per_thread) { return 2 * values_per_thread <= 64 ? 16 : 8; }
constexpr bool fits_registers(int values_per_thread) { return 2 * values_per_thread <= 192; }

// The first instance whose team covers the row, or cudaErrorNotSupported.
template <class Row, template <int> class Pipe, int kTokens, int kTeamWarps, int kChunks, int... kMoreChunks>
cudaError_t launch_first_fit(const SparseMlpParams &params, const DeviceLimits &device, void *workspace,
                             cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    constexpr int kValues = kTokens * kChunks * Row::kPerChunk;
    if constexpr (fits_registers(kValues)) {
        if (params.hidden_size / Row::kPerChunk <= kTeamWarps * kChunks * 32)
            return launch_instance<Row, Pipe, kTokens, warps_for(kValues) / kTeamWarps, kTeamWarps, kChunks>(
                params, device, workspace, stream, options);
        if constexpr (sizeof...(kMoreChunks) > 0)
            return launch_first_fit<Row, Pipe, kTokens, kTeamWarps, kMoreChunks...>(params, device, workspace, stream,
                                                                                    options);
    }
    return cudaErrorNotSupported;
}

template <class Row, template <int> class Pipe, int kTokens>
cudaError_t launch_tokens(const SparseMlpParams &params, const DeviceLimits &device, void *workspace,
                          cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    // Short rows go to teams of 4 warps: 8 would leave most lanes without a chunk, and a row arrives every few hundred
    // cycles, so more teams have to work at once.
    const cudaError_t error = launch_first_fit<Row, Pipe, kTokens, 4, 1>(params, device, workspace, stream, options);
    if (error != cudaErrorNotSupported) return error;
    return launch_first_fit<Row, Pipe, kTokens, 8, 1, 2, 3, 4, 6, 8, 12, 16>(params, device, workspace, stream, options);
}

template <class Row>
cudaError_t launch_generic(const SparseMlpParams &params, const DeviceLimits &device, void *workspace,
                           cudaStream_t stream) {
    float *y_sum = static_cast<float *>(workspace);
    auto *done_ctas = reinterpret_cast<unsigned *>(y_sum + kMaxTokensPerLaunch * params.hidden_size);
    const int ctas = int(std::min<int64_t>(8 * device.multiprocessors, params.intermediate_size));
    sparse_mlp_generic_kernel<typename Row::Element><<<ctas, kGenericThreads, 0, stream>>>(params, y_sum, done_ctas);
    return cudaGetLastError();
}

// One launch for a group of up to kMaxTokensPerLaunch tokens. cudaErrorNotSupported: the row is too long for so many.
template <class Row>
cudaError_t launch_group(const SparseMlpParams &params, const DeviceLimits &device, SparseMlpKernel kernel,
                         void *workspace, cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    const auto launch = [&](auto tokens) {
        constexpr int kTokens = decltype(tokens)::value;
        if (kernel == SparseMlpKernel::kBulkCopy)
            return launch_tokens<Row, BulkCopyPipe, kTokens>(params, device, workspace, stream, options);
        return launch_tokens<Row, AsyncCopyPipe, kTokens>(params, device, workspace, stream, options);
    };
    if (kernel == SparseMlpKernel::kGeneric) return launch_generic<Row>(params, device, workspace, stream);
    if (params.tokens == 1) return launch(std::integral_constant<int, 1>{});
    if (params.tokens == 2) return launch(std::integral_constant<int, 2>{});
    static_assert(kMaxTokensPerLaunch == 4);
    return launch(std::integral_constant<int, 4>{});
}

extern template cudaError_t launch_group<DenseRow<float>>(const SparseMlpParams &, const DeviceLimits &, SparseMlpKernel,
                                                          void *, cudaStream_t, const SparseMlpLaunchOptions &);
extern template cudaError_t launch_group<DenseRow<__half>>(const SparseMlpParams &, const DeviceLimits &,
                                                           SparseMlpKernel, void *, cudaStream_t,
                                                           const SparseMlpLaunchOptions &);
extern template cudaError_t launch_group<DenseRow<__nv_bfloat16>>(const SparseMlpParams &, const DeviceLimits &,
                                                                  SparseMlpKernel, void *, cudaStream_t,
                                                                  const SparseMlpLaunchOptions &);

} // namespace cats
