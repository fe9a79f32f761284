// The product of packed rows with one row, for a step of decoding: ../packed_linear.h.
//
// A team of 8 warps multiplies 16 rows at a time on the tensor cores, each warp with its own blocks of 128 columns:
// D[16 rows, 8] += W[16 rows, 16 columns] B[16 columns, 8]. A lane loads 16 bytes of two rows and multiplies their
// words as they are (unpack.cuh), since the order of the columns in a dot product does not matter. Each column of B has
// x in one group of columns and zeros elsewhere, so that the groups of a warp share its registers and each sum in D has
// one scale; of the sums of a block only those of its own groups are used.
//
// Weights wait in registers, and the first ones are asked for before the previous kernel has ended. All teams of a CTA
// share the preparation of x. From sm_90 on, launches overlap (programmatic dependent launch).
#pragma once

#include "../packed_linear.h"
#include "mbarrier.cuh"
#include "mma.cuh"
#include "packed_linear_loads.cuh"
#include "team.cuh"
#include "unpack.cuh"
#include "values.cuh"

namespace cats {

constexpr int kTeamWarps = 8, kTeamThreads = kTeamWarps * 32, kTeamRows = 16;
constexpr int kMaxTeams = 2; // of a CTA

// Teams that the registers of a multiprocessor suffice for.
constexpr int max_teams(int blocks, int group) { return blocks > 4 && group < 64 ? 1 : kMaxTeams; }

// Bytes of dynamic shared memory: x and the norm weight, and the sums of the warps of each team, twice.
constexpr int packed_linear_shared_bytes(int64_t inputs, int teams) {
    return int(round_up(inputs, kPackedColumns) * 2 * sizeof(uint16_t) +
               teams * 2 * kTeamWarps * kTeamRows * sizeof(float));
}

// kGroup: columns that share a scale; 128 of rows with one scale. kBlocks: the most blocks of a warp.
template <WeightType kType, int kGroup, typename T, int kBlocks> class PackedLinear {
    using Unpack = cats::Unpack<kType>;
    static constexpr uint32_t kAll = 0xffffffffu;
    static constexpr bool kInt4 = kType == WeightType::kInt4, kFloat8 = kType == WeightType::kFloat8;
    static constexpr int kLoads = kInt4 ? 1 : 2;                                      // of 16 bytes, of a lane's row
    static constexpr int kRun = 32 / kLoads;                                          // columns of a load
    static constexpr int kTileBlocks = kInt4 ? 8 : 4, kBlockBytes = kInt4 ? 64 : 128; // of a row
    static constexpr int kDepth = kBlocks < 4 / kLoads ? kBlocks : 4 / kLoads;        // blocks being loaded
    static constexpr int kGroups = kPackedColumns / kGroup;                           // of a block
    static constexpr int kSets = (kBlocks * kGroups + 7) / 8;                         // of 8 groups
    static_assert(kBlocks % kDepth == 0);

  public:
    __device__ PackedLinear(const PackedLinearParams &p, uint8_t *smem)
        : p_(p), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32 % kTeamWarps), quad_(lane_ % 4), row_(lane_ / 4),
          team_(threadIdx.x / kTeamThreads) {
        const int blocks = ceil_div(p.inputs, kPackedColumns), each = ceil_div(blocks, kTeamWarps);
        first_ = min(warp_ * each, blocks);
        count_ = min(each, blocks - first_);
        padded_ = blocks * kPackedColumns;
        x_row_ = reinterpret_cast<T *>(smem);
        norm_row_ = x_row_ + padded_;
        partials_ = reinterpret_cast<float *>(norm_row_ + padded_) + team_ * 2 * kTeamWarps * kTeamRows;
    }

    __device__ __forceinline__ void run() {
        int batches = 0;
#pragma unroll
        for (int part = 0; part < kMaxParts; part++)
            if (part < p_.parts) batches += ceil_div(p_.outputs[part], kTeamRows);
        const int step = gridDim.x * (blockDim.x / kTeamThreads);
        int batch = team_ * gridDim.x + blockIdx.x; // neighbours in time on different multiprocessors
        Rows rows = rows_of(min(batch, batches - 1));
#pragma unroll
        for (int b = 0; b < kDepth; b++) load_block(rows, b, b);
        load_scales(rows);
        load_norm();
        wait_for_previous_kernel();
        prepare_x();
        for (int parity = 0; batch < batches; parity ^= 1) {
            const int next = batch + step;
            const bool more = next < batches, writer = warp_ == 0 && lane_ < kTeamRows;
            T bias = round_to<T>(0.f), residual = bias;
            int y_at = -1;
            if (writer) y_at = load_additions(batch, bias, residual); // needed after the product
            float d[kSets][2][2] = {};                                // [set][row, row + 8][column of D]
#pragma unroll
            for (int b = 0; b < kBlocks; b++) {
                if (b < count_) multiply(b, d);
                if (b + kDepth == kBlocks && more) rows = rows_of(next);
                if (b + kDepth < kBlocks || more) load_block(rows, (b + kDepth) % kBlocks, b % kDepth);
            }
            float dots[2];
            scale(d, dots);
            if (more) load_scales(rows);
            float *sums = partials_ + parity * kTeamWarps * kTeamRows;
            if (quad_ < 2) sums[warp_ * kTeamRows + quad_ * 8 + row_] = quad_ ? dots[1] : dots[0];
            team_barrier_.synchronise(team_, parity);
            if (y_at >= 0) {
                float y = to_float(bias);
#pragma unroll
                for (int w = 0; w < kTeamWarps; w++) y += sums[w * kTeamRows + lane_];
                T result = round_to<T>(y);
                if (p_.residual) result = round_to<T>(to_float(result) + to_float(residual));
                static_cast<T *>(p_.y)[y_at] = result;
            }
            batch = next;
        }
    }

