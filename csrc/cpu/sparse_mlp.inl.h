// The sparse gated MLP for few tokens. It reads the three weights row by row and is bound by memory bandwidth.
//
// 1. gate: the neurons are split evenly over the threads; each computes act(x . gate_row) and lists the kept ones. With
//    an input_threshold each adds up its columns of the transpose's rows instead, of the inputs that are kept.
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
// columns (ColumnOrder::kEvenOdd) instead of consecutive ones took 4 rows from 24 to 29. Packed rows are short, and are
// prefetched as far ahead as the rows that are read next (rows/packed.inl.h).
#pragma once

#include "activation.inl.h"
#include "parallel.inl.h"
#include "rows/dense.inl.h"
#include "rows/packed.inl.h"
#ifdef CATS_DOT_INT8
#include "rows/digits.inl.h"
#endif
#include "vec.inl.h"

namespace cats::CATS_ISA {

constexpr int kRows = 8;       // rows read side by side
constexpr int kMaxTokens = 16; // tokens in a block: each block reads the rows once

// With an input_threshold: sums of gates, of a block of tokens, in the size of an L1 cache; and the number of inputs
// whose rows all tokens of a block add before the next ones, so that they are read from memory once.
constexpr int kGateSums = 1 << 13, kGateInputs = 64;

static constexpr float kSmallest = 0x1p-149f; // as a threshold, it drops zeros and nothing else

// acc[r][t] + rows[r] . x[t] over one block.
template <int Rows, int Tokens, class Row, class X>
CATS_INLINE void dot_block(VecF (&acc)[Rows][Tokens], const Row *rows, int64_t column, int64_t n, const X *const *x) {
    VecF x_sums[Tokens] = {};
    if constexpr (Row::kOffset)
        for (int t = 0; t < Tokens; t++)
            for (int i = 0; i < Row::kBlock; i += kLanes) x_sums[t] += load(x[t] + column + i);
    for (int r = 0; r < Rows; r++) {
        const auto block = rows[r].block(column, n);
        for (int t = 0; t < Tokens; t++) {
            VecF sums = Row::kScaled ? VecF{} : acc[r][t];
            for (int i = 0; i < Row::kBlock; i += kGroup) sums = dot_group(sums, block, i, x[t] + column + i);
            if constexpr (Row::kOffset) sums -= block.offset * x_sums[t];
            if constexpr (Row::kScaled) sums = fma(block.scale, sums, acc[r][t]);
            acc[r][t] = sums;
        }
    }
}

// out[r][t] = rows[r] . x[t]. Each pair has its own accumulator, so its result does not depend on Rows and Tokens.
template <int Rows, int Tokens, class Row, class X>
static void dot(Row *rows, const X *const *x, int64_t columns, float (*out)[kMaxTokens]) {
    VecF acc[Rows][Tokens] = {};
    for (int64_t tile = 0; tile < columns; tile += Row::kTileColumns) {
        for (int r = 0; r < Rows; r++) rows[r].open(tile);
        const int64_t end = min(columns - tile, Row::kTileColumns) + tile;
        constexpr int kStep = kDotColumns<Row, X>;
        int64_t c = tile;
        for (; c + kStep <= end; c += kStep) dot_block(acc, rows, c, kStep, x);
        if constexpr (Row::kScaled) continue; // whole blocks
        const int64_t left = end - c;
        if (left >= kGroup) __builtin_unreachable(); // spares the compiler a branch in load(), and moves in the loop
        if (left > 0) dot_block(acc, rows, c, left, x);
    }
    for (int r = 0; r < Rows; r++)
        for (int t = 0; t < Tokens; t++) out[r][t] = sum(acc[r][t]);
}

// y += sum over r of h[r] * rows[r], added row by row, so the result does not depend on how rows are grouped.
template <int Rows, class Row> static void add_rows(Row *rows, const float *h, int64_t columns, float *y) {
    constexpr int kPiece = Row::kBlock < 4 * kGroup ? Row::kBlock : 4 * kGroup; // of y, held in registers
    for (int64_t tile = 0; tile < columns; tile += Row::kTileColumns) {
        for (int r = 0; r < Rows; r++) rows[r].open(tile);
        const int64_t end = min(columns - tile, Row::kTileColumns) + tile;
        for (int64_t c = tile; c < end; c += kPiece) {
            Group sums[kPiece / kGroup];
            for (int i = 0; i < kPiece / kGroup; i++)
                sums[i] = {load(y + c + i * kGroup), load(y + c + i * kGroup + kLanes)};
            VecF offset = {};
            for (int r = 0; r < Rows; r++) {
                const auto block = rows[r].block(c, end - c);
                VecF factor = broadcast(h[r]);
                if constexpr (Row::kScaled) factor *= block.scale;
                if constexpr (Row::kOffset) offset = fma(factor, block.offset, offset);
                for (int i = 0; i < kPiece / kGroup; i++) {
                    const Group w = block.load(i * kGroup);
                    sums[i] = {fma(w.a, factor, sums[i].a), fma(w.b, factor, sums[i].b)};
                }
            }
            for (int i = 0; i < kPiece / kGroup; i++) {
                store(y + c + i * kGroup, Row::kOffset ? sums[i].a - offset : sums[i].a);
                store(y + c + i * kGroup + kLanes, Row::kOffset ? sums[i].b - offset : sums[i].b);
            }
        }
    }
}

// The same for up to kRows rows.
template <class Row> static void add_rows(Row *rows, int num, const float *h, int64_t columns, float *y) {
    int r = 0;
    if (num & 8) add_rows<8>(rows, h, columns, y), r += 8;
    if (num & 4) add_rows<4>(rows + r, h + r, columns, y), r += 4;
    if (num & 2) add_rows<2>(rows + r, h + r, columns, y), r += 2;
    if (num & 1) add_rows<1>(rows + r, h + r, columns, y);
}

template <class T> CATS_INLINE float scalar(const void *data, int64_t i) {
    return load(static_cast<const T *>(data) + i, 1)[0];
}

CATS_INLINE bool is_below(float value, const float *threshold, int64_t stride, int64_t neuron) {
    return std::fabs(value) < threshold[neuron * stride];
}

template <class Row> struct RowTag {
    typedef Row type;
};

template <auto constant> struct Constant {
    static constexpr auto value = constant;
};

// Calls f with the type of the rows that a matrix has, f(tag) with decltype(tag)::type. T: the dtype of dense rows.
// The one place that chooses a row format: a new one is a case here.
template <class T, class F> CATS_INLINE void with_rows(const RowFormat &format, F f) {
    const auto grouped = [&](auto type, auto zero_points) {
        constexpr WeightType kType = decltype(type)::value;
        constexpr bool kZeroPoints = decltype(zero_points)::value;
        switch (format.group_size) {
        case 32: return f(RowTag<PackedRow<kType, 32, kZeroPoints>>());
        case 64: return f(RowTag<PackedRow<kType, 64, kZeroPoints>>());
        case 128: return f(RowTag<PackedRow<kType, 128, kZeroPoints>>());
        }
    };
    switch (format.type) {
    case WeightType::kDense: return f(RowTag<DenseRow<T>>());
    case WeightType::kInt4:
        if (format.zero_points) return grouped(Constant<WeightType::kInt4>(), Constant<true>());
        return grouped(Constant<WeightType::kInt4>(), Constant<false>());
    case WeightType::kInt8: return grouped(Constant<WeightType::kInt8>(), Constant<false>());
    case WeightType::kFloat8: return f(RowTag<PackedRow<WeightType::kFloat8, 0, false>>());
    }
}

// One block of at most kMaxTokens tokens. Work is split into `parts`, each with its own section of `kept` and its own
// y. T: the dtype of x, the biases and y. Each of the three matrices has its own row format.
template <class T> struct SparseMlp {
    struct Part {
        int64_t kept;                        // neurons listed in its section of `kept`
        int64_t kept_pairs, kept_down_pairs; // token-neuron pairs that passed the first test, both tests
    };

    struct KeptInput {
        int64_t input;
        float value;
    };

    const SparseMlpParams &p;
    const Parallel &parallel;
    const int64_t first_token, tokens;
    const int64_t parts, padded; // padded: hidden_size rounded up to what rows and vectors are filled up to

    float *const v;       // [tokens, I]: act(g), later h
    uint8_t *const alive; // [tokens, I]: not dropped so far
    int32_t *const kept;  // [I]: neurons that some token keeps
    float *const partial; // [parts, tokens, padded]: y of each part
    Part *const part;     // [parts]
    void *x_gate, *x_up;  // [tokens, padded / kOperandColumns]: x as the dot products of gate and of up take it
    const T *const given; // [M, I]: act(g) where it is given and there is no w_gate, otherwise null
    float cutoffs[kMaxTokens];
    KeptInput *const inputs; // [tokens, H]: with an input_threshold, inputs that a token keeps, in order
    int64_t num_inputs[kMaxTokens];

    SparseMlp(const SparseMlpParams &p, const Parallel &parallel, int64_t first_token, const void *given = nullptr)
        : p(p), parallel(parallel), first_token(first_token), tokens(min(kMaxTokens, p.tokens - first_token)),
          parts(parts_for(parallel, p.intermediate_size * p.hidden_size, 1 << 15)),
          padded(round_up(p.hidden_size, p.gate_format.packed() ? kPackedColumns : kGroup)),
          v(workspace<float>(0, tokens * p.intermediate_size)),
          alive(workspace<uint8_t>(1, tokens * p.intermediate_size)), kept(workspace<int32_t>(2, p.intermediate_size)),
          partial(workspace<float>(3, parts * tokens * padded)), part(workspace<Part>(4, parts)),
          given(static_cast<const T *>(given)),
          inputs(p.input_threshold ? workspace<KeptInput>(7, tokens * p.hidden_size) : nullptr) {}

    template <class Element> static Element *workspace(int slot, int64_t size) {
        return static_cast<Element *>(cpu_workspace(slot, size * sizeof(Element)));
    }

    template <class Row> static Row row_of(const void *weight, int64_t stride, int64_t neuron, int64_t next) {
        const auto *rows = static_cast<const typename Row::Storage *>(weight);
        return {rows + neuron * stride, rows + next * stride};
    }

    template <class Row> int64_t columns() const { return Row::kScaled ? padded : p.hidden_size; }

    void run() {
        if (p.x) {
            with_rows<T>(p.gate_format, [this](auto row) { x_gate = pack_x<typename decltype(row)::type>(5); });
            if (p.up_format == p.gate_format) x_up = x_gate;
            else with_rows<T>(p.up_format, [this](auto row) { x_up = pack_x<typename decltype(row)::type>(6); });
        }
        if (p.input_threshold)
            for (int64_t t = 0; t < tokens; t++) num_inputs[t] = list_kept_inputs(t);
        if (p.cutoff) {
            for_each(parallel, parts, [this](int64_t i) { compute_gates(part_begin(i), part_begin(i + 1)); });
            for (int64_t t = 0; t < tokens; t++) cutoffs[t] = cutoff_of(v + t * p.intermediate_size);
        }
        for_each(parallel, parts, [this](int64_t i) { gate(i); });
        const int64_t num_kept = concatenate_kept();
        for_each(parallel, parts, [this, num_kept](int64_t i) { up_and_down(i, num_kept); });
        const int64_t ranges = parts_for(parallel, parts * tokens * padded, 1 << 16);
        with_rows<T>(p.down_format, [this, ranges](auto row) {
            constexpr ColumnOrder order = decltype(row)::type::kOrder;
            for_each(parallel, ranges, [this, ranges](int64_t i) { finish<order>(i, ranges); });
        });
        if (p.counts) count();
    }

    template <class Row> void *pack_x(int slot) const {
        typedef typename DotOperand<Row, T>::type X;
        const int64_t size = padded / kOperandColumns<X>;
        X *const x = workspace<X>(slot, tokens * size);
        for (int64_t t = 0; t < tokens; t++)
            make_operand<Row>(x + t * size, static_cast<const T *>(p.x) + (first_token + t) * p.hidden_size,
                              p.hidden_size, padded);
        return x;
    }

    // out[r][t] = rows[r] . x[t] + bias for kRows neurons of `weight` and all tokens.
    template <class Neuron>
    void project(const RowFormat &format, const void *weight, int64_t stride, const void *x, const void *bias,
                 Neuron neuron, float (*out)[kMaxTokens]) const {
        with_rows<T>(format, [&](auto row) {
            typedef typename decltype(row)::type Row;
            Row rows[kRows];
            for (int r = 0; r < kRows; r++) rows[r] = row_of<Row>(weight, stride, neuron(r), neuron(r + kRows));
            dot_all(rows, static_cast<const typename DotOperand<Row, T>::type *>(x), out);
        });
        if (bias)
            for (int r = 0; r < kRows; r++)
                for (int64_t t = 0; t < tokens; t++) out[r][t] += scalar<T>(bias, neuron(r));
    }

    template <class Row, class X> void dot_all(Row *rows, const X *x, float (*out)[kMaxTokens]) const {
        if (tokens == 1) return dot<kRows, 1>(rows, &x, columns<Row>(), out);
        constexpr int half = kRows / 2; // as many accumulators, and each row is read for two tokens
        for (int r = 0; r < kRows; r += half)
            for (int64_t t = 0; t < tokens; t += 2) {
                const int64_t size = padded / kOperandColumns<X>;
                const X *pair[2] = {x + t * size, x + min(t + 1, tokens - 1) * size};
                float result[half][kMaxTokens];
                dot<half, 2>(rows + r, pair, columns<Row>(), result);
                for (int i = 0; i < half; i++)
                    for (int64_t k = t; k < min(t + 2, tokens); k++) out[r + i][k] = result[i][k - t];
            }
    }

    // Of whole groups where the rows of the gate are split, too, so that groups stay aligned if rows are.
    int64_t part_begin(int64_t i) const {
        const int64_t unit = p.input_threshold ? kGroup : 1;
        return min((p.intermediate_size + unit - 1) / unit * i / parts * unit, p.intermediate_size);
    }

    void gate(int64_t i) {
        const int64_t begin = part_begin(i), end = part_begin(i + 1);
        if (given) {
            read_activations(begin, end);
        } else {
            if (p.input_threshold) add_gates(begin, end);
            else if (!p.cutoff) compute_gates(begin, end);
            with_activation(p.activation,
                            [&](auto activation) { apply_activation<decltype(activation)::value>(begin, end); });
        }
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

    void read_activations(int64_t begin, int64_t end) const {
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t j = begin; j < end; j += kLanes) {
                const T *from = given + (first_token + t) * p.intermediate_size + j;
                store(v + t * p.intermediate_size + j, load(from, end - j), end - j);
            }
    }

    void compute_gates(int64_t begin, int64_t end) const {
        float g[kRows][kMaxTokens];
        for (int64_t j = begin; j < end; j += kRows) {
            auto neuron = [j, end](int r) { return min(j + r, end - 1); }; // repeats the last row at the end
            project(p.gate_format, p.w_gate, p.w_gate_stride, x_gate, p.gate_bias, neuron, g);
            for (int64_t t = 0; t < tokens; t++)
                for (int r = 0; r < kRows; r++) v[t * p.intermediate_size + neuron(r)] = g[r][t];
        }
        if (!p.exact) return;
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t j = begin; j < end; j += kLanes) {
                float *at = v + t * p.intermediate_size + j;
                store(at, rounded<T>(load(at, end - j)), end - j);
            }
    }

