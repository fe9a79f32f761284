// The CUDA side of the torch ops: device guard, output, current stream, workspace, launch. With ops.h, all of the CUDA
// library that knows torch.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cuda/packed_linear_launch.h"
#include "cuda/packed_matmul_launch.h"
#include "cuda/sparse_mlp_launch.h"
#include "cuda/workspace.h"
#include "ops.h"

namespace cats {
namespace {

void check_cuda(const char *op, cudaError_t error) {
    if (error != cudaSuccess) fail(op, ": ", cudaGetErrorName(error), ": ", cudaGetErrorString(error));
}

cudaStream_t current_stream(int32_t device_index) {
    void *stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
    return static_cast<cudaStream_t>(stream);
}

void check_columns(const char *op, const SparseMlpParams &params, cudaError_t error) {
    CATS_REQUIRE(error != cudaErrorNotSupported, op,
                 ": on CUDA every row must start at a multiple of 16 bytes and have a multiple of 16 bytes, and H "
                 "is limited by the shared memory; got H = ",
                 params.hidden_size, ", I = ", params.intermediate_size, ", and strides of ", params.w_gate_stride,
                 ", ", params.w_up_stride, " and ", params.w_down_t_stride);
    check_cuda(op, error);
}

struct CudaBackend {
    // Makes no guard with one GPU: prefill is bound by the host, and the guard's code is cold.
    class OnDevice {
      public:
        explicit OnDevice(int32_t index) {
            static const int devices = [] {
                int count = 0;
                return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
            }();
            if (devices != 1) guard_.emplace(index);
        }

      private:
        std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    };

    // Straight to the allocator: a third of new_empty's host time.
    static Tensor empty_contiguous_like(const Tensor &like) { return empty_contiguous(like, like.sizes()); }

    template <class Sizes> static Tensor empty_contiguous(const Tensor &like, const Sizes &sizes) {
        std::vector<int64_t> strides(sizes.size(), 1);
        for (int64_t d = int64_t(sizes.size()) - 2; d >= 0; d--)
            strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
        int32_t dtype;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
        AtenTensorHandle handle;
        TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                        aoti_torch_device_type_cuda(), like.get_device_index(),
                                                        &handle));
        return Tensor(handle);
    }

    static void run(const char *op, const SparseMlpParams &params, int32_t device_index, bool deterministic) {
        const cudaStream_t stream = current_stream(device_index);
        void *workspace, *between = nullptr; // what the first of two launches leaves to the second
        check_cuda(op, get_workspace(stream, sparse_mlp_workspace_bytes(params), Contents::kZero, &workspace));
        SparseMlpLaunchOptions options;
        size_t between_bytes, bytes = 0;
        check_cuda(op, (params.exact ? exact_mlp_gates_bytes : sparse_mlp_kept_bytes)(params, &between_bytes));
        if (deterministic) check_cuda(op, sparse_mlp_partial_sums_bytes(params, &bytes));
        if (between_bytes + bytes)
            check_cuda(op, get_workspace(stream, between_bytes + bytes, Contents::kAnything, &between));
        if (deterministic) options.partial_sums = static_cast<uint8_t *>(between) + between_bytes;
        if (params.exact) return check_cuda(op, exact_mlp_cuda(params, workspace, between, stream, options));
        if (!params.input_threshold) return check_cuda(op, sparse_mlp_cuda(params, workspace, stream, options));
        const cudaError_t error = sparse_mlp_columns_cuda(params, workspace, between, stream, options);
        check_columns(op, params, error);
    }

    static void run(const ActivatedMlpParams &params, int32_t device_index, bool deterministic) {
        constexpr const char *op = "activated_mlp";
        const cudaStream_t stream = current_stream(device_index);
        void *workspace, *partial_sums = nullptr;
        check_cuda(op, get_workspace(stream, activated_mlp_workspace_bytes(params), Contents::kZero, &workspace));
        if (deterministic) {
            size_t bytes;
            check_cuda(op, activated_mlp_partial_sums_bytes(params, &bytes));
            check_cuda(op, get_workspace(stream, bytes, Contents::kAnything, &partial_sums));
        }
        check_cuda(op, activated_mlp_cuda(params, workspace, partial_sums, stream));
    }

