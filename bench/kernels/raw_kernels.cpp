// The raw CUDA launchers for Python-side microbenchmarks, without torch: pointers and the stream are integers, sizes
// are in elements, errors are exceptions. raw_kernels.py compiles and loads it; it is never part of the wheel, whose op
// path is abi3.
#include <pybind11/pybind11.h>

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/sparse_mlp_launch.h"

namespace py = pybind11;

namespace {

void check(const char *launcher, cudaError_t error) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string(launcher) + ": " + cudaGetErrorName(error) + ": " +
                                 cudaGetErrorString(error));
}

// A pointer member as a Python integer; 0 is null.
template <class Class, class Params, class Pointer>
void address(Class &bound, const char *name, Pointer Params::*member) {
    bound.def_property(
        name, [member](const Params &p) { return reinterpret_cast<uintptr_t>(p.*member); },
        [member](Params &p, uintptr_t value) { p.*member = reinterpret_cast<Pointer>(value); });
}

cudaStream_t as_stream(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

} // namespace

PYBIND11_MODULE(cats_raw_kernels, m) {
    using namespace cats;
    m.attr("MAX_TOKENS_PER_LAUNCH") = kMaxTokensPerLaunch;
    py::enum_<Activation>(m, "Activation")
        .value("silu", Activation::kSilu)
        .value("gelu", Activation::kGelu)
        .value("gelu_tanh", Activation::kGeluTanh)
        .value("relu", Activation::kRelu);
    py::enum_<DType>(m, "DType")
        .value("float32", DType::kFloat32)
        .value("float16", DType::kFloat16)
        .value("bfloat16", DType::kBFloat16)
        .value("float64", DType::kFloat64);
    py::enum_<SparseMlpKernel>(m, "SparseMlpKernel")
        .value("auto", SparseMlpKernel::kAuto)
        .value("bulk_copy", SparseMlpKernel::kBulkCopy)
        .value("async_copy", SparseMlpKernel::kAsyncCopy)
        .value("generic", SparseMlpKernel::kGeneric);

    py::class_<SparseMlpParams> mlp(m, "SparseMlpParams"); // csrc/sparse_mlp.h says what each one is
    mlp.def(py::init([] { return SparseMlpParams{}; }))
        .def_readwrite("tokens", &SparseMlpParams::tokens)
        .def_readwrite("hidden_size", &SparseMlpParams::hidden_size)
        .def_readwrite("intermediate_size", &SparseMlpParams::intermediate_size)
        .def_readwrite("w_gate_stride", &SparseMlpParams::w_gate_stride)
        .def_readwrite("w_up_stride", &SparseMlpParams::w_up_stride)
        .def_readwrite("w_down_t_stride", &SparseMlpParams::w_down_t_stride)
        .def_readwrite("threshold_stride", &SparseMlpParams::threshold_stride)
        .def_readwrite("down_threshold_stride", &SparseMlpParams::down_threshold_stride)
        .def_readwrite("activation", &SparseMlpParams::activation)
        .def_readwrite("dtype", &SparseMlpParams::dtype);
    address(mlp, "x", &SparseMlpParams::x);
    address(mlp, "w_gate", &SparseMlpParams::w_gate);
    address(mlp, "w_up", &SparseMlpParams::w_up);
    address(mlp, "w_down_t", &SparseMlpParams::w_down_t);
    address(mlp, "threshold", &SparseMlpParams::threshold);
    address(mlp, "down_threshold", &SparseMlpParams::down_threshold);
    address(mlp, "gate_bias", &SparseMlpParams::gate_bias);
    address(mlp, "up_bias", &SparseMlpParams::up_bias);
    address(mlp, "down_bias", &SparseMlpParams::down_bias);
    address(mlp, "y", &SparseMlpParams::y);
    address(mlp, "counts", &SparseMlpParams::counts);

    py::class_<SparseMlpLaunchOptions> options(m, "SparseMlpLaunchOptions");
    options.def(py::init<>())
        .def_readwrite("kernel", &SparseMlpLaunchOptions::kernel)
        .def_readwrite("slots", &SparseMlpLaunchOptions::slots)
        .def_readwrite("first_batches", &SparseMlpLaunchOptions::first_batches)
        .def_readwrite("programmatic_launch", &SparseMlpLaunchOptions::programmatic_launch);
    address(options, "partial_sums", &SparseMlpLaunchOptions::partial_sums);

    m.def("sparse_mlp_workspace_bytes", &sparse_mlp_workspace_bytes, py::arg("params"));
    m.def(
        "sparse_mlp_partial_sums_bytes",
        [](const SparseMlpParams &params) {
            size_t bytes = 0;
            check("sparse_mlp_partial_sums_bytes", sparse_mlp_partial_sums_bytes(params, &bytes));
            return bytes;
        },
        py::arg("params"));
    m.def(
        "sparse_mlp_cuda",
        [](const SparseMlpParams &params, uintptr_t workspace, uintptr_t stream,
           const SparseMlpLaunchOptions &options) {
            check("sparse_mlp_cuda",
                  sparse_mlp_cuda(params, reinterpret_cast<void *>(workspace), as_stream(stream), options));
        },
        py::arg("params"), py::arg("workspace"), py::arg("stream") = 0, py::arg("options") = SparseMlpLaunchOptions{});
}
