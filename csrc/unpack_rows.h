// Packed rows as dense ones, for products with many tokens. Plain data: no torch header.
#pragma once

#include "row_format.h"
#include "sparse_mlp.h"

namespace cats {

struct UnpackRowsParams {
    int64_t count, columns;
    const uint8_t *rows; // [count, format.row_bytes(columns)]
    int64_t stride;      // bytes
    RowFormat format;
    void *out;   // [count, columns], contiguous
    DType dtype; // fp32, fp16 or bf16; computed in fp32
};

} // namespace cats
