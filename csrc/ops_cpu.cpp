// The CPU side of the torch ops: checks, output, threads. The only file of the CPU library that knows torch, and only
// through the stable ABI (target 2.10).
#include <tuple>

#include "checks.h"
#include "cpu/kernels.h"

namespace cats {

namespace {

Parallel torch_threads() {
    return {torch::stable::get_num_threads(), [](int64_t n, void (*body)(void *, int64_t), void *context) {
                torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; i++) body(context, i);
                });
            }};
}

Tensor empty_contiguous_like(const Tensor &like) { return torch::stable::new_empty(like, like.sizes()); }

Tensor run_sparse_mlp(const Tensor &x, const Tensor &w_gate, const Tensor &w_up, const Tensor &w_down_t,
                      const OptionalTensor &counts, const Tensor &threshold, const OptionalTensor &down_threshold,
                      const std::string &activation, const OptionalTensor &gate_bias, const OptionalTensor &up_bias,
                      const OptionalTensor &down_bias) {
    SparseMlpParams params = check_sparse_mlp(x, w_gate, w_up, w_down_t, counts, threshold, down_threshold, activation,
                                              gate_bias, up_bias, down_bias);
    Tensor y = empty_contiguous_like(x);
    if (params.tokens == 0) return y;
    const Tensor x_rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
    params.x = x_rows.const_data_ptr();
    params.y = y.mutable_data_ptr();
    cpu_kernels().sparse_mlp(params, torch_threads());
    return y;
}

Tensor sparse_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor threshold,
                  OptionalTensor down_threshold, StringArgument activation, OptionalTensor gate_bias,
                  OptionalTensor up_bias, OptionalTensor down_bias, bool /*deterministic: always*/) {
    return run_sparse_mlp(x, w_gate, w_up, w_down_t, std::nullopt, threshold, down_threshold, activation, gate_bias,
                          up_bias, down_bias);
}

Tensor sparse_mlp_counted(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor counts, Tensor threshold,
                          OptionalTensor down_threshold, StringArgument activation, OptionalTensor gate_bias,
                          OptionalTensor up_bias, OptionalTensor down_bias, bool /*deterministic*/) {
    return run_sparse_mlp(x, w_gate, w_up, w_down_t, counts, threshold, down_threshold, activation, gate_bias, up_bias,
                          down_bias);
}

// The tensors of gated_threshold's parameters in the layout that the kernels read, copied where they are not in it.
struct GatedThresholdInputs {
    GatedThresholdParams params;
    Tensor gate, up, threshold;
    OptionalTensor down_threshold;

    GatedThresholdInputs(const Tensor &gate_, const Tensor &up_, const Tensor &threshold_,
                         const OptionalTensor &down_threshold_, const std::string &activation)
        : gate(gate_), up(up_), threshold(threshold_), down_threshold(down_threshold_) {
        params = check_gated_threshold(gate, up, threshold, down_threshold, activation);
        if (params.rows == 0) return;
        if (collapsed_row_stride(gate) < 0) gate = torch::stable::contiguous(gate);
        if (collapsed_row_stride(up) < 0) up = torch::stable::contiguous(up);
        if (params.threshold_stride > 1) threshold = torch::stable::contiguous(threshold);
        if (params.down_threshold_stride > 1) down_threshold = torch::stable::contiguous(*down_threshold);
        params = check_gated_threshold(gate, up, threshold, down_threshold, activation);
        params.gate_stride = collapsed_row_stride(gate);
        params.up_stride = collapsed_row_stride(up);
    }
};

Tensor gated_threshold(Tensor gate, Tensor up, Tensor threshold, OptionalTensor down_threshold,
                       StringArgument activation) {
    GatedThresholdInputs inputs(gate, up, threshold, down_threshold, activation);
    GatedThresholdParams &params = inputs.params;
    Tensor h = empty_contiguous_like(gate);
    if (params.rows == 0) return h;
    params.h = h.mutable_data_ptr();
    auto run = params.dtype == DType::kFloat64 ? gated_threshold_double : cpu_kernels().gated_threshold;
    run(params, torch_threads());
    return h;
}

std::tuple<Tensor, Tensor> gated_threshold_backward(Tensor grad_h, Tensor gate, Tensor up, Tensor threshold,
                                                    OptionalTensor down_threshold, StringArgument activation) {
    GatedThresholdInputs inputs(gate, up, threshold, down_threshold, activation);
    GatedThresholdParams &params = inputs.params;
    check_same_shape("gated_threshold", "grad_h", grad_h, "gate", gate);
    Tensor grad_gate = empty_contiguous_like(gate), grad_up = empty_contiguous_like(gate);
    if (params.rows == 0) return {grad_gate, grad_up};
    const Tensor grad = grad_h.is_contiguous() ? grad_h : torch::stable::contiguous(grad_h);
    params.grad_h = grad.const_data_ptr();
    params.grad_gate = grad_gate.mutable_data_ptr();
    params.grad_up = grad_up.mutable_data_ptr();
    auto run =
        params.dtype == DType::kFloat64 ? gated_threshold_double_backward : cpu_kernels().gated_threshold_backward;
    run(params, torch_threads());
    return {grad_gate, grad_up};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(cats, CPU, m) {
    m.impl("sparse_mlp", TORCH_BOX(&sparse_mlp));
    m.impl("sparse_mlp_counted", TORCH_BOX(&sparse_mlp_counted));
    m.impl("gated_threshold", TORCH_BOX(&gated_threshold));
    m.impl("gated_threshold_forward", TORCH_BOX(&gated_threshold));
    m.impl("gated_threshold_backward", TORCH_BOX(&gated_threshold_backward));
}

} // namespace cats

// What `cats env` shows: the instruction sets compiled in and the one in use, and what setup.py left out and why.
extern "C" __attribute__((visibility("default"))) const char *cats_build_info() {
#ifdef CATS_LEFT_OUT
    static const std::string info = cats::cpu_kernels_info() + "; the build left out " CATS_LEFT_OUT;
#else
    static const std::string info = cats::cpu_kernels_info();
#endif
    return info.c_str();
}
