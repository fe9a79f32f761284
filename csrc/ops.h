// The torch ops, for CPU and CUDA alike: argument lists, outputs, and the copies that the kernels need. Torch's stable
// ABI only (target 2.10). A Backend has what differs between devices:
//
//     Backend::OnDevice(index)                     makes a device the current one while it lives
//     Backend::empty_contiguous_like(tensor), empty_contiguous(like, sizes)
//     Backend::run(params, device_index, ...)      launches sparse_mlp or exact_mlp, activated_mlp, unpack_rows, or
//                                                  gated_threshold or its backward
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"

namespace cats {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An op's argument of type str. Not std::string itself: torch 2.10 to 2.13 convert to it with a leak, one a call.
struct StringArgument {
    std::string value;
};

inline TensorArgument argument(const char *name, const Tensor &tensor) {
    const AtenTensorHandle handle = tensor.get();
    int64_t *sizes, *strides;
    TensorArgument t{name};
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &t.dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    if (t.dim == 1 && sizes[0] == 0 && !tensor.defined()) return TensorArgument{name}; // what None arrives as
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(handle, &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &t.dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &t.device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &t.device_index));
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &t.data));
    t.sizes = sizes;
    t.strides = strides;
    t.freed = !t.data && t.numel() > 0;
    return t;
}

inline std::string_view named(const StringArgument &row_format) { return row_format.value; }

inline TensorArgument argument(const char *name, const OptionalTensor &tensor) {
    return tensor.has_value() ? argument(name, *tensor) : TensorArgument{name};
}

// Runs what allocates. Errors of torch's own calls name a file of the build and keep the reason to themselves.
template <class Body> auto allocating(const char *op, const char *name, const Tensor &like, const Body &body) {
    try {
        return body();
    } catch (const std::exception &error) {
        const bool by_torch = std::strstr(error.what(), " API call failed at ");
        if (!by_torch && !dynamic_cast<const std::bad_alloc *>(&error)) throw;
    }
    const TensorArgument t = argument(name, like);
    fail(op, ": cannot allocate the output or the workspace for ", name, " of shape ", shape(t), " and dtype ",
         dtype(t), " on ", device(t), ": out of memory, or the device has failed before");
}

// --- sparse_mlp and sparse_mlp_packed, plain and counted -------------------------------------------------------------

template <class Backend>
Tensor run_sparse_mlp(const char *op, SparseMlpParams params, const Tensor &x, const OptionalTensor &counts,
                      bool deterministic) {
    if (counts.has_value()) check_present(op, argument("counts", *counts));
    return allocating(op, "x", x, [&] {
        const int32_t device_index = x.get_device_index();
        const typename Backend::OnDevice on_device(device_index);
        Tensor y = Backend::empty_contiguous_like(x);
        if (params.tokens == 0) return y;
        Tensor x_rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
        if (params.input_threshold && reinterpret_cast<uintptr_t>(x_rows.const_data_ptr()) % 16)
            x_rows = torch::stable::clone(x_rows); // on CUDA this form has no kernel that reads it
        params.x = x_rows.const_data_ptr();
        params.y = y.mutable_data_ptr();
        if (counts.has_value()) params.counts = static_cast<int64_t *>(counts->mutable_data_ptr());
        Backend::run(op, params, device_index, deterministic);
        return y;
    });
}

template <class Backend>
Tensor sparse_mlp(const Tensor &x, const Tensor &w_gate, const Tensor &w_up, const Tensor &w_down_t,
                  const OptionalTensor &counts, const Tensor &threshold, const OptionalTensor &down_threshold,
                  const StringArgument &activation, const OptionalTensor &gate_bias, const OptionalTensor &up_bias,
                  const OptionalTensor &down_bias, bool deterministic) {
    const SparseMlpParams params = check_sparse_mlp(
        {argument("x", x), argument("w_gate", w_gate), argument("w_up", w_up), argument("w_down_t", w_down_t),
         argument("counts", counts), argument("threshold", threshold), argument("down_threshold", down_threshold),
         activation.value, argument("gate_bias", gate_bias), argument("up_bias", up_bias),
         argument("down_bias", down_bias)});
    return run_sparse_mlp<Backend>("sparse_mlp", params, x, counts, deterministic);
}

