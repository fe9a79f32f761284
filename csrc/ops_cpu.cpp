// The CPU side of the torch ops: output, threads, kernels. With ops.h, all of the CPU library that knows torch.
#include "cpu/kernels.h"
#include "ops.h"

namespace cats {
namespace {

Parallel torch_threads() {
    return {torch::stable::get_num_threads(), [](int64_t n, void (*body)(void *, int64_t), void *context) {
                torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
                    for (int64_t i = begin; i < end; i++) body(context, i);
                });
            }};
}

struct CpuBackend {
    struct OnDevice {
        explicit OnDevice(int32_t /*index*/) {}
    };

    static Tensor empty_contiguous_like(const Tensor &like) { return torch::stable::new_empty(like, like.sizes()); }

    static Tensor empty_contiguous(const Tensor &like, const std::vector<int64_t> &sizes) {
        return torch::stable::new_empty(like, sizes);
    }

    static void run(const char * /*op*/, const SparseMlpParams &params, int32_t /*device_index*/,
                    bool /*deterministic: always*/) {
        cpu_kernels().sparse_mlp(params, torch_threads());
    }

    static void run(const ActivatedMlpParams &params, int32_t /*device_index*/, bool /*deterministic: always*/) {
        cpu_kernels().activated_mlp(params, torch_threads());
    }

    static void run(const GatedThresholdParams &params, int32_t /*device_index*/) {
        const bool fp64 = params.dtype == DType::kFloat64;
        (fp64 ? gated_threshold_double : cpu_kernels().gated_threshold)(params, torch_threads());
    }

    static void run(const UnpackRowsParams &params, int32_t /*device_index*/) {
        cpu_kernels().unpack_rows(params, torch_threads());
    }
};

} // namespace

STABLE_TORCH_LIBRARY_IMPL(cats, CPU, m) { implement_ops<CpuBackend>(m); }

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
