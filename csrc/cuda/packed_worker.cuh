// A worker warp of sparse_mlp_packed.cuh multiplies packed rows on the tensor cores, 16 rows of one batch with all of
// its columns.
//
//     gate, up:  D[16 neurons, 8] += W[16 neurons, 16 columns] B[16 columns, 8]
//     down:      D[16 columns, 8] += W^T[16 columns, 16 neurons] B[16 neurons, 8]
//
// The order of the columns in a dot product does not matter, so a lane multiplies the 32-bit words that ldmatrix gives
// it, as unpack.cuh makes operands of them. The offset of integer weights is subtracted at the end, times the sum of
// what was multiplied. x is scaled by a power of two for each warp, so that fp16 has its range; h * scale, too, by one
// that is lowered when a value would not fit.
//
// One token needs one of the 8 columns of B. The others hold what would otherwise take registers: in a dot product x of
// other blocks of 128 columns (only the diagonal of D is used), and for the down rows h of other groups of 64 columns,
// whose sums then share D. h * scale is a sum of two fp16 values.
//
// An infinite x or h makes NaN of what it reaches.
#pragma once

#include "mma.cuh"
#include "ring.cuh"
#include "rows/packed.cuh"
#include "unpack.cuh"
#include "values.cuh"

namespace cats {

template <WeightType kDotType, typename T, int kTokens, int kWorkers, int kBlocks> class PackedWorker {
    static constexpr uint32_t kAll = 0xffffffffu;
    static constexpr float kMostHalf = 60000.f;                           // fp16 ends at 65504
    static constexpr int kSetBlocks = 8 / kTokens;                        // column of B: block % kSetBlocks, token
    static constexpr int kSets = (kBlocks + kSetBlocks - 1) / kSetBlocks; // of x
    // h * scale is a sum of two fp16 values: in a column of B each for one token, otherwise one after the other.
    static constexpr int kPartColumns = kTokens == 1 ? 2 : 1, kParts = 2 / kPartColumns;
    static constexpr int kShare = 8 / (kTokens * kPartColumns); // groups of 64 columns that share D
    static constexpr int kSums = 2 * kBlocks / kShare;
    static constexpr int kUnroll = kBlocks * kTokens > 4 ? 1 : (kDotType == WeightType::kInt4 ? 4 : 2);
    static constexpr bool kSmallGroups = has_small_groups({kTokens, kWorkers, kBlocks});
    static constexpr BatchSizes kSizes = packed_batches(kTokens, kWorkers);
    static_assert((kTokens == 1 || kTokens == 2 || kTokens == 4) && 2 * kBlocks % kShare == 0);

  public:
    using Batches = cats::Batches<kSizes.rows, kTokens, kWorkers, kSizes.max_pending>;

    __device__ PackedWorker(const SparseMlpParams &p, const Ring<Batches> &ring, int warp)
        : p_(p), ring_(ring), lane_(threadIdx.x % 32), warp_(warp), quad_(lane_ % 4), row_(lane_ / 4),
          blocks_(ceil_div(p.hidden_size, kPackedColumns)) {}

    // Before the previous kernel has ended: what it does not write.
    __device__ __forceinline__ void load_norm(float (&norm)[32]) const { columns_of(p_.norm_weight, 0, 0).load(norm); }

    // wait(): until x is there. Its addresses are computed before that: loads that come after the copies of rows wait
    // for all of these, which takes 3 us with int8 rows.
    template <typename Wait> __device__ __forceinline__ void load_x(Wait wait) {
        Columns columns[kSets];
#pragma unroll
        for (int s = 0; s < kSets; s++) {
            columns[s] = columns_of(p_.x, s, row_ % kTokens);
            asm volatile("" : "+l"(columns[s].from), "+r"(columns[s].count)); // computed here
        }
        wait();
        float x[kSets][32], most = 0.f;
#pragma unroll
        for (int s = 0; s < kSets; s++) {
            columns[s].load(x[s]);
            most = fmaxf(most, largest(x[s]));
        }
        const float factor = factor_for(most);
#pragma unroll
        for (int s = 0; s < kSets; s++) keep_x(s, x[s], factor);
    }

    // One token: x / rms(x) * norm weight, rounded where separate operations round.
    __device__ void load_normalised_x(const float (&norm)[32]) {
        __shared__ float squares[kWorkers];
        float x[32], sum = 0.f;
        columns_of(p_.x, 0, 0).load(x);
#pragma unroll
        for (int i = 0; i < 32; i++) sum = fmaf(x[i], x[i], sum);
#pragma unroll
        for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(kAll, sum, o);
        if (lane_ == 0) squares[warp_] = sum;
        asm volatile("bar.sync 1, %0;" ::"n"(kWorkers * 32) : "memory");
        sum = 0.f;
#pragma unroll
        for (int w = 0; w < kWorkers; w++) sum += squares[w];
        const float scale = rsqrtf(sum / float(p_.hidden_size) + p_.norm_eps);
#pragma unroll
        for (int i = 0; i < 32; i++) x[i] = to_float(round_to<T>(to_float(round_to<T>(x[i] * scale)) * norm[i]));
        keep_x(0, x, factor_for(largest(x)));
    }

    __device__ void run() {
        h_factor_ = 1024.f;
#pragma unroll
        for (int i = 0; i < kSums * 16; i++) (&y_[0][0][0])[i] = 0.f;
#pragma unroll
        for (int s = 0; s < kSums; s++) offsets_[s] = 0.f;
        typename Ring<Batches>::Cursor at;
        while (true) {
            wait(ring_.full(at.slot), at.parity);
            const RowKind kind = ring_.state(at.slot).kind;
            if (kind == RowKind::kEnd) {
                arrive_as_warp(ring_.done(at.slot)); // ends the Decider
                break;
            }
            const RowFormat &format = format_of(p_, kind);
            if (kind != RowKind::kDown) {
                if constexpr (kDotType != WeightType::kFloat8 && kSmallGroups) {
                    if (format.group_size == 64) dot_products<kDotType, 2>(at.slot, format);
                    else dot_products<kDotType, 1>(at.slot, format);
                } else {
                    dot_products<kDotType, 1>(at.slot, format);
                }
            } else if constexpr (kDotType == WeightType::kFloat8) {
                add_down_rows<kDotType>(at.slot, format);
            } else {
                if (format.type == WeightType::kInt4) add_down_rows<WeightType::kInt4>(at.slot, format);
                else add_down_rows<WeightType::kInt8>(at.slot, format);
            }
            __syncwarp();
            arrive_as_warp(ring_.done(at.slot));
            at.advance(ring_);
        }
    }

    // add(column, token, values of this and the next columns): float4 or float2
    template <typename Add> __device__ __forceinline__ void add_to_output(Add add) const {
        const bool int4 = p_.down_format.type == WeightType::kInt4;
        const float factor = p_.down_format.type == WeightType::kFloat8 ? Unpack<WeightType::kFloat8>::kFactor
                                                                        : Unpack<WeightType::kInt8>::kFactor,
                    unscale = 1.f / h_factor_;
#pragma unroll
        for (int s = 0; s < kSums; s++) {
            float offset = offsets_[s]; // over the rows, and the parts
#pragma unroll
            for (int o = 1; o < 4 * kPartColumns; o *= 2) offset += __shfl_xor_sync(kAll, offset, o);
#pragma unroll
            for (int e = 0; e < kParts; e++) { // of this lane's columns of D
                const float subtracted = __shfl_sync(kAll, offset, quad_ * 8 + e * 4);
                const int column_of_d = quad_ * kParts + e, token = column_of_d % kTokens;
                const int first = (warp_ * kBlocks * 2 + s * kShare + column_of_d / kTokens) * 64;
                if (token >= p_.tokens || first >= p_.hidden_size) continue;
#pragma unroll
                for (int upper = 0; upper < 2; upper++) {
                    const auto sum = [&](int i) {
                        float d = y_[s][i][2 * upper + e];
                        if constexpr (kPartColumns == 2) d += y_[s][i][2 * upper + 1];
                        return fmaf(d, int4 && i % 2 ? factor / 16 : factor, -subtracted) * unscale;
                    };
                    if (int4) {
                        const int column = first + upper * 32 + row_ * 4;
                        if (column < p_.hidden_size) add(column, token, make_float4(sum(0), sum(1), sum(2), sum(3)));
                    } else {
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const int column = first + half * 32 + upper * 16 + row_ * 2;
                            if (column < p_.hidden_size)
                                add(column, token, make_float2(sum(2 * half), sum(2 * half + 1)));
                        }
                    }
                }
            }
        }
    }

