// What the warps of sparse_mlp_batched.cuh share: a ring of batches of weight rows in shared memory. A batch is up to 8
// rows of one kind. The scheduler warp asks for batches, the worker warps compute with them and free their slots, all
// in ring order:
//
//     asked[slot]  the batch's state is written; for the workers before sm_90, who copy the rows themselves
//     full[slot]   the rows have arrived, and the state is complete
//     done[slot]   every worker warp has read the rows and written its partial dot products
#pragma once

#include "../sparse_mlp.h"
#include "finish.cuh"
#include "mbarrier.cuh"

namespace cats {

// As of the tensor cores' instructions: tokens padded to 8, batches of 8 rows, 32 columns at a time.
constexpr int kBatchTokens = 8, kBatchRows = 8, kBatchDots = kBatchTokens * kBatchRows, kGroupColumns = 32;
constexpr int kWorkerWarps = 11; // with the scheduler 12, which leaves 168 registers a thread

struct BatchedPlan {
    int ctas;
    int slots;         // batches in the ring
    int row_stride;    // bytes between the rows of a batch in shared memory
    int first_batches; // gate batches that a CTA starts with: brought into L2 before the previous kernel ends
};

struct BatchedArguments {
    SparseMlpParams mlp;
    BatchedPlan plan;
    Workspace workspace;
};

enum class BatchKind : uint32_t { kGate, kUp, kDown, kEnd };
constexpr uint32_t kNoNeuron = 0xffffffff; // in the last rows of a batch that is not full
constexpr int kNoSlot = -1;

// A row on its way, of which more is known with every step.
struct RowState {
    uint32_t neuron;
    uint32_t tokens;            // of up and down rows: bit m: token m keeps the neuron; 0: an absent row
    float values[kBatchTokens]; // of up rows act(g), of down rows h
};

struct alignas(16) BatchState {
    RowState rows[kBatchRows];
    float thresholds[kBatchRows]; // where there is one a neuron: copied like the rows
    BatchKind kind;
    int down_slot; // of up rows: the slot that has the same neurons' down rows already, or kNoSlot
};

// A warp arrives after __syncwarp(), one lane for all. compute-sanitizer's racecheck takes that lane's accesses alone
// as ordered; compiled for it, every lane arrives.
#ifdef CATS_FOR_RACECHECK
constexpr int kArrivalsPerWarp = 32;
#else
constexpr int kArrivalsPerWarp = 1;
#endif

__device__ __forceinline__ void arrive_as_warp(uint64_t *barrier) {
    if (threadIdx.x % 32 < kArrivalsPerWarp) arrive(barrier);
}

class Ring {
  public:
    static __host__ __device__ uint32_t bytes(const BatchedPlan &plan) {
        return plan.slots * (kBatchRows * plan.row_stride + kWorkerWarps * kBatchDots * sizeof(float) +
                             sizeof(BatchState) + 3 * sizeof(uint64_t));
    }

    // Registers are scarce: addresses are put together when they are needed.
    __device__ Ring(uint8_t *smem, const BatchedPlan &plan) : smem_(smem), plan_(plan) {}

    __device__ void init(int copy_arrivals) const { // by one warp; copy_arrivals: of the workers, at full[slot]
        for (int s = threadIdx.x % 32; s < plan_.slots; s += 32) {
            init_barrier(asked(s), kArrivalsPerWarp);
            init_barrier(full(s), kArrivalsPerWarp + copy_arrivals);
            init_barrier(done(s), kWorkerWarps * kArrivalsPerWarp);
        }
        publish_barriers();
    }

    __device__ __forceinline__ uint8_t *row(int slot, int r) const {
        return smem_ + (slot * kBatchRows + r) * plan_.row_stride;
    }
    __device__ __forceinline__ float *partials(int slot, int warp) const {
        return reinterpret_cast<float *>(row(plan_.slots, 0)) + (slot * kWorkerWarps + warp) * kBatchDots;
    }
    __device__ __forceinline__ BatchState &state(int slot) const {
        return reinterpret_cast<BatchState *>(partials(plan_.slots, 0))[slot];
    }
    __device__ __forceinline__ uint64_t *asked(int slot) const {
        return reinterpret_cast<uint64_t *>(&state(plan_.slots)) + 3 * slot;
    }
    __device__ __forceinline__ uint64_t *full(int slot) const { return asked(slot) + 1; }
    __device__ __forceinline__ uint64_t *done(int slot) const { return asked(slot) + 2; }

    // A position in the ring and the parity of the slot's current phase.
    struct Cursor {
        int slot = 0;
        uint32_t parity = 0;
        __device__ __forceinline__ void advance(const Ring &ring) {
            if (++slot == ring.plan_.slots) slot = 0, parity ^= 1;
        }
    };

  private:
    uint8_t *smem_;
    const BatchedPlan &plan_;
};

template <class T>
__device__ __forceinline__ const uint8_t *row_address(const SparseMlpParams &p, BatchKind kind, uint32_t j) {
    const bool gate = kind == BatchKind::kGate, up = kind == BatchKind::kUp;
    const void *base = gate ? p.w_gate : (up ? p.w_up : p.w_down_t);
    const int64_t stride = gate ? p.w_gate_stride : (up ? p.w_up_stride : p.w_down_t_stride);
    return static_cast<const uint8_t *>(base) + uint64_t(j) * uint32_t(stride * int64_t(sizeof(T))); // launcher checks
}

// Whether there is a threshold for each neuron, copied like the rows.
__device__ __forceinline__ bool thresholds_differ(const SparseMlpParams &p) {
    return p.threshold_stride || p.down_threshold_stride;
}

__device__ __forceinline__ void copy_threshold(const SparseMlpParams &p, BatchState &state, int r) {
    const uint32_t j = state.rows[r].neuron;
    if (j == kNoNeuron) return;
    if (state.kind == BatchKind::kGate && p.threshold_stride) copy_async<4>(&state.thresholds[r], p.threshold + j);
    if (state.kind == BatchKind::kUp && p.down_threshold_stride)
        copy_async<4>(&state.thresholds[r], p.down_threshold + j);
}

} // namespace cats
