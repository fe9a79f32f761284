// Packed rows (../../row_format.h). The formats are known at run time, one for each matrix: a kernel serves them all.
#pragma once

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "row.cuh"

namespace cats {

__device__ __forceinline__ const RowFormat &format_of(const SparseMlpParams &p, RowKind kind) {
    return kind == RowKind::kGate ? p.gate_format : (kind == RowKind::kUp ? p.up_format : p.down_format);
}

struct PackedRow {
    using Storage = uint8_t;

    struct Bytes {
        const SparseMlpParams &p;
        __device__ explicit Bytes(const SparseMlpParams &p) : p(p) {}
        __device__ __forceinline__ uint32_t operator()(RowKind kind) const {
            return uint32_t(kind == RowKind::kGate ? p.gate_bytes : (kind == RowKind::kUp ? p.up_bytes : p.down_bytes));
        }
    };

    static __device__ __forceinline__ float half_at(const uint8_t *from) {
        return __half2float(*reinterpret_cast<const __half *>(from));
    }

    static __device__ __forceinline__ float column(const SparseMlpParams &p, RowKind kind, const void *row, int c) {
        const RowFormat &format = format_of(p, kind);
        const int tile_columns = kTileChunks * columns_per_chunk(format.type), scale_bytes = format.scale_bytes;
        const int at = c % tile_columns;
        const uint8_t *tile =
            static_cast<const uint8_t *>(row) + c / tile_columns * int64_t(kTileChunks * kChunkBytes + scale_bytes);
        const uint8_t *data = tile + scale_bytes;
        if (format.type == WeightType::kFloat8) {
            __nv_fp8_e4m3 value;
            value.__x = data[at];
            return float(value) * *reinterpret_cast<const float *>(tile);
        }
        const uint8_t *scale = tile + at / format.group_size * (format.zero_points ? 4 : 2);
        if (format.type == WeightType::kInt8) return float(int8_t(data[at])) * half_at(scale);
        const int q = data[at / 2] >> at % 2 * 4 & 15;
        return (float(q) - (format.zero_points ? half_at(scale + 2) : 8.f)) * half_at(scale);
    }
};

} // namespace cats