  private:
    // The same value. What follows from it is computed after this point: ahead of the loop over batches it would take
    // registers for all kinds of rows at once.
    static __device__ __forceinline__ int computed_here(int value) {
        asm volatile("" : "+r"(value));
        return value;
    }

    // The columns of x that this lane's registers of B hold, of set s: of one block, the words that ldmatrix gives its
    // quad_. Zeros where there is no such column or token.
    struct Columns {
        static constexpr int kRun = kDotType == WeightType::kInt4 ? 8 : 4; // consecutive columns
        const T *from;
        int count; // columns from there on
        __device__ __forceinline__ void load(float (&out)[32]) const {
#pragma unroll
            for (int i = 0; i < 32; i += 4) {
                const int column = i / kRun * 4 * kRun + i % kRun;
                float part[8] = {};
                if (column < count) {
                    const uint2 bits = *reinterpret_cast<const uint2 *>(from + column);
                    decode(make_uint4(bits.x, bits.y, 0, 0), part, T{});
                }
#pragma unroll
                for (int k = 0; k < 4; k++) out[i + k] = part[k];
            }
        }
    };

    __device__ __forceinline__ Columns columns_of(const void *data, int s, int token) const {
        const int in_warp = s * kSetBlocks + row_ / kTokens, block = warp_ * kBlocks + in_warp;
        const bool exists = in_warp < kBlocks && block < blocks_ && token < p_.tokens;
        const int first = block * kPackedColumns + quad_ * Columns::kRun;
        return {static_cast<const T *>(data) + int64_t(token) * p_.hidden_size + first,
                exists ? int(p_.hidden_size) - first : 0};
    }