    int64_t list_kept_inputs(int64_t t) {
        const T *x = static_cast<const T *>(p.x) + (first_token + t) * p.hidden_size;
        KeptInput *list = inputs + t * p.hidden_size;
        int64_t num = 0;
        for (int64_t c = 0; c < p.hidden_size; c += kLanes) {
            float values[kLanes];
            store(values, load(x + c, p.hidden_size - c));
            for (int i = 0; i < min(kLanes, p.hidden_size - c); i++) {
                list[num] = {c + i, values[i]}; // without a branch, which half of the inputs would mispredict
                num += !is_below(values[i], p.input_threshold, 0, 0);
            }
        }
        return num;
    }

    // The gates of neurons [begin, end), as sums of columns of the rows of w_gate. Each is summed in the order of
    // inputs, so the result does not depend on how neurons and tokens are split. Rows that no token keeps are not read,
    // and a token that drops a row leaves it out, as in down().
    void add_gates(int64_t begin, int64_t end) const {
        typedef DenseRow<T> Row; // there are no packed rows of the transpose
        float sums[kGateSums];   // [tokens, width], in the column order of rows
        const int64_t width = kGateSums / tokens / kGroup * kGroup;
        for (int64_t j = begin; j < end; j += width) {
            const int64_t columns = min(width, end - j);
            int64_t next[kMaxTokens] = {};
            std::memset(sums, 0, tokens * width * sizeof(*sums));
            for (int64_t i = kGateInputs; i < p.hidden_size + kGateInputs; i += kGateInputs)
                for (int64_t t = 0; t < tokens; t++)
                    next[t] = add_inputs_before<Row>(i, t, next[t], j, columns, sums + t * width);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t c = 0; c < columns; c += kGroup) {
                    const float *from = sums + t * width + c;
                    Group g = {load(from), load(from + kLanes)};
                    if (p.gate_bias) {
                        const Group bias =
                            load_group<Row::kOrder>(static_cast<const T *>(p.gate_bias) + j + c, columns - c);
                        g = {g.a + bias.a, g.b + bias.b};
                    }
                    store_group<Row::kOrder>(v + t * p.intermediate_size + j + c, g, columns - c);
                }
        }
    }

    // Adds the rows of the inputs below `limit` that token t keeps, from the k-th one on, kRows at a time. Returns how
    // far it came: where more inputs follow, up to kRows - 1 are left to be added with them.
    template <class Row>
    int64_t add_inputs_before(int64_t limit, int64_t t, int64_t k, int64_t j, int64_t columns, float *sums) const {
        const KeptInput *list = inputs + t * p.hidden_size;
        for (int num; k < num_inputs[t]; k += num) {
            num = int(min(kRows, num_inputs[t] - k));
            if (list[k + num - 1].input >= limit) break;
            Row rows[kRows];
            float h[kRows];
            for (int r = 0; r < num; r++) {
                const auto *row = static_cast<const T *>(p.w_gate) + list[k + r].input * p.w_gate_stride + j;
                rows[r] = {row, row};
                h[r] = list[k + r].value;
            }
            add_rows(rows, num, h, columns, sums);
        }
        return k;
    }

    template <Activation A> void apply_activation(int64_t begin, int64_t end) const {
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t j = begin; j < end; j += kLanes) {
                float *at = v + t * p.intermediate_size + j;
                VecF g = load(at, end - j);
                if (p.cutoff) {
                    g = rounded<T>(g - cutoffs[t]);
                    g = g < 0.f ? (VecF){} : g; // keeps NaN
                }
                g = activate<A>(g);
                if (p.exact) g = rounded<T>(g);
                if (p.squared) g = rounded<T>(g * g);
                store(at, g, end - j);
            }
    }

    // mean(g) + deviations * std(g) of one token's gates. In fp64, one after the other: the same on any number of
    // threads.
    float cutoff_of(const float *g) const {
        const auto round = [](double value) { return rounded<T>(broadcast(float(value)))[0]; };
        double total = 0, squares = 0;
        for (int64_t j = 0; j < p.intermediate_size; j++) total += g[j];
        const double mean = total / p.intermediate_size;
        for (int64_t j = 0; j < p.intermediate_size; j++) squares += (g[j] - mean) * (g[j] - mean);
        const float deviation = round(__builtin_sqrt(squares / p.intermediate_size));
        return round(round(mean) + round(deviation * p.deviations));
    }

    int64_t concatenate_kept() {
        int64_t total = 0;
        for (int64_t i = 0; i < parts; i++) {
            const int64_t begin = part_begin(i);
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
            if (p.w_up) project(p.up_format, p.w_up, p.w_up_stride, x_up, p.up_bias, neuron, u);
            for (int r = 0; r < min(kRows, end - k); r++) {
                const int32_t j = neuron(r);
                int64_t keeping = 0;
                for (int64_t t = 0; t < tokens; t++) {
                    const int64_t at = t * p.intermediate_size + j;
                    if (p.w_up) v[at] *= p.relu_up && u[r][t] < 0 ? 0 : u[r][t];
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
        with_rows<T>(p.down_format, [&](auto row) {
            for (int64_t k = begin; k < last; k += kRows)
                for (int64_t t = 0; t < tokens; t++)
                    down<typename decltype(row)::type>(kept + k, last - k, t, y + t * padded);
        });
    }

    // Adds the rows of those of the first kRows of `left` neurons that token t keeps. Dropped rows are left out, not
    // multiplied by zero, because 0 * inf is NaN.
    template <class Row> void down(const int32_t *neurons, int64_t left, int64_t t, float *y) const {
        Row rows[kRows];
        float h[kRows];
        int num = 0;
        for (int64_t k = 0; k < min(kRows, left); k++) {
            const int64_t j = neurons[k], at = t * p.intermediate_size + j;
            if (!alive[at]) continue;
            rows[num] = row_of<Row>(p.w_down_t, p.w_down_t_stride, j, neurons[min(k + kRows, left - 1)]);
            h[num++] = v[at];
        }
        add_rows(rows, num, h, columns<Row>(), y);
    }

    template <ColumnOrder order> void finish(int64_t i, int64_t num) const {
        const int64_t groups = padded / kGroup;
        const int64_t end = min(groups * (i + 1) / num * kGroup, p.hidden_size);
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t c = groups * i / num * kGroup; c < end; c += kGroup) {
                Group y{};
                if (p.down_bias) y = load_group<order>(static_cast<const T *>(p.down_bias) + c, end - c);
                for (int64_t k = 0; k < parts; k++) {
                    const float *from = partial + (k * tokens + t) * padded + c;
                    y.a += load(from);
                    y.b += load(from + kLanes);
                }
                store_group<order>(static_cast<T *>(p.y) + (first_token + t) * p.hidden_size + c, y, end - c);
            }
    }

    void count() const {
        p.counts[0] += tokens * p.intermediate_size;
        for (int64_t i = 0; i < parts; i++) {
            p.counts[1] += part[i].kept_pairs;
            p.counts[2] += part[i].kept_down_pairs;
        }
        for (int64_t t = 0; p.input_threshold && t < tokens; t++) p.counts[3] += num_inputs[t];
    }
};

template <class T> static void sparse_mlp_with(const void *given, const SparseMlpParams &p, const Parallel &parallel) {
    for (int64_t first = 0; first < p.tokens; first += kMaxTokens) SparseMlp<T>(p, parallel, first, given).run();
}

static void sparse_mlp_from(const void *given, const SparseMlpParams &p, const Parallel &parallel) {
    switch (p.dtype) {
    case DType::kFloat32: return sparse_mlp_with<float>(given, p, parallel);
    case DType::kFloat16: return sparse_mlp_with<Half>(given, p, parallel);
    case DType::kBFloat16: return sparse_mlp_with<BFloat16>(given, p, parallel);
    case DType::kFloat64: break; // refused by the op
    }
}

static void sparse_mlp(const SparseMlpParams &given, const Parallel &parallel) {
    SparseMlpParams p = given;
    if (p.exact) p.threshold = &kSmallest, p.down_threshold = p.relu_up ? &kSmallest : nullptr;
    sparse_mlp_from(nullptr, p, parallel);
}

static void activated_mlp(const ActivatedMlpParams &a, const Parallel &parallel) {
    SparseMlpParams p{};
    p.tokens = a.tokens, p.hidden_size = a.hidden_size, p.intermediate_size = a.intermediate_size;
    p.x = a.x, p.w_up = a.w_up, p.w_down_t = a.w_down_t, p.y = a.y;
    p.w_up_stride = a.w_up_stride, p.w_down_t_stride = a.w_down_t_stride;
    p.up_bias = a.up_bias, p.down_bias = a.down_bias;
    p.threshold = &kSmallest, p.dtype = a.dtype;
    sparse_mlp_from(a.v, p, parallel);
}

} // namespace cats::CATS_ISA
