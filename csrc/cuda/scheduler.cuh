// Which rows sparse_mlp_batched.cuh and sparse_mlp_packed.cuh read. The Scheduler keeps the ring full, with gate rows
// and with the up and down rows of the neurons that the Decider has queued. Gate rows go first, as far as the queues
// have room for all their neurons: then no row waits for a decision at the end but the very last.
//
// Scheduler and Decider are each a chain of dependent instructions, some 5 cycles each. A batch must pass through both
// in less time than its rows take to arrive, so the loop has one copy of each step and does as little as possible.
// Where one warp for both is too slow (packed rows), each has its own.
#pragma once

#include "decider.cuh"

namespace cats {

// Who copies the rows that the scheduler asks for: itself, the workers (before sm_90), or warps that do nothing else.
enum class Copies { kByScheduler, kByWorkers, kByCopiers };

// Gate batches that are fixed for a CTA, into L2 only: the previous kernel may still be writing the weights.
template <class Row>
__device__ __forceinline__ void prefetch_first_batches(const RingArguments &args, uint32_t rows, uint32_t row_bytes) {
    const SparseMlpParams &p = args.mlp;
    const uint32_t intermediate = uint32_t(p.intermediate_size);
    if (p.w_gate_stride * int64_t(sizeof(typename Row::Storage)) == row_bytes) { // a batch at a time
        for (int i = threadIdx.x % 32; i < args.ring.first_batches; i += 32) {
            const uint32_t j = (blockIdx.x + i * gridDim.x) * rows;
            if (j < intermediate)
                prefetch_l2(row_address<Row>(p, RowKind::kGate, j), min(rows, intermediate - j) * row_bytes);
        }
        return;
    }
    for (int i = threadIdx.x % 32; i < args.ring.first_batches * rows; i += 32) {
        const uint32_t j = (blockIdx.x + i / rows * gridDim.x) * rows + i % rows;
        if (j < intermediate) prefetch_l2(row_address<Row>(p, RowKind::kGate, j), row_bytes);
    }
}

// kSeparate: another warp is the Decider. It is told of the down rows that follow their up rows together with these.
template <class Batches, class Row, typename T, Copies kCopies, bool kSeparate> class Scheduler {
    static constexpr bool kBulk = kCopies != Copies::kByWorkers, kCopiers = kCopies == Copies::kByCopiers;
    static constexpr uint32_t kAll = 0xffffffffu;
    static constexpr int kRows = Batches::kRows;
    using Lanes = DecisionLanes<Batches>;
    using RowState = cats::RowState<Batches::kTokens>;
    using BatchState = typename Batches::State;

  public:
    __device__ Scheduler(const RingArguments &args, const Ring<Batches> &ring, uint8_t *pending)
        : args_(args), p_(args.mlp), ring_(ring), pending_(pending), decider_(args.mlp, ring, pending),
          row_bytes_(args.mlp), intermediate_(uint32_t(args.mlp.intermediate_size)),
          batches_((intermediate_ + ring.rows() - 1) / ring.rows()), next_batch_(blockIdx.x) {}

    // Where other warps copy, and wait for the previous kernel; and for a step of decoding, where no kernel writes the
    // weights. Thresholds, which a previous kernel may write, come with the rows.
    __device__ void ask_before_wait() {
        if (p_.y_sum ? thresholds_differ(p_) : !kCopiers) return;
        while (in_flight_ < args_.ring.slots && next_known_ && next_batch_ < batches_ && ask()) {
        }
    }

    __device__ void run() {
        if constexpr (!kSeparate) decider_.load_thresholds();
        draw(), draw();
        while (true) {
            while (in_flight_ < args_.ring.slots && ask()) {
            }
            if (in_flight_ < args_.ring.slots && nothing_follows()) break;
            wait(kSeparate ? ring_.decided(head_.slot) : ring_.done(head_.slot), head_.parity);
            take_head();
        }
        // The end follows the last batch at once: the workers need not wait until that has come back here.
        if (lane_ == 0) ring_.state(tail_.slot).kind = RowKind::kEnd;
        __syncwarp();
        if (!kBulk || kCopiers) arrive_as_warp(ring_.asked(tail_.slot));
        for (int i = 0; i < kStateArrivals; i++) arrive_as_warp(ring_.full(tail_.slot));
        if (kBulk && !kCopiers && thresholds_differ(p_)) arrive_after_async_copies(ring_.full(tail_.slot));
        if constexpr (!kSeparate) {
            while (in_flight_) {
                wait(ring_.done(head_.slot), head_.parity);
                take_head();
            }
            if (p_.counts) decider_.add_counts();
        }
    }

  private:
    // Whether no decision that is still to be made leads to a row.
    __device__ __forceinline__ bool nothing_follows() const {
        return next_known_ && next_batch_ >= batches_ && !gates_in_flight_ && !ups_ && !downs_ && owing_ == kNoSlot &&
               !ups_in_flight_;
    }

    // The batch at the head has been computed, and decided if another warp does so.
    __device__ __forceinline__ void take_head() {
        const RowKind kind = kind_in(head_.slot);
        if (kind != RowKind::kDown) {
            uint32_t queued;
            if constexpr (kSeparate) queued = ring_.state(head_.slot).queued;
            else queued = decider_.decide(head_.slot, kind);
            if (kind == RowKind::kGate) gates_in_flight_--, ups_ += queued;
            else ups_in_flight_ -= ~paired_ >> head_.slot & 1, downs_ += queued;
            if (!kSeparate && owing_ == head_.slot) owing_ = kNoSlot; // their down rows have been queued
        }
        __syncwarp();
        head_.advance(ring_);
        in_flight_--;
    }

    // Gate batches. A CTA starts with batches b, b + CTAs, ..., as many as are prefetched; from then on it draws the
    // next from a counter in global memory. How many rows a batch leads to depends on the input: with fixed batches the
    // CTAs would end up to a tenth of the whole time apart. A draw takes a while, so two are always on their way.
    // For deterministic results nothing is drawn, and a CTA goes on as it started.
    __device__ __forceinline__ void draw() {
        const bool even = draws_++ % 2 == 0;
        if (lane_ || args_.workspace.partial_sums) return;
        if (even) draw_ticket(drawn_[0], args_.workspace.next_batch);
        else draw_ticket(drawn_[1], args_.workspace.next_batch);
    }

    __device__ __forceinline__ void learn_next_batch() {
        if (next_known_) return;
        next_batch_ = gridDim.x * args_.ring.first_batches;
        if (draws_ % 2 == 0) next_batch_ += __shfl_sync(kAll, drawn_[0], 0);
        else next_batch_ += __shfl_sync(kAll, drawn_[1], 0);
        next_known_ = true;
        if (next_batch_ < batches_) draw();
    }

    __device__ __forceinline__ RowKind kind_in(int slot) const { return RowKind(kinds_ >> 2 * slot & 3); }

    // Asks for one batch; false if there is none to ask for.
    __device__ __forceinline__ bool ask() {
        RowKind kind = RowKind::kGate;
        const RowState *from = nullptr; // up and down: what is known of row lane % kRows
        const uint32_t rows = ring_.rows();
        uint32_t count = rows;
        const bool owed = owing_ != kNoSlot;
        bool paired = false;
        if (owed) { // the down rows of that slot's up rows, whose dot products are not known yet
            BatchState &state = ring_.state(owing_);
            kind = RowKind::kDown;
            from = &state.rows[lane_ % kRows];
            if (!kSeparate && lane_ == 0) state.down_slot = tail_.slot;
        } else {
            bool full = true;
            if (downs_ >= rows) kind = RowKind::kDown;
            else {
                learn_next_batch();
                if (next_batch_ >= batches_) // no gate rows are left: the batch need not be full
                    kind = ups_ ? RowKind::kUp : RowKind::kDown, full = false;
                else if (ups_ + (gates_in_flight_ + 1) * rows > Batches::kMaxPending) {
                    if (ups_ < rows) return false;
                    kind = RowKind::kUp;
                }
            }
            if (kind != RowKind::kGate) {
                const bool down = kind == RowKind::kDown;
                if (!full) count = min(down ? downs_ : ups_, rows);
                if (!count) return false;
                if (count < rows && (gates_in_flight_ || (down && ups_in_flight_))) return false; // it may get fuller
                paired = !down && !p_.down_threshold && count == ups_ && !gates_in_flight_;
                from = pending_.at(kind, (down ? first_down_ : first_up_) + lane_ % kRows);
                if (down) first_down_ += count, downs_ -= count;
                else first_up_ += count, ups_ -= count;
            }
        }

        BatchState &state = ring_.state(tail_.slot);
        uint32_t neuron = next_batch_ * rows + lane_, tokens = 0;
        if (kind == RowKind::kGate) {
            if (neuron >= intermediate_ || lane_ >= rows) neuron = kNoNeuron;
            if (args_.workspace.partial_sums || next_batch_ < gridDim.x * (args_.ring.first_batches - 1))
                next_batch_ += gridDim.x;
            else next_known_ = false;
            gates_in_flight_++;
        } else if (kSeparate && owed) { // the Decider writes the rest, and may have done so
            neuron = from->neuron;
        } else {
            neuron = from->neuron, tokens = from->tokens;
            if (lane_ >= count) neuron = kNoNeuron, tokens = 0;
            // A lane copies its row's values. The lane of that number knows where they are.
            const auto *row =
                reinterpret_cast<const RowState *>(__shfl_sync(kAll, reinterpret_cast<uint64_t>(from), Lanes::row()));
            Lanes::copy_values(&state.rows[Lanes::row()].values[Lanes::first_token()],
                               &row->values[Lanes::first_token()]);
        }
        const bool present = lane_ < kRows && neuron != kNoNeuron;
        if (lane_ < kRows) state.rows[lane_].neuron = neuron;
        if (lane_ < kRows && !(kSeparate && owed)) state.rows[lane_].tokens = tokens;
        const uint32_t present_rows = __popc(__ballot_sync(kAll, present));
        kinds_ = (kinds_ & ~(3u << 2 * tail_.slot)) | uint32_t(kind) << 2 * tail_.slot;
        // Without a second test nothing is left to decide after a gate row: the down rows could follow all up rows at
        // once, and their h come later. Only the last ones do: in between the workers would wait for h.
        owing_ = paired ? tail_.slot : kNoSlot;
        paired_ = (paired_ & ~(1u << tail_.slot)) | uint32_t(paired) << tail_.slot;
        if (kind == RowKind::kUp && !paired) ups_in_flight_++;
        if (lane_ == 0) {
            auto next = tail_;
            next.advance(ring_);
            state.kind = kind, state.down_slot = kSeparate && paired ? next.slot : kNoSlot;
            if (kBulk) expect_bytes(ring_.full(tail_.slot), row_bytes_(kind) * present_rows);
        }
        __syncwarp();
        if (!kBulk || kCopiers) arrive_as_warp(ring_.asked(tail_.slot));
        arrive_as_warp(ring_.full(tail_.slot));
        if (!owed) arrive_as_warp(ring_.full(tail_.slot)); // otherwise from the decision
        if (kBulk && !kCopiers) {
            if (present) {
                copy_threshold(p_, state, lane_);
                copy_bulk(ring_.row(tail_.slot, lane_), row_address<Row>(p_, kind, neuron), row_bytes_(kind),
                          ring_.full(tail_.slot), policy_);
            }
            if (thresholds_differ(p_)) arrive_after_async_copies(ring_.full(tail_.slot));
        }
        tail_.advance(ring_);
        in_flight_++;
        return true;
    }

    const RingArguments &args_;
    const SparseMlpParams &p_;
    const Ring<Batches> &ring_;
    const PendingRows<Batches> pending_;
    Decider<Batches, T> decider_;
    const uint32_t lane_ = threadIdx.x % 32;
    const typename Row::Bytes row_bytes_; // of a kind of row
    const uint32_t intermediate_, batches_;
    const uint64_t policy_ = read_once_policy();
    uint32_t next_batch_, drawn_[2] = {}, draws_ = 0;
    bool next_known_ = true;
    typename Ring<Batches>::Cursor head_, tail_;
    uint32_t kinds_ = 0;                               // of the slots, two bits each
    int in_flight_ = 0;                                // batches
    uint32_t paired_ = 0;                              // of the slots: up rows whose down rows were asked for with them
    uint32_t gates_in_flight_ = 0, ups_in_flight_ = 0; // batches; of up rows those that are not paired
    int owing_ = kNoSlot;                              // the slot whose neurons' down rows come next
    uint32_t first_up_ = 0, ups_ = 0, first_down_ = 0, downs_ = 0; // the two queues
};

// One of several warps that copy the rows that the scheduler asks for. A bulk copy is started by one lane after the
// other, which would be a third of the scheduler's time (bench/results/h100/packed_plan.log).
template <class Batches, class Row> class Copier {
  public:
    __device__ Copier(const RingArguments &args, const Ring<Batches> &ring, int copier, int copiers)
        : p_(args.mlp), ring_(ring), copier_(copier), copiers_(copiers), row_bytes_(args.mlp) {}

    __device__ void run() const {
        const uint64_t policy = read_once_policy();
        const int lane = threadIdx.x % 32, rows = ring_.rows();
        const bool thresholds = copier_ == 0 && thresholds_differ(p_);
        typename Ring<Batches>::Cursor at;
        while (true) {
            wait(ring_.asked(at.slot), at.parity);
            auto &state = ring_.state(at.slot);
            const RowKind kind = state.kind;
            if (kind != RowKind::kEnd) {
                if (thresholds && lane < rows) copy_threshold(p_, state, lane);
                const int r = copier_ + lane * copiers_;
                const uint32_t neuron = r < rows ? state.rows[r].neuron : kNoNeuron;
                if (neuron != kNoNeuron)
                    copy_bulk(ring_.row(at.slot, r), row_address<Row>(p_, kind, neuron), row_bytes_(kind),
                              ring_.full(at.slot), policy);
            }
            if (thresholds) arrive_after_async_copies(ring_.full(at.slot));
            __syncwarp();
            arrive_as_warp(ring_.done(at.slot)); // the state has been read, also by a copier that has no row
            if (kind == RowKind::kEnd) break;
            at.advance(ring_);
        }
    }

  private:
    const SparseMlpParams &p_;
    const Ring<Batches> &ring_;
    const int copier_, copiers_;
    const typename Row::Bytes row_bytes_;
};

} // namespace cats
