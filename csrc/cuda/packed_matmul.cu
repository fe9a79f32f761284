#include "packed_matmul.cuh"

#include <algorithm>

#include "launch.h"
#include "packed_matmul_launch.h"

namespace cats {

namespace {

decltype(&cuTensorMapEncodeTiled) map_encoder() { // or null
    static const auto encode = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
        const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
        if (error != cudaSuccess) cudaGetLastError();
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
    }();
    return encode;
}

template <WeightType kType, typename T, bool kInputRows, int kTokens>
cudaError_t launch(const PackedMatmulParams &p, const LaunchTarget &target, int shares) {
    constexpr auto kernel = packed_matmul_kernel<kType, T, kInputRows, kTokens>;
    static const bool compiled = [] { // for sm_90a
        cudaFuncAttributes attributes;
        const bool known = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
        if (!known) cudaGetLastError();
        return known && attributes.sharedSizeBytes > 0;
    }();
    const auto encode = map_encoder();
    if (!compiled || !encode) return cudaErrorNotSupported;
    MatmulArguments args{p};
    while (1 << args.group_shift < p.format.group_size) args.group_shift++;
    const int64_t count = kInputRows ? p.inputs : p.outputs, columns = kInputRows ? p.outputs : p.inputs;
    constexpr auto element =
        std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    constexpr int kRowBytes = box_columns(kInputRows) / columns_per_chunk(kType) * kChunkBytes;
    const auto map = [&](CUtensorMap *to, CUtensorMapDataType type, const void *from, int64_t width, int64_t height,
                         int64_t stride, int box_width, int box_height, CUtensorMapSwizzle swizzle) {
        const cuuint64_t sizes[] = {cuuint64_t(width), cuuint64_t(height)}, strides[] = {cuuint64_t(stride)};
        const cuuint32_t box[] = {cuuint32_t(box_width), cuuint32_t(box_height)}, steps[] = {1, 1};
        return encode(to, type, 2, const_cast<void *>(from), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
    };
    if (!map(&args.x, element, p.x, p.inputs, p.tokens, p.inputs * int64_t(sizeof(T)), kDepth, kTokens,
             CU_TENSOR_MAP_SWIZZLE_128B) ||
        !map(&args.rows, CU_TENSOR_MAP_DATA_TYPE_UINT8, p.rows, p.format.row_bytes(columns), count, p.stride, kRowBytes,
             box_rows(kInputRows), CU_TENSOR_MAP_SWIZZLE_NONE) ||
        !map(&args.scales, CU_TENSOR_MAP_DATA_TYPE_UINT8, p.rows, p.format.row_bytes(columns), count, p.stride,
             kChunkBytes, box_rows(kInputRows), CU_TENSOR_MAP_SWIZZLE_NONE))
        return cudaErrorInvalidValue;
    using Shape = MatmulShape<kType, kTokens>;
    LaunchSize size{
        dim3(unsigned(ceil_div(p.tokens, kTokens)), unsigned(ceil_div(p.outputs, kOutputs)), unsigned(shares)),
        Shape::kThreads, Shape::kSharedBytes};
    size.cluster = shares;
    return launch_kernel<kernel>(size, target, args);
}

template <WeightType kType, typename T, bool kInputRows>
cudaError_t launch_tokens(const PackedMatmulParams &p, const LaunchTarget &target, const MatmulChoice &choice) {
    switch (choice.tokens) {
    case 32: return launch<kType, T, kInputRows, 32>(p, target, choice.shares);
    case 64: return launch<kType, T, kInputRows, 64>(p, target, choice.shares);
    case 128: return launch<kType, T, kInputRows, 128>(p, target, choice.shares);
    default: return launch<kType, T, kInputRows, 256>(p, target, choice.shares);
    }
}

template <WeightType kType, typename T>
cudaError_t launch_rows(const PackedMatmulParams &p, const LaunchTarget &target, const MatmulChoice &choice) {
    return (p.input_rows ? launch_tokens<kType, T, true> : launch_tokens<kType, T, false>)(p, target, choice);
}

template <typename T>
cudaError_t launch_format(const PackedMatmulParams &p, const LaunchTarget &target, const MatmulChoice &choice) {
    switch (p.format.type) {
    case WeightType::kInt4: return launch_rows<WeightType::kInt4, T>(p, target, choice);
    case WeightType::kInt8: return launch_rows<WeightType::kInt8, T>(p, target, choice);
    case WeightType::kFloat8: return launch_rows<WeightType::kFloat8, T>(p, target, choice);
    case WeightType::kDense: break;
    }
    return cudaErrorInvalidValue;
}

} // namespace

// Fitted to what int4_g128 takes on an H200, 4096x14336 and 14336x4096, 16 to 2,048 tokens.
MatmulChoice choose_matmul(int64_t tokens, int64_t inputs, int64_t outputs, int multiprocessors) {
    struct {
        int tokens, ctas;       // of a multiprocessor
        float few, many, twice; // microseconds of a stage, with CTAs on half of the multiprocessors, on all, and twice
        float ends;             // of a CTA beside its stages
    } constexpr shapes[] = {{32, 2, 0.46f, 0.75f, 0.91f, 4.3f},
                            {64, 2, 0.50f, 0.80f, 0.94f, 4.5f},
                            {128, 1, 0.54f, 0.54f, 0.54f, 5.9f},
                            {256, 1, 0.74f, 0.74f, 0.74f, 5.0f}};
    MatmulChoice best{};
    float least = 0.f;
    for (const auto &shape : shapes)
        for (int shares : {1, 2, 4, 8}) {
            const int stages = ceil_div(inputs, kDepth * shares);
            if (shares > 1 && stages < 4) continue;
            const int64_t ctas = int64_t(ceil_div(tokens, shape.tokens)) * ceil_div(outputs, kOutputs) * shares;
            int64_t at_once = shape.ctas * multiprocessors;
            // Large clusters do not fill every group of multiprocessors, and add up for longer.
            if (shares > 2 && shape.ctas == 1) at_once = at_once * 9 / 10 / shares * shares;
            const float ends = shape.ends + (shares == 8 && shape.ctas == 2 ? 11.f : 0.f);
            const float stage = 2 * ctas <= multiprocessors ? shape.few
                                : ctas <= multiprocessors   ? shape.many
                                                            : shape.twice;
            const float time = float(ceil_div(ctas, at_once)) * (stage * float(stages) + ends);
            if (!best.tokens || time < least) best = {shape.tokens, shares}, least = time;
        }
    return best;
}

cudaError_t packed_matmul_cuda(const PackedMatmulParams &params, cudaStream_t stream, MatmulChoice choice) {
    const auto aligned = [](const void *at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
    if (params.inputs % 8 || params.outputs % 8 || params.stride % 16 || !aligned(params.x) || !aligned(params.y) ||
        !aligned(params.rows) || params.tokens > INT32_MAX || params.inputs > INT32_MAX)
        return cudaErrorNotSupported;
    int device, capability, multiprocessors;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (device >= kMaxDevices) return cudaErrorInvalidDevice;
    if (const cudaError_t error = cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device))
        return error;
    if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device))
        return error;
    if (capability != 9) return cudaErrorNotSupported;
    if (!choice.tokens) choice = choose_matmul(params.tokens, params.inputs, params.outputs, multiprocessors);
    const LaunchTarget target{stream, device, true};
    if (params.dtype == DType::kFloat16) return launch_format<__half>(params, target, choice);
    if (params.dtype == DType::kBFloat16) return launch_format<__nv_bfloat16>(params, target, choice);
    return cudaErrorNotSupported;
}

} // namespace cats
