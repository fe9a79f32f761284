// Argument checks shared by ops_cpu.cpp and ops_cuda.cu: tensors in, checked plain-old-data parameters out.
// Every message is a sentence that names the argument and the value; cats_ext/ops/definitions.py says the same for tracing.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>

#include "sparse_mlp.h"

namespace cats {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An op's argument of type str. Not std::string itself: torch 2.10 to 2.13 convert to it with a leak, one a call.
struct StringArgument {
    std::string value;
    operator const std::string &() const { return value; }
};

inline std::string describe(torch::headeronly::IntHeaderOnlyArrayRef values) {
    std::ostringstream out;
    out << '[';
    for (size_t i = 0; i < values.size(); i++) out << (i ? ", " : "") << values[i];
    out << ']';
    return out.str();
}

inline std::string describe_device(const Tensor &t) {
    return t.is_cpu() ? "cpu" : (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

inline int32_t device_type(const Tensor &t) {
    int32_t type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
    return type;
}

inline bool same_device(const Tensor &a, const Tensor &b) {
    return device_type(a) == device_type(b) && a.get_device_index() == b.get_device_index();
}

inline Activation check_activation(const char *op, const std::string &name) {
    if (name == "silu") return Activation::kSilu;
    if (name == "gelu") return Activation::kGelu;
    if (name == "gelu_tanh") return Activation::kGeluTanh;
    if (name == "relu") return Activation::kRelu;
    STD_TORCH_CHECK(false, op, ": activation must be one of silu, gelu, gelu_tanh, relu, got '", name, "'");
}

inline DType check_dtype(const char *op, const char *name, const Tensor &t, bool allow_double) {
    switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Double:
        if (allow_double) return DType::kFloat64;
        [[fallthrough]];
    default:
        STD_TORCH_CHECK(false, op, ": ", name, " must be float32, float16 or bfloat16",
                        allow_double ? " or float64" : "", ", got ", torch::headeronly::toString(t.scalar_type()));
    }
}

// Same dtype and device as `like`.
inline void check_like(const char *op, const char *name, const Tensor &t, const char *like_name, const Tensor &like) {
    STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have ", like_name, "'s dtype ",
                    torch::headeronly::toString(like.scalar_type()), ", got ",
                    torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(same_device(t, like), op, ": ", name, " must be on ", like_name, "'s device ",
                    describe_device(like), ", got ", describe_device(t));
}

inline void check_same_shape(const char *op, const char *name, const Tensor &t, const char *like_name,
                             const Tensor &like) {
    check_like(op, name, t, like_name, like);
    const auto sizes = t.sizes(), expected = like.sizes();
    STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), op, ": ", name,
                    " must have ", like_name, "'s shape ", describe(expected), ", got ", describe(sizes));
}

inline void check_weight(const char *op, const char *name, const Tensor &w, const Tensor &x, int64_t rows,
                         int64_t columns) {
    check_like(op, name, w, "x", x);
    STD_TORCH_CHECK(w.dim() == 2 && w.size(0) == rows && w.size(1) == columns, op, ": ", name, " must have shape [",
                    rows, ", ", columns, "], got ", describe(w.sizes()));
    STD_TORCH_CHECK(columns == 1 || w.stride(1) == 1, op, ": ", name,
                    " must have unit stride in its last dimension, got strides ", describe(w.strides()),
                    std::string(name) == "w_down_t" ? "; lay down_proj.weight out with one contiguous row a neuron"
                                                    : "");
}

// Null if absent. A vector must be contiguous: biases and thresholds are small, and the caller owns their layout.
inline const void *check_vector(const char *op, const char *name, const OptionalTensor &t, const char *like_name,
                                const Tensor &like, int64_t size) {
    if (!t.has_value()) return nullptr;
    check_like(op, name, *t, like_name, like);
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size, op, ": ", name, " must have shape [", size, "], got ",
                    describe(t->sizes()));
    STD_TORCH_CHECK(size == 1 || t->stride(0) == 1, op, ": ", name, " must be contiguous, got stride ", t->stride(0));
    return t->const_data_ptr();
}

inline const float *check_threshold(const char *op, const char *name, const Tensor &t, const Tensor &like,
                                    int64_t intermediate_size, int64_t *stride) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, op, ": ", name, " must be float32, got ",
                    torch::headeronly::toString(t.scalar_type()));
    STD_TORCH_CHECK(same_device(t, like), op, ": ", name, " must be on the device ", describe_device(like),
                    " of the other arguments, got ", describe_device(t));
    STD_TORCH_CHECK(t.dim() == 0 || (t.dim() == 1 && t.size(0) == intermediate_size), op, ": ", name,
                    " must have shape [] or [", intermediate_size, "], got ", describe(t.sizes()));
    *stride = t.dim() == 0 ? 0 : t.stride(0);
    return static_cast<const float *>(t.const_data_ptr());
}

