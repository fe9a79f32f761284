// What the product of packed rows with one token's row shares between its op and its kernel. No torch, no CUDA header.
//
//     y = W in + bias + residual      for up to three weights W of one input, one after the other in y
//     in = x, x + delta or the attention that partial results stand for, and x / rms(x) * norm_weight of it
//
// Values are rounded to the dtype where separate operations round.
#pragma once

#include "sparse_mlp.h"

namespace cats {

constexpr int kMaxParts = 3;

struct PackedLinearParams {
    int64_t inputs; // K, columns of a row
    int32_t parts;  // weights
    RowFormat format;
    const void *weights[kMaxParts];                 // [N, bytes], packed rows
    int64_t strides[kMaxParts], outputs[kMaxParts]; // bytes from row to row; N
    const void *biases[kMaxParts];                  // [N] or null

    const void *x;           // [K]; or null, with partial results
    const void *delta;       // [K] or null: added to x
    bool delta_is_float;     // fp32; otherwise of the dtype
    void *x_new;             // [K] or null: gets x + delta
    const void *norm_weight; // [K] or null: no normalisation
    float norm_eps;

    const float *weighted, *largest, *total; // [splits, heads, head_dim], [splits, heads], [splits, heads]
    int32_t splits, heads, head_dim;

    const void *residual; // [N] or null, of a single weight
    void *y;              // [sum of N]
    DType dtype;          // of all that is not packed or partial: fp16 or bf16
};

} // namespace cats