template <class Backend>
Tensor sparse_mlp_packed(const Tensor &x, const Tensor &w_gate, const Tensor &w_up, const Tensor &w_down_t,
                         const OptionalTensor &counts, const StringArgument &gate_format,
                         const StringArgument &up_format, const StringArgument &down_format, const Tensor &threshold,
                         const OptionalTensor &down_threshold, const StringArgument &activation,
                         const OptionalTensor &gate_bias, const OptionalTensor &up_bias,
                         const OptionalTensor &down_bias, bool deterministic) {
    const SparseMlpParams params = check_sparse_mlp(
        {argument("x", x), argument("w_gate", w_gate), argument("w_up", w_up), argument("w_down_t", w_down_t),
         argument("counts", counts), argument("threshold", threshold), argument("down_threshold", down_threshold),
         activation.value, argument("gate_bias", gate_bias), argument("up_bias", up_bias),
         argument("down_bias", down_bias), named(gate_format), named(up_format), named(down_format)});
    return run_sparse_mlp<Backend>("sparse_mlp_packed", params, x, counts, deterministic);
}

// --- sparse_mlp_columns ----------------------------------------------------------------------------------------------

template <class Backend>
Tensor sparse_mlp_columns(const Tensor &x, const Tensor &w_gate_t, const Tensor &w_up, const Tensor &w_down_t,
                          const OptionalTensor &counts, const Tensor &input_threshold, const Tensor &threshold,
                          const OptionalTensor &down_threshold, const StringArgument &activation,
                          const OptionalTensor &gate_bias, const OptionalTensor &up_bias,
                          const OptionalTensor &down_bias, bool deterministic) {
    SparseMlpArguments arguments{argument("x", x),
                                 argument("w_gate_t", w_gate_t),
                                 argument("w_up", w_up),
                                 argument("w_down_t", w_down_t),
                                 argument("counts", counts),
                                 argument("threshold", threshold),
                                 argument("down_threshold", down_threshold),
                                 activation.value,
                                 argument("gate_bias", gate_bias),
                                 argument("up_bias", up_bias),
                                 argument("down_bias", down_bias)};
    arguments.input_threshold = argument("input_threshold", input_threshold);
    return run_sparse_mlp<Backend>("sparse_mlp_columns", check_sparse_mlp(arguments), x, counts, deterministic);
}

// --- exact_mlp -------------------------------------------------------------------------------------------------------

template <class Backend>
Tensor exact_mlp(const Tensor &x, const Tensor &w_gate, const OptionalTensor &w_up, const Tensor &w_down_t,
                 const StringArgument &activation, std::optional<double> deviations, bool relu_up,
                 const OptionalTensor &gate_bias, const OptionalTensor &up_bias, const OptionalTensor &down_bias,
                 bool deterministic) {
    const SparseMlpParams params = check_exact_mlp(
        {argument("x", x), argument("w_gate", w_gate), argument("w_up", w_up), argument("w_down_t", w_down_t),
         activation.value, deviations, relu_up, argument("gate_bias", gate_bias), argument("up_bias", up_bias),
         argument("down_bias", down_bias)});
    return run_sparse_mlp<Backend>("exact_mlp", params, x, std::nullopt, deterministic);
}

// --- activated_mlp ---------------------------------------------------------------------------------------------------

