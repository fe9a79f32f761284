// From a Choice to the kernel instance that it names. Which instances exist is said once, in plan.h. Included by one
// file for each row format and dtype, so that the instances compile in parallel.
#pragma once

#include <iterator>
#include <utility>

#include "sparse_mlp_batched.cuh"
#include "sparse_mlp_dispatch.h"
#include "sparse_mlp_generic.cuh"
#include "sparse_mlp_kernel.cuh"
#include "sparse_mlp_packed.cuh"
#include "sparse_mlp_small.cuh"

namespace cats {

inline LaunchSize launch_size(const Choice &choice) {
    return {dim3(unsigned(choice.ctas)), unsigned(choice.threads), choice.shared_bytes};
}

// Calls launch(std::integral_constant<int, i>) for the i below kCount at which `found` is true.
template <int kCount, int i = 0, class Found, class Launch>
cudaError_t launch_where(const Found &found, const Launch &launch) {
    if constexpr (i < kCount) {
        if (found(i)) return launch(std::integral_constant<int, i>{});
        return launch_where<kCount, i + 1>(found, launch);
    }
    return cudaErrorNotSupported;
}

template <class Row, typename T, template <class, int, int> class Pipe, int kTokens>
cudaError_t launch_pipelined(const Choice &choice, const RingArguments &args, const LaunchTarget &target) {
    constexpr TeamShapes shapes = team_shapes(kTokens, Row::kPerChunk);
    const auto found = [&](int i) {
        const TeamShape &a = choice.team, &b = shapes.list[i];
        return a.teams == b.teams && a.team_warps == b.team_warps && a.chunks == b.chunks;
    };
    return launch_where<shapes.count>(found, [&](auto index) {
        constexpr TeamShape shape = team_shapes(kTokens, Row::kPerChunk).list[decltype(index)::value];
        const auto launch = [&](auto rows, auto form) {
            constexpr int kRows = decltype(rows)::value;
            return launch_kernel<sparse_mlp_kernel<Row, T, Pipe<Row, shape.chunks, kRows>, kTokens, shape.teams,
                                                   shape.team_warps, shape.chunks, kRows, decltype(form)::value>>(
                launch_size(choice), target, args);
        };
        const auto launch_form = [&](auto rows) {
            if constexpr (has_exact_instance(layout_of<Row>())) {
                if (args.mlp.gates) return launch(rows, std::integral_constant<Form, Form::kGates>{});
                if (args.mlp.exact) return launch(rows, std::integral_constant<Form, Form::kExact>{});
            }
            if constexpr (kTokens == 1) {
                if (args.mlp.kept.neurons && args.mlp.y_sum)
                    return launch(rows, std::integral_constant<Form, Form::kKeptStep>{});
                if (args.mlp.kept.neurons) return launch(rows, std::integral_constant<Form, Form::kKept>{});
                if (args.mlp.y_sum) return launch(rows, std::integral_constant<Form, Form::kStep>{});
            }
            return launch(rows, std::integral_constant<Form, Form::kOrdinary>{});
        };
        constexpr int kMostRows = rows_per_batch(kTokens, shape.chunks, true);
        constexpr int kFewRows = rows_per_batch(kTokens, shape.chunks, false);
        if (choice.rows_per_batch == kMostRows) return launch_form(std::integral_constant<int, kMostRows>{});
        return launch_form(std::integral_constant<int, kFewRows>{});
    });
}

template <class Row, typename T>
cudaError_t launch_small(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                         const LaunchTarget &target) {
    return launch_where<4>([&](int chunks) { return chunks == choice.team.chunks; },
                           [&](auto chunks) {
                               constexpr int kChunks = decltype(chunks)::value;
                               if constexpr (has_small_instance(kChunks, Row::kPerChunk))
                                   return launch_kernel<sparse_mlp_small_kernel<Row, T, kChunks, kSmallRows>>(
                                       launch_size(choice), target, params, workspace);
                               return cudaErrorNotSupported;
                           });
}

template <class Row, typename T, bool kBulk, int kTokenPadding>
cudaError_t launch_batched(const Choice &choice, const RingArguments &args, const LaunchTarget &target) {
    return launch_where<int(std::size(kColumnGroups))>(
        [&](int i) { return kColumnGroups[i] == choice.column_groups; },
        [&](auto index) {
            constexpr int kGroups = kColumnGroups[decltype(index)::value];
            constexpr int kMostColumns = kDenseBatches.workers * kGroups * kGroupColumns;
            if constexpr (kTokenPadding > 2 || kMostColumns >= kTwoTokenColumns)
                return launch_kernel<sparse_mlp_batched_kernel<Row, T, kBulk, kGroups, kTokenPadding>>(
                    launch_size(choice), target, args);
            return cudaErrorNotSupported;
        });
}

// For deterministic results: the second kernel, which adds the CTAs' parts.
template <typename T, int kTokenPadding>
cudaError_t add_partial_sums(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                             const LaunchTarget &target) {
    using Order = OutputOrder<kTokenPadding>;
    const Order order{int(params.tokens), int(params.hidden_size)};
    const LaunchSize size{dim3(unsigned(ceil_div(order.size(), kPartialSumColumns))),
                          kPartialSumColumns * kPartialSumGroups};
    return launch_kernel<add_partial_sums_kernel<T, Order>>(
        size, target, static_cast<const float *>(workspace.partial_sums), choice.ctas,
        static_cast<const T *>(params.down_bias), static_cast<T *>(params.y), order);
}

template <class Row, typename T>
cudaError_t launch_generic(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                           LaunchTarget target) {
    target.overlap = false; // the kernels do not wait for the previous one
    const cudaError_t error =
        launch_kernel<sparse_mlp_generic_kernel<Row, T>>(launch_size(choice), target, params, workspace);
    if (error != cudaSuccess || !params.gates) return error;
    const LaunchSize size{dim3(unsigned(workspace.gate_places), unsigned(params.tokens)), kGenericThreads};
    return launch_kernel<sum_gates_kernel<T>>(size, target, params, workspace);
}

template <class Row, typename T>
cudaError_t launch_choice(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                          const LaunchTarget &target) {
    const RingArguments args{params, choice.ring, workspace};
    const bool bulk = choice.bulk_copy;
    cudaError_t error = cudaErrorNotSupported;
    switch (choice.kernel) {
    case Kernel::kNone: break;
    case Kernel::kPipelined:
        if (choice.tokens == 1)
            error = bulk ? launch_pipelined<Row, T, BulkCopyPipe, 1>(choice, args, target)
                         : launch_pipelined<Row, T, AsyncCopyPipe, 1>(choice, args, target);
        else
            error = bulk ? launch_pipelined<Row, T, BulkCopyPipe, 2>(choice, args, target)
                         : launch_pipelined<Row, T, AsyncCopyPipe, 2>(choice, args, target);
        break;
    case Kernel::kSmall: error = launch_small<Row, T>(choice, params, workspace, target); break;
    case Kernel::kBatched:
        if constexpr (layout_of<Row>().mma_operand) {
            if (choice.token_padding == 2) error = launch_batched<Row, T, true, 2>(choice, args, target);
            else if (choice.token_padding == 4)
                error = bulk ? launch_batched<Row, T, true, 4>(choice, args, target)
                             : launch_batched<Row, T, false, 4>(choice, args, target);
            else
                error = bulk ? launch_batched<Row, T, true, 8>(choice, args, target)
                             : launch_batched<Row, T, false, 8>(choice, args, target);
        }
        break;
    case Kernel::kGeneric: error = launch_generic<Row, T>(choice, params, workspace, target); break;
    case Kernel::kPacked: break;
    }
    if (error != cudaSuccess || !workspace.partial_sums) return error;
    if constexpr (layout_of<Row>().mma_operand) {
        if (choice.token_padding == 2) return add_partial_sums<T, 2>(choice, params, workspace, target);
        if (choice.token_padding == 4) return add_partial_sums<T, 4>(choice, params, workspace, target);
        if (choice.token_padding == 8) return add_partial_sums<T, 8>(choice, params, workspace, target);
    }
    return add_partial_sums<T, 0>(choice, params, workspace, target);
}

template <WeightType kDotType, typename T>
cudaError_t launch_packed(const Choice &choice, const SparseMlpParams &params, const Workspace &workspace,
                          const LaunchTarget &target) {
    cudaError_t error = cudaErrorNotSupported;
    if constexpr (kDotType == WeightType::kDense) {
        if (choice.kernel == Kernel::kGeneric) error = launch_generic<PackedRow, T>(choice, params, workspace, target);
    } else if (choice.kernel == Kernel::kPacked) {
        const RingArguments args{params, choice.ring, workspace};
        const auto found = [&](int i) {
            const PackedInstance &instance = kPackedInstances[i];
            return instance.tokens == (choice.tokens == 3 ? 4 : choice.tokens) &&
                   instance.blocks == choice.column_groups;
        };
        error = launch_where<int(std::size(kPackedInstances))>(found, [&](auto index) {
            constexpr PackedInstance kInstance = kPackedInstances[decltype(index)::value];
            return launch_kernel<
                sparse_mlp_packed_kernel<kDotType, T, kInstance.tokens, kInstance.workers, kInstance.blocks>>(
                launch_size(choice), target, args);
        });
    }
    if (error != cudaSuccess || !workspace.partial_sums) return error;
    return add_partial_sums<T, 0>(choice, params, workspace, target);
}

} // namespace cats
