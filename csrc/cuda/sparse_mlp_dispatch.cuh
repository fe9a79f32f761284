// Picks the kernel instance and plans the launch for one shape, one token group and one row format.
// Included by one file per dtype, so that the instances compile in parallel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "sparse_mlp_batched.cuh"
#include "sparse_mlp_dispatch.h"
#include "sparse_mlp_generic.cuh"
#include "sparse_mlp_kernel.cuh"
#include "sparse_mlp_small.cuh"

namespace cats {

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Launches with shared memory beyond the default, which every kernel has to be allowed once a device, and so that it
// may overlap with the end of the previous kernel.
template <class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Arguments...), int ctas, int threads, int shared_bytes,
                          const DeviceLimits &device, cudaStream_t stream, const SparseMlpLaunchOptions &options,
                          const std::common_type_t<Arguments> &...arguments) {
    static std::mutex mutex;
    static std::map<std::pair<void (*)(Arguments...), int>, int> allowed;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        int &bytes = allowed[{kernel, device.index}];
        if (bytes < shared_bytes) {
            const cudaError_t error =
                cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
            if (error != cudaSuccess) return error;
            bytes = shared_bytes;
        }
    }
    cudaLaunchConfig_t config{};
    config.gridDim = ctas;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    if (options.programmatic_launch && device.compute_capability >= 90) config.attrs = &overlap, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// For deterministic results: the second kernel, which adds what the first has left in the CTAs' shares.
template <typename T, class Order>
cudaError_t sum_shares(const SparseMlpParams &params, const DeviceLimits &device, const Workspace &workspace, int ctas,
                       Order order, cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    if (!workspace.shares) return cudaSuccess;
    return launch_kernel(sum_shares_kernel<T, Order>, ceil_div(order.size(), kShareColumns),
                         kShareColumns * kShareGroups, 0, device, stream, options, workspace.shares, ctas,
                         static_cast<const T *>(params.down_bias), static_cast<T *>(params.y), order);
}

