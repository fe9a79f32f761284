// The input row of packed_linear.cuh: x, x + delta or the attention that partial results stand for, normalised, in fp16
// times a power of two. Each warp has its own columns, and a power of two of its own.
#pragma once

#include "../packed_linear.h"
#include "mbarrier.cuh"
#include "mma.cuh"
#include "values.cuh"

namespace cats {

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

// kPieces: of 8 columns a lane.
template <typename T, int kPieces> class LinearInput {
    static constexpr uint32_t kAll = 0xffffffffu;
    static constexpr int kWarps = 8;

  public:
    // Of `blocks` blocks of 128 columns from `block` on.
    __device__ LinearInput(const PackedLinearParams &p, int block, int blocks)
        : p_(p), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32), first_(block * 128), end_(first_ + blocks * 128) {}

    __device__ __forceinline__ void load_norm() {
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            norm_[i] = uint4{};
            if (p_.norm_weight && column(i) < limit())
                norm_[i] = *reinterpret_cast<const uint4 *>(static_cast<const T *>(p_.norm_weight) + column(i));
        }
    }

    // Writes the operands of B (unpack.cuh) of 8 columns each, zeros for padding. Returns what a product with them is
    // to be multiplied by.
    template <bool kInt4> __device__ __forceinline__ float prepare(uint4 *to) {
        __shared__ float squares[kWarps];
        uint4 x[kPieces];
        float sum = 0.f, most = 0.f;
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            float v[8] = {};
            if (column(i) < limit()) input8(column(i), v);
            x[i] = rounded(v);
        }
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            float v[8], weight[8];
            if (p_.x_new && blockIdx.x == 0 && column(i) < limit())
                *reinterpret_cast<uint4 *>(static_cast<T *>(p_.x_new) + column(i)) = x[i];
            decode(x[i], v, T{});
            decode(norm_[i], weight, T{});
#pragma unroll
            for (int k = 0; k < 8; k++) {
                sum = fmaf(v[k], v[k], sum);
                most = fmaxf(most, fabsf(p_.norm_weight ? v[k] * weight[k] : v[k]));
            }
        }
#pragma unroll
        for (int o = 16; o; o /= 2) {
            sum += __shfl_xor_sync(kAll, sum, o);
            most = fmaxf(most, __shfl_xor_sync(kAll, most, o));
        }
        float rms = 1.f;
        if (p_.norm_weight) {
            if (lane_ == 0) squares[warp_] = sum;
            __syncthreads();
            sum = 0.f;
#pragma unroll
            for (int w = 0; w < kWarps; w++) sum += squares[w];
            rms = rsqrtf(sum / float(p_.inputs) + p_.norm_eps), most *= rms;
        }
        // A power of two that brings the largest to 2^14 or more; its inverse is a power of two as well.
        const uint32_t exponent = min(127u + 14u + 127u - (__float_as_uint(most) >> 23), 253u);
        const float factor = __uint_as_float(exponent << 23);
#pragma unroll
        for (int i = 0; i < kPieces; i++) {
            float v[8], weight[8];
            decode(x[i], v, T{});
            decode(norm_[i], weight, T{});
            if (p_.norm_weight)
#pragma unroll
                for (int k = 0; k < 8; k++) v[k] = to_float(round_to<T>(to_float(round_to<T>(v[k] * rms)) * weight[k]));
            if (column(i) < end_) to[i * 32 + lane_] = operands<kInt4>(v, factor);
        }
        __syncwarp();
        return __uint_as_float((254u - exponent) << 23);
    }

  private:
    __device__ __forceinline__ int column(int i) const { return first_ + (i * 32 + lane_) * 8; }
    __device__ __forceinline__ int limit() const { return min(end_, int(p_.inputs)); }

    static __device__ __forceinline__ uint4 rounded(const float (&v)[8]) {
        T values[8];
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = round_to<T>(v[i]);
        return *reinterpret_cast<const uint4 *>(values);
    }

    // In the order of Unpack.
    template <bool kInt4> static __device__ __forceinline__ uint4 operands(const float (&v)[8], float factor) {
        uint32_t pairs[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float weight = kInt4 && i % 2 ? 1.f / 16.f : 1.f; // of the operand
            const int low = kInt4 ? i : i / 2 * 4 + i % 2, high = low + (kInt4 ? 4 : 2);
            const __half2 pair = __floats2half2_rn(v[low] * factor * weight, v[high] * factor * weight);
            pairs[i] = reinterpret_cast<const uint32_t &>(pair);
        }
        return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }

    static __device__ __forceinline__ void load8(const T *from, float (&out)[8]) {
        decode(__ldcg(reinterpret_cast<const uint4 *>(from)), out, T{});
    }

    // Columns c to c + 7 of the attention, whose keys were split: Flash-Decoding.
    __device__ __forceinline__ void merge8(int c, float (&out)[8]) const {
        constexpr int kAtATime = 4;
        const int head = c / p_.head_dim;
        float largest = -1e30f, total = 0.f;
#pragma unroll
        for (int i = 0; i < 8; i++) out[i] = 0.f;
        for (int first = 0; first < p_.splits; first += kAtATime) {
            const int splits = p_.splits - first;
            const auto place = [&](int s) { return (first + min(s, splits - 1)) * p_.heads + head; };
            float weight[kAtATime], totals[kAtATime], larger = largest;
#pragma unroll
            for (int s = 0; s < kAtATime; s++) weight[s] = load_now(p_.largest + place(s));
#pragma unroll
            for (int s = 0; s < kAtATime; s++) totals[s] = load_now(p_.total + place(s));
            float4 part[kAtATime][2];
#pragma unroll
            for (int s = 0; s < kAtATime; s++) {
                const float *from = p_.weighted + int64_t(place(s) - head) * p_.head_dim + c;
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

    __device__ __forceinline__ void input8(int c, float (&v)[8]) const {
        if (p_.splits) return merge8(c, v);
        load8(static_cast<const T *>(p_.x) + c, v);
        if (!p_.delta) return;
        float delta[8];
        if (p_.delta_is_float) {
            const auto *from = reinterpret_cast<const float4 *>(static_cast<const float *>(p_.delta) + c);
            const float4 low = __ldcg(from), high = __ldcg(from + 1);
            delta[0] = low.x, delta[1] = low.y, delta[2] = low.z, delta[3] = low.w;
            delta[4] = high.x, delta[5] = high.y, delta[6] = high.z, delta[7] = high.w;
        } else {
            load8(static_cast<const T *>(p_.delta) + c, delta);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] += to_float(round_to<T>(delta[i]));
    }

    const PackedLinearParams &p_;
    const int lane_, warp_, first_, end_; // columns of this warp, with padding
    uint4 norm_[kPieces];
};

} // namespace cats
