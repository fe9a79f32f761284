// What every layer below the torch ops shares: plain-old-data parameters of the sparse gated MLP, on CPU and CUDA.
// No torch header is included here or by any kernel, so the benchmark binaries link the kernels without torch.
//
//     g = x Wg^T + bg        v = act(g)            keep neuron j if not (|v_j| < threshold_j)
//     u = x Wu^T + bu        h = v * u             then if not (|h_j| < down_threshold_j)
//     y = h Wd^T + bd        (CATS, arXiv 2404.08763, eq. 2-5; the second test is our extension)
//
// Written as "not less than" so that NaN is kept, and so that a NaN or negative threshold keeps everything.
// All strides are in elements, not bytes.
#pragma once

#include <cstdint>

#include "row_format.h"

namespace cats {

enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kFloat64 = 3 };

// Number of entries of `counts`: token-neuron pairs evaluated, kept by `threshold`, kept by `down_threshold` too; with
// columns token-input pairs kept by `input_threshold`.
constexpr int kNumCounts = 3, kNumColumnsCounts = 4;

// A neuron that one token keeps, and v of it.
struct alignas(8) KeptNeuron {
    uint32_t neuron;
    float value;
};

// On CUDA: what a launch has found of one token. Segment s has `counts[s]` neurons, of the neurons from s * size on, at
// neurons[s * size]; they are filled up to a multiple of kKeptMultiple with neurons UINT32_MAX.
constexpr int kKeptMultiple = 4;
struct KeptNeurons {
    KeptNeuron *neurons; // [segments, size], or null
    uint32_t *counts;    // [segments]
    int32_t size, segments;
};

struct SparseMlpParams {
    int64_t tokens;            // M
    int64_t hidden_size;       // H
    int64_t intermediate_size; // I

    const void *x;                                       // [M, H], contiguous
    const void *w_gate;                                  // [I, H], unit column stride, or packed rows
    const void *w_up;                                    // likewise
    const void *w_down_t;                                // likewise: row j is neuron j's column of down_proj.weight
    int64_t w_gate_stride, w_up_stride, w_down_t_stride; // between neurons, in elements, or in bytes of packed rows
    RowFormat gate_format, up_format, down_format;       // all dense or all packed
    int32_t gate_bytes, up_bytes, down_bytes;            // of a packed row

    const float *threshold;      // fp32, one value (stride 0) or one for each neuron (any stride)
    const float *down_threshold; // likewise, or null: no second test
    int64_t threshold_stride, down_threshold_stride;

    const void *gate_bias, *up_bias; // [I] or null
    const void *down_bias;           // [H] or null

    void *y; // [M, H], contiguous; accumulated in fp32, rounded once

    // The form for a step of decoding writes y_sum instead of y, for one token, without counts and down_bias. x is
    // normalised first: x / rms(x) * norm_weight. y stays an fp32 sum, which the next kernel rounds. y_sum is [H + 1]
    // and zero before the launch; its last element is scratch. Weights and norm_weight are read before the previous
    // kernel has ended; with input_threshold only norm_weight.
    float *y_sum;            // or null
    const void *norm_weight; // [H]
    float norm_eps;          // added to the mean square

    int64_t *counts; // [kNumCounts], or [kNumColumnsCounts] with input_threshold, added to; or null

    // The form for models that are sparse by themselves (exact_mlp), without thresholds: what is exactly zero is
    // skipped. g and v are rounded to dtype, as a model's own modules round them, so that the same neurons are zero.
    //
    //     v = act(g), or act(g)^2 if squared                             keep neuron j if not (v_j = 0)
    //     h = v * u, v * max(u, 0) if relu_up, or v without w_up         if relu_up, then if not (h_j = 0)
    //
    // With a cutoff (Gemma 3n), v = act(max(g - (mean(g) + deviations * std(g)), 0)), of the gates of a token; each
    // operation is rounded to dtype. deviations has been rounded by the caller.
    bool exact, squared, relu_up, cutoff;
    float deviations;
    void *gates; // CUDA: [M, I] of dtype, or null. With it only g is computed, and written here, and its GateSums.

    // The form with columns of the gate: w_gate is its transpose, [H, I], whose row i is what all neurons multiply
    // input i with. Inputs under the threshold count as zero for the gate, and their rows are not read.
    //
    //     g = sum over i of x_i Wg_i + bg        keep input i if not (|x_i| < input_threshold)
    //
    // On CUDA one launch of one token computes v and lists in `kept` what passes the first test. A second one, without
    // w_gate, starts from the list.
    const float *input_threshold; // one value, or null
    KeptNeurons kept;

    Activation activation;
    DType dtype; // of x, the biases, norm_weight, y and dense weights: fp32, fp16 or bf16
};

// Of some of a token's gates as they were written, and of their squares.
struct alignas(16) GateSums {
    double sum, squares;
};

// The same MLP from its activations on: v is given, and a neuron in which it is zero is skipped. Nothing else is, so
// the result is the dense one, except that a zero times an infinite or NaN weight is skipped too.
//
//     keep neuron j if v_j != 0        h = v * (x Wu^T + bu), or h = v without Wu        y = h Wd^T + bd
//
// With a cutoff, gates are given, and v follows from them as in SparseMlpParams: the second launch of exact_mlp, on
// CUDA.
struct ActivatedMlpParams {
    int64_t tokens, hidden_size, intermediate_size;

    const void *v;                        // [M, I], contiguous; gates with a cutoff
    const void *x, *w_up;                 // [M, H], contiguous, and [I, H], unit column stride; or both null
    const void *w_down_t;                 // [I, H], unit column stride
    int64_t w_up_stride, w_down_t_stride; // between neurons, in elements
    const void *up_bias, *down_bias;      // [I] and [H], or null

    void *y; // [M, H], contiguous; accumulated in fp32, rounded once

    bool cutoff, squared;
    float deviations;
    Activation activation;
    const GateSums *gate_sums; // [M, gate_places]: all places together have a token's gates
    int32_t gate_places;
    double gate_weight; // 1 / I: a division takes longer

    DType dtype; // of all of them: fp32, fp16 or bf16
};

// h = mask * act(gate) * up, elementwise: the dense masked path used for many tokens and for training.
struct GatedThresholdParams {
    int64_t rows;              // tokens
    int64_t intermediate_size; // I

    const void *gate, *up; // [rows, I], unit column stride (views of a merged gate_up output have a larger row stride)
    int64_t gate_stride, up_stride;

    const float *threshold, *down_threshold; // as above
    int64_t threshold_stride, down_threshold_stride;

    void *h;         // forward: [rows, I], contiguous
    int64_t *counts; // forward: [kNumCounts], added to; or null

    const void *grad_h;        // backward: [rows, I], contiguous; null: forward
    void *grad_gate, *grad_up; // backward: [rows, I], contiguous

    Activation activation;
    DType dtype; // fp32, fp16, bf16 or fp64; computed in fp32 (fp64 for fp64)
};

} // namespace cats
