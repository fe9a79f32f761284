// Dot products of packed int4 and int8 rows with x of 16 bits by vpdpbusd, which multiplies bytes and adds four
// products to a 32-bit integer. x becomes integers of three bytes, with a power of two for each piece of a row: it is
// rounded by at most 2^-21 of the piece's largest x. Two bytes, 2^-14, make errors that show in results of 16 bits. x
// in fp32 is multiplied in fp32.
#pragma once

#include "dense.inl.h"
#include "packed.inl.h"

namespace cats::CATS_ISA {

// x of one token at the columns of a piece of a row, which is 64 bytes: the sum of 256^i * bytes[i], times scale. A
// lane sums up the products of 4 bytes of the row.
template <WeightType type> struct alignas(64) Digits {
    static constexpr int kColumns = 64 / kChunkBytes * columns_per_chunk(type);
    static constexpr int kParts = type == WeightType::kInt4 ? 2 : 1;      // of int4 the even columns, and the odd ones
    static constexpr int kLog2Offset = type == WeightType::kInt4 ? 3 : 7; // a code stands for 8 or 128 less
    static constexpr int kBytes = 3;
    int8_t bytes[kBytes][kParts][64];
    int32_t sums[kLanes]; // of the integers
    float scale;          // NaN if an x is not finite
};

template <WeightType weight_type, int group_size, bool zero_points, class T>
struct DotOperand<PackedRow<weight_type, group_size, zero_points>, T> {
    static constexpr bool kDigits = weight_type != WeightType::kFloat8 && !std::is_same_v<T, float>;
    typedef std::conditional_t<kDigits, Digits<weight_type>, float> type;
};

template <WeightType type> constexpr int kOperandColumns<Digits<type>> = Digits<type>::kColumns;
template <class Row, WeightType type> constexpr int kDotColumns<Row, Digits<type>> = Digits<type>::kColumns;

// The digits of one piece, of which the first n columns are x and the others zero.
template <WeightType type, class T> CATS_INLINE Digits<type> digits_of(const T *from, int64_t n) {
    constexpr int kColumns = Digits<type>::kColumns, kParts = Digits<type>::kParts;
    VecF x[kColumns / kLanes];
    VecI largest = {}; // bits of the largest |x|: those of NaN are more than those of infinity
    for (int i = 0; i < kColumns / kLanes; i++) {
        const int64_t left = n - i * kLanes;
        x[i] = load(from + i * kLanes, left > 0 ? left : 0);
        const VecI bits = (VecI)abs(x[i]);
        largest = bits > largest ? bits : largest;
    }
    int32_t most = 0;
    for (int lane = 0; lane < kLanes; lane++) most = largest[lane] > most ? largest[lane] : most;

    Digits<type> digits = {};
    if (most >= 0x7f800000) {
        digits.scale = __builtin_nanf("");
        return digits;
    }
    // The largest becomes 2^20 or more, and less than 2^21; if it is subnormal, less. In two steps: 2^146 is no fp32.
    const int exponent = min(20 - ((most >> 23) - 127), 146), half = exponent / 2;
    const float first = __builtin_ldexpf(1.f, half), second = __builtin_ldexpf(1.f, exponent - half);
    digits.scale = __builtin_ldexpf(1.f, -exponent);
    for (int i = 0; i < kColumns / kLanes; i++) {
        VecI value = (VecI)(x[i] * first * second + 0x1.8p23f) - 0x4b400000; // the sum rounds to an integer
        for (int lane = 0; lane < kLanes; lane++) digits.sums[(i * kLanes + lane) / kParts / 4] += value[lane];
        for (int k = 0; k < Digits<type>::kBytes; k++) {
            const VecI last = ((value + 128) & 255) - 128;
            value = (value - last) >> 8;
            for (int lane = 0; lane < kLanes; lane++) {
                const int column = i * kLanes + lane;
                digits.bytes[k][column % kParts][column / kParts] = int8_t(last[lane]);
            }
        }
    }
    return digits;
}

template <class Row, class T, WeightType type>
CATS_INLINE void make_operand(Digits<type> *to, const T *from, int64_t n, int64_t padded) {
    for (int64_t c = 0; c < padded; c += Digits<type>::kColumns) *to++ = digits_of<type>(from + c, n - c);
}

// Of each lane the group's entry in `from`, where a piece has kGroups of them, kStride apart.
template <int kGroups, int kStride> CATS_INLINE VecF by_group(const float *from) {
    if constexpr (kGroups == 1) return broadcast(from[0]);
    VecI index;
    for (int lane = 0; lane < kLanes; lane++) index[lane] = lane * kGroups / kLanes * kStride;
    const __m512 found = _mm512_maskz_loadu_ps((1 << ((kGroups - 1) * kStride + 1)) - 1, from);
    return (VecF)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, found);
}

// acc[r][t] + rows[r] . x[t] over one piece.
template <int Rows, int Tokens, class Row, WeightType type>
CATS_INLINE void dot_block(VecF (&acc)[Rows][Tokens], const Row *rows, int64_t column, int64_t /*n: all of it*/,
                           const Digits<type> *const *x) {
    typedef Digits<type> X;
    constexpr bool kInt4 = type == WeightType::kInt4;
    constexpr int kGroups = Row::kBlock < X::kColumns ? X::kColumns / Row::kBlock : 1;
    constexpr int kStride = Row::kFormat.zero_points ? 2 : 1;
    const int64_t in_tile = column % Row::kTileColumns;
    const X *at[Tokens];
    for (int t = 0; t < Tokens; t++) at[t] = x[t] + column / X::kColumns;
    for (int r = 0; r < Rows; r++) {
        const uint8_t *data = rows[r].tile + in_tile * 64 / X::kColumns;
        __builtin_prefetch(data + rows[r].ahead, 0, 2);
        const float *scales = rows[r].scales + in_tile / Row::kBlock * kStride;
        const VecF scale = by_group<kGroups, kStride>(scales);
        VecU codes[X::kParts] = {load_bits<VecU>(data)};
        if constexpr (kInt4) codes[1] = codes[0] >> 4 & 0x0f0f0f0f, codes[0] &= 0x0f0f0f0f;
        else codes[0] ^= 0x80808080;
        for (int t = 0; t < Tokens; t++) {
            const VecI sums = load_bits<VecI>(at[t]->sums);
            VecU total = {}; // wraps around on the way
            for (int k = X::kBytes - 1; k >= 0; k--) {
                __m512i products = (__m512i)(total << 8);
                if (kStride == 1 && k == 0) products = (__m512i)((VecU)products - ((VecU)sums << X::kLog2Offset));
                for (int part = 0; part < X::kParts; part++)
                    products =
                        _mm512_dpbusd_epi32(products, (__m512i)codes[part], load_bits<__m512i>(at[t]->bytes[k][part]));
                total = (VecU)products;
            }
            VecF products = __builtin_convertvector((VecI)total, VecF);
            if constexpr (kStride == 2)
                products -= by_group<kGroups, kStride>(scales + 1) * __builtin_convertvector(sums, VecF);
            acc[r][t] = fma(scale * products, broadcast(at[t]->scale), acc[r][t]);
        }
    }
}

} // namespace cats::CATS_ISA
