// What the product of packed rows with many tokens shares between its op and its kernel. No torch and no CUDA header.
#pragma once

#include "sparse_mlp.h"

namespace cats {

// y = x W^T, where rows are those of W [outputs, inputs], or y = x W, where they are those of W [inputs, outputs].
struct PackedMatmulParams {
    int64_t tokens, inputs, outputs;
    const void *x; // [tokens, inputs], contiguous
    const uint8_t *rows;
    int64_t stride; // bytes from row to row
    RowFormat format;
    bool input_rows;  // rows are those of inputs
    const void *bias; // [outputs] or null
    void *y;          // [tokens, outputs], contiguous
    DType dtype;      // of x, bias and y: fp16 or bf16
    void *scratch;    // MatmulChoice::scratch_bytes() at a multiple of 16; may be null where that is 0
};

} // namespace cats
