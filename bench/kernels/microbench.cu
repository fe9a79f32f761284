// Microbenchmark of the sparse MLP kernels, without torch. From the repository root:
//
//     nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -Icsrc bench/kernels/microbench.cu
//         csrc/cuda/sparse_mlp_*.cu csrc/cuda/plan.cpp -o microbench
//     ./microbench --shape 4096x14336 --dtype bf16 --tokens 1 --sparsity 0,50,70,90
//
// Every run is checked against a CPU reference in fp64 first. Timing replays a CUDA graph over distinct layers, more
// than twice the L2 in all, and takes the median; "limit" is the time to read the bytes that must be read, at the rate
// of the fastest of several streaming read kernels in the same process.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cuda/sparse_mlp_launch.h"
#include "microbench.cuh"

namespace {

struct Options {
    int hidden = 4096, intermediate = 14336, tokens = 1, layers = 0, replays = 30;
    std::string dtype = "bf16", kernel = "auto", csv, driver, commit, date; // the last three: for the CSV file
    std::vector<double> sparsity = {0, 50, 70, 90};
    std::vector<int> slots = {0}, prefetch = {0};
    double down_sparsity = -1;
    bool check = true, pdl = true, deterministic = false, per_neuron = false, step = false;
};

std::vector<double> parse_list(const char *text) {
    std::vector<double> values;
    for (const char *at = text; *at;) {
        char *end;
        values.push_back(strtod(at, &end));
        if (end == at) fprintf(stderr, "not a list of numbers: '%s'\n", text), exit(2);
        at = *end == ',' ? end + 1 : end;
    }
    return values;
}

Options parse(int argc, char **argv) {
    Options o;
    const std::map<std::string, std::pair<bool *, bool>> flags = {{"--no-check", {&o.check, false}},
                                                                  {"--no-pdl", {&o.pdl, false}},
                                                                  {"--deterministic", {&o.deterministic, true}},
                                                                  {"--per-neuron", {&o.per_neuron, true}},
                                                                  {"--step", {&o.step, true}}};
    for (int i = 1; i < argc; i++) {
        const std::string name = argv[i];
        if (const auto flag = flags.find(name); flag != flags.end()) {
            *flag->second.first = flag->second.second;
            continue;
        }
        if (i + 1 >= argc) fprintf(stderr, "%s needs a value\n", name.c_str()), exit(2);
        const char *value = argv[++i];
        const auto ints = [&] {
            const std::vector<double> list = parse_list(value);
            return std::vector<int>(list.begin(), list.end());
        };
        if (name == "--shape") {
            if (sscanf(value, "%dx%d", &o.hidden, &o.intermediate) != 2 || o.hidden < 1 || o.intermediate < 1)
                fprintf(stderr, "--shape must be HxI, got '%s'\n", value), exit(2);
        } else if (name == "--dtype") o.dtype = value;
        else if (name == "--kernel") o.kernel = value;
        else if (name == "--csv") o.csv = value;
        else if (name == "--driver") o.driver = value;
        else if (name == "--commit") o.commit = value;
        else if (name == "--date") o.date = value;
        else if (name == "--tokens") o.tokens = atoi(value);
        else if (name == "--layers") o.layers = atoi(value);
        else if (name == "--replays") o.replays = atoi(value);
        else if (name == "--sparsity") o.sparsity = parse_list(value);
        else if (name == "--down-sparsity") o.down_sparsity = atof(value);
        else if (name == "--slots") o.slots = ints();
        else if (name == "--prefetch") o.prefetch = ints();
        else fprintf(stderr, "unknown option %s\n", name.c_str()), exit(2);
    }
    if (o.step && (o.tokens != 1 || o.deterministic))
        fprintf(stderr, "--step takes one token, and is not deterministic\n"), exit(2);
    return o;
}

template <typename T> class Bench {
  public:
    Bench(const Options &o, cats::DType dtype) : o_(o), size_(int64_t(o.hidden) * o.intermediate) {
        cudaDeviceProp properties;
        CHECK_CUDA(cudaGetDeviceProperties(&properties, 0));
        const int64_t layer_bytes = 3 * size_ * sizeof(T);
        layers_ = o.layers ? o.layers : int(std::max<int64_t>(4, 3ll * properties.l2CacheSize / layer_bytes + 1));
        CHECK_CUDA(cudaStreamCreate(&stream_));
        CHECK_CUDA(cudaMalloc(&weights_, layers_ * layer_bytes));
        CHECK_CUDA(cudaMalloc(&x_, sizeof(T) * o.tokens * o.hidden));
        CHECK_CUDA(cudaMalloc(&y_, sizeof(T) * o.tokens * o.hidden * layers_));
        CHECK_CUDA(cudaMalloc(&raw_x_, sizeof(T) * 2 * o.hidden));
        CHECK_CUDA(cudaMalloc(&sums_, sums_bytes()));
        CHECK_CUDA(cudaMalloc(&thresholds_, sizeof(float) * 2 * layers_ * threshold_size()));
        CHECK_CUDA(cudaMalloc(&projection_, sizeof(float) * 2 * o.tokens * o.intermediate));
        fill_random<<<1024, 256, 0, stream_>>>(weights_, 3 * size_ * layers_, 1, 1.f / std::sqrt(float(o.hidden)));
        fill_random<<<64, 256, 0, stream_>>>(x_, int64_t(o.tokens) * o.hidden, 2, 1.f);
        CHECK_CUDA(cudaGetLastError());
        params_.tokens = o.tokens, params_.hidden_size = o.hidden, params_.intermediate_size = o.intermediate;
        params_.w_gate_stride = params_.w_up_stride = params_.w_down_t_stride = o.hidden;
        if (o.step) normalise_x();
        params_.x = o.step ? raw_x_ : x_, params_.dtype = dtype, params_.activation = cats::Activation::kSilu;
        const size_t workspace_bytes = cats::sparse_mlp_workspace_bytes(params_);
        if (o.deterministic) {
            size_t bytes;
            CHECK_CUDA(cats::sparse_mlp_partial_sums_bytes(params_, &bytes));
            CHECK_CUDA(cudaMalloc(&partial_sums_, bytes));
        }
        CHECK_CUDA(cudaMalloc(&workspace_, workspace_bytes));
        CHECK_CUDA(cudaMemset(workspace_, 0, workspace_bytes));
        for (int l = 0; l < layers_; l++) measure_activations(l);
        device_name_ = properties.name;
        read_gbps_ = measure_read_limit(properties);
        printf("%s, %s, %dx%d, %d tokens, %d layers of %.1f MB, read limit %.0f GB/s\n", properties.name,
               o.dtype.c_str(), o.hidden, o.intermediate, o.tokens, layers_, layer_bytes / 1e6, read_gbps_);
        printf("%8s %6s %6s %8s | %9s %8s %9s %7s | %9s\n", "sparsity", "slots", "pref", "kernel", "us", "GB/s",
               "limit us", "share", "rel error");
    }

    void run() {
        for (double sparsity : o_.sparsity) {
            const int64_t bytes = set_thresholds(sparsity / 100, o_.down_sparsity / 100);
            const double error = o_.check ? check() : NAN;
            for (int slots : o_.slots)
                for (int prefetch : o_.prefetch) {
                    const double us = time(slots, prefetch), limit = bytes / read_gbps_ / 1e3;
                    printf("%7.1f%% %6d %6d %8s | %9.2f %8.0f %9.2f %7.3f | %9.1e%s\n", sparsity, slots, prefetch,
                           o_.kernel.c_str(), us, bytes / us / 1e3, limit, limit / us, error,
                           error > tolerance() ? "  WRONG" : "");
                    if (error > tolerance()) failed_ = true;
                    if (!o_.csv.empty()) write_csv(sparsity, slots, prefetch, us, limit, error);
                }
        }
        if (failed_) exit(1);
    }

  private:
    void write_csv(double sparsity, int slots, int prefetch, double us, double limit, double error) const {
        FILE *csv = fopen(o_.csv.c_str(), "a");
        if (!csv) fprintf(stderr, "cannot write '%s'\n", o_.csv.c_str()), exit(2);
        if (fseek(csv, 0, SEEK_END) == 0 && ftell(csv) == 0)
            fputs("hidden_size,intermediate_size,dtype,tokens,kernel,deterministic,sparsity,down_sparsity,per_neuron,"
                  "step,slots,first_batches,us,"
                  "read_limit_gb_per_s,limit_us,share_of_limit,relative_error,device,driver,commit,date\n",
                  csv);
        fprintf(csv, "%d,%d,%s,%d,%s,%d,%.3f,%.3f,%d,%d,%d,%d,%.2f,%.0f,%.2f,%.3f,%.1e,%s,%s,%s,%s\n", o_.hidden,
                o_.intermediate, o_.dtype.c_str(), o_.tokens, o_.kernel.c_str(), int(o_.deterministic), sparsity / 100,
                (o_.down_sparsity > 0 ? o_.down_sparsity : sparsity) / 100, int(o_.per_neuron), int(o_.step), slots,
                prefetch, us, read_gbps_, limit, limit / us, error, device_name_.c_str(), o_.driver.c_str(),
                o_.commit.c_str(), o_.date.c_str());
        fclose(csv);
    }

    // In the form for a step the kernel normalises: x_ becomes what it has to compute with, raw_x_ and the norm's
    // weight behind it what it gets.
    void normalise_x() {
        std::vector<T> raw(o_.hidden), norm(o_.hidden), x(o_.hidden);
        fill_random<<<64, 256, 0, stream_>>>(raw_x_, 2 * o_.hidden, 3, 1.f);
        CHECK_CUDA(cudaStreamSynchronize(stream_));
        CHECK_CUDA(cudaMemcpy(raw.data(), raw_x_, sizeof(T) * o_.hidden, cudaMemcpyDeviceToHost));
        CHECK_CUDA(cudaMemcpy(norm.data(), raw_x_ + o_.hidden, sizeof(T) * o_.hidden, cudaMemcpyDeviceToHost));
        double squares = 0;
        for (T v : raw) squares += double(as_float(v)) * as_float(v);
        params_.norm_weight = raw_x_ + o_.hidden, params_.norm_eps = 1e-5f;
        const float scale = float(1 / std::sqrt(squares / o_.hidden + params_.norm_eps));
        for (int c = 0; c < o_.hidden; c++) x[c] = T(as_float(T(as_float(raw[c]) * scale)) * as_float(norm[c]));
        CHECK_CUDA(cudaMemcpy(x_, x.data(), sizeof(T) * o_.hidden, cudaMemcpyHostToDevice));
    }

    int64_t sums_stride() const { return (o_.hidden + 4) / 4 * 4; } // [H + 1], and every layer's at 16 bytes
    int64_t sums_bytes() const { return layers_ * sums_stride() * int64_t(sizeof(float)); }
    int64_t threshold_size() const { return o_.per_neuron ? o_.intermediate : 1; }
    double tolerance() const { return sizeof(T) == 4 ? 2e-5 : 1e-2; }
    const T *weight(int layer, int which) const { return weights_ + (int64_t(layer) * 3 + which) * size_; }

    void measure_activations(int layer) {
        std::vector<float> g(size_t(o_.tokens) * o_.intermediate), u(g.size());
        for (int which = 0; which < 2; which++)
            project<<<(o_.intermediate + 7) / 8, 256, 0, stream_>>>(
                weight(layer, which), x_, projection_ + which * g.size(), o_.intermediate, o_.hidden, o_.tokens);
        CHECK_CUDA(cudaStreamSynchronize(stream_));
        CHECK_CUDA(cudaMemcpy(g.data(), projection_, g.size() * 4, cudaMemcpyDeviceToHost));
        CHECK_CUDA(cudaMemcpy(u.data(), projection_ + g.size(), u.size() * 4, cudaMemcpyDeviceToHost));
        std::vector<double> v(g.size()), h(g.size());
        for (size_t i = 0; i < g.size(); i++) v[i] = std::abs(silu(g[i])), h[i] = v[i] * std::abs(double(u[i]));
        act_.push_back(v), product_.push_back(h);
    }

    double measure_read_limit(const cudaDeviceProp &properties) {
        const int64_t bytes = 3 * size_ * sizeof(T) * layers_;
        const auto *from = reinterpret_cast<const uint4 *>(weights_);
        double best = 0;
        for (int per_sm : {1, 2, 4, 8})
            for (int threads : {256, 512, 1024}) {
                if (per_sm * threads > 2048) continue;
                const double us = Timer().median_us(stream_, 10, [&] {
                    read_all<8><<<properties.multiProcessorCount * per_sm, threads, 0, stream_>>>(
                        from, bytes / 16, reinterpret_cast<uint4 *>(y_));
                });
                best = std::max(best, bytes / us / 1e3);
            }
        return best;
    }

    // Thresholds of every layer for these shares of skipped token-neuron pairs; returns the bytes a layer must read.
    int64_t set_thresholds(double sparsity, double down_sparsity) {
        std::vector<float> thresholds(2 * layers_);
        int64_t rows = 0;
        for (int l = 0; l < layers_; l++) {
            thresholds[l] = threshold_for(act_[l], sparsity);
            std::vector<double> h = product_[l];
            for (size_t i = 0; i < h.size(); i++)
                if (act_[l][i] < thresholds[l]) h[i] = 0;
            thresholds[layers_ + l] = down_sparsity > 0 ? threshold_for(h, down_sparsity) : 0.f;
            for (int j = 0; j < o_.intermediate; j++) {
                bool up = false, down = false;
                for (int m = 0; m < o_.tokens; m++) {
                    const bool kept = act_[l][size_t(m) * o_.intermediate + j] >= thresholds[l];
                    up |= kept;
                    down |= kept && h[size_t(m) * o_.intermediate + j] >= thresholds[layers_ + l];
                }
                rows += 1 + up + down;
            }
        }
        std::vector<float> spread; // one a layer, or the same for each of its neurons
        for (float threshold : thresholds) spread.insert(spread.end(), threshold_size(), threshold);
        CHECK_CUDA(cudaMemcpy(thresholds_, spread.data(), spread.size() * 4, cudaMemcpyHostToDevice));
        host_thresholds_ = thresholds;
        params_.threshold_stride = params_.down_threshold_stride = o_.per_neuron;
        return rows * o_.hidden * int64_t(sizeof(T)) / layers_;
    }

    void launch(int layer, const cats::SparseMlpLaunchOptions &options) {
        cats::SparseMlpParams p = params_;
        p.w_gate = weight(layer, 0), p.w_up = weight(layer, 1), p.w_down_t = weight(layer, 2);
        p.threshold = thresholds_ + layer * threshold_size();
        p.down_threshold = o_.down_sparsity > 0 ? thresholds_ + (layers_ + layer) * threshold_size() : nullptr;
        p.y = y_ + int64_t(layer) * o_.tokens * o_.hidden;
        if (o_.step) p.y_sum = sums_ + layer * sums_stride();
        CHECK_CUDA(cats::sparse_mlp_cuda(p, workspace_, stream_, options));
    }

    cats::SparseMlpLaunchOptions options(int slots, int prefetch) const {
        cats::SparseMlpLaunchOptions options;
        options.slots = slots, options.first_batches = prefetch, options.programmatic_launch = o_.pdl;
        options.partial_sums = partial_sums_;
        if (o_.kernel == "bulk") options.kernel = cats::SparseMlpKernel::kBulkCopy;
        else if (o_.kernel == "async") options.kernel = cats::SparseMlpKernel::kAsyncCopy;
        else if (o_.kernel == "generic") options.kernel = cats::SparseMlpKernel::kGeneric;
        else if (o_.kernel != "auto") fprintf(stderr, "unknown kernel '%s'\n", o_.kernel.c_str()), exit(2);
        return options;
    }

    // ||y - reference|| / ||reference|| on the last layer, with a poisoned output.
    double check() {
        const int l = layers_ - 1;
        std::vector<T> w(3 * size_), x(size_t(o_.tokens) * o_.hidden), y(x.size());
        std::vector<float> sums(o_.hidden);
        CHECK_CUDA(cudaMemset(y_, 0xff, sizeof(T) * x.size() * layers_));
        CHECK_CUDA(cudaMemset(sums_, 0, sums_bytes()));
        launch(l, options(0, -1));
        CHECK_CUDA(cudaStreamSynchronize(stream_));
        CHECK_CUDA(cudaMemcpy(w.data(), weight(l, 0), sizeof(T) * w.size(), cudaMemcpyDeviceToHost));
        CHECK_CUDA(cudaMemcpy(x.data(), x_, sizeof(T) * x.size(), cudaMemcpyDeviceToHost));
        CHECK_CUDA(cudaMemcpy(y.data(), y_ + l * x.size(), sizeof(T) * y.size(), cudaMemcpyDeviceToHost));
        CHECK_CUDA(cudaMemcpy(sums.data(), sums_ + l * sums_stride(), sums.size() * 4, cudaMemcpyDeviceToHost));
        double difference = 0, norm = 0;
        for (int m = 0; m < o_.tokens; m++) {
            const T *xm = x.data() + size_t(m) * o_.hidden;
            std::vector<double> reference(o_.hidden);
            for (int j = 0; j < o_.intermediate; j++) {
                const T *gate = w.data() + int64_t(j) * o_.hidden, *up = gate + size_, *down = up + size_;
                double g = 0, u = 0;
                for (int c = 0; c < o_.hidden; c++) g += double(as_float(gate[c])) * as_float(xm[c]);
                const double v = silu(g);
                if (std::abs(v) < host_thresholds_[l]) continue;
                for (int c = 0; c < o_.hidden; c++) u += double(as_float(up[c])) * as_float(xm[c]);
                if (o_.down_sparsity > 0 && std::abs(v * u) < host_thresholds_[layers_ + l]) continue;
                for (int c = 0; c < o_.hidden; c++) reference[c] += v * u * as_float(down[c]);
            }
            for (int c = 0; c < o_.hidden; c++) {
                const double got = o_.step ? sums[c] : as_float(y[size_t(m) * o_.hidden + c]), d = got - reference[c];
                difference += d * d, norm += reference[c] * reference[c];
            }
        }
        return std::isfinite(difference) ? std::sqrt(difference / norm) : INFINITY;
    }

    double time(int slots, int prefetch) {
        cudaGraph_t graph;
        cudaGraphExec_t executable;
        CHECK_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
        if (o_.step) CHECK_CUDA(cudaMemsetAsync(sums_, 0, sums_bytes(), stream_)); // of all layers at once
        for (int l = 0; l < layers_; l++) launch(l, options(slots, prefetch));
        CHECK_CUDA(cudaStreamEndCapture(stream_, &graph));
        CHECK_CUDA(cudaGraphInstantiate(&executable, graph, 0));
        const double us =
            Timer().median_us(stream_, o_.replays, [&] { CHECK_CUDA(cudaGraphLaunch(executable, stream_)); });
        CHECK_CUDA(cudaGraphExecDestroy(executable));
        CHECK_CUDA(cudaGraphDestroy(graph));
        return us / layers_;
    }

    Options o_;
    int64_t size_;
    int layers_;
    cudaStream_t stream_;
    T *weights_, *x_, *raw_x_, *y_;
    float *thresholds_, *projection_, *sums_;
    void *workspace_, *partial_sums_ = nullptr;
    cats::SparseMlpParams params_{};
    std::vector<std::vector<double>> act_, product_; // per layer: |act(g)| and |act(g) u|, [tokens][I]
    std::vector<float> host_thresholds_;
    std::string device_name_;
    double read_gbps_;
    bool failed_ = false;
};

} // namespace

int main(int argc, char **argv) {
    const Options o = parse(argc, argv);
    if (o.dtype == "bf16") Bench<__nv_bfloat16>(o, cats::DType::kBFloat16).run();
    else if (o.dtype == "fp16") Bench<__half>(o, cats::DType::kFloat16).run();
    else if (o.dtype == "fp32") Bench<float>(o, cats::DType::kFloat32).run();
    else return fprintf(stderr, "--dtype must be bf16, fp16 or fp32, got '%s'\n", o.dtype.c_str()), 2;
    return 0;
}
