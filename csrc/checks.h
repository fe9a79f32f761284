// The checks of the ops' arguments, written once, and the kernels' parameters that follow from them. No torch here: the
// ops describe their tensors as plain data (ops.h), and so does Python, for tracing and for the reference (checks.cpp).
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "argument.h"
#include "packed_linear.h"
#include "packed_matmul.h"
#include "unpack_rows.h"

namespace cats {

struct SparseMlpArguments {
    TensorArgument x, w_gate, w_up, w_down_t, counts, threshold, down_threshold;
    std::string_view activation;
    TensorArgument gate_bias, up_bias, down_bias;
    std::optional<std::string_view> gate_format = {}, up_format = {}, down_format = {}; // none of dense weights
    std::optional<TensorArgument> input_threshold = {};                                 // with it w_gate is [H, I]
};

// All parameters that are read. x must be made contiguous, and the caller sets what is written (y, counts).
inline SparseMlpParams check_sparse_mlp(const SparseMlpArguments &a) {
    const bool packed = a.gate_format.has_value(), by_columns = a.input_threshold.has_value();
    const char *op = packed ? "sparse_mlp_packed" : (by_columns ? "sparse_mlp_columns" : "sparse_mlp");
    const TensorArgument &x = a.x, &w_gate = a.w_gate, &counts = a.counts;
    SparseMlpParams p{};
    p.dtype = check_dtype(op, x, /*allow_double=*/false);
    CATS_REQUIRE(x.dim >= 1, op, ": x must have at least one dimension, got shape []");
    check_present(op, w_gate);
    CATS_REQUIRE(w_gate.dim == 2, op, ": ", w_gate.name, " must have shape ",
                 by_columns ? "[H, I]" : (packed ? "[I, bytes]" : "[I, H]"), ", got ", shape(w_gate));
    const int64_t intermediate_size = w_gate.sizes[by_columns],
                  hidden_size = packed ? x.last_size() : w_gate.sizes[!by_columns];
    CATS_REQUIRE(hidden_size > 0 || !packed, op, ": x must have last dimension H > 0, got shape ", shape(x));
    CATS_REQUIRE(intermediate_size > 0 && hidden_size > 0, op, ": ", w_gate.name, " must have I > 0 and H > 0, got ",
                 shape(w_gate));
    CATS_REQUIRE(x.last_size() == hidden_size, op, ": x must have last dimension H = ", hidden_size, ", got shape ",
                 shape(x));
    p.tokens = x.numel() / hidden_size;
    p.hidden_size = hidden_size;
    p.intermediate_size = intermediate_size;
    p.x = x.data;
    const auto weight = [&](const TensorArgument &w, const char *format_name, std::optional<std::string_view> name,
                            RowFormat *format, int64_t *stride) {
        if (!packed) return check_weight(op, w, x, intermediate_size, hidden_size, stride);
        return check_packed_weight(op, w, x, intermediate_size, hidden_size, format_name, *name, format, stride);
    };
    if (by_columns) p.w_gate = check_weight(op, w_gate, x, hidden_size, intermediate_size, &p.w_gate_stride);
    else p.w_gate = weight(w_gate, "gate_format", a.gate_format, &p.gate_format, &p.w_gate_stride);
    p.w_up = weight(a.w_up, "up_format", a.up_format, &p.up_format, &p.w_up_stride);
    p.w_down_t = weight(a.w_down_t, "down_format", a.down_format, &p.down_format, &p.w_down_t_stride);
    if (packed) {
        p.gate_bytes = int32_t(p.gate_format.row_bytes(hidden_size));
        p.up_bytes = int32_t(p.up_format.row_bytes(hidden_size));
        p.down_bytes = int32_t(p.down_format.row_bytes(hidden_size));
    }
    if (by_columns) {
        int64_t stride;
        check_present(op, *a.input_threshold);
        p.input_threshold = check_threshold(op, *a.input_threshold, x, /*intermediate_size=*/0, &stride);
    }
    check_present(op, a.threshold);
    p.threshold = check_threshold(op, a.threshold, x, intermediate_size, &p.threshold_stride);
    p.down_threshold = check_threshold(op, a.down_threshold, x, intermediate_size, &p.down_threshold_stride);
    p.activation = check_activation(op, a.activation);
    p.gate_bias = check_vector(op, a.gate_bias, x, intermediate_size);
    p.up_bias = check_vector(op, a.up_bias, x, intermediate_size);
    p.down_bias = check_vector(op, a.down_bias, x, hidden_size);
    check_counts(op, counts, x, by_columns ? kNumColumnsCounts : kNumCounts);
    return p;
}

// Of a step of decoding; the caller sets y_sum and norm_eps.
inline SparseMlpParams check_sparse_mlp_step(const SparseMlpArguments &a, const TensorArgument &norm_weight,
                                             const TensorArgument &y_sum) {
    const char *op = a.gate_format.has_value() ? "sparse_mlp_packed_step" : "sparse_mlp_step";
    if (a.input_threshold.has_value()) op = "sparse_mlp_columns_step";
    SparseMlpParams p = check_sparse_mlp(a);
    CATS_REQUIRE(p.tokens == 1 && (p.hidden_size == 1 || a.x.strides[a.x.dim - 1] == 1), op,
                 ": x must be one contiguous row, got shape ", shape(a.x));
    check_present(op, y_sum);
    CATS_REQUIRE(y_sum.dtype == kFloat && y_sum.dim == 1 && y_sum.sizes[0] > p.hidden_size && y_sum.strides[0] == 1 &&
                     y_sum.on_same_device(a.x),
                 op, ": y_sum must be contiguous float32 of shape [H + 1] on ", device(a.x), ", got ", dtype(y_sum),
                 " of shape ", shape(y_sum), " on ", device(y_sum));
    check_present(op, norm_weight);
    p.norm_weight = check_vector(op, norm_weight, a.x, p.hidden_size);
    return p;
}

struct ExactMlpArguments {
    TensorArgument x, w_gate, w_up, w_down_t;
    std::string_view activation;
    std::optional<double> deviations;
    bool relu_up;
    TensorArgument gate_bias, up_bias, down_bias;
};

// As check_sparse_mlp; w_up may be absent, and nothing has a threshold.
inline SparseMlpParams check_exact_mlp(const ExactMlpArguments &a) {
    constexpr const char *op = "exact_mlp";
    const TensorArgument &x = a.x, &w_gate = a.w_gate;
    SparseMlpParams p{};
    p.exact = true;
    p.dtype = check_dtype(op, x, /*allow_double=*/false);
    CATS_REQUIRE(x.dim >= 1, op, ": x must have at least one dimension, got shape []");
    check_present(op, w_gate);
    CATS_REQUIRE(w_gate.dim == 2 && w_gate.sizes[0] > 0 && w_gate.sizes[1] > 0, op,
                 ": w_gate must have shape [I, H] with I > 0 and H > 0, got ", shape(w_gate));
    p.intermediate_size = w_gate.sizes[0], p.hidden_size = w_gate.sizes[1];
    CATS_REQUIRE(x.last_size() == p.hidden_size, op, ": x must have last dimension H = ", p.hidden_size, ", got shape ",
                 shape(x));
    p.tokens = x.numel() / p.hidden_size;
    p.x = x.data;
    p.w_gate = check_weight(op, w_gate, x, p.intermediate_size, p.hidden_size, &p.w_gate_stride);
    if (a.w_up.present()) p.w_up = check_weight(op, a.w_up, x, p.intermediate_size, p.hidden_size, &p.w_up_stride);
    CATS_REQUIRE(a.w_up.present() || !a.up_bias.present(), op, ": up_bias needs w_up, got None");
    CATS_REQUIRE(a.w_up.present() || !a.relu_up, op, ": relu_up needs w_up, got None");
    p.w_down_t = check_weight(op, a.w_down_t, x, p.intermediate_size, p.hidden_size, &p.w_down_t_stride);
    p.squared = a.activation == "relu2";
    p.activation = check_activation(op, p.squared ? "relu" : a.activation, /*allow_squared=*/true);
    CATS_REQUIRE(!a.deviations || (!a.relu_up && std::isfinite(*a.deviations)), op, ": deviations must be finite",
                 a.relu_up ? ", and None with relu_up" : "", ", got ", a.deviations.value_or(0));
    p.cutoff = a.deviations.has_value(), p.deviations = float(a.deviations.value_or(0)), p.relu_up = a.relu_up;
    p.gate_bias = check_vector(op, a.gate_bias, x, p.intermediate_size);
    p.up_bias = check_vector(op, a.up_bias, x, p.intermediate_size);
    p.down_bias = check_vector(op, a.down_bias, x, p.hidden_size);
    return p;
}

struct ActivatedMlpArguments {
    TensorArgument v, w_down_t, down_bias, x, w_up, up_bias;
};

// All parameters that are read. v and x must be made contiguous, and the caller sets y.
inline ActivatedMlpParams check_activated_mlp(const ActivatedMlpArguments &a) {
    constexpr const char *op = "activated_mlp";
    const TensorArgument &v = a.v, &w_down_t = a.w_down_t, &x = a.x;
    ActivatedMlpParams p{};
    p.dtype = check_dtype(op, v, /*allow_double=*/false);
    CATS_REQUIRE(v.dim >= 1, op, ": v must have at least one dimension, got shape []");
    check_present(op, w_down_t);
    CATS_REQUIRE(w_down_t.dim == 2 && w_down_t.sizes[0] > 0 && w_down_t.sizes[1] > 0, op,
                 ": w_down_t must have shape [I, H] with I > 0 and H > 0, got ", shape(w_down_t));
    p.intermediate_size = w_down_t.sizes[0], p.hidden_size = w_down_t.sizes[1];
    CATS_REQUIRE(v.last_size() == p.intermediate_size, op, ": v must have last dimension I = ", p.intermediate_size,
                 ", got shape ", shape(v));
    p.tokens = v.numel() / p.intermediate_size;
    p.v = v.data;
    p.w_down_t = check_weight(op, w_down_t, v, p.intermediate_size, p.hidden_size, &p.w_down_t_stride);
    p.down_bias = check_vector(op, a.down_bias, v, p.hidden_size);
    CATS_REQUIRE(x.present() == a.w_up.present(), op, ": x and w_up must be given together, got ",
                 x.present() ? "x only" : "w_up only");
    CATS_REQUIRE(x.present() || !a.up_bias.present(), op, ": up_bias needs x and w_up, got neither");
    if (!x.present()) return p;
    check_like(op, x, v);
    CATS_REQUIRE(x.dim == v.dim && std::equal(x.sizes, x.sizes + x.dim - 1, v.sizes) && x.last_size() == p.hidden_size,
                 op, ": x must have v's shape ", shape(v), " with last dimension H = ", p.hidden_size, ", got ",
                 shape(x));
    p.x = x.data;
    p.w_up = check_weight(op, a.w_up, v, p.intermediate_size, p.hidden_size, &p.w_up_stride);
    p.up_bias = check_vector(op, a.up_bias, v, p.intermediate_size);
    return p;
}

constexpr const char *kPartWeights[kMaxParts + 1] = {"weights[0]", "weights[1]", "weights[2]", "weights[3]"};
constexpr const char *kPartBiases[kMaxParts + 1] = {"biases[0]", "biases[1]", "biases[2]", "biases[3]"};

struct PackedLinearArguments {
    TensorArgument x, delta, norm_weight;
    std::vector<TensorArgument> weights;
    std::string_view row_format;
    std::vector<TensorArgument> biases; // none, or one for each weight
    TensorArgument residual, largest, total, y, x_new;
};

// All parameters; the caller sets norm_eps.
inline PackedLinearParams check_packed_linear(const PackedLinearArguments &a) {
    constexpr const char *op = "packed_linear_step";
    const TensorArgument &x = a.x, &y = a.y;
    const int64_t parts = int64_t(a.weights.size());
    PackedLinearParams p{};
    p.dtype = check_dtype(op, y, /*allow_double=*/false);
    check_present(op, x);
    CATS_REQUIRE(parts >= 1 && parts <= kMaxParts, op, ": weights must be 1 to ", kMaxParts, " tensors, got ", parts);
    CATS_REQUIRE(a.biases.empty() || int64_t(a.biases.size()) == parts, op, ": biases must be none or ", parts,
                 ", as many as weights, got ", a.biases.size());
    const auto float_part = [&](const TensorArgument &t, int64_t dim) {
        CATS_REQUIRE(t.present() && t.dtype == kFloat && t.dim == dim && t.on_same_device(y) && is_contiguous(t) &&
                         std::equal(t.sizes, t.sizes + 2, x.sizes),
                     op, ": ", t.name, " must be contiguous float32 of shape [S, heads", dim == 3 ? ", D]" : "]",
                     " with x's S and heads, on ", device(y), ", got ", t.present() ? dtype(t) : "None", " of shape ",
                     t.present() ? shape(t) : "[]");
        return static_cast<const float *>(t.data);
    };
    if (a.largest.present() || a.total.present()) {
        CATS_REQUIRE(x.dim == 3, op, ": x must have shape [S, heads, D] with largest and total, got ", shape(x));
        p.weighted = float_part(x, 3), p.largest = float_part(a.largest, 2), p.total = float_part(a.total, 2);
        p.splits = int32_t(x.sizes[0]), p.heads = int32_t(x.sizes[1]), p.head_dim = int32_t(x.sizes[2]);
        p.inputs = x.sizes[1] * x.sizes[2];
        CATS_REQUIRE(p.splits > 0, op, ": x must have at least one split, got shape ", shape(x));
        CATS_REQUIRE(!a.delta.present() && !a.x_new.present(), op, ": delta and x_new must be None with largest");
    } else {
        CATS_REQUIRE(x.dim == 1, op, ": x must have shape [K], got ", shape(x));
        p.inputs = x.sizes[0];
        p.x = check_vector(op, x, y, p.inputs);
        p.delta_is_float = a.delta.present() && a.delta.dtype == kFloat;
        TensorArgument delta = a.delta;
        if (p.delta_is_float) delta.dtype = y.dtype;
        p.delta = check_vector(op, delta, y, p.inputs);
        p.x_new = const_cast<void *>(check_vector(op, a.x_new, y, p.inputs));
    }
    CATS_REQUIRE(p.inputs > 0, op, ": x must have K > 0, got shape ", shape(x));
    p.norm_weight = check_vector(op, a.norm_weight, y, p.inputs);
    p.parts = int32_t(parts);
    int64_t outputs = 0;
    for (int64_t i = 0; i < parts; i++) {
        const TensorArgument &w = a.weights[i];
        check_present(op, w);
        CATS_REQUIRE(w.dim == 2 && w.sizes[0] > 0, op, ": ", w.name, " must have shape [N, bytes], got ", shape(w));
        p.outputs[i] = w.sizes[0];
        outputs += w.sizes[0];
        p.weights[i] =
            check_packed_weight(op, w, y, w.sizes[0], p.inputs, "row_format", a.row_format, &p.format, &p.strides[i]);
        if (!a.biases.empty()) {
            check_present(op, a.biases[i]);
            p.biases[i] = check_vector(op, a.biases[i], y, w.sizes[0]);
        }
    }
    CATS_REQUIRE(!a.residual.present() || parts == 1, op, ": residual must be None with several weights");
    p.residual = check_vector(op, a.residual, y, outputs);
    p.y = const_cast<void *>(check_vector(op, y, y, outputs));
    return p;
}

// All parameters that are read; the caller sets what is written (h, counts). gate and up are [..., I]; the caller
// copies those whose stride is -1, because their leading dimensions do not collapse to rows of one stride (contiguous
// tensors and halves of a merged projection's output do), and grad_h, of the backward op, where it is not contiguous.
inline GatedThresholdParams check_gated_threshold(const TensorArgument &grad_h, const TensorArgument &gate,
                                                  const TensorArgument &up, const TensorArgument &counts,
                                                  const TensorArgument &threshold, const TensorArgument &down_threshold,
                                                  std::string_view activation) {
    constexpr const char *op = "gated_threshold";
    GatedThresholdParams p{};
    p.dtype = check_dtype(op, gate, /*allow_double=*/true);
    CATS_REQUIRE(gate.dim >= 1, op, ": gate must have at least one dimension, got shape []");
    check_same_shape(op, up, gate);
    p.intermediate_size = gate.last_size();
    p.rows = p.intermediate_size ? gate.numel() / p.intermediate_size : 0;
    p.gate = gate.data;
    p.up = up.data;
    p.gate_stride = collapsed_row_stride(gate);
    p.up_stride = collapsed_row_stride(up);
    check_present(op, threshold);
    p.threshold = check_threshold(op, threshold, gate, p.intermediate_size, &p.threshold_stride);
    p.down_threshold = check_threshold(op, down_threshold, gate, p.intermediate_size, &p.down_threshold_stride);
    p.activation = check_activation(op, activation);
    check_counts(op, counts, gate);
    if (grad_h.present()) check_same_shape(op, grad_h, gate);
    p.grad_h = grad_h.data;
    return p;
}

// All parameters that are read. x must be made contiguous, and the caller sets y.
inline PackedMatmulParams check_packed_matmul(const TensorArgument &x, const TensorArgument &rows,
                                              std::string_view row_format, int64_t columns, bool input_rows,
                                              const TensorArgument &bias) {
    constexpr const char *op = "packed_matmul";
    PackedMatmulParams p{};
    p.dtype = check_dtype(op, x, /*allow_double=*/false);
    CATS_REQUIRE(x.dim >= 1, op, ": x must have at least one dimension, got shape []");
    check_present(op, rows);
    CATS_REQUIRE(rows.dim == 2 && rows.sizes[0] > 0, op, ": rows must have shape [N, bytes] with N > 0, got ",
                 shape(rows));
    const int64_t count = rows.sizes[0];
    CATS_REQUIRE(columns > 0 && columns <= INT32_MAX, op, ": columns must be positive and below 2^31, got ", columns);
    p.input_rows = input_rows;
    p.inputs = input_rows ? count : columns;
    p.outputs = input_rows ? columns : count;
    CATS_REQUIRE(x.last_size() == p.inputs, op, ": x must have last dimension ", p.inputs, ", ",
                 input_rows ? "as many as rows" : "columns", ", got shape ", shape(x));
    p.tokens = x.numel() / p.inputs;
    p.x = x.data;
    p.rows = static_cast<const uint8_t *>(
        check_packed_weight(op, rows, x, count, columns, "row_format", row_format, &p.format, &p.stride));
    p.bias = check_vector(op, bias, x, p.outputs);
    return p;
}

// dtype: of the output, as one of kDtypeNames. The caller sets out.
inline UnpackRowsParams check_unpack_rows(const TensorArgument &rows, std::string_view row_format, int64_t columns,
                                          int32_t out_dtype) {
    constexpr const char *op = "unpack_rows";
    UnpackRowsParams p{};
    CATS_REQUIRE(parse_row_format(row_format, &p.format), op, ": row_format must be one of ", kRowFormatNames,
                 ", got '", row_format, "'");
    const int64_t multiple = p.format.group_size ? p.format.group_size : 1;
    CATS_REQUIRE(columns > 0 && columns <= INT32_MAX && columns % multiple == 0, op,
                 ": columns must be a positive multiple of ", multiple, " below 2^31 for ", row_format, ", got ",
                 columns);
    p.dtype = check_dtype(op, "dtype", out_dtype, /*allow_double=*/false);
    check_present(op, rows);
    const int64_t bytes = p.format.row_bytes(columns);
    CATS_REQUIRE(rows.dtype == kUInt8 && rows.dim == 2 && rows.sizes[1] == bytes, op,
                 ": rows must be torch.uint8 of shape [I, ", bytes, "], the bytes of rows of ", columns, " columns in ",
                 row_format, ", got ", dtype(rows), " of shape ", shape(rows));
    const auto past = reinterpret_cast<uintptr_t>(rows.data) % 16;
    const bool aligned = rows.strides[0] % 16 == 0 && past == 0;
    CATS_REQUIRE(
        rows.strides[1] == 1 && (aligned || rows.device_type == kCpu), op,
        ": rows must start at multiples of 16 bytes and have unit stride in their last dimension, got strides ",
        strides(rows), ", the first ", past, " bytes past a multiple");
    p.count = rows.sizes[0];
    p.columns = columns;
    p.rows = static_cast<const uint8_t *>(rows.data);
    p.stride = rows.strides[0];
    return p;
}

} // namespace cats
