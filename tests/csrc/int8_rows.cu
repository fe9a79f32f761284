// A row format of the tests' own: the kernels serve it as they are. int8 columns with an fp32 scale for 128 of them.
// Compiled by .ci/run; on a GPU tests/ops/test_launchers.py compares it with a CPU reference. By hand:
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc tests/csrc/int8_rows.cu csrc/cuda/plan.cpp
//         -o int8_rows && ./int8_rows
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cuda/sparse_mlp_dispatch.cuh"

#define CHECK_CUDA(call)                                                                                               \
    do {                                                                                                               \
        const cudaError_t error_ = (call);                                                                             \
        if (error_ != cudaSuccess) fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error_)), exit(1);            \
    } while (0)

namespace cats {

// A tile is 4 scales and 32 chunks of 16 columns.
struct Int8Row {
    using Storage = uint8_t;
    using MmaOperand = void;
    static constexpr int kPerChunk = 16, kScaleBytes = 16;
    static constexpr int kTileColumns = kTileChunks * kPerChunk, kColumnsPerScale = 128;
    struct Packed {
        uint4 chunk;
        float scale;
    };

    static __device__ __forceinline__ Packed load(const uint8_t *tile, int lane) {
        return {*reinterpret_cast<const uint4 *>(tile + kScaleBytes + lane * kChunkBytes),
                reinterpret_cast<const float *>(tile)[lane * kPerChunk / kColumnsPerScale]};
    }
    static __device__ __forceinline__ void decode(const Packed &packed, float (&out)[kPerChunk]) {
        const uint32_t words[4] = {packed.chunk.x, packed.chunk.y, packed.chunk.z, packed.chunk.w};
#pragma unroll
        for (int i = 0; i < kPerChunk; i++) out[i] = float(int8_t(words[i / 4] >> i % 4 * 8)) * packed.scale;
    }
    struct Bytes : UniformBytes {
        __device__ explicit Bytes(const SparseMlpParams &p)
            : UniformBytes{uint32_t(row_bytes(int(p.hidden_size) / kPerChunk, kScaleBytes))} {}
    };
    static __device__ float column(const SparseMlpParams &, RowKind, const void *row, int c) { return column(row, c); }
    static __host__ __device__ float column(const void *row, int c) {
        const uint8_t *tile = static_cast<const uint8_t *>(row) + c / kTileColumns * (kTileColumns + kScaleBytes);
        float scale;
        memcpy(&scale, tile + c % kTileColumns / kColumnsPerScale * sizeof(float), sizeof(float));
        return float(int8_t(tile[kScaleBytes + c % kTileColumns])) * scale;
    }
};

} // namespace cats

using namespace cats;
using T = __nv_bfloat16;