    static void run(const GatedThresholdParams &params, int32_t device_index) {
        check_cuda("gated_threshold", gated_threshold_cuda(params, current_stream(device_index)));
    }

    static void run(const UnpackRowsParams &params, int32_t device_index) {
        check_cuda("unpack_rows", unpack_rows_cuda(params, current_stream(device_index)));
    }
};

// One token, added to y_sum. On CUDA only: decoding on a CPU gains nothing by it.
void run_step(const char *op, const SparseMlpArguments &arguments, const Tensor &x, const Tensor &norm_weight,
              double norm_eps, const Tensor &y_sum) {
    SparseMlpParams params =
        check_sparse_mlp_step(arguments, argument("norm_weight", norm_weight), argument("y_sum", y_sum));
    params.norm_eps = float(norm_eps);
    params.y_sum = static_cast<float *>(y_sum.mutable_data_ptr());
    const CudaBackend::OnDevice on_device(x.get_device_index());
    const cudaStream_t stream = current_stream(x.get_device_index());
    if (!params.input_threshold) return check_cuda(op, sparse_mlp_cuda(params, nullptr, stream));
    size_t bytes;
    void *kept;
    check_cuda(op, sparse_mlp_kept_bytes(params, &bytes));
    check_cuda(op, get_workspace(stream, bytes, Contents::kAnything, &kept));
    check_columns(op, params, sparse_mlp_columns_cuda(params, nullptr, kept, stream));
}

void sparse_mlp_step(const Tensor &x, const Tensor &norm_weight, double norm_eps, const Tensor &w_gate,
                     const Tensor &w_up, const Tensor &w_down_t, const Tensor &y_sum, const Tensor &threshold,
                     const OptionalTensor &down_threshold, const StringArgument &activation,
                     const OptionalTensor &gate_bias, const OptionalTensor &up_bias) {
    run_step("sparse_mlp_step",
             {argument("x", x), argument("w_gate", w_gate), argument("w_up", w_up), argument("w_down_t", w_down_t),
              argument("counts", std::nullopt), argument("threshold", threshold),
              argument("down_threshold", down_threshold), activation.value, argument("gate_bias", gate_bias),
              argument("up_bias", up_bias), argument("down_bias", std::nullopt)},
             x, norm_weight, norm_eps, y_sum);
}

void sparse_mlp_columns_step(const Tensor &x, const Tensor &norm_weight, double norm_eps, const Tensor &w_gate_t,
                             const Tensor &w_up, const Tensor &w_down_t, const Tensor &y_sum,
                             const Tensor &input_threshold, const Tensor &threshold,
                             const OptionalTensor &down_threshold, const StringArgument &activation,
                             const OptionalTensor &gate_bias, const OptionalTensor &up_bias) {
    SparseMlpArguments arguments{argument("x", x),
                                 argument("w_gate_t", w_gate_t),
                                 argument("w_up", w_up),
                                 argument("w_down_t", w_down_t),
                                 argument("counts", std::nullopt),
                                 argument("threshold", threshold),
                                 argument("down_threshold", down_threshold),
                                 activation.value,
                                 argument("gate_bias", gate_bias),
                                 argument("up_bias", up_bias),
                                 argument("down_bias", std::nullopt)};
    arguments.input_threshold = argument("input_threshold", input_threshold);
    run_step("sparse_mlp_columns_step", arguments, x, norm_weight, norm_eps, y_sum);
}

