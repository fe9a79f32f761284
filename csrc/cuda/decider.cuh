// The Decider of the kernels with a scheduler (scheduler.cuh): it sums the worker warps' partial dot products of a
// batch, applies the activation and the thresholds, and queues the up and down rows of the neurons that some token
// keeps.
#pragma once

#include "activation.cuh"
#include "ring.cuh"

namespace cats {

// Which lane of the deciding warp has which values of a batch: lane l has row l / kRowLanes, and of its values kValues
// from first_token() on. With fewer tokens than that, kShared lanes have the same value.
template <class Batches> struct DecisionLanes {
    static constexpr int kTokens = Batches::kTokens, kRowLanes = 32 / Batches::kRows;
    static constexpr int kValues = kTokens > kRowLanes ? kTokens / kRowLanes : 1;
    static constexpr int kShared = kRowLanes / (kTokens < kRowLanes ? kTokens : kRowLanes);
    static_assert(kValues <= 2 && Batches::kWorkers % kShared == 0);

    static __device__ __forceinline__ int row() { return threadIdx.x % 32 / kRowLanes; }
    static __device__ __forceinline__ int first_token() {
        const int in_row = threadIdx.x % kRowLanes;
        return kShared == 1 ? in_row * kValues : in_row / kShared;
    }
    static __device__ __forceinline__ void copy_values(float *to, const float *from) {
        if constexpr (kValues == 2) *reinterpret_cast<float2 *>(to) = *reinterpret_cast<const float2 *>(from);
        else *to = *from;
    }
};

// The neurons whose up rows, or whose down rows, are still to be asked for: two queues of kMaxPending in shared memory.
template <class Batches> class PendingRows {
  public:
    using RowState = cats::RowState<Batches::kTokens>;
    __device__ explicit PendingRows(uint8_t *smem) : rows_(reinterpret_cast<RowState *>(smem)) {}
    __device__ __forceinline__ RowState *at(RowKind kind, uint32_t i) const {
        return rows_ + (kind == RowKind::kDown ? Batches::kMaxPending : 0) + i % uint32_t(Batches::kMaxPending);
    }

  private:
    RowState *rows_;
};

// Applies the activation and the thresholds to batches that the workers have computed.
template <class Batches, typename T> class Decider {
    static constexpr uint32_t kAll = 0xffffffffu;
    using Lanes = DecisionLanes<Batches>;
    using RowState = cats::RowState<Batches::kTokens>;
    static constexpr int kRowLanes = Lanes::kRowLanes, kValues = Lanes::kValues, kShared = Lanes::kShared;

  public:
    __device__ Decider(const SparseMlpParams &p, const Ring<Batches> &ring, uint8_t *pending)
        : p_(p), ring_(ring), pending_(pending) {}

    __device__ void load_thresholds() {
        threshold_ = *p_.threshold;
        if (p_.down_threshold) down_threshold_ = *p_.down_threshold; // otherwise 0: keeps all
    }

    // As a warp of its own: of all batches in ring order.
    __device__ void run() {
        load_thresholds();
        typename Ring<Batches>::Cursor at;
        while (true) {
            wait(ring_.done(at.slot), at.parity);
            auto &state = ring_.state(at.slot);
            const RowKind kind = state.kind;
            if (kind == RowKind::kEnd) break;
            const uint32_t queued = kind == RowKind::kDown ? 0 : decide(at.slot, kind);
            if (lane_ == 0) state.queued = queued;
            __syncwarp();
            arrive_as_warp(ring_.decided(at.slot));
            at.advance(ring_);
        }
    }

    // act(g) and the first threshold for gate rows, h and the second one for up rows. Queues the neurons that some
    // token keeps, unless their down rows are asked for with their up rows, and returns how many it has queued.
    __device__ __forceinline__ uint32_t decide(int slot, RowKind kind) {
        const int r = Lanes::row(), part = lane_ % kRowLanes, first = Lanes::first_token();
        auto &state = ring_.state(slot);
        RowState &row = state.rows[r];
        const bool gate = kind == RowKind::kGate;
        const uint32_t neuron = row.neuron;
        const int down_slot = state.down_slot;
        const void *biases = gate ? p_.gate_bias : p_.up_bias;
        const float bias = biases && neuron != kNoNeuron ? to_float(static_cast<const T *>(biases)[neuron]) : 0.f;
        const bool one_each = gate ? p_.threshold_stride : p_.down_threshold_stride;
        const float threshold = one_each ? state.thresholds[r] : (gate ? threshold_ : down_threshold_);

        // Of the lanes that have the same value each sums the partial sums of some workers.
        float sums[2][kValues] = {}, values[kValues];
#pragma unroll
        for (int i = 0; i < Batches::kWorkers / kShared; i++) {
            float partial[kValues];
            Lanes::copy_values(partial,
                               ring_.partials(slot, i * kShared + part % kShared) + r * Batches::kTokens + first);
#pragma unroll
            for (int k = 0; k < kValues; k++) sums[i % 2][k] += partial[k];
        }
#pragma unroll
        for (int k = 0; k < kValues; k++) {
            values[k] = sums[0][k] + sums[1][k];
#pragma unroll
            for (int o = 1; o < kShared; o *= 2) values[k] += __shfl_xor_sync(kAll, values[k], o);
            values[k] += bias;
        }
        const uint32_t candidates = gate ? (1u << p_.tokens) - 1 : row.tokens;
        uint32_t tokens = 0;
#pragma unroll
        for (int i = 0; i < kValues; i++) {
            values[i] = gate ? activate(values[i], p_.activation) : values[i] * row.values[first + i];
            tokens |= uint32_t(keep(values[i], threshold)) << (first + i);
        }
#pragma unroll
        for (int o = kShared; o < kRowLanes; o *= 2) tokens |= __shfl_xor_sync(kAll, tokens, o);
        tokens = neuron == kNoNeuron ? 0 : tokens & candidates;
        if (part == 0) {
            if (gate) kept_ += __popc(tokens);
            else kept_down_ += __popc(tokens);
        }

        RowState *to = nullptr; // where the neuron goes next, if some token keeps it
        uint32_t queued = 0;
        if (down_slot != kNoSlot) { // its down row comes there
            to = &ring_.state(down_slot).rows[r];
        } else {
            const uint32_t kept_rows = __ballot_sync(kAll, part == 0 && tokens);
            const uint32_t rank = __popc(kept_rows & ((1u << kRowLanes * r) - 1));
            queued = __popc(kept_rows);
            if (tokens) to = pending_.at(gate ? RowKind::kUp : RowKind::kDown, (gate ? next_up_ : next_down_) + rank);
            if (gate) next_up_ += queued;
            else next_down_ += queued;
        }
        if (to) {
            if (part == 0) {
                if (down_slot == kNoSlot) to->neuron = neuron;
                to->tokens = tokens;
            }
            Lanes::copy_values(&to->values[first], values);
        }
        __syncwarp();
        if (down_slot != kNoSlot) arrive_as_warp(ring_.full(down_slot));
        return queued;
    }

    __device__ void add_counts() const { // token-neuron pairs
        auto *counts = reinterpret_cast<unsigned long long *>(p_.counts);
        const uint32_t kept = __reduce_add_sync(kAll, kept_), kept_down = __reduce_add_sync(kAll, kept_down_);
        if (lane_) return;
        if (blockIdx.x == 0) atomicAdd(counts, (unsigned long long)(p_.intermediate_size * p_.tokens));
        atomicAdd(counts + 1, (unsigned long long)kept);
        atomicAdd(counts + 2, (unsigned long long)kept_down);
    }

  private:
    const SparseMlpParams &p_;
    const Ring<Batches> &ring_;
    const PendingRows<Batches> pending_;
    const uint32_t lane_ = threadIdx.x % 32;
    float threshold_ = 0.f, down_threshold_ = 0.f; // if all neurons have the same
    uint32_t next_up_ = 0, next_down_ = 0;         // the ends of the two queues
    uint32_t kept_ = 0, kept_down_ = 0;
};

} // namespace cats
