// The sparse gated MLP for few tokens. It reads the three weights row by row and is bound by memory bandwidth.
//
// 1. gate: the neurons are split evenly over the threads; each computes act(x . gate_row) and lists the kept ones.
// 2. up and down: the list of kept neurons is split evenly, so no thread has more rows to read than another. Each reads
//    its up rows, applies the second threshold, and adds the surviving down rows into its own fp32 y.
// 3. The threads' y are added in the order of their parts and rounded once.
//
// Eight rows are read side by side (kRows). A hardware prefetcher restarts at each 4 KB page and each row, but follows
// several address streams at once. Measured on Zen 3, 2 threads, 4096 x 14336, 50 % sparsity, in GB/s, where a plain
// sum over the same memory reads 48:
//     fp32: 1 row 34, 2 rows 40, 4 rows 43, 8 rows 45; bf16: 4 rows 32, 8 rows 35
// Software prefetch was slower at every distance, of these rows or the next, into L1 or L2: fp32 with 4 rows 31 to 37
// instead of 38, bf16 with 8 rows 28 to 32 instead of 35. bf16 is bound by instructions per byte: loading even and odd
// columns (ColumnOrder::kEvenOdd) instead of consecutive ones took 4 rows from 24 to 29.
#pragma once

#include "activation.inl.h"
#include "parallel.inl.h"
#include "rows/dense.inl.h"
#include "vec.inl.h"