void sparse_mlp_packed_step(const Tensor &x, const Tensor &norm_weight, double norm_eps, const Tensor &w_gate,
                            const Tensor &w_up, const Tensor &w_down_t, const StringArgument &gate_format,
                            const StringArgument &up_format, const StringArgument &down_format, const Tensor &y_sum,
                            const Tensor &threshold, const OptionalTensor &down_threshold,
                            const StringArgument &activation, const OptionalTensor &gate_bias,
                            const OptionalTensor &up_bias) {
    run_step("sparse_mlp_packed_step",
             {argument("x", x), argument("w_gate", w_gate), argument("w_up", w_up), argument("w_down_t", w_down_t),
              argument("counts", std::nullopt), argument("threshold", threshold),
              argument("down_threshold", down_threshold), activation.value, argument("gate_bias", gate_bias),
              argument("up_bias", up_bias), argument("down_bias", std::nullopt), named(gate_format), named(up_format),
              named(down_format)},
             x, norm_weight, norm_eps, y_sum);
}

std::vector<TensorArgument> part_arguments(const char *const (&names)[kMaxParts + 1],
                                           const std::vector<Tensor> &parts) {
    std::vector<TensorArgument> found;
    for (size_t i = 0; i < parts.size(); i++)
        found.push_back(argument(names[std::min<size_t>(i, kMaxParts)], parts[i]));
    return found;
}

void packed_linear_step(const Tensor &x, const OptionalTensor &delta, const OptionalTensor &norm_weight,
                        double norm_eps, const std::vector<Tensor> &weights, const StringArgument &row_format,
                        const std::vector<Tensor> &biases, const OptionalTensor &residual,
                        const OptionalTensor &largest, const OptionalTensor &total, const Tensor &y,
                        const OptionalTensor &x_new) {
    PackedLinearParams params = check_packed_linear(
        {argument("x", x), argument("delta", delta), argument("norm_weight", norm_weight),
         part_arguments(kPartWeights, weights), row_format.value, part_arguments(kPartBiases, biases),
         argument("residual", residual), argument("largest", largest), argument("total", total), argument("y", y),
         argument("x_new", x_new)});
    params.norm_eps = float(norm_eps);
    params.y = y.mutable_data_ptr();
    if (x_new.has_value()) params.x_new = x_new->mutable_data_ptr();
    const CudaBackend::OnDevice on_device(y.get_device_index());
    check_cuda("packed_linear_step", packed_linear_cuda(params, current_stream(y.get_device_index())));
}

Tensor packed_matmul(const Tensor &x, const Tensor &rows, const StringArgument &row_format, int64_t columns,
                     bool input_rows, const OptionalTensor &bias) {
    PackedMatmulParams params = check_packed_matmul(argument("x", x), argument("rows", rows), row_format.value, columns,
                                                    input_rows, argument("bias", bias));
    return allocating("packed_matmul", "x", x, [&] {
        const int32_t device_index = x.get_device_index();
        const CudaBackend::OnDevice on_device(device_index);
        const auto x_sizes = x.sizes();
        std::vector<int64_t> sizes(x_sizes.begin(), x_sizes.end());
        sizes.back() = params.outputs;
        Tensor y = CudaBackend::empty_contiguous(x, sizes);
        if (params.tokens == 0) return y;
        Tensor x_rows = x.is_contiguous() ? x : torch::stable::contiguous(x);
        if (reinterpret_cast<uintptr_t>(x_rows.const_data_ptr()) % 16) x_rows = torch::stable::clone(x_rows);
        params.x = x_rows.const_data_ptr();
        params.y = y.mutable_data_ptr();
        MatmulChoice choice;
        cudaError_t error = plan_packed_matmul(params, &choice);
        // From torch's allocator, so that graphs of one memory pool share it: each graph has a workspace of its own.
        std::optional<Tensor> scratch;
        if (error == cudaSuccess && choice.scratch_bytes()) {
            const std::vector<int64_t> halves{int64_t(choice.scratch_bytes() / 2)};
            scratch = CudaBackend::empty_contiguous(x, halves);
            params.scratch = scratch->mutable_data_ptr();
        }
        if (error == cudaSuccess) error = packed_matmul_cuda(params, choice, current_stream(device_index));
        CATS_REQUIRE(error != cudaErrorNotSupported, "packed_matmul",
                     ": the kernel needs compute capability 9.0, a build for 9.0a, x in float16 or bfloat16, and "
                     "multiples of 8 inputs and outputs; got ",
                     dtype(argument("x", x)), ", ", params.inputs, " and ", params.outputs);
        check_cuda("packed_matmul", error);
        return y;
    });
}

