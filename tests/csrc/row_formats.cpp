// The CPU kernel with rows of one type and x, biases and y of another, against the formula in double. Prints the
// largest error of each combination, relative to the largest output. tests/ops/test_row_formats.py compiles and runs
// it.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define CATS_ISA test
#include "cpu/sparse_mlp.inl.h"
#include "int8_row.inl.h"

using namespace cats;
using namespace cats::test;

void *cats::cpu_workspace(int slot, size_t bytes) {
    static std::vector<std::max_align_t> buffers[kWorkspaceSlots];
    buffers[slot].resize(bytes / sizeof(std::max_align_t) + 1);
    return buffers[slot].data();
}

static std::mt19937 generator(0);

static float normal() { return std::normal_distribution<float>()(generator); }

// One element converted by the kernels' own code, which the op tests check.
static double to_double(const float *p) { return *p; }
template <class T> static double to_double(const T *p) { return cats::test::load(p, 1)[0]; }
template <class T> static void from_float(T *p, float value) { cats::test::store(p, broadcast(value), 1); }

template <class T> static std::vector<T> normals(int64_t n, float scale) {
    std::vector<T> out(n);
    for (T &value : out) from_float(&value, scale * normal());
    return out;
}

// [I, H] in the row format, with `stride` between rows, and the values it stands for.
template <class Row> struct Weight {
    std::vector<typename Row::Storage> data;
    std::vector<double> values;
    int64_t stride;
};

template <class Row> Weight<Row> make_weight(int64_t rows, int64_t columns, float scale);

template <> Weight<Int8Row> make_weight(int64_t rows, int64_t columns, float scale) {
    Weight<Int8Row> w{{}, {}, columns + int64_t(sizeof(float)) + 1}; // odd, so that scales are unaligned
    w.data.resize(rows * w.stride);
    for (int64_t r = 0; r < rows; r++) {
        const float row_scale = scale / 50 * (1 + r % 3);
        for (int64_t c = 0; c < columns; c++) {
            w.data[r * w.stride + c] = int8_t(generator() % 255 - 127);
            w.values.push_back(double(row_scale) * w.data[r * w.stride + c]);
        }
        std::memcpy(&w.data[r * w.stride + columns], &row_scale, sizeof(row_scale));
    }
    return w;
}

template <class Row> Weight<Row> make_weight(int64_t rows, int64_t columns, float scale) {
    Weight<Row> w{normals<typename Row::Storage>(rows * (columns + 3), scale), {}, columns + 3};
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) w.values.push_back(to_double(&w.data[r * w.stride + c]));
    return w;
}

template <class Row, class T> static void run(const char *name, int64_t tokens, int64_t hidden, int64_t intermediate) {
    const float scale = 1 / std::sqrt(float(hidden));
    const auto gate = make_weight<Row>(intermediate, hidden, scale), up = make_weight<Row>(intermediate, hidden, scale),
               down = make_weight<Row>(intermediate, hidden, scale);
    const auto x = normals<T>(tokens * hidden, 1), gate_bias = normals<T>(intermediate, 0.1f),
               down_bias = normals<T>(hidden, 0.1f);
    std::vector<T> y(tokens * hidden);
    const float threshold = 0.3f;
    int64_t counts[kNumCounts] = {};

    SparseMlpParams p{};
    p.tokens = tokens, p.hidden_size = hidden, p.intermediate_size = intermediate;
    p.x = x.data(), p.w_gate = gate.data.data(), p.w_up = up.data.data(), p.w_down_t = down.data.data();
    p.w_gate_stride = gate.stride, p.w_up_stride = up.stride, p.w_down_t_stride = down.stride;
    p.threshold = &threshold;
    p.gate_bias = gate_bias.data(), p.down_bias = down_bias.data();
    p.y = y.data(), p.counts = counts, p.activation = Activation::kRelu;
    const Parallel parallel = {2, [](int64_t n, void (*body)(void *, int64_t), void *context) {
                                   for (int64_t i = 0; i < n; i++) body(context, i);
                               }};
    sparse_mlp_of<Row, T>(p, parallel);

    double error = 0, largest = 0;
    int64_t kept = 0;
    for (int64_t t = 0; t < tokens; t++) {
        std::vector<double> expected(hidden);
        for (int64_t c = 0; c < hidden; c++) expected[c] = to_double(&down_bias[c]);
        for (int64_t j = 0; j < intermediate; j++) {
            double g = to_double(&gate_bias[j]), u = 0;
            for (int64_t c = 0; c < hidden; c++) {
                g += to_double(&x[t * hidden + c]) * gate.values[j * hidden + c];
                u += to_double(&x[t * hidden + c]) * up.values[j * hidden + c];
            }
            if (g < threshold) continue;
            kept++;
            for (int64_t c = 0; c < hidden; c++) expected[c] += g * u * down.values[j * hidden + c];
        }
        for (int64_t c = 0; c < hidden; c++) {
            error = std::fmax(error, std::fabs(to_double(&y[t * hidden + c]) - expected[c]));
            largest = std::fmax(largest, std::fabs(expected[c]));
        }
    }
    if (counts[0] != tokens * intermediate || counts[1] != kept) std::printf("%s: wrong counts\n", name), std::exit(1);
    std::printf("%s %g\n", name, error / largest);
}

template <class Row> static void run_all(const char *row, int64_t tokens, int64_t hidden, int64_t intermediate) {
    run<Row, float>((std::string(row) + " rows, x fp32").c_str(), tokens, hidden, intermediate);
    run<Row, Half>((std::string(row) + " rows, x fp16").c_str(), tokens, hidden, intermediate);
    run<Row, BFloat16>((std::string(row) + " rows, x bf16").c_str(), tokens, hidden, intermediate);
}

int main() {
    const int64_t shapes[][3] = {{1, 256, 48}, {1, 77, 33}, {3, 130, 21}, {17, 64, 40}};
    for (const auto &[tokens, hidden, intermediate] : shapes) {
        run_all<Int8Row>("int8", tokens, hidden, intermediate);
        run_all<DenseRow<BFloat16>>("bf16", tokens, hidden, intermediate);
        run_all<DenseRow<float>>("fp32", tokens, hidden, intermediate);
    }
}
