// Packed weights as operands of the tensor cores. Masked bits of a word of integers are two fp16 numbers as they are,
// subnormal ones. Such products are exact in fp32 and run at full speed.
#pragma once

#include "../row_format.h"

namespace cats {

// How a 32-bit word of a row, eight 4-bit or four 8-bit weights, becomes operands of two fp16 values each: weights
// first(i) and first(i) + kStep, divided by kFactor. columns(): of a word that has the same columns of two rows, so
// that each operand has one column of both. kOffset: of all weights of the type, beside zero points.
template <WeightType kType> struct Unpack;

template <> struct Unpack<WeightType::kInt4> { // of an odd operand times 2^-20 instead of 2^-24
    static constexpr int kOperands = 4, kStep = 4;
    static constexpr float kFactor = 16777216.f, kOffset = 8.f;
    static constexpr __device__ int first(int i) { return i; }
    static __device__ __forceinline__ uint32_t columns(uint32_t w) { return w; }
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        return w >> i / 2 * 8 & (i % 2 ? 0x00f000f0 : 0x000f000f);
    }
};

template <> struct Unpack<WeightType::kInt8> { // plus 128
    static constexpr int kOperands = 2, kStep = 2;
    static constexpr float kFactor = 16777216.f, kOffset = 128.f;
    static constexpr __device__ int first(int i) { return i; }
    static __device__ __forceinline__ uint32_t columns(uint32_t w) { return w; }
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        return (w >> i * 8 & 0x00ff00ff) ^ 0x00800080;
    }
};

template <> struct Unpack<WeightType::kFloat8> {
    static constexpr int kOperands = 2;
    static constexpr float kOffset = 0.f;
#if __CUDA_ARCH__ >= 890 // has an instruction for it, which makes NaN of NaN codes
    static constexpr int kStep = 1;
    static constexpr float kFactor = 1.f;
    static constexpr __device__ int first(int i) { return 2 * i; }
    static __device__ __forceinline__ uint32_t columns(uint32_t w) { return __byte_perm(w, 0, 0x3120); }
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        uint32_t halves;
        asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(uint16_t(w >> i * 16)));
        return halves;
    }
#else // the bits in their places of fp16, whose exponent has another bias
    static constexpr int kStep = 2;
    static constexpr float kFactor = 256.f;
    static constexpr __device__ int first(int i) { return i; }
    static __device__ __forceinline__ uint32_t columns(uint32_t w) { return w; }
    static __device__ __forceinline__ uint32_t operand(uint32_t w, int i) {
        return ((i ? w : w << 8) & 0x80008000) | ((i ? w >> 1 : w << 7) & 0x3f803f80);
    }
#endif
};

} // namespace cats
