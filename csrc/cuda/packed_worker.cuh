// A worker warp of sparse_mlp_packed.cuh multiplies packed rows on the tensor cores, 16 rows of one batch with all of
// its columns.
//
//     gate, up:  D[16 neurons, 8] += W[16 neurons, 16 columns] B[16 columns, 8]
//     down:      D[16 columns, 8] += W^T[16 columns, 16 neurons] B[16 neurons, 8]
//
// The order of the columns in a dot product does not matter, so a lane multiplies the 32-bit words that ldmatrix gives
// it: masking and or-ing 4 bits of each half into a bf16 of 128 makes two weights (int8: two halves of two weights, of
// which the upper counts 16 times). The offset, 128 + z, is subtracted at the end, times the sum of what was
// multiplied. Products are exact in fp32.
//
// One token needs one of the 8 columns of B. The others hold what would otherwise take registers: in a dot product x of
// other blocks of 128 columns (only the diagonal of D is used), and for the down rows h of other groups of 64 columns,
// whose sums then share D. h * scale is a sum of two bf16 values, and so is x of fp16 or fp32.
//
// An infinite x or h makes NaN of what it reaches.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "ring.cuh"
#include "rows/packed.cuh"
#include "values.cuh"

namespace cats {

// The bits that `mask` selects of w, flipped and completed by those of `with`.
__device__ __forceinline__ uint32_t masked_xor(uint32_t w, uint32_t mask, uint32_t with) {
    uint32_t out;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(w), "r"(mask), "r"(with));
    return out;
}

// How one register of ldmatrix, eight 4-bit or four 8-bit weights, becomes operands of two bf16 values each.
template <WeightType kType> struct Unpack;

template <> struct Unpack<WeightType::kInt4> { // operand i: 128 + nibbles i and i + 4
    static constexpr int kOperands = 4;
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        return masked_xor(w >> 4 * i, 0x000f000f, 0x43004300);
    }
};

template <> struct Unpack<WeightType::kInt8> { // operand 2 i + upper: 128 + a half of bytes i and i + 2, of q + 128
    static constexpr int kOperands = 4;
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        return masked_xor(w >> 4 * i, 0x000f000f, i % 2 ? 0x43084308 : 0x43004300);
    }
};

template <> struct Unpack<WeightType::kFloat8> { // operand i: bytes i and i + 2, times 2^-120: other exponent bias
    static constexpr int kOperands = 2;
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        const uint32_t sign = (i ? w : w << 8) & 0x80008000, rest = (i ? w >> 4 : w << 4) & 0x07f007f0;
        return sign | rest;
    }
};

// Of fp8: x and h are multiplied by 2^60, and so are the results.
constexpr float kFloat8Factor = 1152921504606846976.f;

// The offset of a weight that its operands have, beside its zero point: 128, or 128 + 16 * 128 + 128.
constexpr float kInt4Offset = 128.f, kInt8Offset = 2304.f;

