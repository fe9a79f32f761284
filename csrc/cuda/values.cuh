// The type T of x, y, norm weights and biases: fp32, fp16 or bf16. How the weights are stored is apart: rows/row.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cats {

template <typename T> __device__ __forceinline__ float to_float(T v) { return static_cast<float>(v); }

template <typename T, typename C> __device__ __forceinline__ T round_to(C v) { return static_cast<T>(v); }
template <> __device__ __forceinline__ __nv_bfloat16 round_to(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ __half round_to(float v) { return __float2half_rn(v); }

// 16 bytes of T in fp32.
__device__ __forceinline__ void decode(uint4 bits, float (&out)[4], float) {
    out[0] = __uint_as_float(bits.x), out[1] = __uint_as_float(bits.y);
    out[2] = __uint_as_float(bits.z), out[3] = __uint_as_float(bits.w);
}

__device__ __forceinline__ void decode(uint4 bits, float (&out)[8], __nv_bfloat16) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; i++) { // a bf16 is the upper half of an fp32
        out[2 * i] = __uint_as_float(words[i] << 16);
        out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void decode(uint4 bits, float (&out)[8], __half) {
    const __half2 *pairs = reinterpret_cast<const __half2 *>(&bits);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = __half22float2(pairs[i]);
        out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
    }
}

// kCount consecutive values of T, loaded 16 bytes at a time and decoded later.
template <typename T, int kCount> struct Values {
    static constexpr int kPerLoad = 16 / sizeof(T), kLoads = kCount / kPerLoad;
    static_assert(kCount % kPerLoad == 0);
    uint4 bits[kLoads];

    static __device__ __forceinline__ Values load(const T *from) {
        Values values;
#pragma unroll
        for (int l = 0; l < kLoads; l++) values.bits[l] = reinterpret_cast<const uint4 *>(from)[l];
        return values;
    }

    __device__ __forceinline__ void store(T *to) const {
#pragma unroll
        for (int l = 0; l < kLoads; l++) reinterpret_cast<uint4 *>(to)[l] = bits[l];
    }

    __device__ __forceinline__ void decode(float (&out)[kCount]) const {
#pragma unroll
        for (int l = 0; l < kLoads; l++) {
            float part[kPerLoad];
            cats::decode(bits[l], part, T{});
#pragma unroll
            for (int e = 0; e < kPerLoad; e++) out[l * kPerLoad + e] = part[e];
        }
    }
};

} // namespace cats