template <class Row, template <int, int> class PipeOf, int kTokens, int kTeams, int kTeamWarps, int kChunks, int kRows>
cudaError_t launch_instance(const SparseMlpParams &params, const DeviceLimits &device, const Workspace &workspace,
                            cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    using Pipe = PipeOf<kChunks, kRows>;
    constexpr int kWarps = kTeams * kTeamWarps;
    const int row_chunks = int(params.hidden_size) / Row::kPerChunk;
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
    // and the end of the launch gets longer: bench/results/h100/microbench_plan.csv. A step asks for its first rows
    // before the previous kernel has ended, and fills a third slot meanwhile, where there is room for it.
    plan.slots = options.slots ? std::min(options.slots, kMaxValues / kRows) : (params.y_sum ? 3 : 2);
    // The more is in L2 when the previous kernel ends, the less the start costs: 1 / 2 / 4 batches a team take 83.0 /
    // 82.2 / 81.4 us (same file), 6 / 8 / 10 / 12 take 80.3 / 80.3 / 80.4 / 81.8 at 50 % sparsity and 51.4 / 51.1
    // / 51.0 / 52.0 at 90 % (kernel_experiments.csv). What a team starts with is not drawn. A step has been tuned
    // with 6.
    plan.first_batches = options.first_batches ? options.first_batches : (params.y_sum ? 6 : 8);
    plan.first_batches = std::clamp(plan.first_batches, 1, 32 / kRows);
    if (params.y_sum && !options.slots && int(shared_bytes(plan)) > device.shared_bytes) plan.slots = 2;
    const int smem = int(shared_bytes(plan));
    if (smem > device.shared_bytes) return cudaErrorNotSupported;

    const auto launch = [&](auto step) {
        constexpr bool kStep = decltype(step)::value;
        return launch_kernel(sparse_mlp_kernel<Row, Pipe, kTokens, kTeams, kTeamWarps, kChunks, kRows, kStep>,
                             plan.ctas, kWarps * 32, smem, device, stream, options, args);
    };
    if constexpr (kTokens == 1)
        if (params.y_sum) return launch(std::true_type{});
    const cudaError_t error = launch(std::false_type{});
    if (error != cudaSuccess) return error;
    const OutputOrder<0> order{int(params.tokens), int(params.hidden_size)};
    return sum_shares<typename Row::Element>(params, device, workspace, plan.ctas, order, stream, options);
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
    constexpr bool kBigger = kTeamWarps == 1 || 2 * kChunks > kMaxChunks;
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

// One token and a layer of which every warp gets kRows neurons at most.
template <class Row, int kChunks, int kRows>
bool fits_small(const SparseMlpParams &params, const DeviceLimits &device) {
    return params.tokens == 1 && params.hidden_size / Row::kPerChunk <= kChunks * 32 &&
           params.intermediate_size <= device.multiprocessors * kSmallWarps * kRows;
}

// Else cudaErrorNotSupported. With more rows of more chunks the registers would not do for two CTAs a multiprocessor.
template <class Row, int kChunks, int kRows>
cudaError_t launch_small(const SparseMlpParams &params, const DeviceLimits &device, const Workspace &workspace,
                         cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    if (!fits_small<Row, kChunks, kRows>(params, device)) return cudaErrorNotSupported;
    const int ctas = int(std::min<int64_t>(device.multiprocessors, params.intermediate_size));
    const cudaError_t error = launch_kernel(sparse_mlp_small_kernel<Row, kChunks, kRows>, ctas, kSmallWarps * 32,
                                            int(kSmallWarps * params.hidden_size * sizeof(float)), device, stream,
                                            options, params, workspace);
    if (error != cudaSuccess) return error;
    const OutputOrder<0> order{1, int(params.hidden_size)};
    return sum_shares<typename Row::Element>(params, device, workspace, ctas, order, stream, options);
}

// 3 to 8 tokens of 16-bit weights whose y fits the workers' registers; else cudaErrorNotSupported.
template <typename T, bool kBulk, int kInside, int kGroups, int... kMoreGroups>
cudaError_t launch_batched(const SparseMlpParams &params, const DeviceLimits &device, const Workspace &workspace,
                           cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    if (params.hidden_size > kWorkerWarps * kGroups * kGroupColumns) {
        if constexpr (sizeof...(kMoreGroups) > 0)
            return launch_batched<T, kBulk, kInside, kMoreGroups...>(params, device, workspace, stream, options);
        return cudaErrorNotSupported;
    }
    BatchedArguments args{};
    args.mlp = params;
    args.workspace = workspace;
    BatchedPlan &plan = args.plan;
    plan.ctas = std::min(device.multiprocessors, ceil_div(params.intermediate_size, kBatchRows));
    plan.row_stride = int(params.hidden_size * sizeof(T)) + 16; // ldmatrix reads 8 rows at a time, from all banks so
    plan.first_batches = std::max(1, options.first_batches ? options.first_batches : 2);
    plan.slots = options.slots ? options.slots : 2;
    const auto shared_bytes = [&] { return int(Ring::bytes(plan)) + Scheduler<T, kBulk>::kBytes; };
    plan.slots = std::min(plan.slots, int(kMaxPending) / kBatchRows - 1);
    while (plan.slots > 2 && shared_bytes() > device.shared_bytes) plan.slots--;
    if (shared_bytes() > device.shared_bytes) return cudaErrorNotSupported;
    const cudaError_t error = launch_kernel(sparse_mlp_batched_kernel<T, kBulk, kGroups, kInside>, plan.ctas,
                                            (kWorkerWarps + 1) * 32, shared_bytes(), device, stream, options, args);
    if (error != cudaSuccess) return error;
    const OutputOrder<kInside> order{int(params.tokens), int(params.hidden_size)};
    return sum_shares<T>(params, device, workspace, plan.ctas, order, stream, options);
}

template <class Row>
cudaError_t launch_generic(const SparseMlpParams &params, const DeviceLimits &device, const Workspace &workspace,
                           cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    using T = typename Row::Element;
    const int ctas = workspace.shares ? max_ctas(params, device)
                                      : int(std::min<int64_t>(8 * device.multiprocessors, params.intermediate_size));
    sparse_mlp_generic_kernel<T><<<ctas, kGenericThreads, 0, stream>>>(params, workspace);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    const OutputOrder<0> order{int(params.tokens), int(params.hidden_size)};
    return sum_shares<T>(params, device, workspace, ctas, order, stream, options);
}

template <class Row>
cudaError_t launch_group(const SparseMlpParams &params, const DeviceLimits &device, SparseMlpKernel kernel,
                         const Workspace &workspace, cudaStream_t stream, const SparseMlpLaunchOptions &options) {
    using T = typename Row::Element;
    const bool bulk = kernel == SparseMlpKernel::kBulkCopy;
    const auto launch = [&](auto tokens) {
        constexpr int kTokens = decltype(tokens)::value;
        if (bulk) return launch_tokens<Row, BulkCopyPipe, kTokens>(params, device, workspace, stream, options);
        return launch_tokens<Row, AsyncCopyPipe, kTokens>(params, device, workspace, stream, options);
    };
    // The form for a step of decoding is the pipelined kernel's. Where another is faster, or the only one, there is
    // none.
    if (params.y_sum && (kernel == SparseMlpKernel::kGeneric || fits_small<Row, 3, 2>(params, device)))
        return cudaErrorNotSupported;
    if (kernel == SparseMlpKernel::kGeneric) return launch_generic<Row>(params, device, workspace, stream, options);
    cudaError_t error = launch_small<Row, 2, 2>(params, device, workspace, stream, options);
    if (error == cudaErrorNotSupported) error = launch_small<Row, 3, 2>(params, device, workspace, stream, options);
    if (error != cudaErrorNotSupported) return error;
    if (params.tokens == 1) return launch(std::integral_constant<int, 1>{});
    if (params.tokens == 2) return launch(std::integral_constant<int, 2>{});
    if constexpr (sizeof(T) == 2) {
        if (params.hidden_size % kGroupColumns) return cudaErrorNotSupported;
        const auto launch_inside = [&](auto inside) {
            constexpr int kInside = decltype(inside)::value;
            if (bulk) return launch_batched<T, true, kInside, 3, 6, 9, 12>(params, device, workspace, stream, options);
            return launch_batched<T, false, kInside, 3, 6, 9, 12>(params, device, workspace, stream, options);
        };
        if (params.tokens <= 4) return launch_inside(std::integral_constant<int, 4>{});
        return launch_inside(std::integral_constant<int, 8>{});
    }
    return cudaErrorNotSupported;
}

} // namespace cats