namespace cats::CATS_ISA {

constexpr int kRows = 8;       // rows read side by side
constexpr int kMaxTokens = 16; // tokens in a block: each block reads the rows once

// out[r][t] = rows[r] . x[t]. Each pair has its own accumulator, so its result does not depend on Rows and Tokens.
template <int Rows, int Tokens, class Row, class X>
static void dot(const Row *rows, const X *const *x, int64_t hidden_size, float (*out)[kMaxTokens]) {
    VecF acc[Rows][Tokens] = {};
    int64_t c = 0;
    for (; c + kGroup <= hidden_size; c += kGroup)
        for (int r = 0; r < Rows; r++)
            for (int t = 0; t < Tokens; t++) acc[r][t] = dot_group(acc[r][t], rows[r], c, kGroup, x[t] + c);
    const int64_t left = hidden_size - c;
    if (left >= kGroup) __builtin_unreachable(); // spares the compiler a branch in each load(), and moves in the loop
    if (left > 0)
        for (int r = 0; r < Rows; r++)
            for (int t = 0; t < Tokens; t++) acc[r][t] = dot_group(acc[r][t], rows[r], c, left, x[t] + c);
    for (int r = 0; r < Rows; r++)
        for (int t = 0; t < Tokens; t++) out[r][t] = rows[r].scale() * sum(acc[r][t]);
}

// y += sum over r of h[r] * rows[r], added row by row, so the result does not depend on how rows are grouped.
template <int Rows, class Row> static void add_rows(const Row *rows, const float *h, int64_t hidden_size, float *y) {
    for (int64_t c = 0; c < hidden_size; c += kGroup) {
        VecF a = load(y + c), b = load(y + c + kLanes);
        for (int r = 0; r < Rows; r++) {
            const Group g = rows[r].load(c, hidden_size - c);
            a = fma(g.a, broadcast(h[r]), a);
            b = fma(g.b, broadcast(h[r]), b);
        }
        store(y + c, a);
        store(y + c + kLanes, b);
    }
}

template <class T> CATS_INLINE float scalar(const void *data, int64_t i) {
    return load(static_cast<const T *>(data) + i, 1)[0];
}

CATS_INLINE bool is_below(float value, const float *threshold, int64_t stride, int64_t neuron) {
    return std::fabs(value) < threshold[neuron * stride];
}

// One block of at most kMaxTokens tokens. Work is split into `parts`, each with its own section of `kept` and its own
// y. Row: the format of the weight rows (rows/). T: the dtype of x, the biases and y.
template <class Row, class T> struct SparseMlp {
    typedef typename DotOperand<Row, T>::type X;

    struct Part {
        int64_t kept;                        // neurons listed in its section of `kept`
        int64_t kept_pairs, kept_down_pairs; // token-neuron pairs that passed the first test, both tests
    };

    const SparseMlpParams &p;
    const Parallel &parallel;
    const int64_t first_token, tokens;
    const int64_t parts, padded; // padded: hidden_size rounded up to whole groups

    X *const x;           // [tokens, padded]
    float *const v;       // [tokens, I]: act(g), later h
    uint8_t *const alive; // [tokens, I]: not dropped so far
    int32_t *const kept;  // [I]: neurons that some token keeps
    float *const partial; // [parts, tokens, padded]: y of each part
    Part *const part;     // [parts]
    const X *x_rows[kMaxTokens];

    SparseMlp(const SparseMlpParams &p, const Parallel &parallel, int64_t first_token)
        : p(p), parallel(parallel), first_token(first_token), tokens(min(kMaxTokens, p.tokens - first_token)),
          parts(parts_for(parallel, p.intermediate_size * p.hidden_size, 1 << 15)),
          padded((p.hidden_size + kGroup - 1) / kGroup * kGroup), x(workspace<X>(0, tokens * padded)),
          v(workspace<float>(1, tokens * p.intermediate_size)),
          alive(workspace<uint8_t>(2, tokens * p.intermediate_size)), kept(workspace<int32_t>(3, p.intermediate_size)),
          partial(workspace<float>(4, parts * tokens * padded)), part(workspace<Part>(5, parts)) {}

    template <class Element> static Element *workspace(int slot, int64_t size) {
        return static_cast<Element *>(cpu_workspace(slot, size * sizeof(Element)));
    }

    Row row_of(const void *weight, int64_t stride, int64_t neuron) const {
        return {static_cast<const typename Row::Storage *>(weight) + neuron * stride, p.hidden_size};
    }

    void run() {
        pack_x();
        for_each(parallel, parts, [this](int64_t i) { gate(i); });
        const int64_t num_kept = concatenate_kept();
        for_each(parallel, parts, [this, num_kept](int64_t i) { up_and_down(i, num_kept); });
        const int64_t columns = parts_for(parallel, parts * tokens * padded, 1 << 16);
        for_each(parallel, columns, [this, columns](int64_t i) { finish(i, columns); });
        if (p.counts) count();
    }

    void pack_x() {
        for (int64_t t = 0; t < tokens; t++) {
            const T *from = static_cast<const T *>(p.x) + (first_token + t) * p.hidden_size;
            X *to = x + t * padded;
            x_rows[t] = to;
            if constexpr (std::is_same_v<X, float>) {
                for (int64_t c = 0; c < padded; c += kGroup)
                    store_group<ColumnOrder::kConsecutive>(to + c,
                                                           load_group<Row::kOrder>(from + c, p.hidden_size - c));
            } else {
                std::memset(to, 0, padded * sizeof(X));
                std::memcpy(to, from, p.hidden_size * sizeof(X));
            }
        }
    }

    // out[r][t] = rows[r] . x[t] + bias for kRows neurons of `weight` and all tokens.
    template <class Neuron>
    void project(const void *weight, int64_t stride, const void *bias, Neuron neuron, float (*out)[kMaxTokens]) const {
        Row rows[kRows];
        for (int r = 0; r < kRows; r++) rows[r] = row_of(weight, stride, neuron(r));
        if (tokens == 1) {
            dot<kRows, 1>(rows, x_rows, p.hidden_size, out);
        } else {
            constexpr int half = kRows / 2; // as many accumulators, and each row is read for two tokens
            for (int r = 0; r < kRows; r += half)
                for (int64_t t = 0; t < tokens; t += 2) {
                    const X *pair[2] = {x_rows[t], x_rows[min(t + 1, tokens - 1)]};
                    float result[half][kMaxTokens];
                    dot<half, 2>(rows + r, pair, p.hidden_size, result);
                    for (int i = 0; i < half; i++)
                        for (int64_t k = t; k < min(t + 2, tokens); k++) out[r + i][k] = result[i][k - t];
                }
        }
        if (bias)
            for (int r = 0; r < kRows; r++)
                for (int64_t t = 0; t < tokens; t++) out[r][t] += scalar<T>(bias, neuron(r));
    }

    void gate(int64_t i) {
        const int64_t begin = p.intermediate_size * i / parts, end = p.intermediate_size * (i + 1) / parts;
        float g[kRows][kMaxTokens];
        for (int64_t j = begin; j < end; j += kRows) {
            auto neuron = [j, end](int r) { return min(j + r, end - 1); }; // repeats the last row at the end
            project(p.w_gate, p.w_gate_stride, p.gate_bias, neuron, g);
            for (int64_t t = 0; t < tokens; t++)
                for (int r = 0; r < kRows; r++) v[t * p.intermediate_size + neuron(r)] = g[r][t];
        }
        with_activation(p.activation, [&](auto activation) {
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t j = begin; j < end; j += kLanes) {
                    float *at = v + t * p.intermediate_size + j;
                    store(at, activate<decltype(activation)::value>(load(at, end - j)), end - j);
                }
        });
        Part result{};
        for (int64_t j = begin; j < end; j++) {
            int64_t keeping = 0;
            for (int64_t t = 0; t < tokens; t++) {
                const int64_t at = t * p.intermediate_size + j;
                alive[at] = !is_below(v[at], p.threshold, p.threshold_stride, j);
                keeping += alive[at];
            }
            if (keeping) kept[begin + result.kept++] = j;
            result.kept_pairs += keeping;
        }
        part[i] = result;
    }

