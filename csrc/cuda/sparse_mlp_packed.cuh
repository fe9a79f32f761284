// The one-pass sparse gated MLP on packed rows, for 1, 2 or 4 tokens, from sm_90 on. A CTA has one warp that asks for
// rows, one that decides which neurons are kept and 2 that copy (scheduler.cuh), and 8 that compute on the tensor cores
// (packed_worker.cuh), each with its own columns.
//
// Rows of 4 bits arrive four times as fast as rows of bf16, so what decides is what a batch of 16 rows costs: about 1
// us each to arrive on an H200, 0.8 to compute, 0.65 to decide and 0.35 to ask for
// (bench/results/h200/packed_kernel.log); and the ends of a launch: the chain of first reads, decisions and last
// additions, some 9 us with nothing between (bench/results/h100/packed_plan.log). Programmatic dependent launch: as in
// sparse_mlp_kernel.cuh; rows are asked for before the previous kernel has ended, and copied after that.
#pragma once

#include "packed_worker.cuh"
#include "scheduler.cuh"

namespace cats {

// compute-sanitizer's racecheck does not follow what orders a copy after the workers' reads of its slot: they tell the
// Decider, it the Scheduler, and that the copier. Compiled for it, the Scheduler copies.
#ifdef CATS_FOR_RACECHECK
constexpr Copies kPackedCopies = Copies::kByScheduler;
#else
constexpr Copies kPackedCopies = Copies::kByCopiers;
#endif

template <WeightType kDotType, typename T, int kTokens, int kWorkers, int kBlocks>
__device__ __forceinline__ void sparse_mlp_packed_body(const RingArguments &args) {
    using Worker = PackedWorker<kDotType, T, kTokens, kWorkers, kBlocks>;
    using Batches = typename Worker::Batches;
    const SparseMlpParams &p = args.mlp;
    constexpr int kCopiers = kPackedCopies == Copies::kByCopiers ? kCopierWarps : 0;
    const bool step = p.y_sum;
    const int warp = threadIdx.x / 32;
    const OutputOrder<0> order{int(p.tokens), int(p.hidden_size)};
    extern __shared__ __align__(128) uint8_t smem[];
    const Ring<Batches> ring(smem, args.ring);
    launch_dependents();
    if (warp == kWorkers) ring.init(thresholds_differ(p) ? 32 : 0, kCopiers); // threads that copy
    __syncthreads();
    uint8_t *pending = smem + ring_bytes(args.ring.slots, ring.rows() * args.ring.row_stride, Batches::kSizes);
    if (warp > kWorkers + 1) {
        const int copier = warp - kWorkers - 2;
        if (copier == 0) prefetch_first_batches<PackedRow>(args, ring.rows(), uint32_t(p.gate_bytes));
        if (!step) wait_for_previous_kernel();
        if constexpr (kCopiers > 0) Copier<Batches, PackedRow>(args, ring, copier, kCopiers).run();
    } else if (warp == kWorkers) {
        Scheduler<Batches, PackedRow, T, kPackedCopies, true> scheduler(args, ring, pending);
        scheduler.ask_before_wait();
        wait_for_previous_kernel();
        scheduler.run();
    } else if (warp == kWorkers + 1) {
        Decider<Batches, T> decider(p, ring, pending);
        wait_for_previous_kernel();
        decider.run();
        if (p.counts) decider.add_counts();
    } else {
        Worker worker(p, ring, warp);
        if (step) {
            if constexpr (kTokens == 1) {
                float norm[32];
                worker.load_norm(norm);
                wait_for_previous_kernel();
                worker.load_normalised_x(norm);
            }
        } else {
            worker.load_x([] { wait_for_previous_kernel(); });
        }
        worker.run();
        worker.add_to_output([&](int column, int token, auto v) {
            add_to_output(args.workspace, order.size(), token * int(p.hidden_size) + column, v);
        });
    }
    if (!step) finish_output(args.workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

template <WeightType kDotType, typename T, int kTokens, int kWorkers, int kBlocks>
__global__ void __launch_bounds__((kWorkers + kDecidingWarps + kCopierWarps) * 32, 1)
    sparse_mlp_packed_kernel(const __grid_constant__ RingArguments args) {
#ifdef __CUDA_ARCH__
    if constexpr (__CUDA_ARCH__ >= 900) sparse_mlp_packed_body<kDotType, T, kTokens, kWorkers, kBlocks>(args);
    else __trap();
#endif
}

} // namespace cats
