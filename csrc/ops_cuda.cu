// The CUDA side of the torch ops: checks, device guard, output, current stream, workspace, launch. The only file of the
// CUDA library that knows torch, and only through the stable ABI (target 2.10).
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "cuda/sparse_mlp_launch.h"
#include "cuda/workspace.h"

namespace cats {

namespace {

// A device is the current one while this lives. With one device there is nothing to ask: a prompt's layers wait for the
// host, which has forgotten the guard's code since the layer before.
class OnDevice {
  public:
    explicit OnDevice(int device_index) {
        static const int devices = [] {
            int count = 0;
            return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
        }();
        if (devices != 1) guard_.emplace(device_index);
    }

  private:
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

cudaStream_t current_stream(int device_index) {
    void *stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    return static_cast<cudaStream_t>(stream);
}

void check_cuda(const char *op, cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

// Contiguous, of the shape, dtype and device of `like`. Straight to the allocator: a third of new_empty's host time.
Tensor empty_contiguous_like(const Tensor &like) {
    const auto sizes = like.sizes();
    std::vector<int64_t> strides(sizes.size(), 1);
    for (int64_t d = int64_t(sizes.size()) - 2; d >= 0; d--)
        strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                    aoti_torch_device_type_cuda(), like.get_device_index(), &handle));
    return Tensor(handle);
}

Tensor run_sparse_mlp(const Tensor &x, const Tensor &w_gate, const Tensor &w_up, const Tensor &w_down_t,
                      const OptionalTensor &counts, const Tensor &threshold, const OptionalTensor &down_threshold,
                      const std::string &activation, const OptionalTensor &gate_bias, const OptionalTensor &up_bias,
                      const OptionalTensor &down_bias, bool deterministic) {
    SparseMlpParams params = check_sparse_mlp(x, w_gate, w_up, w_down_t, counts, threshold, down_threshold, activation,
                                              gate_bias, up_bias, down_bias);
    const OnDevice on_device(x.get_device_index());
    Tensor y = empty_contiguous_like(x);
    if (params.tokens == 0) return y;
    const Tensor x_rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
    params.x = x_rows.const_data_ptr();
    params.y = y.mutable_data_ptr();
    const cudaStream_t stream = current_stream(x.get_device_index());
    void *workspace;
    check_cuda("sparse_mlp", get_workspace(stream, sparse_mlp_workspace_bytes(params), Contents::kZero, &workspace));
    SparseMlpLaunchOptions options;
    if (deterministic) {
        size_t bytes;
        check_cuda("sparse_mlp", sparse_mlp_partial_sums_bytes(params, &bytes));
        check_cuda("sparse_mlp", get_workspace(stream, bytes, Contents::kAnything, &options.partial_sums));
    }
    check_cuda("sparse_mlp", sparse_mlp_cuda(params, workspace, stream, options));
    return y;
}

Tensor sparse_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor threshold,
                  OptionalTensor down_threshold, StringArgument activation, OptionalTensor gate_bias,
                  OptionalTensor up_bias, OptionalTensor down_bias, bool deterministic) {
    return run_sparse_mlp(x, w_gate, w_up, w_down_t, std::nullopt, threshold, down_threshold, activation, gate_bias,
                          up_bias, down_bias, deterministic);
}

Tensor sparse_mlp_counted(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_down_t, Tensor counts, Tensor threshold,
                          OptionalTensor down_threshold, StringArgument activation, OptionalTensor gate_bias,
                          OptionalTensor up_bias, OptionalTensor down_bias, bool deterministic) {
    return run_sparse_mlp(x, w_gate, w_up, w_down_t, counts, threshold, down_threshold, activation, gate_bias, up_bias,
                          down_bias, deterministic);
}

// One token; y_sum is the launch's own memory, so there is no workspace.
void sparse_mlp_step(Tensor x, Tensor norm_weight, double norm_eps, Tensor w_gate, Tensor w_up, Tensor w_down_t,
                     Tensor y_sum, Tensor threshold, OptionalTensor down_threshold, StringArgument activation,
                     OptionalTensor gate_bias, OptionalTensor up_bias) {
    constexpr const char *op = "sparse_mlp_step";
    SparseMlpParams params = check_sparse_mlp(x, w_gate, w_up, w_down_t, std::nullopt, threshold, down_threshold,
                                              activation, gate_bias, up_bias, std::nullopt);
    STD_TORCH_CHECK(params.tokens == 1 && x.is_contiguous(), op, ": x must be one contiguous row, got shape ",
                    describe(x.sizes()));
    STD_TORCH_CHECK(y_sum.scalar_type() == ScalarType::Float && y_sum.dim() == 1 &&
                        y_sum.size(0) > params.hidden_size && y_sum.is_contiguous() && same_device(y_sum, x),
                    op, ": y_sum must be contiguous float32 of shape [H + 1] on ", describe_device(x), ", got ",
                    torch::headeronly::toString(y_sum.scalar_type()), " of shape ", describe(y_sum.sizes()), " on ",
                    describe_device(y_sum));
    params.norm_weight = check_vector(op, "norm_weight", norm_weight, "x", x, params.hidden_size);
    params.norm_eps = float(norm_eps);
    params.y_sum = static_cast<float *>(y_sum.mutable_data_ptr());
    const OnDevice on_device(x.get_device_index());
    check_cuda(op, sparse_mlp_cuda(params, nullptr, current_stream(x.get_device_index())));
}

// The same values in rows of one stride, which is set: t itself, or a copy.
Tensor with_uniform_rows(const Tensor &t, int64_t *stride) {
    *stride = collapsed_row_stride(t);
    if (*stride >= 0) return t;
    Tensor copy = torch::stable::contiguous(t);
    *stride = collapsed_row_stride(copy);
    return copy;
}

Tensor gated_threshold(Tensor gate, Tensor up, Tensor threshold, OptionalTensor down_threshold,
                       StringArgument activation) {
    GatedThresholdParams params = check_gated_threshold(gate, up, threshold, down_threshold, activation);
    const OnDevice on_device(gate.get_device_index());
    const Tensor gate_rows = with_uniform_rows(gate, &params.gate_stride),
                 up_rows = with_uniform_rows(up, &params.up_stride);
    Tensor h = empty_contiguous_like(gate);
    params.gate = gate_rows.const_data_ptr();
    params.up = up_rows.const_data_ptr();
    params.h = h.mutable_data_ptr();
    check_cuda("gated_threshold", gated_threshold_cuda(params, current_stream(gate.get_device_index())));
    return h;
}

std::tuple<Tensor, Tensor> gated_threshold_backward(Tensor grad_h, Tensor gate, Tensor up, Tensor threshold,
                                                    OptionalTensor down_threshold, StringArgument activation) {
    GatedThresholdParams params = check_gated_threshold(gate, up, threshold, down_threshold, activation);
    check_same_shape("gated_threshold", "grad_h", grad_h, "gate", gate);
    const OnDevice on_device(gate.get_device_index());
    const Tensor gate_rows = with_uniform_rows(gate, &params.gate_stride),
                 up_rows = with_uniform_rows(up, &params.up_stride);
    const Tensor grad = grad_h.is_contiguous() ? grad_h : torch::stable::contiguous(grad_h);
    Tensor grad_gate = empty_contiguous_like(gate), grad_up = empty_contiguous_like(gate);
    params.gate = gate_rows.const_data_ptr();
    params.up = up_rows.const_data_ptr();
    params.grad_h = grad.const_data_ptr();
    params.grad_gate = grad_gate.mutable_data_ptr();
    params.grad_up = grad_up.mutable_data_ptr();
    check_cuda("gated_threshold", gated_threshold_backward_cuda(params, current_stream(gate.get_device_index())));
    return {grad_gate, grad_up};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(cats, CUDA, m) {
    m.impl("sparse_mlp", TORCH_BOX(&sparse_mlp));
    m.impl("sparse_mlp_counted", TORCH_BOX(&sparse_mlp_counted));
    m.impl("sparse_mlp_step", TORCH_BOX(&sparse_mlp_step));
    m.impl("gated_threshold", TORCH_BOX(&gated_threshold));
    m.impl("gated_threshold_forward", TORCH_BOX(&gated_threshold));
    m.impl("gated_threshold_backward", TORCH_BOX(&gated_threshold_backward));
}

} // namespace cats

#define CATS_STRINGIFY_LIST(...) #__VA_ARGS__
#define CATS_STRINGIFY(...) CATS_STRINGIFY_LIST(__VA_ARGS__)

// What `cats env` shows: the toolkit and the architectures this library was compiled for.
extern "C" __attribute__((visibility("default"))) const char *cats_build_info() {
    return "CUDA " CATS_STRINGIFY(__CUDACC_VER_MAJOR__) "." CATS_STRINGIFY(__CUDACC_VER_MINOR__) ", architectures " //
        CATS_STRINGIFY(__CUDA_ARCH_LIST__);
}
