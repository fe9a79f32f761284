// Packed rows as dense ones, in one pass over memory; PyTorch's own ops take about ten.
#include <cuda_fp8.h>

#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "sparse_mlp_launch.h"
#include "values.cuh"

namespace cats {

namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 8; // columns of a thread: 4 or 8 bytes of the row, 16 of a 2-byte output
constexpr int kRows = 4;  // of a thread, read before the first is written, so that more reads are under way

__device__ __forceinline__ float half_at(const uint8_t *from) {
    return __half2float(*reinterpret_cast<const __half *>(from));
}

// What a thread reads of one row. Its columns share a scale, since groups are multiples of 32 columns.
template <WeightType kType> struct PackedColumns {
    using Bits = std::conditional_t<kType == WeightType::kInt4, uint32_t, uint2>;

    Bits bits;
    float scale, zero;

    // Columns first, ..., first + kWidth - 1.
    __device__ __forceinline__ void load(const RowFormat &format, const uint8_t *row, int first) {
        constexpr int kTileColumns = kTileChunks * columns_per_chunk(kType);
        const int at = first % kTileColumns;
        const uint8_t *tile = row + first / kTileColumns * int64_t(kTileChunks * kChunkBytes + format.scale_bytes);
        bits = *reinterpret_cast<const Bits *>(tile + format.scale_bytes + at * int(sizeof(Bits)) / kWidth);
        if constexpr (kType == WeightType::kFloat8) {
            scale = *reinterpret_cast<const float *>(tile);
        } else {
            const uint8_t *scales = tile + at / format.group_size * (format.zero_points ? 4 : 2);
            scale = half_at(scales);
            if constexpr (kType == WeightType::kInt4) zero = format.zero_points ? half_at(scales + 2) : 8.f;
        }
    }

    __device__ __forceinline__ float value(int column) const {
        if constexpr (kType == WeightType::kInt4) {
            return (float(bits >> 4 * column & 15) - zero) * scale;
        } else if constexpr (kType == WeightType::kInt8) {
            return float(reinterpret_cast<const int8_t *>(&bits)[column]) * scale;
        } else {
            __nv_fp8_e4m3 code;
            code.__x = reinterpret_cast<const uint8_t *>(&bits)[column];
            return float(code) * scale;
        }
    }
};

template <WeightType kType, typename T>
__global__ void __launch_bounds__(kThreads) unpack_rows_kernel(const __grid_constant__ UnpackRowsParams p) {
    const int first = (blockIdx.x * kThreads + threadIdx.x) * kWidth;
    if (first >= p.columns) return;
    const bool whole = p.columns % kWidth == 0; // then every row of the output starts at a multiple of 16 bytes
    for (int64_t row = int64_t(blockIdx.y) * kRows; row < p.count; row += int64_t(gridDim.y) * kRows) {
        const int rows = int(min(p.count - row, int64_t(kRows)));
        PackedColumns<kType> packed[kRows];
#pragma unroll
        for (int r = 0; r < kRows; r++) // the last row again, where there are fewer
            packed[r].load(p.format, p.rows + (row + min(r, rows - 1)) * p.stride, first);
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            if (r >= rows) break;
            T *out = static_cast<T *>(p.out) + (row + r) * p.columns + first;
            if (whole) {
                alignas(16) T rounded[kWidth];
#pragma unroll
                for (int e = 0; e < kWidth; e++) rounded[e] = round_to<T>(packed[r].value(e));
#pragma unroll
                for (int i = 0; i < int(sizeof(rounded) / 16); i++)
                    reinterpret_cast<uint4 *>(out)[i] = reinterpret_cast<const uint4 *>(rounded)[i];
            } else {
#pragma unroll
                for (int e = 0; e < kWidth; e++)
                    if (first + e < p.columns) out[e] = round_to<T>(packed[r].value(e));
            }
        }
    }
}

template <WeightType kType> cudaError_t launch(const UnpackRowsParams &p, cudaStream_t stream) {
    const LaunchTarget target{stream};
    const LaunchSize size{dim3(unsigned(ceil_div(p.columns, kThreads * kWidth)),
                               unsigned(std::min<int64_t>(ceil_div(p.count, kRows), 65535))),
                          kThreads};
    switch (p.dtype) {
    case DType::kFloat32: return launch_kernel<unpack_rows_kernel<kType, float>>(size, target, p);
    case DType::kFloat16: return launch_kernel<unpack_rows_kernel<kType, __half>>(size, target, p);
    case DType::kBFloat16: return launch_kernel<unpack_rows_kernel<kType, __nv_bfloat16>>(size, target, p);
    case DType::kFloat64: break;
    }
    return cudaErrorInvalidValue;
}

} // namespace

cudaError_t unpack_rows_cuda(const UnpackRowsParams &p, cudaStream_t stream) {
    switch (p.format.type) {
    case WeightType::kInt4: return launch<WeightType::kInt4>(p, stream);
    case WeightType::kInt8: return launch<WeightType::kInt8>(p, stream);
    case WeightType::kFloat8: return launch<WeightType::kFloat8>(p, stream);
    case WeightType::kDense: break;
    }
    return cudaErrorInvalidValue;
}

} // namespace cats