namespace {

std::mt19937 generator(0);
float normal() { return std::normal_distribution<float>()(generator); }
double silu(double g) { return g / (1 + std::exp(-g)); }

std::vector<uint8_t> random_rows(int rows, int hidden, int stride, float scale) {
    std::vector<uint8_t> bytes(size_t(rows) * stride);
    for (int j = 0; j < rows; j++)
        for (int c = 0; c < hidden; c++) {
            uint8_t *tile = bytes.data() + size_t(j) * stride + c / Int8Row::kTileColumns * kTileBytes<Int8Row>;
            const int at = c % Int8Row::kTileColumns;
            tile[Int8Row::kScaleBytes + at] = uint8_t(int8_t(std::clamp(normal() * 40, -127.f, 127.f)));
            const float group_scale = scale / 40 * (0.5f + (j + c / Int8Row::kColumnsPerScale) % 5 * 0.25f);
            memcpy(tile + at / Int8Row::kColumnsPerScale * sizeof(float), &group_scale, sizeof(float));
        }
    return bytes;
}

template <typename V> V *to_device(const std::vector<V> &values) {
    V *there;
    CHECK_CUDA(cudaMalloc(&there, values.size() * sizeof(V)));
    CHECK_CUDA(cudaMemcpy(there, values.data(), values.size() * sizeof(V), cudaMemcpyHostToDevice));
    return there;
}

const char *name_of(Kernel kernel) {
    const char *names[] = {"none", "pipelined", "small", "batched", "generic"};
    return names[int(kernel)];
}

// All launches for so many tokens against the formula in fp64; false if they differ.
bool check(const DeviceLimits &device, int tokens, int hidden, int intermediate, SparseMlpKernel asked, Kernel expected,
           bool deterministic) {
    const int stride = row_bytes(hidden / Int8Row::kPerChunk, Int8Row::kScaleBytes) + 32; // a gap after every row
    std::vector<T> x(size_t(tokens) * hidden), y(x.size());
    for (T &value : x) value = T(normal());
    const float scale = 1 / std::sqrt(float(hidden));
    const std::vector<uint8_t> gate = random_rows(intermediate, hidden, stride, scale),
                               up = random_rows(intermediate, hidden, stride, scale),
                               down = random_rows(intermediate, hidden, stride, 1 / std::sqrt(float(intermediate)));
    constexpr float kThreshold = 0.15f, kDownThreshold = 0.05f;
    std::vector<double> reference(x.size());
    for (int m = 0; m < tokens; m++)
        for (int j = 0; j < intermediate; j++) {
            const auto dot = [&](const std::vector<uint8_t> &w) {
                double sum = 0;
                for (int c = 0; c < hidden; c++)
                    sum += double(Int8Row::column(w.data() + size_t(j) * stride, c)) * float(x[m * hidden + c]);
                return sum;
            };
            const double v = silu(dot(gate)), h = v * dot(up);
            if (std::abs(v) < kThreshold || std::abs(h) < kDownThreshold) continue;
            for (int c = 0; c < hidden; c++)
                reference[m * hidden + c] += h * Int8Row::column(down.data() + size_t(j) * stride, c);
        }

    SparseMlpParams params{};
    params.hidden_size = hidden, params.intermediate_size = intermediate;
    params.w_gate = to_device(gate), params.w_up = to_device(up), params.w_down_t = to_device(down);
    params.w_gate_stride = params.w_up_stride = params.w_down_t_stride = stride;
    params.threshold = to_device(std::vector<float>{kThreshold});
    params.down_threshold = to_device(std::vector<float>{kDownThreshold});
    const T *x_there = to_device(x);
    T *y_there = to_device(y);
    float *memory = to_device(std::vector<float>(4 + size_t(kMaxTokensPerLaunch) * hidden));
    Workspace workspace{memory + 4, reinterpret_cast<unsigned *>(memory), reinterpret_cast<unsigned *>(memory) + 1};
    if (deterministic)
        CHECK_CUDA(cudaMalloc(&workspace.partial_sums,
                              size_t(device.multiprocessors) * kMaxTokensPerLaunch * hidden * sizeof(float)));
    Kernel used = Kernel::kNone;
    PlanOverrides overrides;
    overrides.kernel = asked;
    for (int first = 0; first < tokens;) {
        const Shape shape{tokens - first, hidden, intermediate, layout_of<Int8Row>(), true, false, deterministic};
        const Choice choice = plan(shape, device, overrides);
        if (!first) used = choice.kernel;
        params.tokens = choice.tokens, params.x = x_there + first * hidden, params.y = y_there + first * hidden;
        CHECK_CUDA((launch_choice<Int8Row, T>(choice, params, workspace, LaunchTarget{})));
        first += choice.tokens;
    }
    CHECK_CUDA(cudaMemcpy(y.data(), y_there, y.size() * sizeof(T), cudaMemcpyDeviceToHost));
    double difference = 0, norm = 0;
    for (size_t i = 0; i < y.size(); i++) {
        difference += std::pow(double(float(y[i])) - reference[i], 2);
        norm += reference[i] * reference[i];
    }
    const double error = std::sqrt(difference / norm);
    const bool right = used == expected && error < 4e-3; // y is rounded to bf16
    printf("%s: %d tokens, %dx%d, %s%s: relative error %.1e\n", right ? "ok" : "WRONG", tokens, hidden, intermediate,
           name_of(used), deterministic ? ", deterministic" : "", error);
    return right;
}

} // namespace

int main() {
    cudaDeviceProp properties;
    CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
    const DeviceLimits device{10 * properties.major + properties.minor, properties.multiProcessorCount,
                              int(properties.sharedMemPerBlockOptin)};
    constexpr auto kAuto = SparseMlpKernel::kAuto, kAsync = SparseMlpKernel::kAsyncCopy;
    bool right = true;
    for (bool deterministic : {false, true}) {
        const auto run = [&](int tokens, int hidden, int intermediate, SparseMlpKernel asked, Kernel expected) {
            right &= check(device, tokens, hidden, intermediate, asked, expected, deterministic);
        };
        for (int hidden : {4096, 2560, 1040, 16}) { // 1040 is two tiles and one chunk
            for (SparseMlpKernel asked : {kAuto, kAsync}) {
                run(1, hidden, 5000, asked, Kernel::kPipelined);
                run(2, hidden, 300, asked, Kernel::kPipelined);
                run(5, hidden, 100, asked, Kernel::kPipelined); // the tensor cores do not take these rows
            }
            run(3, hidden, 100, SparseMlpKernel::kGeneric, Kernel::kGeneric);
        }
        run(1, 1024, 200, kAuto, Kernel::kSmall);
        run(1, 528, 999, kAuto, Kernel::kSmall);
        run(1, 8, 50, kAuto, Kernel::kGeneric); // half a chunk
    }
    return !right;
}
