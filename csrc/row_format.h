// How the weights of one matrix are stored: as the elements of nn.Linear, or packed. No torch and no CUDA header.
//
// A packed row holds one neuron's weights of one matrix with all that decodes them, so that one copy brings them. It is
// a sequence of tiles of 32 chunks of 16 bytes; each tile stands after its scales, which fill a multiple of 16 bytes.
// The columns are padded with zeros to a multiple of 128, so the last tile may have fewer chunks.
//
//     int4   32 columns a chunk; column c of a tile in byte c / 2, an even one in the low 4 bits. w = (q - z) * scale
//            for q of 0 to 15, and z = 8 without zero points
//     int8   16 columns a chunk, two's complement. w = q * scale
//     fp8    16 columns a chunk, e4m3 (float8_e4m3fn). w = q * scale. Products may take its NaN codes for numbers:
//            packing refuses NaN
//
// int4 and int8 have a scale in fp16 for each group of 32, 64 or 128 columns, in order. With zero points a group has
// its scale and then z, in fp16. fp8 has one fp32 scale a row, before each of its tiles.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#ifdef __CUDACC__
#define CATS_HOST_DEVICE __host__ __device__
#else
#define CATS_HOST_DEVICE
#endif

namespace cats {

CATS_HOST_DEVICE constexpr int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }
CATS_HOST_DEVICE constexpr int round_up(int64_t a, int64_t b) { return int((a + b - 1) / b * b); }

constexpr int kChunkBytes = 16, kTileChunks = 32; // a tile is what a warp reads at a time
constexpr int kPackedColumns = 128;               // packed rows have a multiple of so many columns

CATS_HOST_DEVICE constexpr int row_bytes(int chunks, int scale_bytes) {
    return chunks * kChunkBytes + (chunks + kTileChunks - 1) / kTileChunks * scale_bytes;
}

enum class WeightType : int32_t { kDense = 0, kInt4 = 1, kInt8 = 2, kFloat8 = 3 }; // kDense: elements of x's dtype

CATS_HOST_DEVICE constexpr int columns_per_chunk(WeightType type) { return type == WeightType::kInt4 ? 32 : 16; }

struct RowFormat {
    WeightType type = WeightType::kDense;
    int32_t group_size = 0; // columns of a scale; 0: dense, or one scale a row
    bool zero_points = false;
    int32_t scale_bytes = 0; // packed: of the scales before a tile, a multiple of 16

    constexpr RowFormat() = default;
    constexpr RowFormat(WeightType type, int32_t group_size, bool zero_points)
        : type(type), group_size(group_size), zero_points(zero_points), scale_bytes(16) {
        if (group_size)
            scale_bytes = round_up(kTileChunks * columns_per_chunk(type) / group_size * (zero_points ? 4 : 2), 16);
    }
    CATS_HOST_DEVICE constexpr bool packed() const { return type != WeightType::kDense; }
    constexpr bool operator==(const RowFormat &other) const {
        return type == other.type && group_size == other.group_size && zero_points == other.zero_points;
    }
    constexpr int64_t row_bytes(int64_t columns) const {
        const int64_t chunks =
            (columns + kPackedColumns - 1) / kPackedColumns * (kPackedColumns / columns_per_chunk(type));
        return chunks * kChunkBytes + (chunks + kTileChunks - 1) / kTileChunks * scale_bytes;
    }
};

// The names of all packed formats: cats_ext/rows/formats.py has the same.
constexpr std::string_view kRowFormatNames =
    "int4_g32, int4_g64, int4_g128, int4_g32_zp, int4_g64_zp, int4_g128_zp, int8_g32, int8_g64, int8_g128, fp8_e4m3";

// False: there is no such format.
inline bool parse_row_format(std::string_view name, RowFormat *format) {
    for (WeightType type : {WeightType::kInt4, WeightType::kInt8})
        for (int group_size : {32, 64, 128})
            for (bool zero_points : {false, true}) {
                if (zero_points && type != WeightType::kInt4) continue;
                const std::string known = (type == WeightType::kInt4 ? "int4_g" : "int8_g") +
                                          std::to_string(group_size) + (zero_points ? "_zp" : "");
                if (name != known) continue;
                *format = {type, group_size, zero_points};
                return true;
            }
    if (name != "fp8_e4m3") return false;
    *format = {WeightType::kFloat8, 0, false};
    return true;
}

} // namespace cats
