// What packed_linear.cuh reads from global memory: weights, scales, and the attention whose keys were split.
#pragma once

#include "../packed_linear.h"
#include "mbarrier.cuh"

namespace cats {

__device__ __forceinline__ uint4 load_weights(const uint8_t *from) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ uint32_t load_scale(const uint8_t *from, bool wide) {
    uint32_t v;
    if (wide) {
        asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(from));
    } else {
        uint16_t half;
        asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(half) : "l"(from));
        v = half;
    }
    return v;
}

// Loads that stay where they stand, so that several are under way at a time.
__device__ __forceinline__ float load_now(const float *from) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(from));
    return v;
}

__device__ __forceinline__ float4 load4_now(const float *from) {
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ float half_bits(uint32_t bits) { return __half2float(__ushort_as_half(uint16_t(bits))); }

// Columns c to c + 7 of the attention, whose keys were split: Flash-Decoding.
__device__ __forceinline__ void merge_attention(const PackedLinearParams &p, int c, float (&out)[8]) {
    constexpr int kAtATime = 4;
    const int head = c / p.head_dim;
    float largest = -1e30f, total = 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] = 0.f;
    for (int first = 0; first < p.splits; first += kAtATime) {
        const int splits = p.splits - first;
        const auto place = [&](int s) { return (first + min(s, splits - 1)) * p.heads + head; };
        float weight[kAtATime], totals[kAtATime], larger = largest;
#pragma unroll
        for (int s = 0; s < kAtATime; s++) weight[s] = load_now(p.largest + place(s));
#pragma unroll
        for (int s = 0; s < kAtATime; s++) totals[s] = load_now(p.total + place(s));
        float4 part[kAtATime][2];
#pragma unroll
        for (int s = 0; s < kAtATime; s++) {
            const float *from = p.weighted + int64_t(place(s) - head) * p.head_dim + c;
            part[s][0] = load4_now(from), part[s][1] = load4_now(from + 4);
        }
#pragma unroll
        for (int s = 0; s < kAtATime; s++) larger = fmaxf(larger, weight[s]);
        const float shrink = __expf(largest - larger);
        total *= shrink, largest = larger;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] *= shrink;
#pragma unroll
        for (int s = 0; s < kAtATime; s++) {
            const float w = s < splits ? __expf(weight[s] - larger) : 0.f;
            total = fmaf(totals[s], w, total);
            out[0] = fmaf(part[s][0].x, w, out[0]), out[1] = fmaf(part[s][0].y, w, out[1]);
            out[2] = fmaf(part[s][0].z, w, out[2]), out[3] = fmaf(part[s][0].w, w, out[3]);
            out[4] = fmaf(part[s][1].x, w, out[4]), out[5] = fmaf(part[s][1].y, w, out[5]);
            out[6] = fmaf(part[s][1].z, w, out[6]), out[7] = fmaf(part[s][1].w, w, out[7]);
        }
    }
    const float inverse = 1.f / total;
#pragma unroll
    for (int i = 0; i < 8; i++) out[i] *= inverse;
}

} // namespace cats