// Everything of SparseMlpParams but y. x must outlive the parameters and be contiguous (the ops see to it).
inline SparseMlpParams check_sparse_mlp(const Tensor &x, const Tensor &w_gate, const Tensor &w_up,
                                        const Tensor &w_down_t, const OptionalTensor &counts, const Tensor &threshold,
                                        const OptionalTensor &down_threshold, const std::string &activation,
                                        const OptionalTensor &gate_bias, const OptionalTensor &up_bias,
                                        const OptionalTensor &down_bias) {
    constexpr const char *op = "sparse_mlp";
    SparseMlpParams p{};
    p.dtype = check_dtype(op, "x", x, /*allow_double=*/false);
    STD_TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got shape []");
    STD_TORCH_CHECK(w_gate.dim() == 2, op, ": w_gate must have shape [I, H], got ", describe(w_gate.sizes()));
    p.intermediate_size = w_gate.size(0);
    p.hidden_size = w_gate.size(1);
    STD_TORCH_CHECK(p.intermediate_size > 0 && p.hidden_size > 0, op, ": w_gate must have I > 0 and H > 0, got ",
                    describe(w_gate.sizes()));
    STD_TORCH_CHECK(x.size(x.dim() - 1) == p.hidden_size, op, ": x must have last dimension H = ", p.hidden_size,
                    ", got shape ", describe(x.sizes()));
    p.tokens = x.numel() / p.hidden_size;
    check_weight(op, "w_gate", w_gate, x, p.intermediate_size, p.hidden_size);
    check_weight(op, "w_up", w_up, x, p.intermediate_size, p.hidden_size);
    check_weight(op, "w_down_t", w_down_t, x, p.intermediate_size, p.hidden_size);
    p.x = x.const_data_ptr();
    p.w_gate = w_gate.const_data_ptr();
    p.w_up = w_up.const_data_ptr();
    p.w_down_t = w_down_t.const_data_ptr();
    p.w_gate_stride = w_gate.stride(0);
    p.w_up_stride = w_up.stride(0);
    p.w_down_t_stride = w_down_t.stride(0);
    p.threshold = check_threshold(op, "threshold", threshold, x, p.intermediate_size, &p.threshold_stride);
    if (down_threshold.has_value())
        p.down_threshold =
            check_threshold(op, "down_threshold", *down_threshold, x, p.intermediate_size, &p.down_threshold_stride);
    p.activation = check_activation(op, activation);
    p.gate_bias = check_vector(op, "gate_bias", gate_bias, "x", x, p.intermediate_size);
    p.up_bias = check_vector(op, "up_bias", up_bias, "x", x, p.intermediate_size);
    p.down_bias = check_vector(op, "down_bias", down_bias, "x", x, p.hidden_size);
    if (counts.has_value()) {
        STD_TORCH_CHECK(counts->scalar_type() == ScalarType::Long && counts->dim() == 1 &&
                            counts->size(0) == kNumCounts && counts->is_contiguous() && same_device(*counts, x),
                        op, ": counts must be contiguous int64 of shape [", kNumCounts, "] on ", describe_device(x),
                        ", got ", torch::headeronly::toString(counts->scalar_type()), " of shape ",
                        describe(counts->sizes()), " on ", describe_device(*counts));
        p.counts = static_cast<int64_t *>(counts->mutable_data_ptr());
    }
    return p;
}

// Everything of GatedThresholdParams but the outputs and grad_h. gate and up are [..., I]; their leading dimensions
// must collapse to rows of one stride (true for contiguous tensors and for halves of a merged projection's output).
inline GatedThresholdParams check_gated_threshold(const Tensor &gate, const Tensor &up, const Tensor &threshold,
                                                  const OptionalTensor &down_threshold, const std::string &activation) {
    constexpr const char *op = "gated_threshold";
    GatedThresholdParams p{};
    p.dtype = check_dtype(op, "gate", gate, /*allow_double=*/true);
    const auto sizes = gate.sizes();
    STD_TORCH_CHECK(sizes.size() >= 1, op, ": gate must have at least one dimension, got shape []");
    check_same_shape(op, "up", up, "gate", gate);
    p.intermediate_size = sizes[sizes.size() - 1];
    p.rows = p.intermediate_size ? gate.numel() / p.intermediate_size : 0;
    p.gate = gate.const_data_ptr();
    p.up = up.const_data_ptr();
    p.threshold = check_threshold(op, "threshold", threshold, gate, p.intermediate_size, &p.threshold_stride);
    if (down_threshold.has_value())
        p.down_threshold =
            check_threshold(op, "down_threshold", *down_threshold, gate, p.intermediate_size, &p.down_threshold_stride);
    p.activation = check_activation(op, activation);
    return p;
}

// Row stride of [..., I] if its last dimension has unit stride and the leading ones collapse to one; else -1.
inline int64_t collapsed_row_stride(const Tensor &t) {
    const auto sizes = t.sizes(), strides = t.strides();
    const int64_t last = int64_t(sizes.size()) - 1;
    if (sizes[last] > 1 && strides[last] != 1) return -1;
    int64_t row_stride = sizes[last], expected = -1;
    for (int64_t d = last - 1; d >= 0; d--) {
        if (sizes[d] == 1) continue;
        if (expected < 0) row_stride = strides[d];
        else if (strides[d] != expected) return -1;
        expected = strides[d] * sizes[d];
    }
    return row_stride;
}

} // namespace cats

template <> struct torch::stable::detail::ToImpl<cats::StringArgument> {
    static cats::StringArgument call(StableIValue value, uint64_t /*build_version*/, bool /*is_internal*/) {
        const auto handle = to<StringHandle>(value);
        size_t length;
        const char *data;
        TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
        TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
        cats::StringArgument argument{{data, length}};
        TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
        return argument;
    }
};