    // x as the operands of Unpack need it, in fp16, and its sums by groups of 64 columns, which offsets are multiplied
    // by.
    __device__ __forceinline__ void keep_x(int s, const float (&x)[32], float factor) {
        float sums[2] = {};
#pragma unroll
        for (int i = 0; i < 16; i++) {
            using Unpack = cats::Unpack<kDotType>;
            constexpr int kOperands = Unpack::kOperands;
            const int first = i / kOperands * 2 * kOperands + Unpack::first(i % kOperands),
                      second = first + Unpack::kStep;
            const float weight = kDotType == WeightType::kInt4 && i % 2 ? 16.f : 1.f; // of the operand
            const __half2 pair = __floats2half2_rn(x[first] * factor / weight, x[second] * factor / weight);
            x_[s][i] = reinterpret_cast<const uint32_t &>(pair);
            sums[i / 8] += (__low2float(pair) + __high2float(pair)) * weight;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sums[half] += __shfl_xor_sync(kAll, sums[half], 1);
            sums[half] += __shfl_xor_sync(kAll, sums[half], 2);
        }
#pragma unroll
        for (int e = 0; e < 2; e++) { // of this lane's columns of D
            const int from = quad_ * 8 + e * 4;
            x_sums_[s][e][0] = __shfl_sync(kAll, sums[0], from);
            x_sums_[s][e][1] = __shfl_sync(kAll, sums[1], from);
        }
    }