  private:
    struct Rows {
        const uint8_t *at[2]; // where the two rows of this lane begin
    };

    // The weight that a batch of rows lies in. Its place in that, and the outputs of the weights before.
    __device__ __forceinline__ int part_of(int batch, int &first, int &before) const {
        int part = 0;
        before = 0;
#pragma unroll
        for (int k = 0; k < kMaxParts - 1; k++) {
            const int batches = ceil_div(p_.outputs[k], kTeamRows);
            if (part == k && k + 1 < p_.parts && batch >= batches)
                batch -= batches, before += int(p_.outputs[k]), part++;
        }
        first = batch * kTeamRows;
        return part;
    }

    __device__ __forceinline__ Rows rows_of(int batch) const {
        int first, before;
        const int part = part_of(batch, first, before), last = int(p_.outputs[part]) - 1;
        Rows rows;
#pragma unroll
        for (int r = 0; r < 2; r++) // rows that are not there: the last one again
            rows.at[r] = static_cast<const uint8_t *>(p_.weights[part]) +
                         int64_t(min(first + row_ + 8 * r, last)) * p_.strides[part];
        return rows;
    }

    // What is added to the product of row lane_ of a batch. Its place in y; -1: there is no such row.
    __device__ __forceinline__ int load_additions(int batch, T &bias, T &residual) const {
        int first, before;
        const int part = part_of(batch, first, before), row = first + lane_;
        if (row >= p_.outputs[part]) return -1;
        if (p_.biases[part]) bias = static_cast<const T *>(p_.biases[part])[row];
        if (p_.residual) residual = static_cast<const T *>(p_.residual)[row];
        return before + row;
    }

    __device__ __forceinline__ void load_block(const Rows &rows, int b, int slot) {
        if (b >= count_) return;
        const int block = first_ + b;
        const uint32_t at = block / kTileBlocks * (kTileChunks * kChunkBytes + p_.format.scale_bytes) +
                            p_.format.scale_bytes + block % kTileBlocks * kBlockBytes + quad_ * kChunkBytes;
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int load = 0; load < kLoads; load++) words_[slot][load][r] = load_weights(rows.at[r] + at + load * 64);
    }

    // Groups that do not exist get the scale of another: all that they multiply is zero.
    __device__ __forceinline__ void load_scales(const Rows &rows) {
        if constexpr (kFloat8) {
#pragma unroll
            for (int r = 0; r < 2; r++) scales_[0][r][0] = load_scale(rows.at[r], true);
        } else {
            constexpr int kTileGroups = kTileBlocks * kGroups;
            const int last = int(p_.inputs) / kGroup - 1;
#pragma unroll
            for (int s = 0; s < kSets; s++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int group = min(first_ * kGroups + s * 8 + quad_ * 2 + e, last);
                    const uint32_t at = group / kTileGroups * (kTileChunks * kChunkBytes + p_.format.scale_bytes) +
                                        group % kTileGroups * (p_.format.zero_points ? 4 : 2);
#pragma unroll
                    for (int r = 0; r < 2; r++) scales_[s][r][e] = load_scale(rows.at[r] + at, p_.format.zero_points);
                }
        }
    }

    __device__ __forceinline__ void multiply(int b, float (&d)[kSets][2][2]) const {
        const int set = b * kGroups / 8, column = b * kGroups % 8;
        float c[4] = {};
#pragma unroll
        for (int load = 0; load < kLoads; load++) {
            const uint4(&both)[2] = words_[b % kDepth][load];
            const uint32_t low[4] = {both[0].x, both[0].y, both[0].z, both[0].w},
                           high[4] = {both[1].x, both[1].y, both[1].z, both[1].w};
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int o = 0; o < Unpack::kOperands; o += 2) {
                    const uint32_t *x = x_[set] + (load * 4 + i) * Unpack::kOperands + o;
                    mma<__half>(c, Unpack::operand(low[i], o), Unpack::operand(high[i], o),
                                Unpack::operand(low[i], o + 1), Unpack::operand(high[i], o + 1), x[0], x[1]);
                }
        }
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int mine = quad_ * 2 + e - column;
            if (mine < 0 || mine >= kGroups) continue;
