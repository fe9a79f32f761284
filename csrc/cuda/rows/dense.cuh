// Elements of T, one after the other: the rows of nn.Linear's weights.
#pragma once

#include "../values.cuh"
#include "row.cuh"

namespace cats {

template <typename T> struct DenseRow {
    using Storage = T;
    using MmaOperand = std::conditional_t<sizeof(T) == 2, T, void>;
    using Packed = uint4;
    static constexpr int kPerChunk = kChunkBytes / sizeof(T), kScaleBytes = 0;

    struct Bytes : UniformBytes {
        __device__ explicit Bytes(const SparseMlpParams &p) : UniformBytes{uint32_t(p.hidden_size * sizeof(T))} {}
    };

    static __device__ __forceinline__ Packed load(const uint8_t *tile, int lane) {
        return *reinterpret_cast<const uint4 *>(tile + lane * kChunkBytes);
    }
    static __device__ __forceinline__ void decode(const Packed &packed, float (&out)[kPerChunk]) {
        cats::decode(packed, out, T{});
    }
    static __device__ __forceinline__ float column(const SparseMlpParams &, RowKind, const void *row, int c) {
        return to_float(static_cast<const T *>(row)[c]);
    }
};

} // namespace cats
