// A worker warp of sparse_mlp_batched.cuh computes on the tensor cores with the rows that have arrived. Before sm_90 it
// also copies its part of the rows that the scheduler asks for.
//
//     gate, up:  D[8 neurons, 8 tokens] += W[8 neurons, 16 columns] x^T[16 columns, 8 tokens]      (rows 8-15 of A: 0)
//     down:      y^T[16 columns, 8 tokens] += W^T[16 columns, 8 neurons] h[8 neurons, 8 tokens]
//
// The same 8x8 tiles of a batch serve both, read with ldmatrix as they are or transposed. h is split into a rounded
// part and the rest, as neurons 0-7 and 8-15 of one instruction, so y keeps nearly the precision of an fp32 h. A row
// that only some tokens keep is multiplied by 0 for the others: as in a dense product, an infinite or NaN weight makes
// their y NaN.
#pragma once

#include "mma.cuh"
#include "ring.cuh"
#include "values.cuh"

namespace cats {

using DenseBatches =
    Batches<kDenseBatches.rows, kDenseBatches.tokens, kDenseBatches.workers, kDenseBatches.max_pending>;

template <class Row, typename T, bool kBulk, int kGroups> class MmaWorker {
    using Ring = cats::Ring<DenseBatches>;
    using BatchState = DenseBatches::State;
    using RowState = cats::RowState<DenseBatches::kTokens>;
    static constexpr int kWorkerWarps = DenseBatches::kWorkers;
    static_assert(std::is_same_v<typename Row::MmaOperand, T> && Row::kScaleBytes == 0);
    // x of so many groups of columns stays in registers. There is no room for the rest, which comes from L1 every time.
    static constexpr int kResidentGroups = kGroups < 10 ? kGroups : 9;

  public:
    __device__ MmaWorker(const SparseMlpParams &p, const Ring &ring, int warp)
        : p_(p), ring_(ring), warp_(warp), lane_(threadIdx.x % 32), groups_(int(p.hidden_size) / kGroupColumns) {}

    __device__ void run() {
#pragma unroll
        for (int i = 0; i < kResidentGroups; i++) load_x(i, x_[i]);
        if constexpr (kBulk) wait_for_x();
#pragma unroll
        for (int i = 0; i < kGroups; i++)
#pragma unroll
            for (int t = 0; t < 4; t++) y_[i][0][t] = y_[i][1][t] = 0.f;
        typename Ring::Cursor at, to_copy;
        int copied = 0; // batches that are on their way or here
        for (bool more = !kBulk;;) {
            while (more && !(copied && phase_done(ring_.full(at.slot), at.parity)))
                if (phase_done(ring_.asked(to_copy.slot), to_copy.parity)) {
                    more = copy(to_copy.slot);
                    to_copy.advance(ring_);
                    copied++;
                }
            wait(ring_.full(at.slot), at.parity);
            const RowKind kind = ring_.state(at.slot).kind;
            if (kind == RowKind::kEnd) break;
            if (kind == RowKind::kDown) add_down_rows(at.slot);
            else dot_products(at.slot);
            __syncwarp();
            arrive_as_warp(ring_.done(at.slot));
            at.advance(ring_);
            copied--;
        }
    }

    // add(column, token, values of this token and the next)
    template <typename Add> __device__ __forceinline__ void add_to_output(Add add) const {
#pragma unroll
        for (int i = 0; i < kGroups; i++) {
            if (group(i) >= groups_ || lane_ % 4 * 2 >= p_.tokens) break;
#pragma unroll
            for (int t = 0; t < 4; t++)
                add(group(i) * kGroupColumns + t * 8 + lane_ / 4, lane_ % 4 * 2,
                    make_float2(y_[i][t / 2][t % 2 * 2], y_[i][t / 2][t % 2 * 2 + 1]));
        }
    }

  private:
    // sm_80: every warp copies the columns that it will read itself, 64 bytes of all rows at a time. False at the end.
    __device__ __forceinline__ bool copy(int slot) const {
        BatchState &state = ring_.state(slot);
        const RowState &row = state.rows[lane_ / 4];
        const bool end = state.kind == RowKind::kEnd;
        if (!end && row.neuron != kNoNeuron) {
            const uint8_t *from = row_address<Row>(p_, state.kind, row.neuron) + lane_ % 4 * 16;
            uint8_t *to = ring_.row(slot, lane_ / 4) + lane_ % 4 * 16;
            for (int g = warp_; g < groups_; g += kWorkerWarps) copy_async<16>(to + g * 64, from + g * 64);
        }
        if (!end && warp_ == 0 && lane_ < DenseBatches::kRows) copy_threshold(p_, state, lane_);
        arrive_after_async_copies(ring_.full(slot));
        return !end;
    }

    // Columns 2 * (lane % 4) and the next of the four 8-column tiles of a group, of token lane / 4.
    __device__ __forceinline__ void load_x(int i, uint32_t (&x)[4]) const {
        const int token = lane_ / 4;
        const uint32_t *from = static_cast<const uint32_t *>(p_.x) + token * (int(p_.hidden_size) / 2) +
                               group(i) * (kGroupColumns / 2) + lane_ % 4;
        const bool exists = group(i) < groups_ && token < p_.tokens;
#pragma unroll
        for (int t = 0; t < 4; t++) x[t] = exists ? from[4 * t] : 0;
    }

    // Lets the scheduler copy when x is here: loads wait for all copies that were started before them, some 6 us.
    __device__ __forceinline__ void wait_for_x() const {
        uint32_t all = 0; // of x: what does not stay in registers comes into L1
#pragma unroll
        for (int i = 0; i < kGroups; i++) {
            uint32_t x[4];
            if (i < kResidentGroups) x[0] = x_[i][0], x[1] = x_[i][1], x[2] = x_[i][2], x[3] = x_[i][3];
            else load_x(i, x);
            all ^= x[0] ^ x[1] ^ x[2] ^ x[3];
        }
        // A use of all of x; the first dot products overwrite it.
        reinterpret_cast<uint32_t *>(ring_.partials(0, warp_))[lane_] = all;
        __syncwarp();
        asm volatile("bar.arrive 1, %0;" ::"n"((kWorkerWarps + 1) * 32) : "memory");
    }

    // This warp's part of the dot products of all rows with all tokens. Meaningless for absent rows.
    __device__ __forceinline__ void dot_products(int slot) const {
        float even[4] = {}, odd[4] = {};
        const uint32_t address = tile_address(slot);
#pragma unroll
        for (int i = 0; i < kGroups; i++) {
            if (group(i) >= groups_) break;
            uint32_t tiles[4];
            load_tiles<false>(tiles, address + i * kWorkerWarps * kGroupColumns * sizeof(T));
            uint32_t x[4];
            if (i < kResidentGroups) x[0] = x_[i][0], x[1] = x_[i][1], x[2] = x_[i][2], x[3] = x_[i][3];
            else load_x(i, x);
            mma<T>(even, tiles[0], 0, tiles[1], 0, x[0], x[1]);
            mma<T>(odd, tiles[2], 0, tiles[3], 0, x[2], x[3]);
        }
        // Lane l has neuron l / 4 and tokens 2 * (l % 4) and the next.
        reinterpret_cast<float2 *>(ring_.partials(slot, warp_))[lane_] =
            make_float2(even[0] + odd[0], even[1] + odd[1]);
    }

    __device__ __forceinline__ void add_down_rows(int slot) {
        const int token = lane_ / 4;
        T rounded[2], rest[2];
        uint32_t present = 0; // absent rows may hold anything, also NaN, and are masked to 0
#pragma unroll
        for (int k = 0; k < 2; k++) { // neurons 2 * (lane % 4) and the next
            const RowState &row = ring_.state(slot).rows[lane_ % 4 * 2 + k];
            const float h = row.tokens >> token & 1 ? row.values[token] : 0.f;
            rounded[k] = round_to<T>(h);
            const float left = h - to_float(rounded[k]);
            rest[k] = round_to<T>(isfinite(left) ? left : 0.f);
            if (row.tokens) present |= 0xffffu << 16 * k;
        }
        const uint32_t b0 = pack(rounded[0], rounded[1]), b1 = pack(rest[0], rest[1]);
        const uint32_t address = tile_address(slot);
#pragma unroll
        for (int i = 0; i < kGroups; i++) {
            if (group(i) >= groups_) break;
            uint32_t tiles[4];
            load_tiles<true>(tiles, address + i * kWorkerWarps * kGroupColumns * sizeof(T));
#pragma unroll
            for (int t = 0; t < 4; t++) tiles[t] &= present;
            mma<T>(y_[i][0], tiles[0], tiles[1], tiles[0], tiles[1], b0, b1);
            mma<T>(y_[i][1], tiles[2], tiles[3], tiles[2], tiles[3], b0, b1);
        }
    }

    __device__ __forceinline__ int group(int i) const { return i * kWorkerWarps + warp_; }
    // Lane l's address for ldmatrix: row l % 8 of tile l / 8.
    __device__ __forceinline__ uint32_t tile_address(int slot) const {
        return smem_address(ring_.row(slot, lane_ % 8)) + (warp_ * kGroupColumns + lane_ / 8 * 8) * uint32_t(sizeof(T));
    }
    static __device__ __forceinline__ uint32_t pack(T low, T high) {
        return uint32_t(reinterpret_cast<const uint16_t &>(high)) << 16 | reinterpret_cast<const uint16_t &>(low);
    }

    const SparseMlpParams &p_;
    const Ring &ring_;
    const int warp_, lane_, groups_;
    uint32_t x_[kResidentGroups][4]; // see load_x
    float y_[kGroups][2][4];         // columns lane / 4 and 8 further, of the two 16-column halves; two tokens each
};

} // namespace cats