#pragma unroll
            for (int r = 0; r < 2; r++) d[set][r][e] = c[2 * r + e];
        }
    }

    // The dot products of this warp's columns, in the lanes of a row.
    __device__ __forceinline__ void scale(const float (&d)[kSets][2][2], float (&dots)[2]) const {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float dot = 0.f;
#pragma unroll
            for (int s = 0; s < kSets; s++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    if constexpr (kFloat8) {
                        dot += d[s][r][e];
                    } else {
                        const uint32_t bits = scales_[s][r][e];
                        const float offset = kInt4 && p_.format.zero_points ? half_bits(bits >> 16) : Unpack::kOffset;
                        dot = fmaf(half_bits(bits), fmaf(d[s][r][e], Unpack::kFactor, -offset * x_sums_[s][e]), dot);
                    }
                }
            if constexpr (kFloat8) dot *= __uint_as_float(scales_[0][r][0]) * Unpack::kFactor;
            dot += __shfl_xor_sync(kAll, dot, 1);
            dot += __shfl_xor_sync(kAll, dot, 2);
            dots[r] = dot * unscale_;
        }
    }

    // --- x -----------------------------------------------------------------------------------------------------------

    static __device__ __forceinline__ void load8(const T *from, float (&out)[8]) {
        decode(__ldcg(reinterpret_cast<const uint4 *>(from)), out, T{});
    }

    static __device__ __forceinline__ void store8(T *to, const float (&v)[8]) {
        T rounded[8];
#pragma unroll
        for (int i = 0; i < 8; i++) rounded[i] = round_to<T>(v[i]);
        *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(rounded);
    }

    __device__ __forceinline__ void load_norm() {
        if (!p_.norm_weight) return;
        for (int c = threadIdx.x * 8; c < padded_; c += blockDim.x * 8) {
            uint4 bits{};
            if (c < p_.inputs) bits = *reinterpret_cast<const uint4 *>(static_cast<const T *>(p_.norm_weight) + c);
            *reinterpret_cast<uint4 *>(norm_row_ + c) = bits;
        }
    }

    __device__ __forceinline__ void input8(int c, float (&v)[8]) const {
        if (p_.splits) return merge_attention(p_, c, v);
        load8(static_cast<const T *>(p_.x) + c, v);
        if (!p_.delta) return;
        float delta[8];
        if (p_.delta_is_float) {
            const auto *from = reinterpret_cast<const float4 *>(static_cast<const float *>(p_.delta) + c);
            const float4 low = __ldcg(from), high = __ldcg(from + 1);
            delta[0] = low.x, delta[1] = low.y, delta[2] = low.z, delta[3] = low.w;
            delta[4] = high.x, delta[5] = high.y, delta[6] = high.z, delta[7] = high.w;
        } else {
            load8(static_cast<const T *>(p_.delta) + c, delta);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] += to_float(round_to<T>(delta[i]));
    }

    // The input into shared memory, first as it is, then as operands. From there every lane takes what it needs of B.
    __device__ __forceinline__ void prepare_x() {
        __shared__ float squares[kMaxTeams * kTeamWarps], mosts[kMaxTeams * kTeamWarps];
        float sum = 0.f, most = 0.f;
        for (int c = threadIdx.x * 8; c < padded_; c += blockDim.x * 8) {
            float v[8] = {}, weight[8];
            if (c < p_.inputs) input8(c, v);
            store8(x_row_ + c, v);
            if (p_.x_new && blockIdx.x == 0 && c < p_.inputs) store8(static_cast<T *>(p_.x_new) + c, v);
            if (p_.norm_weight) decode(*reinterpret_cast<const uint4 *>(norm_row_ + c), weight, T{});
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float rounded = to_float(round_to<T>(v[i]));
                sum = fmaf(rounded, rounded, sum);
                most = fmaxf(most, fabsf(p_.norm_weight ? rounded * weight[i] : rounded));
            }
        }
#pragma unroll
        for (int o = 16; o; o /= 2) {
            sum += __shfl_xor_sync(kAll, sum, o);
            most = fmaxf(most, __shfl_xor_sync(kAll, most, o));
        }
        if (lane_ == 0) squares[threadIdx.x / 32] = sum, mosts[threadIdx.x / 32] = most;
        __syncthreads();
        const bool there = lane_ < blockDim.x / 32;
        sum = there ? squares[lane_] : 0.f, most = there ? mosts[lane_] : 0.f;