// --- cats_vllm::mlp, plain and counted: see integrations/vllm_op.py ------------------------------------------------

Tensor linear(const Tensor &x, const Tensor &weight, const OptionalTensor &bias) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether torch.use_deterministic_algorithms is on. The stable ABI cannot tell, so an op in Python does. Only the
// kernel's path asks: that of decoding, which is captured in CUDA graphs.
bool deterministic() {
    StableIValue result = 0;
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("cats_vllm::deterministic", "", &result, TORCH_ABI_VERSION));
    return torch::stable::detail::to<bool>(result);
}

// Gate and up: both tensors, or the halves of the only one.
struct Halves {
    Tensor gate, up;
    Halves(const std::vector<Tensor> &tensors, int64_t dim) : gate(tensors[0]), up(tensors.back()) {
        if (tensors.size() == 2) return;
        const int64_t size = gate.size(dim) / 2;
        Tensor whole = tensors[0];
        gate = torch::stable::narrow(whole, dim, 0, size), up = torch::stable::narrow(whole, dim, size, size);
    }
};

// Torch's own errors keep their reason to themselves (see allocating), so the products' operands are checked here.
void check_mlp(const Tensor &x, const std::vector<Tensor> &gate_up, const Tensor &w_down, const Tensor &threshold,
               const OptionalTensor &down_threshold, const StringArgument &activation,
               const std::vector<Tensor> &biases, const OptionalTensor &down_bias, const OptionalTensor &counts) {
    constexpr const char *op = "mlp", *names[] = {"gate_up[0]", "gate_up[1]"},
                         *bias_names[] = {"biases[0]", "biases[1]"};
    const TensorArgument row = argument("x", x), down = argument("w_down", w_down);
    check_dtype(op, row, /*allow_double=*/false);
    CATS_REQUIRE(row.dim >= 1, op, ": x must have at least one dimension, got shape []");
    CATS_REQUIRE(gate_up.size() == 1 || gate_up.size() == 2, op, ": gate_up must be one or two tensors, got ",
                 gate_up.size());
    CATS_REQUIRE(biases.empty() || biases.size() == gate_up.size(), op, ": biases must be none or ", gate_up.size(),
                 ", as many as gate_up, got ", biases.size());
    check_like(op, down, row);
    const int64_t hidden_size = row.last_size();
    CATS_REQUIRE(down.dim == 2 && down.sizes[0] == hidden_size && hidden_size > 0 && down.sizes[1] > 0, op,
                 ": w_down must have shape [H, I] with x's last dimension H = ", hidden_size, ", got ", shape(down));
    CATS_REQUIRE(hidden_size == 1 || down.strides[0] == 1, op,
                 ": w_down must have unit stride in its first dimension, one contiguous row a neuron, got strides ",
                 strides(down));
    const int64_t rows = 2 * down.sizes[1] / int64_t(gate_up.size());
    int64_t stride;
    for (size_t i = 0; i < gate_up.size(); i++) {
        check_weight(op, argument(names[i], gate_up[i]), row, rows, hidden_size, &stride);
        if (!biases.empty()) check_vector(op, argument(bias_names[i], biases[i]), row, rows);
    }
    check_vector(op, argument("down_bias", down_bias), row, hidden_size);
    const TensorArgument given = argument("threshold", threshold);
    check_present(op, given);
    check_threshold(op, given, row, down.sizes[1], &stride);
    check_threshold(op, argument("down_threshold", down_threshold), row, down.sizes[1], &stride);
    check_activation(op, activation.value);
    check_counts(op, argument("counts", counts), row);
}