    static __device__ __forceinline__ float largest(const float (&x)[32]) {
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < 32; i++) most = fmaxf(most, fabsf(x[i]));
        return most;
    }

    // A power of two that brings the largest x of this lane's token in this warp to 2^14 or more.
    __device__ __forceinline__ float factor_for(float most) {
#pragma unroll
        for (int o = 1; o < 32; o *= 2)
            if (o < 4 || o >= 4 * kTokens) most = fmaxf(most, __shfl_xor_sync(kAll, most, o));
        // Its inverse is a power of two as well.
        const uint32_t exponent = min(127u + 14u + 127u - (__float_as_uint(most) >> 23), 253u);
        const float factor = most > 0.f ? __uint_as_float(exponent << 23) : 1.f;
#pragma unroll
        for (int e = 0; e < 2; e++) x_unscale_[e] = 1.f / __shfl_sync(kAll, factor, quad_ * 8 + e * 4);
        return factor;
    }

    // The scale of a group of 64 or 128 columns, counted through the row.
    template <WeightType kType>
    static __device__ __forceinline__ const uint8_t *scale_at(const uint8_t *row, const RowFormat &format,
                                                              int scale_bytes, int group, int group_shift) {
        const int shift = (kType == WeightType::kInt4 ? 10 : 9) - group_shift; // groups of a tile
        return row + (group >> shift) * (kTileChunks * kChunkBytes + scale_bytes) +
               (group & ((1 << shift) - 1)) * (format.zero_points ? 4 : 2);
    }

    // Block b of this warp's columns is not behind the end of a short row.
    __device__ __forceinline__ bool in_row(int b) const { return warp_ * kBlocks + b < blocks_; }

    // What lies behind the end of a short row is read as well. Its dot products are not used. In down rows it is
    // multiplied by zero: operands of integers are finite, whatever it is. racecheck would report that it may be about
    // to change.
    __device__ __forceinline__ bool is_read(int b) const {
#ifdef CATS_FOR_RACECHECK
        return in_row(b);
#else
        return true;
#endif
    }

    // Where block b of this warp begins in a row.
    template <WeightType kType> __device__ __forceinline__ uint32_t block_at(int b, int scale_bytes) const {
        constexpr int kTileBlocks = kType == WeightType::kInt4 ? 8 : 4;
        constexpr int kBlockBytes = kTileChunks * kChunkBytes / kTileBlocks;
        const int block = warp_ * kBlocks + b;
        return block / kTileBlocks * (kTileChunks * kChunkBytes + scale_bytes) + scale_bytes +
               block % kTileBlocks * kBlockBytes;
    }

    // kGroups: of 128 columns, with a scale each.
    template <WeightType kType, int kGroups>
    __device__ __forceinline__ void dot_products(int slot, const RowFormat &format) const {
        using Unpack = cats::Unpack<kType>;
        constexpr bool kInt4 = kType == WeightType::kInt4;
        const int scale_bytes = computed_here(format.scale_bytes), rows = ring_.rows();
        const uint8_t *first_row = ring_.row(slot, 0);
        const uint32_t stride = uint32_t(ring_.row(slot, 1) - first_row);
        const uint32_t low = smem_address(first_row) + lane_ % 8 * stride + lane_ / 8 * kChunkBytes,
                       high = low + (rows == 8 ? 0 : 8 * stride);
        float d[kSets][2][2][kGroups]; // [set][row, row + 8][column of D][group]
#pragma unroll
        for (int i = 0; i < kSets * 4 * kGroups; i++) (&d[0][0][0][0])[i] = 0.f;
#pragma unroll
        for (int s = 0; s < kSets; s++)
#pragma unroll kUnroll
            for (int b = 0; b < (s + 1 == kSets ? kBlocks - s * kSetBlocks : kSetBlocks); b++) {
                constexpr int kLoads = kInt4 ? 1 : 2; // ldmatrix reads 64 bytes of a row
                const int first = b * kTokens;        // column of B
                const uint32_t at = block_at<kType>(s * kSetBlocks + b, scale_bytes);
                float c[2][4] = {}; // by halves of the block
                if (!is_read(s * kSetBlocks + b)) continue;
#pragma unroll
                for (int load = 0; load < kLoads; load++) {
                    uint32_t lo[4], hi[4];
                    load_tiles<false>(lo, low + at + load * 64);
                    load_tiles<false>(hi, high + at + load * 64);
#pragma unroll
                    for (int i = 0; i < 4; i++)
#pragma unroll
                        for (int o = 0; o < Unpack::kOperands; o += 2) {
                            const uint32_t *x = x_[s] + (load * 4 + i) * Unpack::kOperands + o;
                            mma<__half>(c[kInt4 ? i / 2 : load], Unpack::operand(lo[i], o), Unpack::operand(hi[i], o),
                                        Unpack::operand(lo[i], o + 1), Unpack::operand(hi[i], o + 1), x[0], x[1]);
                        }
                }
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const bool mine =
                            quad_ >= first / 2 && quad_ < (first + kTokens + 1) / 2 && (kTokens > 1 || e == first % 2);
                        const float first_half = c[0][2 * r + e], second_half = c[1][2 * r + e];
                        float (&to)[kGroups] = d[s][r][e];
                        to[0] = mine ? (kGroups == 1 ? first_half + second_half : first_half) : to[0];
                        if constexpr (kGroups == 2) to[1] = mine ? second_half : to[1];
                    }
            }
        // Scales, and the sum over the blocks: of the two columns of D and over the lanes of a row.
        float dots[2][2] = {}; // [row, row + 8][token of this lane]
        constexpr int kShift = kGroups == 1 ? 7 : 6;