template <class Backend>
Tensor activated_mlp(const Tensor &v, const Tensor &w_down_t, const OptionalTensor &down_bias, const OptionalTensor &x,
                     const OptionalTensor &w_up, const OptionalTensor &up_bias, bool deterministic) {
    ActivatedMlpParams params =
        check_activated_mlp({argument("v", v), argument("w_down_t", w_down_t), argument("down_bias", down_bias),
                             argument("x", x), argument("w_up", w_up), argument("up_bias", up_bias)});
    return allocating("activated_mlp", "v", v, [&] {
        const int32_t device_index = v.get_device_index();
        const typename Backend::OnDevice on_device(device_index);
        const auto v_sizes = v.sizes();
        std::vector<int64_t> sizes(v_sizes.begin(), v_sizes.end());
        sizes.back() = params.hidden_size;
        Tensor y = Backend::empty_contiguous(v, sizes);
        if (params.tokens == 0) return y;
        const Tensor v_rows = v.is_contiguous() ? v : torch::stable::contiguous(v);
        OptionalTensor x_rows;
        if (params.x) x_rows = x->is_contiguous() ? *x : torch::stable::contiguous(*x);
        params.v = v_rows.const_data_ptr();
        if (params.x) params.x = x_rows->const_data_ptr();
        params.y = y.mutable_data_ptr();
        Backend::run(params, device_index, deterministic);
        return y;
    });
}

// Two ops from one function: without `counts`, its fifth argument, and with it.
template <auto function> struct WithAndWithoutCounts;

template <class... Rest, Tensor (*function)(const Tensor &, const Tensor &, const Tensor &, const Tensor &,
                                            const OptionalTensor &, Rest...)>
struct WithAndWithoutCounts<function> {
    static Tensor plain(const Tensor &x, const Tensor &w_gate, const Tensor &w_up, const Tensor &w_down_t,
                        Rest... rest) {
        return function(x, w_gate, w_up, w_down_t, std::nullopt, rest...);
    }
    static Tensor counted(const Tensor &x, const Tensor &w_gate, const Tensor &w_up, const Tensor &w_down_t,
                          const Tensor &counts, Rest... rest) {
        return function(x, w_gate, w_up, w_down_t, counts, rest...);
    }
};

// --- gated_threshold and its backward --------------------------------------------------------------------------------

// The same values in rows of one stride: `t` itself, or a copy, which is contiguous; its data and stride are then set.
inline Tensor with_uniform_rows(const Tensor &t, const void **data, int64_t *stride) {
    if (*stride >= 0) return t;
    Tensor copy = torch::stable::contiguous(t);
    *stride = copy.size(copy.dim() - 1);
    *data = copy.const_data_ptr();
    return copy;
}

template <class Backend>
Tensor run_gated_threshold(const Tensor &gate, const Tensor &up, const OptionalTensor &counts, const Tensor &threshold,
                           const OptionalTensor &down_threshold, const StringArgument &activation) {
    GatedThresholdParams params = check_gated_threshold(
        argument("grad_h", std::nullopt), argument("gate", gate), argument("up", up), argument("counts", counts),
        argument("threshold", threshold), argument("down_threshold", down_threshold), activation.value);
    return allocating("gated_threshold", "gate", gate, [&] {
        const int32_t device_index = gate.get_device_index();
        const typename Backend::OnDevice on_device(device_index);
        Tensor h = Backend::empty_contiguous_like(gate);
        if (params.rows == 0) return h;
        const Tensor gate_rows = with_uniform_rows(gate, &params.gate, &params.gate_stride),
                     up_rows = with_uniform_rows(up, &params.up, &params.up_stride);
        params.h = h.mutable_data_ptr();
        if (counts.has_value()) params.counts = static_cast<int64_t *>(counts->mutable_data_ptr());
        Backend::run(params, device_index);
        return h;
    });
}

template <class Backend>
Tensor gated_threshold(const Tensor &gate, const Tensor &up, const Tensor &threshold,
                       const OptionalTensor &down_threshold, const StringArgument &activation) {
    return run_gated_threshold<Backend>(gate, up, std::nullopt, threshold, down_threshold, activation);
}

template <class Backend>
Tensor gated_threshold_counted(const Tensor &gate, const Tensor &up, const Tensor &counts, const Tensor &threshold,
                               const OptionalTensor &down_threshold, const StringArgument &activation) {
    check_present("gated_threshold", argument("counts", counts));
    return run_gated_threshold<Backend>(gate, up, counts, threshold, down_threshold, activation);
}