Tensor run_mlp(const Tensor &x, const std::vector<Tensor> &gate_up, const Tensor &w_down, const Tensor &threshold,
               const OptionalTensor &down_threshold, const StringArgument &activation,
               const std::vector<Tensor> &biases, const OptionalTensor &down_bias, int64_t kernel_tokens,
               const OptionalTensor &counts, bool kernel_only) {
    check_mlp(x, gate_up, w_down, threshold, down_threshold, activation, biases, down_bias, counts);
    if (x.numel() <= kernel_tokens * x.size(x.dim() - 1)) {
        const Halves weights(gate_up, 0);
        const Tensor w_down_t = torch::stable::transpose(w_down, 0, 1);
        OptionalTensor gate_bias, up_bias;
        if (!biases.empty()) {
            const Halves halves(biases, 0);
            gate_bias = halves.gate, up_bias = halves.up;
        }
        return sparse_mlp<CudaBackend>(x, weights.gate, weights.up, w_down_t, counts, threshold, down_threshold,
                                       activation, gate_bias, up_bias, down_bias, deterministic());
    }
    return allocating("mlp", "x", x, [&] {
        std::vector<Tensor> products;
        for (size_t i = 0; i < gate_up.size(); i++)
            products.push_back(linear(x, gate_up[i], biases.empty() ? OptionalTensor{} : biases[i]));
        const Halves halves(products, x.dim() - 1);
        const Tensor h = run_gated_threshold<CudaBackend>(
            halves.gate, halves.up, kernel_only ? OptionalTensor{} : counts, threshold, down_threshold, activation);
        return linear(h, w_down, down_bias);
    });
}

Tensor mlp(const Tensor &x, const std::vector<Tensor> &gate_up, const Tensor &w_down, const Tensor &threshold,
           const OptionalTensor &down_threshold, const StringArgument &activation, const std::vector<Tensor> &biases,
           const OptionalTensor &down_bias, int64_t kernel_tokens) {
    return run_mlp(x, gate_up, w_down, threshold, down_threshold, activation, biases, down_bias, kernel_tokens,
                   std::nullopt, false);
}

Tensor mlp_counted(const Tensor &x, const std::vector<Tensor> &gate_up, const Tensor &w_down, const Tensor &threshold,
                   const OptionalTensor &down_threshold, const StringArgument &activation,
                   const std::vector<Tensor> &biases, const OptionalTensor &down_bias, int64_t kernel_tokens,
                   const Tensor &counts, bool kernel_only) {
    return run_mlp(x, gate_up, w_down, threshold, down_threshold, activation, biases, down_bias, kernel_tokens, counts,
                   kernel_only);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(cats, CUDA, m) {
    implement_ops<CudaBackend>(m);
    m.impl("sparse_mlp_step", TORCH_BOX(&sparse_mlp_step));
    m.impl("sparse_mlp_columns_step", TORCH_BOX(&sparse_mlp_columns_step));
    m.impl("sparse_mlp_packed_step", TORCH_BOX(&sparse_mlp_packed_step));
    m.impl("packed_linear_step", TORCH_BOX(&packed_linear_step));
    m.impl("packed_matmul", TORCH_BOX(&packed_matmul));
}

STABLE_TORCH_LIBRARY_IMPL(cats_vllm, CUDA, m) {
    m.impl("mlp", TORCH_BOX(&mlp));
    m.impl("mlp_counted", TORCH_BOX(&mlp_counted));
}

} // namespace cats

#define CATS_STRINGIFY_LIST(...) #__VA_ARGS__
#define CATS_STRINGIFY(...) CATS_STRINGIFY_LIST(__VA_ARGS__)
#ifndef CATS_ARCHITECTURES // setup.py has TORCH_CUDA_ARCH_LIST here
#define CATS_ARCHITECTURES CATS_STRINGIFY(__CUDA_ARCH_LIST__)
#endif

// What `cats env` shows: the toolkit and the architectures this library was compiled for.
extern "C" __attribute__((visibility("default"))) const char *cats_build_info() {
    return "CUDA " CATS_STRINGIFY(__CUDACC_VER_MAJOR__) "." CATS_STRINGIFY(
        __CUDACC_VER_MINOR__) ", architectures " CATS_ARCHITECTURES;
}
