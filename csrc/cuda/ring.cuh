// What the warps of the kernels with a scheduler share: a ring of batches of weight rows in shared memory. A batch is
// up to kRows rows of one kind. The scheduler warp asks for batches, the worker warps compute with them and free their
// slots, all in ring order. Each slot has four barriers:
//
//     asked[slot]    the batch's state is written; only where other warps copy the rows
//     full[slot]     the rows have arrived, and the state is complete
//     done[slot]     every worker warp has read the rows and written its partial dot products, every copier has read
//                    the state
//     decided[slot]  where a warp of its own decides: it has read the partial dot products and the state
#pragma once

#include "mbarrier.cuh"
#include "team.cuh"

namespace cats {

constexpr uint32_t kNoNeuron = 0xffffffff; // in the last rows of a batch that is not full
constexpr int kNoSlot = -1;

// A row on its way. The scheduler fills in more at every step.
template <int kTokens> struct RowState {
    uint32_t neuron;
    uint32_t tokens;       // up and down rows: bit m: token m keeps the neuron; 0: an absent row
    float values[kTokens]; // up rows: act(g); down rows: h
};

// The batches of one kernel. kMaxPending: neurons whose up row, or whose down row, is still to be asked for, a power of
// two.
template <int kRows_, int kTokens_, int kWorkers_, int kMaxPending_> struct Batches {
    static constexpr int kRows = kRows_, kTokens = kTokens_, kWorkers = kWorkers_, kMaxPending = kMaxPending_;
    static constexpr BatchSizes kSizes{kRows, kTokens, kWorkers, kMaxPending};

    struct alignas(16) State {
        RowState<kTokens> rows[kRows];
        float thresholds[kRows]; // if each neuron has its own: copied like the rows
        RowKind kind;
        int down_slot;   // up rows: the slot that has, or will have, the same neurons' down rows, or kNoSlot
        uint32_t queued; // neurons of the batch that a Decider of its own warp has queued
    };
    static_assert(sizeof(RowState<kTokens>) == kSizes.row_state_bytes() && sizeof(State) == kSizes.batch_state_bytes());
};

// After __syncwarp() one lane arrives for the warp. compute-sanitizer's racecheck takes only that lane's accesses as
// ordered. Compiled for it, every lane arrives.
#ifdef CATS_FOR_RACECHECK
constexpr int kArrivalsPerWarp = 32;
#else
constexpr int kArrivalsPerWarp = 1;
#endif

__device__ __forceinline__ void arrive_as_warp(uint64_t *barrier) {
    if (threadIdx.x % 32 < kArrivalsPerWarp) arrive(barrier);
}

// Arrivals at full[slot] of those who write the state: the scheduler twice, or once where the values come from a
// decision. A barrier with one arrival would be complete if that came before the scheduler has expected any bytes.
constexpr int kStateArrivals = 2;

template <class Batches_> class Ring {
  public:
    using Batches = Batches_;
    using BatchState = typename Batches::State;

    // Registers are scarce, so addresses are computed when they are needed.
    __device__ Ring(uint8_t *smem, const RingSizes &sizes) : smem_(smem), sizes_(sizes) {}

    // Called by one warp. copy_arrivals: of the threads that copy, at full[slot]. copiers: warps that read the state
    // beside the workers.
    __device__ void init(int copy_arrivals, int copiers = 0) const {
        for (int s = threadIdx.x % 32; s < sizes_.slots; s += 32) {
            init_barrier(asked(s), kArrivalsPerWarp);
            init_barrier(full(s), kStateArrivals * kArrivalsPerWarp + copy_arrivals);
            init_barrier(done(s), (Batches::kWorkers + copiers) * kArrivalsPerWarp);
            init_barrier(decided(s), kArrivalsPerWarp);
        }
        publish_barriers();
    }

    // Of a batch in shared memory.
    __device__ __forceinline__ int rows() const { return Batches::kRows == 8 ? 8 : sizes_.rows; }
    __device__ __forceinline__ uint8_t *row(int slot, int r) const {
        return smem_ + (slot * rows() + r) * sizes_.row_stride;
    }
    __device__ __forceinline__ float *partials(int slot, int warp) const {
        return reinterpret_cast<float *>(row(sizes_.slots, 0)) +
               (slot * Batches::kWorkers + warp) * (Batches::kRows * Batches::kTokens);
    }
    __device__ __forceinline__ BatchState &state(int slot) const {
        return reinterpret_cast<BatchState *>(partials(sizes_.slots, 0))[slot];
    }
    __device__ __forceinline__ uint64_t *asked(int slot) const {
        return reinterpret_cast<uint64_t *>(&state(sizes_.slots)) + 4 * slot;
    }
    __device__ __forceinline__ uint64_t *full(int slot) const { return asked(slot) + 1; }
    __device__ __forceinline__ uint64_t *done(int slot) const { return asked(slot) + 2; }
    __device__ __forceinline__ uint64_t *decided(int slot) const { return asked(slot) + 3; }

    // A position in the ring and the parity of the slot's current phase.
    struct Cursor {
        int slot = 0;
        uint32_t parity = 0;
        __device__ __forceinline__ void advance(const Ring &ring) {
            if (++slot == ring.sizes_.slots) slot = 0, parity ^= 1;
        }
    };

  private:
    uint8_t *smem_;
    const RingSizes &sizes_;
};

// Whether each neuron has its own threshold, which is copied like the rows.
__device__ __forceinline__ bool thresholds_differ(const SparseMlpParams &p) {
    return p.threshold_stride || p.down_threshold_stride;
}

template <class BatchState>
__device__ __forceinline__ void copy_threshold(const SparseMlpParams &p, BatchState &state, int r) {
    const uint32_t j = state.rows[r].neuron;
    if (j == kNoNeuron) return;
    if (state.kind == RowKind::kGate && p.threshold_stride)
        copy_async<4>(&state.thresholds[r], p.threshold + j * p.threshold_stride);
    if (state.kind == RowKind::kUp && p.down_threshold_stride)
        copy_async<4>(&state.thresholds[r], p.down_threshold + j * p.down_threshold_stride);
}

} // namespace cats
