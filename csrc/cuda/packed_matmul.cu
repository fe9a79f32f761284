#include "packed_matmul.cuh"

#include <algorithm>

#include "launch.h"
#include "packed_matmul_launch.h"
#include "sparse_mlp_launch.h"
#include "workspace.h"

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

template <WeightType kType, bool kZeroPoints, typename T, bool kInputRows, int kTokens>
cudaError_t launch(const PackedMatmulParams &p, const LaunchTarget &target, const MatmulChoice &choice) {
    using Shape = MatmulShape<kType, kTokens>;
    constexpr auto kernel = packed_matmul_kernel<kType, kZeroPoints, T, kInputRows, kTokens>;
    static const bool compiled = [] { // for sm_90a
        cudaFuncAttributes attributes;
        const bool known = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
        if (!known) cudaGetLastError();
        return known && attributes.sharedSizeBytes > 0;
    }();
    const auto encode = map_encoder();
    if (!compiled || !encode) return cudaErrorNotSupported;
    MatmulArguments args{p};
    void *left = nullptr;
    if (choice.scratch_bytes())
        if (const cudaError_t error =
                get_workspace(target.stream, choice.ctas * sizeof(uint32_t), Contents::kZero, &left))
            return error;
    args.left = static_cast<uint32_t *>(left);
    while (1 << args.group_shift < p.format.group_size) args.group_shift++;
    const int64_t count = kInputRows ? p.inputs : p.outputs, columns = kInputRows ? p.outputs : p.inputs;
    constexpr auto element =
        std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    constexpr int kRowBytes = PackedFragment<kType, kZeroPoints, T, kInputRows>::kRowBytes;
    const auto map = [&](CUtensorMap *to, CUtensorMapDataType type, const void *from, int64_t width, int64_t height,
                         int64_t stride, int box_width, int box_height, CUtensorMapSwizzle swizzle) {
        const cuuint64_t sizes[] = {cuuint64_t(width), cuuint64_t(height)}, strides[] = {cuuint64_t(stride)};
        const cuuint32_t box[] = {cuuint32_t(box_width), cuuint32_t(box_height)}, steps[] = {1, 1};
        return encode(to, type, 2, const_cast<void *>(from), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
    };
    if (!map(&args.x, element, p.x, p.inputs, p.tokens, p.inputs * int64_t(sizeof(T)), kXDepth, kTokens,
             CU_TENSOR_MAP_SWIZZLE_128B) ||
        !map(&args.rows, CU_TENSOR_MAP_DATA_TYPE_UINT8, p.rows, p.format.row_bytes(columns), count, p.stride, kRowBytes,
             kBoxRows, kRowBytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B) ||
        !map(&args.scales, CU_TENSOR_MAP_DATA_TYPE_UINT8, p.rows, p.format.row_bytes(columns), count, p.stride,
             kChunkBytes, kBoxRows, CU_TENSOR_MAP_SWIZZLE_NONE))
        return cudaErrorInvalidValue;
    const LaunchSize size{dim3(unsigned(choice.ctas)), Shape::kThreads, Shape::kSharedBytes};
    return launch_kernel<kernel>(size, target, args);
}

template <WeightType kType, bool kZeroPoints, typename T, bool kInputRows>
cudaError_t launch_tokens(const PackedMatmulParams &p, const LaunchTarget &target, const MatmulChoice &choice) {
    switch (choice.tokens) {
    case 32: return launch<kType, kZeroPoints, T, kInputRows, 32>(p, target, choice);
    case 64: return launch<kType, kZeroPoints, T, kInputRows, 64>(p, target, choice);
    case 128: return launch<kType, kZeroPoints, T, kInputRows, 128>(p, target, choice);
    default: return launch<kType, kZeroPoints, T, kInputRows, 256>(p, target, choice);
    }
}

template <WeightType kType, bool kZeroPoints, typename T>
cudaError_t launch_rows(const PackedMatmulParams &p, const LaunchTarget &target, const MatmulChoice &choice) {
    return (p.input_rows ? launch_tokens<kType, kZeroPoints, T, true>
                         : launch_tokens<kType, kZeroPoints, T, false>)(p, target, choice);
}

template <typename T>
cudaError_t launch_format(const PackedMatmulParams &p, const LaunchTarget &target, const MatmulChoice &choice) {
    switch (p.format.type) {
    case WeightType::kInt4:
        return (p.format.zero_points ? launch_rows<WeightType::kInt4, true, T>
                                     : launch_rows<WeightType::kInt4, false, T>)(p, target, choice);
    case WeightType::kInt8: return launch_rows<WeightType::kInt8, false, T>(p, target, choice);
    case WeightType::kFloat8: return launch_rows<WeightType::kFloat8, false, T>(p, target, choice);
    case WeightType::kDense: break;
    }
    return cudaErrorInvalidValue;
}

} // namespace

