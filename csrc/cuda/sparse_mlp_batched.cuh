// The one-pass sparse gated MLP for 2 to 8 tokens. On the CUDA cores the arithmetic of 4 tokens takes longer than the
// rows take to arrive, so it is done on the tensor cores, in batches of 8 rows. y of 8 tokens fills half the registers
// of a multiprocessor at H 4096. So a CTA has one team of worker warps (mma_worker.cuh), each with its own columns, and
// one warp that decides for all of them (scheduler.cuh). Workers wait for rows, and at the end for the last decision.
//
// A row is read once, if any token keeps its neuron. Its stored bytes are the tensor cores' operand as they are, so
// only row formats with an MmaOperand have this kernel. Programmatic dependent launch: as in sparse_mlp_kernel.cuh.
#pragma once

#include "mma_worker.cuh"
#include "scheduler.cuh"

namespace cats {

template <class Row, typename T, bool kBulk, int kGroups, int kTokenPadding>
__device__ __forceinline__ void sparse_mlp_batched_body(const RingArguments &args) {
    const SparseMlpParams &p = args.mlp;
    const int warp = threadIdx.x / 32;
    const OutputOrder<kTokenPadding> order{int(p.tokens), int(p.hidden_size)};
    extern __shared__ __align__(128) uint8_t smem[];
    const Ring<DenseBatches> ring(smem, args.ring);
    constexpr BatchSizes kSizes = DenseBatches::kSizes;
    Scheduler<DenseBatches, Row, T, kBulk ? Copies::kByScheduler : Copies::kByWorkers, false> scheduler(
        args, ring, smem + ring_bytes(args.ring.slots, kSizes.rows * args.ring.row_stride, kSizes));
    const bool schedules = warp == kSizes.workers;
    launch_dependents();
    if (schedules) {
        prefetch_first_batches<Row>(args, kSizes.rows, uint32_t(p.hidden_size * sizeof(T)));
        ring.init(kBulk ? (thresholds_differ(p) ? 32 : 0) : kSizes.workers * 32); // threads that copy
    }
    __syncthreads();
    wait_for_previous_kernel();
    if (schedules) {
        if constexpr (kBulk)
            asm volatile("bar.sync 1, %0;" ::"n"((kSizes.workers + 1) * 32) : "memory"); // see wait_for_x
        scheduler.run();
    } else {
        MmaWorker<Row, T, kBulk, kGroups> worker(p, ring, warp);
        worker.run();
        worker.add_to_output([&](int column, int token, float2 v) {
            add_to_output(args.workspace, order.size(), column * kTokenPadding + token, v);
        });
    }
    finish_output(args.workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

// Every architecture gets the code of the instances that plan() picks on it; the others would trap. kBulk: for sm_90.
// kTokenPadding: 2, 4 or 8 tokens in y_sum.
template <class Row, typename T, bool kBulk, int kGroups, int kTokenPadding>
__global__ void __launch_bounds__((kDenseBatches.workers + 1) * 32, 1)
    sparse_mlp_batched_kernel(const __grid_constant__ RingArguments args) {
#ifdef __CUDA_ARCH__
    if constexpr (__CUDA_ARCH__ >= (kBulk ? 900 : 800) && has_batched_instance(kGroups, __CUDA_ARCH__))
        sparse_mlp_batched_body<Row, T, kBulk, kGroups, kTokenPadding>(args);
    else __trap();
#endif
}

} // namespace cats