template <WeightType kDotType, typename T, int kTokens, int kWorkers, int kBlocks> class PackedWorker {
    static constexpr uint32_t kAll = 0xffffffffu;
    static constexpr int kParts = std::is_same_v<T, __nv_bfloat16> ? 1 : 2; // bf16 values that make up an x
    static constexpr int kSetBlocks = 8 / kTokens;                          // column of B: block % kSetBlocks, token
    static constexpr int kSets = (kBlocks + kSetBlocks - 1) / kSetBlocks;   // of x
    // h * scale is a sum of two bf16 values: in a column of B each for one token, otherwise one after the other.
    static constexpr int kPartColumns = kTokens == 1 ? 2 : 1;
    static constexpr int kShare = 8 / (kTokens * kPartColumns); // groups of 64 columns that share D
    static constexpr int kSums = 2 * kBlocks / kShare;
    static constexpr int kUnrolledBlocks = 1;
    static constexpr BatchSizes kSizes = packed_batches(kTokens, kWorkers);
    static_assert((kTokens == 1 || kTokens == 2 || kTokens == 4) && 2 * kBlocks % kShare == 0);

  public:
    using Batches = cats::Batches<kSizes.rows, kTokens, kWorkers, kSizes.max_pending, true>;

    __device__ PackedWorker(const SparseMlpParams &p, const Ring<Batches> &ring, int warp)
        : p_(p), ring_(ring), lane_(threadIdx.x % 32), warp_(warp), quad_(lane_ % 4), row_(lane_ / 4),
          blocks_(ceil_div(p.hidden_size, kPackedColumns)) {}

    // Before the previous kernel has ended: what it does not write.
    __device__ __forceinline__ void load_norm(float (&norm)[32]) const { load_columns(p_.norm_weight, 0, 0, norm); }

    __device__ void load_x() {
#pragma unroll
        for (int s = 0; s < kSets; s++) {
            float x[32];
            load_columns(p_.x, s, token_of_column(row_), x);
            split(s, x);
        }
        sum_x();
    }

    // One token: x / rms(x) * norm weight, rounded where separate operations round.
    __device__ void load_normalised_x(const float (&norm)[32]) {
        __shared__ float squares[kWorkers];
        float x[32], sum = 0.f;
        load_columns(p_.x, 0, 0, x);
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
        split(0, x);
        sum_x();
    }

    __device__ void run() {
#pragma unroll
        for (int i = 0; i < kSums * 16; i++) (&y_[0][0][0])[i] = 0.f;
#pragma unroll
        for (int s = 0; s < kSums; s++) offset_[s] = 0.f;
        typename Ring<Batches>::Cursor at;
        while (true) {
            wait(ring_.full(at.slot), at.parity);
            const RowKind kind = ring_.state(at.slot).kind;
            if (kind == RowKind::kEnd) break;
            const RowFormat &format = format_of(p_, kind);
            if (kind != RowKind::kDown) {
                if (kDotType == WeightType::kFloat8 || format.group_size == 128)
                    dot_products<kDotType, 1>(at.slot, format);
                else dot_products<kDotType, 2>(at.slot, format);
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
        const float factor = p_.down_format.type == WeightType::kFloat8 ? kFloat8Factor : 1.f;
#pragma unroll
        for (int s = 0; s < kSums; s++) {
            float offset = offset_[s]; // over the rows, and the parts
#pragma unroll
            for (int o = 1; o < 4 * kPartColumns; o *= 2) offset += __shfl_xor_sync(kAll, offset, o);
#pragma unroll
            for (int e = 0; e < 2 / kPartColumns; e++) { // of this lane's columns of D
                const float subtracted = __shfl_sync(kAll, offset, quad_ * 8 + e * 4);
                const int column_of_d = quad_ * (2 / kPartColumns) + e, token = column_of_d % kTokens;
                const int first = (warp_ * kBlocks * 2 + s * kShare + column_of_d / kTokens) * 64;
                if (token >= p_.tokens || first >= p_.hidden_size) continue;
#pragma unroll
                for (int upper = 0; upper < 2; upper++) {
                    const auto sum = [&](int i) {
                        float d = y_[s][i][2 * upper + e];
                        if constexpr (kPartColumns == 2) d += y_[s][i][2 * upper + 1];
                        return (d - subtracted) * factor;
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

    static __device__ __forceinline__ int token_of_column(int column) { return column % kTokens; }

    // The columns of x that this lane's registers of B hold, of set s: of one block, the words that ldmatrix gives its
    // quad_. Zeros where there is no such column or token.
    __device__ __forceinline__ void load_columns(const void *data, int s, int token, float (&out)[32]) const {
        const int block = warp_ * kBlocks + s * kSetBlocks + row_ / kTokens;
        const bool exists = row_ / kTokens + s * kSetBlocks < kBlocks && block < blocks_ && token < p_.tokens;
        const T *from = static_cast<const T *>(data) + int64_t(token) * p_.hidden_size;
        const auto load = [&](auto run) { // of consecutive columns
            constexpr int kRun = decltype(run)::value;
#pragma unroll
            for (int i = 0; i < 32 / kRun; i++) {
                const int column = block * kPackedColumns + (i * 4 + quad_) * kRun;
                float values[kRun] = {};
                if (exists && column < p_.hidden_size) {
#pragma unroll
                    for (int e = 0; e < kRun; e += 4) {
                        float part[4];
                        load_four(from + column + e, part);
#pragma unroll
                        for (int k = 0; k < 4; k++) values[e + k] = part[k];
                    }
                }
#pragma unroll
                for (int e = 0; e < kRun; e++) out[i * kRun + e] = values[e];
            }
        };
        if (kDotType == WeightType::kInt4) load(std::integral_constant<int, 8>{});
        else load(std::integral_constant<int, 4>{});
    }

    static __device__ __forceinline__ void load_four(const T *from, float (&out)[4]) {
        if constexpr (sizeof(T) == 4) {
            decode(*reinterpret_cast<const uint4 *>(from), out, float{});
        } else {
            const uint2 bits = *reinterpret_cast<const uint2 *>(from);
            float wide[8];
            decode(make_uint4(bits.x, bits.y, 0, 0), wide, T{});
#pragma unroll
            for (int k = 0; k < 4; k++) out[k] = wide[k];
        }
    }

    // Pairs of columns of one word: those that an operand of Unpack has.
    __device__ __forceinline__ void split(int s, const float (&x)[32]) {
        const float factor = kDotType == WeightType::kFloat8 ? kFloat8Factor : 1.f;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int of8 = i / 4 * 8 + i % 4, of4 = i / 2 * 4 + i % 2;
            const bool int4 = kDotType == WeightType::kInt4;
            float low = (int4 ? x[of8] : x[of4]) * factor, high = (int4 ? x[of8 + 4] : x[of4 + 2]) * factor;
#pragma unroll
            for (int part = 0; part < kParts; part++) {
                const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
                x_[part][s][i] = reinterpret_cast<const uint32_t &>(pair);
                low -= __low2float(pair), high -= __high2float(pair);
            }
        }
    }

    // Sums of x by groups of 64 columns, as the offsets are multiplied by: of this lane's two columns of D.
    __device__ __forceinline__ void sum_x() {
#pragma unroll
        for (int s = 0; s < kSets; s++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = 0.f;
#pragma unroll
                for (int i = 0; i < 8; i++)
#pragma unroll
                    for (int part = 0; part < kParts; part++) {
                        const uint32_t pair = x_[part][s][half * 8 + i];
                        sum += __uint_as_float(pair << 16) + __uint_as_float(pair & 0xffff0000u);
                    }
                sum += __shfl_xor_sync(kAll, sum, 1);
                sum += __shfl_xor_sync(kAll, sum, 2);
                x_sum_[s][0][half] = __shfl_sync(kAll, sum, quad_ * 8);
                x_sum_[s][1][half] = __shfl_sync(kAll, sum, quad_ * 8 + 4);
            }
    }

    // Of a group of 64 or 128 columns, counted through the row.
    template <WeightType kType>
    static __device__ __forceinline__ const uint8_t *scale_at(const uint8_t *row, const RowFormat &format,
                                                              int scale_bytes, int group, int group_shift) {
        // groups of a tile: 1024 or 512 columns
        const int shift = (kType == WeightType::kInt4 ? 10 : 9) - group_shift;
        return row + (group >> shift) * (kTileChunks * kChunkBytes + scale_bytes) +
               (group & ((1 << shift) - 1)) * (format.zero_points ? 4 : 2);
    }

    // Where block b of this warp begins in a row.
    template <WeightType kType> __device__ __forceinline__ uint32_t block_at(int b, int scale_bytes) const {
        constexpr int kTileBlocks = kType == WeightType::kInt4 ? 8 : 4,
                      kBlockBytes = kTileChunks * kChunkBytes / kTileBlocks;
        const int block = warp_ * kBlocks + b;
        return block / kTileBlocks * (kTileChunks * kChunkBytes + scale_bytes) + scale_bytes +
               block % kTileBlocks * kBlockBytes;
    }

    // kGroups: of 128 columns, with a scale each.
    template <WeightType kType, int kGroups>
    __device__ __forceinline__ void dot_products(int slot, const RowFormat &format) const {
        using Unpack = cats::Unpack<kType>;
        constexpr bool kInt4 = kType == WeightType::kInt4, kInt8 = kType == WeightType::kInt8;
        const int scale_bytes = computed_here(format.scale_bytes()), rows = ring_.rows();
        const uint8_t *first_row = ring_.row(slot, 0);
        const uint32_t stride = uint32_t(ring_.row(slot, 1) - first_row);
        const uint32_t low = smem_address(first_row) + lane_ % 8 * stride + lane_ / 8 * kChunkBytes,
                       high = low + (rows == 8 ? 0 : 8 * stride);
        float d[kSets][2][2][kGroups]; // [set][row, row + 8][column of D][group]
#pragma unroll
        for (int i = 0; i < kSets * 4 * kGroups; i++) (&d[0][0][0][0])[i] = 0.f;
#pragma unroll
        for (int s = 0; s < kSets; s++)
#pragma unroll kUnrolledBlocks
            for (int i_block = 0; i_block < (s + 1 == kSets ? kBlocks - s * kSetBlocks : kSetBlocks); i_block++) {
                constexpr int kLoads = kInt4 ? 1 : 2; // ldmatrix reads 64 bytes of a row
                const int first = i_block * kTokens;
                const uint32_t at = block_at<kType>(s * kSetBlocks + i_block, scale_bytes);
                float c[2][4] = {}, c_upper[2][4] = {}; // by halves of the block; int8: of the upper bits
#pragma unroll
                for (int load = 0; load < kLoads; load++) {
                    uint32_t lo[4], hi[4];
                    load_tiles<false>(lo, low + at + load * 64);
                    load_tiles<false>(hi, high + at + load * 64);
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int half = kInt4 ? i / 2 : load;
#pragma unroll
                        for (int part = 0; part < kParts; part++) {
                            const uint32_t *x = x_[part][s] + (kInt4 ? i * 4 : (load * 4 + i) * 2);
                            const auto multiply = [&](float (&sum)[4], int first_operand, int second_operand,
                                                      int at_x) {
                                mma<__nv_bfloat16>(sum, Unpack::operand(lo[i], first_operand),
                                                   Unpack::operand(hi[i], first_operand),
                                                   Unpack::operand(lo[i], second_operand),
                                                   Unpack::operand(hi[i], second_operand), x[at_x], x[at_x + 1]);
                            };
                            if constexpr (kInt4) multiply(c[half], 0, 1, 0), multiply(c[half], 2, 3, 2);
                            else if constexpr (kInt8) multiply(c[half], 0, 2, 0), multiply(c_upper[half], 1, 3, 0);
                            else multiply(c[half], 0, 1, 0);
                        }
                    }
                }
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const bool mine =
                            quad_ >= first / 2 && quad_ < (first + kTokens + 1) / 2 && (kTokens > 1 || e == first % 2);
                        float value[2];
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            value[half] = c[half][2 * r + e];
                            if constexpr (kInt8) value[half] = fmaf(16.f, c_upper[half][2 * r + e], value[half]);
                        }
                        if (mine) {
                            if constexpr (kGroups == 1) d[s][r][e][0] = value[0] + value[1];
                            else d[s][r][e][0] = value[0], d[s][r][e][kGroups - 1] = value[1];
                        }
                    }
            }
        // Scales, and the sum over the blocks: of the two columns of D and over the lanes of a row.
        float dots[2][2] = {}; // [row, row + 8][token of this lane]
        constexpr int kShift = kGroups == 1 ? 7 : 6;
        constexpr float kOffset = kInt4 ? kInt4Offset : (kInt8 ? kInt8Offset : 0.f);
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
                    if constexpr (kInt4 || kInt8) {
#pragma unroll
                        for (int g = 0; g < kGroups; g++) {
                            const uint8_t *scale =
                                scale_at<kType>(row, format, scale_bytes, block * kGroups + g, kShift);
                            float offset = kOffset + (kInt4 ? 8.f : 0.f);
                            if (kInt4 && format.zero_points) offset = kOffset + PackedRow::half_at(scale + 2);
                            const float sum = kGroups == 1 ? x_sum_[s][e][0] + x_sum_[s][e][1] : x_sum_[s][e][g];
                            dot = fmaf(PackedRow::half_at(scale), d[s][r][e][g] - offset * sum, dot);
                        }
                    } else {
                        dot = fmaf(*reinterpret_cast<const float *>(row) * kFloat8Factor, d[s][r][e][0], dot);
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
        constexpr bool kInt4 = kType == WeightType::kInt4, kInt8 = kType == WeightType::kInt8;
        const auto &state = ring_.state(slot);
        const int scale_bytes = computed_here(format.scale_bytes()), rows = ring_.rows();
        const uint8_t *first_row = ring_.row(slot, 0);
        const uint32_t stride = uint32_t(ring_.row(slot, 1) - first_row);
        // The column of B that this lane holds: a group of 64 columns, a token, and for one token a part of h * scale.
        const int column_group = row_ / (kPartColumns * kTokens), token = row_ / kPartColumns % kTokens;
        constexpr int kInTurn = 2 / kPartColumns; // parts one after the other
        float h[4];
#pragma unroll
        for (int k = 0; k < 4; k++) { // neurons 2 * quad_, the next, and these + 8
            const int r = 2 * quad_ + k % 2 + k / 2 * 8;
            const auto &row = state.rows[r];
            h[k] = row.tokens >> token & 1 ? row.values[token] : 0.f;
        }
        const uint32_t tiles_at = smem_address(first_row) + (lane_ % 8 + (rows == 8 ? 0 : lane_ / 8 % 2 * 8)) * stride +
                                  lane_ / 16 * kChunkBytes;
        const int group_shift = format.group_size == 128 ? 7 : 6;
#pragma unroll
        for (int s = 0; s < kSums; s++) {
            const int group64 = warp_ * kBlocks * 2 + s * kShare + column_group;
            const bool exists = group64 < 2 * blocks_;
            uint32_t b[kInTurn][2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float value[2], offset[2];
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int r = 2 * quad_ + e + (rows == 8 ? 0 : 8 * k);
                    const uint8_t *row = first_row + r * stride;
                    float scale;
                    offset[e] = kInt4 ? kInt4Offset + 8.f : kInt8Offset;
                    if constexpr (kInt4 || kInt8) {
                        const uint8_t *at =
                            scale_at<kType>(row, format, scale_bytes, group64 >> (group_shift - 6), group_shift);
                        scale = PackedRow::half_at(at);
                        if (kInt4 && format.zero_points) offset[e] = kInt4Offset + PackedRow::half_at(at + 2);
                    } else {
                        scale = *reinterpret_cast<const float *>(row) * kFloat8Factor;
                    }
                    // An absent row may hold anything.
                    const bool used = exists && state.rows[2 * quad_ + e + 8 * k].tokens >> token & 1;
                    value[e] = used ? h[2 * k + e] * scale : 0.f;
                    offset[e] = used ? offset[e] : 0.f;
                }
                __nv_bfloat162 pair = __floats2bfloat162_rn(value[0], value[1]);
                const auto rest = [&] {
                    return __floats2bfloat162_rn(value[0] - __low2float(pair), value[1] - __high2float(pair));
                };
                if (kPartColumns == 2 && row_ % 2) pair = rest();
#pragma unroll
                for (int part = 0; part < kInTurn; part++) {
                    if (part) pair = rest();
                    if constexpr (kInt4 || kInt8)
                        offset_[s] =
                            fmaf(offset[0], __low2float(pair), fmaf(offset[1], __high2float(pair), offset_[s]));
                    b[part][k] = reinterpret_cast<const uint32_t &>(pair);
                }
            }
#pragma unroll
            for (int share = 0; share < kShare; share++) {
                const int group = s * kShare + share; // of 64 columns, in this warp
                const bool mine = column_group == share;
                const uint32_t at = tiles_at + block_at<kType>(group / 2, scale_bytes) + group % 2 * (kInt4 ? 32 : 64);
                constexpr int kLoads = kInt4 ? 1 : 2; // 16 rows of 32 bytes
#pragma unroll
                for (int load = 0; load < kLoads; load++) {
                    uint32_t t[4];
                    load_tiles<true>(t, at + load * 32);
#pragma unroll
                    for (int i = 0; i < (kInt4 ? 4 : 2); i++) {
                        float (&sum)[4] = y_[s][kInt4 ? i : 2 * load + i];
                        const auto multiply = [&](int operand, auto factor) {
                            const uint32_t a[4] = {Unpack::operand(t[0], operand), Unpack::operand(t[2], operand),
                                                   Unpack::operand(t[1], operand), Unpack::operand(t[3], operand)};
#pragma unroll
                            for (int part = 0; part < kInTurn; part++)
                                mma<__nv_bfloat16>(sum, a[0], a[1], a[2], a[3], mine ? factor(b[part][0]) : 0,
                                                   mine ? factor(b[part][1]) : 0);
                        };
                        const auto once = [](uint32_t pair) { return pair; };
                        if constexpr (kInt8) multiply(2 * i, once), multiply(2 * i + 1, times_16);
                        else multiply(i, once);
                    }
                }
            }
        }
    }

    static __device__ __forceinline__ uint32_t times_16(uint32_t pair) {
        const __nv_bfloat162 product =
            __hmul2(reinterpret_cast<const __nv_bfloat162 &>(pair), __floats2bfloat162_rn(16.f, 16.f));
        return reinterpret_cast<const uint32_t &>(product);
    }

    const SparseMlpParams &p_;
    const Ring<Batches> &ring_;
    const int lane_, warp_, quad_, row_; // row_: of D, or the column of B
    const int blocks_;                   // of 128 columns, in a row
    uint32_t x_[kParts][kSets][16];
    float x_sum_[kSets][2][2];
    float y_[kSums][4][4]; // D: by groups of 64 columns that do not share
    float offset_[kSums];  // what the offsets of the weights added, of this lane's rows and column of B
};

} // namespace cats
