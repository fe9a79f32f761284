// A row format for the test: int8 columns in their order, then one fp32 scale. All that a format needs to be.
#pragma once

#include "cpu/vec.inl.h"

namespace cats::CATS_ISA {

struct Int8Row {
    typedef int8_t Storage;
    static constexpr ColumnOrder kOrder = ColumnOrder::kConsecutive;

    const int8_t *data;
    float row_scale;

    Int8Row() = default;
    Int8Row(const int8_t *data, int64_t hidden_size) : data(data) {
        std::memcpy(&row_scale, data + hidden_size, sizeof(row_scale));
    }
    Group load(int64_t column, int64_t n) const {
        float values[kGroup] = {};
        for (int64_t i = 0; i < n && i < kGroup; i++) values[i] = data[column + i];
        return load_group<kOrder>(values);
    }
    float scale() const { return row_scale; }
};

} // namespace cats::CATS_ISA
