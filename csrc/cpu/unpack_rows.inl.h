// Packed rows as dense ones.
#pragma once

#include <limits>

#include "../unpack_rows.h"
#include "parallel.inl.h"
#include "vec.inl.h"

namespace cats::CATS_ISA {

// n columns of one scale, n a multiple of 2 for int4. Both loops are what compilers turn into vectors.
static void unpack_group(WeightType type, const uint8_t *data, int64_t n, float scale, float zero, float *out) {
    switch (type) {
    case WeightType::kInt4:
        for (int64_t i = 0; i < n / 2; i++) out[2 * i] = float(data[i] & 15), out[2 * i + 1] = float(data[i] >> 4);
        break;
    case WeightType::kInt8:
        for (int64_t i = 0; i < n; i++) out[i] = float(int8_t(data[i]));
        break;
    case WeightType::kFloat8: // the row's padding lets whole vectors be read
        for (int64_t i = 0; i < n; i += kLanes) store(out + i, load_e4m3(data + i) * kE4m3Factor, n - i);
        for (int64_t i = 0; i < n; i++)
            if ((data[i] & 0x7f) == 0x7f) out[i] = std::numeric_limits<float>::quiet_NaN();
        break;
    case WeightType::kDense: break;
    }
    for (int64_t i = 0; i < n; i++) out[i] = (out[i] - zero) * scale;
}

template <class T> static void unpack_row(const UnpackRowsParams &p, int64_t row) {
    const RowFormat &format = p.format;
    const bool int4 = format.type == WeightType::kInt4, fp8 = format.type == WeightType::kFloat8;
    const int64_t tile_columns = kTileChunks * columns_per_chunk(format.type);
    const int64_t group = format.group_size ? format.group_size : kPackedColumns;
    const uint8_t *tile = p.rows + row * p.stride;
    T *out = static_cast<T *>(p.out) + row * p.columns;
    float values[kPackedColumns];
    for (int64_t first = 0; first < p.columns;
         first += tile_columns, tile += kTileChunks * kChunkBytes + format.scale_bytes) {
        const uint8_t *data = tile + format.scale_bytes;
        for (int64_t at = 0; at < min(tile_columns, p.columns - first); at += group) {
            const int64_t n = min(group, p.columns - first - at);
            float scale, zero = 0;
            if (fp8) {
                std::memcpy(&scale, tile, sizeof(scale));
            } else {
                const Half *scales = reinterpret_cast<const Half *>(tile) + at / group * (format.zero_points ? 2 : 1);
                scale = load(scales, 1)[0];
                if (int4) zero = format.zero_points ? load(scales + 1, 1)[0] : 8;
            }
            unpack_group(format.type, data + (int4 ? at / 2 : at), n, scale, zero, values);
            for (int64_t i = 0; i < n; i += kLanes) store(out + first + at + i, load(values + i), n - i);
        }
    }
}

static void unpack_rows(const UnpackRowsParams &p, const Parallel &parallel) {
    const int64_t parts = parts_for(parallel, p.count * p.columns, 1 << 16);
    for_each(parallel, parts, [&](int64_t part) {
        for (int64_t row = p.count * part / parts; row < p.count * (part + 1) / parts; row++) switch (p.dtype) {
            case DType::kFloat32: unpack_row<float>(p, row); break;
            case DType::kFloat16: unpack_row<Half>(p, row); break;
            case DType::kBFloat16: unpack_row<BFloat16>(p, row); break;
            case DType::kFloat64: break;
            }
    });
}

} // namespace cats::CATS_ISA