#pragma unroll
        for (int s = 0; s < kSets; s++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int in_warp = s * kSetBlocks + (2 * quad_ + e) / kTokens, block = warp_ * kBlocks + in_warp;
                if (in_warp >= kBlocks || block >= blocks_) continue;
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const uint8_t *row = first_row + (row_ + (rows == 8 ? 0 : 8 * r)) * stride;
                    float &dot = dots[r][kTokens == 1 ? 0 : e];
                    if constexpr (kType == WeightType::kFloat8) {
                        dot = fmaf(*reinterpret_cast<const float *>(row) * x_unscale_[e],
                                   d[s][r][e][0] * Unpack::kFactor, dot);
                        continue;
                    }
#pragma unroll
                    for (int g = 0; g < kGroups; g++) {
                        const uint8_t *scale = scale_at<kType>(row, format, scale_bytes, block * kGroups + g, kShift);
                        const float offset =
                            kInt4 && format.zero_points ? PackedRow::half_at(scale + 2) : Unpack::kOffset;
                        const float sum = kGroups == 1 ? x_sums_[s][e][0] + x_sums_[s][e][1] : x_sums_[s][e][g];
                        dot = fmaf(PackedRow::half_at(scale) * x_unscale_[e],
                                   fmaf(d[s][r][e][g], Unpack::kFactor, -offset * sum), dot);
                    }
                }
            }
        constexpr int kFirst = kTokens == 4 ? 2 : 1; // of 4 tokens, even and odd lanes have two each
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int e = 0; e < (kTokens == 1 ? 1 : 2); e++)
#pragma unroll
                for (int o = kFirst; o < 4; o *= 2) dots[r][e] += __shfl_xor_sync(kAll, dots[r][e], o);
        if (quad_ < kFirst) {
            float *to = ring_.partials(slot, warp_);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                if (r && rows == 8) break;
                float *values = to + (row_ + 8 * r) * kTokens;
                if constexpr (kTokens == 1) *values = dots[r][0];
                else reinterpret_cast<float2 *>(values)[quad_] = make_float2(dots[r][0], dots[r][1]);
            }
        }
    }

    template <WeightType kType> __device__ __forceinline__ void add_down_rows(int slot, const RowFormat &format) {
        using Unpack = cats::Unpack<kType>;
        constexpr bool kInt4 = kType == WeightType::kInt4, kFloat8 = kType == WeightType::kFloat8;
        const auto &state = ring_.state(slot);
        const int scale_bytes = computed_here(format.scale_bytes), rows = ring_.rows();
        const uint8_t *first_row = ring_.row(slot, 0);
        const uint32_t stride = uint32_t(ring_.row(slot, 1) - first_row);
        // The column of B that this lane holds: a group of 64 columns, a token, and for one token a part of h * scale.
        const int column_group = row_ / (kPartColumns * kTokens), token = row_ / kPartColumns % kTokens;
        int tile_row = lane_ % 8 + (rows == 8 ? 0 : lane_ / 8 % 2 * 8); // whose address this lane gives to ldmatrix
        if constexpr (kFloat8) { // an absent row may hold NaN codes: another one instead
            const bool absent = state.rows[tile_row].tokens == 0;
            const uint32_t present = __ballot_sync(kAll, !absent);
            if (!present) return;
            const int other = __shfl_sync(kAll, tile_row, __ffs(present) - 1);
            if (absent) tile_row = other;
        }
        const uint32_t tiles_at = smem_address(first_row) + tile_row * stride + lane_ / 16 * kChunkBytes;
        const int group_shift = format.group_size == 128 ? 7 : 6;
#pragma unroll
        for (int s = 0; s < kSums; s++) {
            const int group64 = warp_ * kBlocks * 2 + s * kShare + column_group;
            const bool exists = group64 < 2 * blocks_;
            float value[2][2], offset[2][2], most = 0.f; // of rows 2 * quad_, the next, and these + 8
#pragma unroll
            for (int k = 0; k < 2; k++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const uint8_t *row = first_row + (2 * quad_ + e + (rows == 8 ? 0 : 8 * k)) * stride;
                    const auto &row_state = state.rows[2 * quad_ + e + 8 * k];
                    const bool used = exists && row_state.tokens >> token & 1; // an absent row may hold anything
                    float scale = 0.f;
                    offset[k][e] = Unpack::kOffset;
                    if (is_read((s * kShare + column_group) / 2)) {
                        if constexpr (kFloat8) {
                            scale = *reinterpret_cast<const float *>(row);
                        } else {
                            const uint8_t *at =
                                scale_at<kType>(row, format, scale_bytes, group64 >> (group_shift - 6), group_shift);
                            scale = PackedRow::half_at(at);
                            if (kInt4 && format.zero_points) offset[k][e] = used ? PackedRow::half_at(at + 2) : 0.f;
                        }
                    }
                    value[k][e] = used ? row_state.values[token] * scale * h_factor_ : 0.f;
                    most = fmaxf(most, fabsf(value[k][e]));
                }
            if (__any_sync(kAll, most > kMostHalf)) {
                const float lower = lower_h_factor(most);
#pragma unroll
                for (int i = 0; i < 4; i++) value[i / 2][i % 2] *= lower;
            }
            uint32_t b[kParts][2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                __half2 pair = __floats2half2_rn(value[k][0], value[k][1]);
                const auto rest = [&] {
                    return __floats2half2_rn(value[k][0] - __low2float(pair), value[k][1] - __high2float(pair));
                };
                if (kPartColumns == 2 && row_ % 2) pair = rest();
#pragma unroll
                for (int part = 0; part < kParts; part++) {
                    if (part) pair = rest();
                    if constexpr (!kFloat8)
                        offsets_[s] =
                            fmaf(offset[k][0], __low2float(pair), fmaf(offset[k][1], __high2float(pair), offsets_[s]));
                    b[part][k] = reinterpret_cast<const uint32_t &>(pair);
                }
            }
#pragma unroll
            for (int share = 0; share < kShare; share++) {
                const int group = s * kShare + share; // of 64 columns, in this warp
                const bool mine = column_group == share;
                if (!(kFloat8 ? in_row(group / 2) : is_read(group / 2))) continue; // of fp8: no NaN codes into D
                const uint32_t at = tiles_at + block_at<kType>(group / 2, scale_bytes) + group % 2 * (kInt4 ? 32 : 64);
                constexpr int kLoads = kInt4 ? 1 : 2; // 16 rows of 32 bytes
#pragma unroll
                for (int load = 0; load < kLoads; load++) {
                    uint32_t t[4];
                    load_tiles<true>(t, at + load * 32);
#pragma unroll
                    for (uint32_t &word : t) word = Unpack::columns(word);
#pragma unroll
                    for (int i = 0; i < Unpack::kOperands; i++) {
                        const uint32_t a[4] = {Unpack::operand(t[0], i), Unpack::operand(t[2], i),
                                               Unpack::operand(t[1], i), Unpack::operand(t[3], i)};
#pragma unroll
                        for (int part = 0; part < kParts; part++)
                            mma<__half>(y_[s][load * Unpack::kOperands + i], a[0], a[1], a[2], a[3],
                                        mine ? b[part][0] : 0, mine ? b[part][1] : 0);
                    }
                }
            }
        }
    }

    // Makes room for values up to the warp's largest `most`. Returns what these values are to be multiplied by.
    __device__ __forceinline__ float lower_h_factor(float most) {
        if (!(most <= 3.4e38f)) most = 0.f; // infinite: y will be, too
#pragma unroll
        for (int o = 16; o; o /= 2) most = fmaxf(most, __shfl_xor_sync(kAll, most, o));
        if (!(most > kMostHalf)) return 1.f;
        const float lower = __uint_as_float((127u + 13u + 127u - (__float_as_uint(most) >> 23)) << 23);
        h_factor_ *= lower;
#pragma unroll
        for (int i = 0; i < kSums * 16; i++) (&y_[0][0][0])[i] *= lower;
#pragma unroll
        for (int s = 0; s < kSums; s++) offsets_[s] *= lower;
        return lower;
    }

    const SparseMlpParams &p_;
    const Ring<Batches> &ring_;
    const int lane_, warp_, quad_, row_; // row_: of D, or the column of B
    const int blocks_;                   // of 128 columns, in a row
    uint32_t x_[kSets][16];
    float x_sums_[kSets][2][2], x_unscale_[2];
    float y_[kSums][4][4]; // D: by groups of 64 columns that do not share
    float offsets_[kSums]; // what the offsets of the weights added, of this lane's rows and column of B
    float h_factor_;       // of h * scale and all that follows from it
};

} // namespace cats
