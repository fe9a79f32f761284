// How a weight row is stored, as the kernels see it: 16-byte chunks that decode to kPerChunk consecutive columns in
// fp32. This is the one place to change for another storage (int8 or int4 rows): give it a chunk width, a decoder, and
// load x with the same columns per chunk.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace cats {

template <typename T> struct DenseRow;

template <> struct DenseRow<float> {
    using Element = float;
    static constexpr int kPerChunk = 4;
    static __device__ __forceinline__ void decode(uint4 chunk, float (&out)[kPerChunk]) {
        out[0] = __uint_as_float(chunk.x), out[1] = __uint_as_float(chunk.y);
        out[2] = __uint_as_float(chunk.z), out[3] = __uint_as_float(chunk.w);
    }
};

template <> struct DenseRow<__nv_bfloat16> {
    using Element = __nv_bfloat16;
    static constexpr int kPerChunk = 8;
    static __device__ __forceinline__ void decode(uint4 chunk, float (&out)[kPerChunk]) {
        const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (int i = 0; i < 4; i++) { // a bf16 is the upper half of an fp32
            out[2 * i] = __uint_as_float(words[i] << 16);
            out[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
        }
    }
};

template <> struct DenseRow<__half> {
    using Element = __half;
    static constexpr int kPerChunk = 8;
    static __device__ __forceinline__ void decode(uint4 chunk, float (&out)[kPerChunk]) {
        const __half2 *pairs = reinterpret_cast<const __half2 *>(&chunk);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 pair = __half22float2(pairs[i]);
            out[2 * i] = pair.x, out[2 * i + 1] = pair.y;
        }
    }
};

template <typename T> __device__ __forceinline__ float to_float(T v) { return static_cast<float>(v); }
template <typename T> __device__ __forceinline__ T from_float(float v) { return static_cast<T>(v); }
template <> __device__ __forceinline__ __nv_bfloat16 from_float(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ __half from_float(float v) { return __float2half_rn(v); }

} // namespace cats
