// Packed rows (../../row_format.h) as an operand of wgmma: what a thread holds of it in registers.
#pragma once

#include "../values.cuh"
#include "packed.cuh"

namespace cats {

constexpr int kBoxRows = 128, kBoxColumns = 128; // what lies in shared memory of a matrix of packed rows

// Two values of T in one register, the first in the lower half.
template <typename T> __device__ __forceinline__ uint32_t rounded_pair(float first, float second) {
    uint32_t pair;
    if constexpr (std::is_same_v<T, __half>) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}

// Numbers of one scale. The bits of an integer weight become the last places of an fp32 number of a power of two, and
// one multiply-add takes that off again: exact before it is rounded, except that with a zero point the product that is
// taken off is rounded, too, to 2^-13 of the scale.
template <WeightType kType, bool kZeroPoints> struct PackedNumbers {
    float scale, offsets[2];

    // bits: of the scale in fp16, and above them of the zero point; fp8: of the scale in fp32.
    __device__ __forceinline__ explicit PackedNumbers(uint32_t bits) {
        if constexpr (kType == WeightType::kFloat8) {
            scale = __uint_as_float(bits);
        } else {
            scale = __half2float(__ushort_as_half(uint16_t(bits)));
            if constexpr (kType == WeightType::kInt8) {
                offsets[0] = -(32768.f + 128.f) * scale;
            } else if constexpr (kZeroPoints) {
                const float zero = __half2float(__ushort_as_half(uint16_t(bits >> 16)));
                offsets[0] = -(2048.f + zero) * scale, offsets[1] = -(128.f + zero) * scale;
            } else {
                offsets[0] = -(2048.f + 8.f) * scale, offsets[1] = -(128.f + 8.f) * scale;
            }
        }
    }

    static __device__ __forceinline__ uint32_t scale_bits(const uint8_t *of_group) {
        if constexpr (kType == WeightType::kFloat8 || kZeroPoints) return *reinterpret_cast<const uint32_t *>(of_group);
        else return *reinterpret_cast<const uint16_t *>(of_group);
    }

    // Two neighbouring columns: of int4 in bits 12 to 19, otherwise in the lower 16 bits.
    __device__ __forceinline__ float2 values(uint32_t bits) const {
        if constexpr (kType == WeightType::kInt4) {
            const float first = __uint_as_float(masked(bits, 0x0000f000, 0x45000000)), // 2048
                second = __uint_as_float(masked(bits, 0x000f0000, 0x43000000));        // 128
            return make_float2(fmaf(first, scale, offsets[0]), fmaf(second, scale, offsets[1]));
        } else if constexpr (kType == WeightType::kInt8) { // plus 128, in bits 8 to 15 of 32768
            const uint32_t positive = bits ^ 0x8080;
            const float first = __uint_as_float(__byte_perm(positive, 0x47000000, 0x7604)),
                        second = __uint_as_float(__byte_perm(positive, 0x47000000, 0x7614));
            return make_float2(fmaf(first, scale, offsets[0]), fmaf(second, scale, offsets[0]));
        } else {
            const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(bits), __NV_E4M3);
            const float2 codes = __half22float2(__half2(halves));
            return make_float2(codes.x * scale, codes.y * scale);
        }
    }

    // (word & mask) | rest in one instruction: with constants that the compiler knows it takes two.
    static __device__ __forceinline__ uint32_t masked(uint32_t word, uint32_t mask, uint32_t rest) {
        asm("mov.b32 %0, %0;" : "+r"(mask));
        asm("mov.b32 %0, %0;" : "+r"(rest));
        uint32_t result;
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "r"(mask), "r"(rest));
        return result;
    }
};

