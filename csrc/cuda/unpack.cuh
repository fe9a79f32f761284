// Packed weights as operands of the tensor cores: masked bits of a word are two fp16 numbers as they are, subnormal
// ones. Such products are exact in fp32 and run at full speed.
#pragma once

#include "../row_format.h"

namespace cats {

// How a 32-bit word of a row, eight 4-bit or four 8-bit weights, becomes operands of two fp16 values each.
// kOffset: of all weights of the type, beside zero points.
template <WeightType kType> struct Unpack;

template <> struct Unpack<WeightType::kInt4> { // operand i: 4-bit weights i and i + 4, times 2^-24, if i is odd 2^-20
    static constexpr int kOperands = 4;
    static constexpr float kFactor = 16777216.f, kOffset = 8.f;
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        return w >> i / 2 * 8 & (i % 2 ? 0x00f000f0 : 0x000f000f);
    }
};

template <> struct Unpack<WeightType::kInt8> { // operand i: weights i and i + 2, plus 128, times 2^-24
    static constexpr int kOperands = 2;
    static constexpr float kFactor = 16777216.f, kOffset = 128.f;
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        return (w >> i * 8 & 0x00ff00ff) ^ 0x00800080;
    }
};

template <> struct Unpack<WeightType::kFloat8> { // operand i: weights i and i + 2, times 2^-8: other exponent bias
    static constexpr int kOperands = 2;
    static constexpr float kFactor = 256.f, kOffset = 0.f;
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        return ((i ? w : w << 8) & 0x80008000) | ((i ? w >> 1 : w << 7) & 0x3f803f80);
    }
};

} // namespace cats