    int64_t concatenate_kept() {
        int64_t total = 0;
        for (int64_t i = 0; i < parts; i++) {
            const int64_t begin = p.intermediate_size * i / parts;
            std::memmove(kept + total, kept + begin, part[i].kept * sizeof(*kept));
            total += part[i].kept;
        }
        return total;
    }

    void up_and_down(int64_t i, int64_t num_kept) {
        const int64_t begin = num_kept * i / parts, end = num_kept * (i + 1) / parts;
        int64_t last = begin, kept_down_pairs = 0; // kept[begin, last): neurons that pass both tests
        float u[kRows][kMaxTokens];
        for (int64_t k = begin; k < end; k += kRows) {
            auto neuron = [this, k, end](int r) -> int64_t { return kept[min(k + r, end - 1)]; };
            project(p.w_up, p.w_up_stride, p.up_bias, neuron, u);
            for (int r = 0; r < min(kRows, end - k); r++) {
                const int32_t j = neuron(r);
                int64_t keeping = 0;
                for (int64_t t = 0; t < tokens; t++) {
                    const int64_t at = t * p.intermediate_size + j;
                    v[at] *= u[r][t];
                    if (p.down_threshold && is_below(v[at], p.down_threshold, p.down_threshold_stride, j))
                        alive[at] = 0;
                    keeping += alive[at];
                }
                if (keeping) kept[last++] = j;
                kept_down_pairs += keeping;
            }
        }
        part[i].kept_down_pairs = kept_down_pairs;
        float *y = partial + i * tokens * padded;
        std::memset(y, 0, tokens * padded * sizeof(*y));
        for (int64_t k = begin; k < last; k += kRows)
            for (int64_t t = 0; t < tokens; t++) down(kept + k, min(kRows, last - k), t, y + t * padded);
    }

    // Adds the rows of those of n neurons that token t keeps. Dropped rows are left out, not multiplied by zero,
    // because 0 * inf is NaN.
    void down(const int32_t *neurons, int64_t n, int64_t t, float *y) const {
        Row rows[kRows];
        float h[kRows];
        int num = 0;
        for (int64_t k = 0; k < n; k++) {
            const int64_t j = neurons[k], at = t * p.intermediate_size + j;
            if (!alive[at]) continue;
            rows[num] = row_of(p.w_down_t, p.w_down_t_stride, j);
            h[num] = v[at] * rows[num].scale();
            num++;
        }
        int r = 0;
        if (num & 8) add_rows<8>(rows, h, p.hidden_size, y), r += 8;
        if (num & 4) add_rows<4>(rows + r, h + r, p.hidden_size, y), r += 4;
        if (num & 2) add_rows<2>(rows + r, h + r, p.hidden_size, y), r += 2;
        if (num & 1) add_rows<1>(rows + r, h + r, p.hidden_size, y);
    }

    void finish(int64_t i, int64_t num) {
        const int64_t groups = padded / kGroup;
        const int64_t end = min(groups * (i + 1) / num * kGroup, p.hidden_size);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t c = groups * i / num * kGroup; c < end; c += kGroup) {
                Group y{};
                if (p.down_bias) y = load_group<Row::kOrder>(static_cast<const T *>(p.down_bias) + c, end - c);
                for (int64_t k = 0; k < parts; k++) {
                    const float *from = partial + (k * tokens + t) * padded + c;
                    y.a += load(from);
                    y.b += load(from + kLanes);
                }
                store_group<Row::kOrder>(static_cast<T *>(p.y) + (first_token + t) * p.hidden_size + c, y, end - c);
            }
    }

    void count() const {
        p.counts[0] += tokens * p.intermediate_size;
        for (int64_t i = 0; i < parts; i++) {
            p.counts[1] += part[i].kept_pairs;
            p.counts[2] += part[i].kept_down_pairs;
        }
    }
};

template <class Row, class T> static void sparse_mlp_of(const SparseMlpParams &p, const Parallel &parallel) {
    for (int64_t first = 0; first < p.tokens; first += kMaxTokens) SparseMlp<Row, T>(p, parallel, first).run();
}

// The one place that chooses a row format: a new one is a case here.
template <class T> static void sparse_mlp_with(const SparseMlpParams &p, const Parallel &parallel) {
    return sparse_mlp_of<DenseRow<T>, T>(p, parallel);
}

static void sparse_mlp(const SparseMlpParams &p, const Parallel &parallel) {
    switch (p.dtype) {
    case DType::kFloat32: return sparse_mlp_with<float>(p, parallel);
    case DType::kFloat16: return sparse_mlp_with<Half>(p, parallel);
    case DType::kBFloat16: return sparse_mlp_with<BFloat16>(p, parallel);
    case DType::kFloat64: break; // refused by the op
    }
}

} // namespace cats::CATS_ISA