// A thread's part of A [128 outputs, 128 inputs], of which each of 8 warps has 16 outputs. Rows are those of outputs or
// of inputs, 128 of them in shared memory, as copies with the widest swizzle leave them (64 bytes of int4, otherwise
// 128), and beside them 16 bytes of each that hold its scales. Rows l / 4 and l / 4 + 8 of the operand of lane l are
// two neighbouring outputs: 2 (l / 4) and the next.
template <WeightType kType, bool kZeroPoints, typename T, bool kInputRows> struct PackedFragment {
    using Numbers = PackedNumbers<kType, kZeroPoints>;
    static constexpr int kRowBytes = kBoxColumns / columns_per_chunk(kType) * kChunkBytes;
    static constexpr bool kInt4 = kType == WeightType::kInt4;

    // Of 32 inputs, as they are stored.
    struct Unit {
        uint32_t bits[8], scales[kInputRows ? 8 : 2];
    };

    const int group_shift;
    const int warp, pair, quarter; // of 8; lane / 4 and lane % 4

    __device__ __forceinline__ explicit PackedFragment(int group_shift)
        : group_shift(group_shift), warp(threadIdx.x / 32), pair(threadIdx.x % 32 / 4), quarter(threadIdx.x % 4) {}

    static __device__ __forceinline__ int swizzled(int row, int chunk) {
        return row * kRowBytes + (kInt4 ? chunk ^ row / 2 % 4 : chunk ^ row % 8) * kChunkBytes;
    }
    __device__ __forceinline__ int scale_of_column(int column) const {
        return kType == WeightType::kFloat8 ? 0 : (column >> group_shift) * (kZeroPoints ? 4 : 2);
    }

    // Inputs from 32 * index on. first_scale: where the first group of the box's columns has its scale in the 16 bytes.
    __device__ __forceinline__ void load(const uint8_t *rows, const uint8_t *scales, int first_scale, int index,
                                         Unit &unit) const {
        if constexpr (kInputRows) { // the box's columns are the outputs
            const uint8_t *const scale = scales + first_scale + scale_of_column(warp * 16);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int row = index * 32 + i / 2 * 8 + quarter * 2 + i % 2;
                unit.scales[i] = Numbers::scale_bits(scale + row * kChunkBytes);
                if constexpr (kInt4) unit.bits[i] = rows[swizzled(row, warp / 2) + warp % 2 * 8 + pair];
                else unit.bits[i] = *reinterpret_cast<const uint16_t *>(rows + swizzled(row, warp) + pair * 2);
            }
        } else {
#pragma unroll
            for (int e = 0; e < 2; e++) { // outputs
                const int row = warp * 16 + pair * 2 + e;
                unit.scales[e] =
                    Numbers::scale_bits(scales + row * kChunkBytes + first_scale + scale_of_column(index * 32));
                if constexpr (kInt4) {
                    const uint4 chunk = *reinterpret_cast<const uint4 *>(rows + swizzled(row, index));
                    unit.bits[4 * e] = chunk.x, unit.bits[4 * e + 1] = chunk.y;
                    unit.bits[4 * e + 2] = chunk.z, unit.bits[4 * e + 3] = chunk.w;
                } else {
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        unit.bits[4 * e + i] = *reinterpret_cast<const uint16_t *>(
                            rows + swizzled(row, index * 2 + i / 2) + i % 2 * 8 + quarter * 2);
                }
            }
        }
    }

    // Its two steps of 16 inputs.
    __device__ __forceinline__ void unpack(const Unit &unit, uint32_t (&a)[2][4]) const {
        if constexpr (kInputRows) {
#pragma unroll
            for (int i = 0; i < 4; i++) { // eight inputs
                const float2 v = Numbers(unit.scales[2 * i]).values(placed(unit.bits[2 * i])),
                             next = Numbers(unit.scales[2 * i + 1]).values(placed(unit.bits[2 * i + 1]));
                a[i / 2][i % 2 * 2] = rounded_pair<T>(v.x, next.x);
                a[i / 2][i % 2 * 2 + 1] = rounded_pair<T>(v.y, next.y);
            }
        } else {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const Numbers numbers(unit.scales[e]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 v = numbers.values(placed(unit.bits[4 * e + i]));
                    a[i / 2][i % 2 * 2 + e] = rounded_pair<T>(v.x, v.y);
                }
            }
        }
    }

    // Of int4 this thread's byte where PackedNumbers wants it.
    __device__ __forceinline__ uint32_t placed(uint32_t bits) const {
        if constexpr (!kInt4) return bits;
        return kInputRows ? bits << 12 : __funnelshift_l(bits, bits, 12 - 8 * quarter & 31);
    }
};

} // namespace cats