size_t MatmulChoice::scratch_bytes() const {
    return tiles % ctas == 0 ? 0 : size_t(ctas) * tokens * kOutputs * sizeof(float);
}

// Fitted to what int4_g128 and int8_g128 take on an H200, 32 to 1,024 tokens, 1,024 to 14,336 inputs and outputs
// (bench/results/h200/packed_matmul.log). Each tile's stages are divided by the same number of CTAs where possible: a
// CTA that begins and ends within tiles has two ends. Not with tiles of up to 64 tokens, of which a multiprocessor has
// room for two CTAs: fewer CTAs than multiprocessors meet on some of them, which costs more.
MatmulChoice choose_matmul(int64_t tokens, int64_t inputs, int64_t outputs, int multiprocessors) {
    struct {
        int tokens;
        float stage, ends;   // microseconds of a stage, and of a CTA beside its stages
        float within, other; // where tiles are divided, and for each other CTA of a tile
        float uneven;        // where CTAs begin and end anywhere; 0: always
    } constexpr shapes[] = {{32, 0.6f, 8.f, 0.f, 0.f, 0.f},
                            {64, 0.75f, 8.f, 0.f, 0.f, 0.f},
                            {128, 0.75f, 5.6f, 1.f, 0.7f, 8.f},
                            {256, 1.25f, 6.f, 2.f, 1.2f, 9.f}};
    MatmulChoice best{};
    float least = 0.f;
    const int64_t most = multiprocessors;
    for (const auto &shape : shapes) {
        const int64_t tiles = int64_t(ceil_div(tokens, shape.tokens)) * ceil_div(outputs, kOutputs);
        const int64_t of_tile = ceil_div(inputs, kDepth), stages = tiles * of_tile;
        const auto consider = [&](int64_t ctas, float beside) {
            const float time = shape.stage * float(ceil_div(stages, ctas)) + shape.ends + beside;
            if (!best.tokens || time < least) best = {shape.tokens, int(ctas), tiles}, least = time;
        };
        if (shape.uneven != 0.f)
            for (int64_t each = 1; each <= std::min(most / tiles, of_tile); each++)
                consider(tiles * each, each > 1 ? shape.within + shape.other * float(each - 1) : 0.f);
        consider(std::min(stages, most), shape.uneven + shape.other * float(most / tiles));
    }
    return best;
}

cudaError_t plan_packed_matmul(const PackedMatmulParams &params, MatmulChoice *choice) {
    const auto aligned = [](const void *at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
    const int64_t columns = params.input_rows ? params.outputs : params.inputs;
    if (params.tokens < 1 || params.inputs < 1 || params.outputs < 1) return cudaErrorInvalidValue;
    if (params.inputs % 8 || params.outputs % 8 || params.stride % 16 || !aligned(params.x) || !aligned(params.y) ||
        !aligned(params.rows) || params.tokens > INT32_MAX || params.inputs > INT32_MAX || params.outputs > INT32_MAX ||
        params.format.row_bytes(columns) > INT32_MAX) // places in a row, and coordinates of copies, are 32 bits
        return cudaErrorNotSupported;
    int device;
    DeviceLimits limits;
    if (const cudaError_t error = device_limits(&device, &limits)) return error;
    if (limits.compute_capability != 90 || params.dtype == DType::kFloat32) return cudaErrorNotSupported;
    *choice = choose_matmul(params.tokens, params.inputs, params.outputs, limits.multiprocessors);
    return cudaSuccess;
}

cudaError_t packed_matmul_cuda(const PackedMatmulParams &params, const MatmulChoice &choice, cudaStream_t stream) {
    int device;
    if (choice.scratch_bytes() && !params.scratch) return cudaErrorInvalidValue;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    const LaunchTarget target{stream, device, true};
    if (params.dtype == DType::kFloat16) return launch_format<__half>(params, target, choice);
    if (params.dtype == DType::kBFloat16) return launch_format<__nv_bfloat16>(params, target, choice);
    return cudaErrorNotSupported;
}

} // namespace cats
