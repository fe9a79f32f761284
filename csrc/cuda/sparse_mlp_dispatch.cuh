// Picks the kernel instance and plans the launch for one shape, one token group and one row format.
// Included by one file per dtype, so that the instances compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "sparse_mlp_dispatch.h"
#include "sparse_mlp_generic.cuh"
#include "sparse_mlp_kernel.cuh"

namespace cats {

template <class Row, template <int, int> class PipeOf, int kTokens, int kTeams, int kTeamWarps, int kChunks, int kRows>
cudaError_t launch_instance(const SparseMlpParams &params, const DeviceLimits &device, const Workspace &workspace,
                            cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    using Pipe = PipeOf<kChunks, kRows>;
    constexpr int kWarps = kTeams * kTeamWarps;
    const int row_chunks = int(params.hidden_size) / Row::kPerChunk;
    const auto ceil_div = [](int64_t a, int64_t b) { return int((a + b - 1) / b); };
    const auto shared_bytes = [&](const SparseMlpPlan &plan) {
        return SharedLayout(plan, params.hidden_size, kWarps, kTeams, kRows, Pipe::kBarrierBytes,
                            sizeof(WarpState<kTokens, kRows>), sizeof(TeamState<kRows * kTokens, kTeamWarps>))
            .total;
    };

    KernelArguments args{};
    args.mlp = params;
    args.workspace = workspace;
    SparseMlpPlan &plan = args.plan;
    // One CTA a multiprocessor, for the shared memory. Fewer where there are fewer neurons than teams.
    plan.ctas = std::min(device.multiprocessors, ceil_div(params.intermediate_size, kTeams));
    // Equal segments, whole 128-byte lines.
    plan.segment_chunks = ceil_div(ceil_div(row_chunks, kTeamWarps), 8) * 8;
    // Two slots of up to 64 KiB a CTA keep enough on its way. With more, up and down rows queue behind more gate rows
    // and the end of the launch gets longer: bench/results/h100/microbench_plan.csv.
    plan.slots = options.slots ? std::min(options.slots, kMaxValues / kRows) : 2;
    // The more is in L2 when the previous kernel ends, the less the start costs: 1 / 2 / 4 / 6 / 8 batches a team take
    // 83.0 / 82.2 / 81.4 / 81.0 / 81.1 us (same file). What a team starts with is not drawn, so no more than a few.
    plan.first_batches = std::clamp(options.first_batches ? options.first_batches : 6, 1, 32 / kRows);
    const int smem = int(shared_bytes(plan));
    if (smem > device.shared_bytes) return cudaErrorNotSupported;

    auto *kernel = sparse_mlp_kernel<Row, Pipe, kTokens, kTeams, kTeamWarps, kChunks, kRows>;
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

// The first instance whose team covers the row; cudaErrorNotSupported if the row is too long. x and the accumulators of
// a thread are kTokens * kChunks * kPerChunk fp32 registers each: up to 32 fit the 128 registers of 16 warps (16 of
// fp32 rows, whose chunks hold half as many and need as many addresses), up to 64 the 255 of 8.
//
// A team is as small as its registers allow. What its warps all repeat (waiting, reducing, deciding, asking for the
// next rows) is about 190 instructions a batch and warp: at H 4096, teams of 8 warps and one row a batch issued for 500
// of the 600 cycles that a row takes to arrive.
template <class Row, template <int, int> class Pipe, int kTokens, int kWarps, int kTeamWarps, int kChunks,
          int... kMoreChunks>
cudaError_t launch_first_fit(const SparseMlpParams &params, const DeviceLimits &device, const Workspace &workspace,
                             cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    constexpr int kMaxChunks = kWarps == 16 ? 4 / kTokens : 64 / (kTokens * Row::kPerChunk);
    // Half as many chunks belong to a team of half the warps; more registers only where 16 warps do not do.
    constexpr bool kBigger = kWarps == 16 ? kTeamWarps == 1 || 2 * kChunks > kMaxChunks : 2 * kChunks > kMaxChunks;
    if constexpr (kChunks <= kMaxChunks && kBigger)
        if (params.hidden_size / Row::kPerChunk <= kTeamWarps * kChunks * 32)
            return device.large_shared_memory
                       ? launch_instance<Row, Pipe, kTokens, kWarps / kTeamWarps, kTeamWarps, kChunks,
                                         rows_per_batch(kTokens, kChunks, true)>(params, device, workspace, stream,
                                                                                 options)
                       : launch_instance<Row, Pipe, kTokens, kWarps / kTeamWarps, kTeamWarps, kChunks,
                                         rows_per_batch(kTokens, kChunks, false)>(params, device, workspace, stream,
                                                                                  options);
    if constexpr (sizeof...(kMoreChunks) > 0)
        return launch_first_fit<Row, Pipe, kTokens, kWarps, kTeamWarps, kMoreChunks...>(params, device, workspace,
                                                                                        stream, options);
    return cudaErrorNotSupported;
}

template <class Row, template <int, int> class Pipe, int kTokens>
cudaError_t launch_tokens(const SparseMlpParams &params, const DeviceLimits &device, const Workspace &workspace,
                          cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    cudaError_t error = cudaErrorNotSupported;
    const auto attempt = [&](auto warps, auto team_warps) {
        if (error == cudaErrorNotSupported)
            error = launch_first_fit<Row, Pipe, kTokens, decltype(warps)::value, decltype(team_warps)::value, 1, 2, 3,
                                     4, 6, 8, 12, 16>(params, device, workspace, stream, options);
    };
    attempt(std::integral_constant<int, 16>{}, std::integral_constant<int, 1>{});
    attempt(std::integral_constant<int, 16>{}, std::integral_constant<int, 2>{});
    attempt(std::integral_constant<int, 16>{}, std::integral_constant<int, 4>{});
    attempt(std::integral_constant<int, 16>{}, std::integral_constant<int, 8>{});
    attempt(std::integral_constant<int, 8>{}, std::integral_constant<int, 8>{});
    return error;
}

template <class Row>
cudaError_t launch_generic(const SparseMlpParams &params, const DeviceLimits &device, const Workspace &workspace,
                           cudaStream_t stream) {
    const int ctas = int(std::min<int64_t>(8 * device.multiprocessors, params.intermediate_size));
    sparse_mlp_generic_kernel<typename Row::Element><<<ctas, kGenericThreads, 0, stream>>>(params, workspace);
    return cudaGetLastError();
}

template <class Row>
cudaError_t launch_group(const SparseMlpParams &params, const DeviceLimits &device, SparseMlpKernel kernel,
                         const Workspace &workspace, cudaStream_t stream, const SparseMlpLaunchOptions &options) {
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

} // namespace cats
