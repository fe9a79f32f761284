// Packed rows (row_format.h): int4, int8 and fp8, widened to fp32, so that sums are as exact as those of dense rows.
// For dot products on integers see digits.inl.h.
#pragma once

#include "../vec.inl.h"

namespace cats::CATS_ISA {

template <WeightType type, int group_size, bool zero_points> struct PackedRow {
    typedef uint8_t Storage;
    static constexpr RowFormat kFormat = {type, group_size, zero_points};
    // A byte of int4 holds an even column and the odd one after it.
    static constexpr ColumnOrder kOrder = type == WeightType::kInt4 ? ColumnOrder::kEvenOdd : ColumnOrder::kConsecutive;
    static constexpr int64_t kTileColumns = kTileChunks * columns_per_chunk(type);
    static constexpr int kBlock = group_size ? group_size : kPackedColumns;
    static constexpr bool kScaled = true;
    // On AVX-512 an instruction looks the values of int4 up, with their offset.
    static constexpr bool kOffset = type == WeightType::kInt4 && CATS_VECTOR_BYTES != 64;

    struct Block {
        const uint8_t *data;
        VecF scale;
        VecF offset; // of int4: the zero point
        VecF values; // of int4 on AVX-512: of its 16 codes

        CATS_INLINE_MEMBER Group load(int i) const {
            if constexpr (type == WeightType::kInt4) {
                const VecU pairs = load_bytes(data + i / 2);
#if CATS_VECTOR_BYTES == 64
                // The low 4 bits of a lane choose its value.
                return {(VecF)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)pairs, (__m512)values),
                        (VecF)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)(pairs >> 4), (__m512)values)};
#else
                return {__builtin_convertvector((VecI)(pairs & 15), VecF),
                        __builtin_convertvector((VecI)(pairs >> 4), VecF)};
#endif
            } else {
                return {load_vector(data + i), load_vector(data + i + kLanes)};
            }
        }

        CATS_INLINE_MEMBER static VecF load_vector(const uint8_t *p) {
            if constexpr (type == WeightType::kInt8) return __builtin_convertvector(load_signed_bytes(p), VecF);
            else return load_e4m3(p);
        }
    };

    static constexpr int kTileScales = group_size ? int(kTileColumns) / group_size * (zero_points ? 2 : 1) : 1;

    int64_t ahead;                               // from this row to the next
    const uint8_t *data, *tile;                  // of the row, and after the scales of the open tile
    float scales[round_up(kTileScales, kLanes)]; // of the open tile, with the zero points between them

    PackedRow() = default;
    PackedRow(const uint8_t *data, const uint8_t *next) : ahead(next - data), data(data) {}

    CATS_INLINE_MEMBER void open(int64_t column) {
        const uint8_t *from = data + column / kTileColumns * (kTileChunks * kChunkBytes + kFormat.scale_bytes);
        tile = from + kFormat.scale_bytes;
        if constexpr (type == WeightType::kFloat8) {
            std::memcpy(scales, from, sizeof(float));
            scales[0] *= kE4m3Factor;
        } else { // the last vector may reach into the data
            for (int i = 0; i < kTileScales; i += kLanes)
                store(scales + i, cats::CATS_ISA::load(reinterpret_cast<const Half *>(from) + i));
        }
    }

    CATS_INLINE_MEMBER Block block(int64_t column, int64_t /*n: all of it*/) const {
        const int64_t i = column % kTileColumns;
        const float *scale = scales + (group_size ? i / kBlock * (zero_points ? 2 : 1) : 0);
        Block block = {tile + i / (type == WeightType::kInt4 ? 2 : 1), broadcast(scale[0]), {}, {}};
        // A hardware prefetcher has hardly started when a row of 2 to 4 KB ends. On one thread of a Xeon with AVX-512,
        // GB/s with and without: int8 dot 13 and 10, add 14 and 11; int4 dot 8 and 8, add 10 and 8. Into L1 the same.
        for (int line = 0; line < kBlock * kChunkBytes / columns_per_chunk(type); line += 64)
            __builtin_prefetch(block.data + ahead + line, 0, 2);
        if constexpr (type == WeightType::kInt4) {
            block.offset = broadcast(zero_points ? scale[1] : 8);
#if CATS_VECTOR_BYTES == 64
            block.values = VecF{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} - block.offset;
#endif
        }
        return block;
    }
};

} // namespace cats::CATS_ISA