#pragma unroll
        for (int o = 16; o; o /= 2) {
            sum += __shfl_xor_sync(kAll, sum, o);
            most = fmaxf(most, __shfl_xor_sync(kAll, most, o));
        }
        float rms = 1.f;
        if (p_.norm_weight) rms = rsqrtf(sum / float(p_.inputs) + p_.norm_eps), most *= rms;
        // A power of two that brings the largest to 2^14 or more; its inverse is a power of two as well.
        const uint32_t exponent = min(127u + 14u + 127u - (__float_as_uint(most) >> 23), 253u);
        const float factor = __uint_as_float(exponent << 23);
        unscale_ = __uint_as_float((254u - exponent) << 23);
        for (int c = threadIdx.x * 8; c < padded_; c += blockDim.x * 8) make_operands(c, rms, factor);
        __syncthreads();
#pragma unroll
        for (int s = 0; s < kSets; s++) {
            float x_sum = 0.f;
#pragma unroll
            for (int load = 0; load < kLoads; load++) keep_x(s, load, x_sum);
            x_sum += __shfl_xor_sync(kAll, x_sum, 1);
            x_sum += __shfl_xor_sync(kAll, x_sum, 2);
#pragma unroll
            for (int e = 0; e < 2; e++) x_sums_[s][e] = __shfl_sync(kAll, x_sum, quad_ * 8 + e * 4);
        }
    }

    // Columns c to c + 7, which this thread wrote, in fp16 times a power of two. The order is that of Unpack.
    __device__ __forceinline__ void make_operands(int c, float rms, float factor) const {
        float x[8];
        decode(*reinterpret_cast<const uint4 *>(x_row_ + c), x, T{});
        if (p_.norm_weight) {
            float weight[8];
            decode(*reinterpret_cast<const uint4 *>(norm_row_ + c), weight, T{});
#pragma unroll
            for (int i = 0; i < 8; i++) x[i] = to_float(round_to<T>(to_float(round_to<T>(x[i] * rms)) * weight[i]));
        }
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            constexpr int kOperands = Unpack::kOperands;
            const int low = i / kOperands * 2 * kOperands + Unpack::first(i % kOperands), high = low + Unpack::kStep;
            const __half2 pair = __floats2half2_rn(x[low] * factor / shrink(i), x[high] * factor / shrink(i));
            words[i] = reinterpret_cast<const uint32_t &>(pair);
        }
        *reinterpret_cast<uint4 *>(x_row_ + c) = make_uint4(words[0], words[1], words[2], words[3]);
    }

    // What operand i of a word is multiplied by too often: Unpack leaves odd ones of int4 where they are in it.
    static __device__ __forceinline__ float shrink(int i) { return kInt4 && i % 2 ? 16.f : 1.f; }

    // What a load of set s meets in this lane's column of B, row_.
    __device__ __forceinline__ void keep_x(int s, int load, float &sum) {
        const int group = s * 8 + row_, block = group / kGroups, column = (load * 4 + quad_) * kRun;
        const bool there = block < count_ && column / kGroup == group % kGroups;
        const T *from = x_row_ + (first_ + block) * kPackedColumns + column;
#pragma unroll
        for (int first = 0; first < kRun; first += 8) {
            uint4 found{};
            if (there) found = *reinterpret_cast<const uint4 *>(from + first);
            const uint32_t words[4] = {found.x, found.y, found.z, found.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const __half2 pair = reinterpret_cast<const __half2 &>(words[i]);
                x_[s][(load * kRun + first) / 2 + i] = words[i];
                sum += (__low2float(pair) + __high2float(pair)) * shrink(i);
            }
        }
    }

    const PackedLinearParams &p_;
    const TeamBarrier<kMaxTeams, kTeamWarps> team_barrier_;
    const int lane_, warp_, quad_, row_, team_; // row_: of D, or the column of B
    int first_, count_, padded_;                // blocks of this warp; columns of x with padding
    T *x_row_, *norm_row_;
    float *partials_;
    uint4 words_[kDepth][kLoads][2];
    uint32_t scales_[kFloat8 ? 1 : kSets][2][kFloat8 ? 1 : 2]; // with zero points in the upper half
    uint32_t x_[kSets][16];
    float x_sums_[kSets][2], unscale_;
};

template <WeightType kType, int kGroup, typename T, int kBlocks, int kTeams>
__global__ void __launch_bounds__(kTeamThreads *kTeams, 1)
    packed_linear_kernel(const __grid_constant__ PackedLinearParams p) {
    extern __shared__ __align__(16) uint8_t smem[];
    launch_dependents();
    PackedLinear<kType, kGroup, T, kBlocks>(p, smem).run();
}

} // namespace cats