template <class Backend>
std::tuple<Tensor, Tensor> gated_threshold_backward(const Tensor &grad_h, const Tensor &gate, const Tensor &up,
                                                    const Tensor &threshold, const OptionalTensor &down_threshold,
                                                    const StringArgument &activation) {
    check_present("gated_threshold", argument("grad_h", grad_h));
    GatedThresholdParams params = check_gated_threshold(
        argument("grad_h", grad_h), argument("gate", gate), argument("up", up), argument("counts", std::nullopt),
        argument("threshold", threshold), argument("down_threshold", down_threshold), activation.value);
    return allocating("gated_threshold", "gate", gate, [&]() -> std::tuple<Tensor, Tensor> {
        const int32_t device_index = gate.get_device_index();
        const typename Backend::OnDevice on_device(device_index);
        Tensor grad_gate = Backend::empty_contiguous_like(gate), grad_up = Backend::empty_contiguous_like(gate);
        if (params.rows == 0) return {grad_gate, grad_up};
        const Tensor gate_rows = with_uniform_rows(gate, &params.gate, &params.gate_stride),
                     up_rows = with_uniform_rows(up, &params.up, &params.up_stride),
                     grad_rows = grad_h.is_contiguous() ? grad_h : torch::stable::contiguous(grad_h);
        params.grad_h = grad_rows.const_data_ptr();
        params.grad_gate = grad_gate.mutable_data_ptr();
        params.grad_up = grad_up.mutable_data_ptr();
        Backend::run(params, device_index);
        return {grad_gate, grad_up};
    });
}

// --- unpack_rows -----------------------------------------------------------------------------------------------------

template <class Backend>
Tensor unpack_rows(const Tensor &rows, const StringArgument &row_format, int64_t columns,
                   torch::headeronly::ScalarType dtype) {
    UnpackRowsParams params = check_unpack_rows(argument("rows", rows), row_format.value, columns, int32_t(dtype));
    return allocating("unpack_rows", "rows", rows, [&] {
        const int32_t device_index = rows.get_device_index();
        const typename Backend::OnDevice on_device(device_index);
        Tensor out = torch::stable::new_empty(rows, {params.count, columns}, dtype);
        if (params.count == 0) return out;
        params.out = out.mutable_data_ptr();
        Backend::run(params, device_index);
        return out;
    });
}

template <class Backend, class Library> void implement_ops(Library &m) {
    m.impl("sparse_mlp", TORCH_BOX(&WithAndWithoutCounts<&sparse_mlp<Backend>>::plain));
    m.impl("sparse_mlp_counted", TORCH_BOX(&WithAndWithoutCounts<&sparse_mlp<Backend>>::counted));
    m.impl("sparse_mlp_packed", TORCH_BOX(&WithAndWithoutCounts<&sparse_mlp_packed<Backend>>::plain));
    m.impl("sparse_mlp_packed_counted", TORCH_BOX(&WithAndWithoutCounts<&sparse_mlp_packed<Backend>>::counted));
    m.impl("sparse_mlp_columns", TORCH_BOX(&WithAndWithoutCounts<&sparse_mlp_columns<Backend>>::plain));
    m.impl("sparse_mlp_columns_counted", TORCH_BOX(&WithAndWithoutCounts<&sparse_mlp_columns<Backend>>::counted));
    m.impl("exact_mlp", TORCH_BOX(&exact_mlp<Backend>));
    m.impl("activated_mlp", TORCH_BOX(&activated_mlp<Backend>));
    m.impl("unpack_rows", TORCH_BOX(&unpack_rows<Backend>));
    m.impl("gated_threshold", TORCH_BOX(&gated_threshold<Backend>));
    m.impl("gated_threshold_counted", TORCH_BOX(&gated_threshold_counted<Backend>));
    m.impl("gated_threshold_forward", TORCH_BOX(&gated_threshold<Backend>));
    m.impl("gated_threshold_backward", TORCH_BOX(&gated_threshold_backward<Backend>));
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
