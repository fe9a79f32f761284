// An MLP from its activations on: v is given and mostly zero, and only the up and down rows of the others are read.
//
// Nothing has to be decided on the way, so there is no queue: every CTA reads all of v, which L2 has, counts the
// neurons that some token needs, and takes an equal part of them. No CTA has more rows to read than another, at any
// sparsity. A thread has the same columns of every row. It asks for the up and down rows of a batch of neurons
// together: the down rows arrive while the up rows' dot products are summed over the CTA.
//
// With a cutoff (kCutoff), v is what sparse_mlp_kernel.cuh wrote of the gates just before, and every CTA first computes
// each token's cutoff, in the same order and so with the same bits. Two launches, not one with a barrier of the grid,
// which needs all CTAs on the device at once: with several streams only a cooperative launch promises that.
#pragma once

#include "activation.cuh"
#include "finish.cuh"
#include "rows/dense.cuh"
#include "sparse_mlp_generic.cuh"
#include "team.cuh"

namespace cats {

constexpr int kActivatedThreads = 512; // at most, which leaves 128 registers a thread
constexpr int kScanNeurons = 8;        // neurons of a thread at a time in the scan
constexpr int kLeastScanThreads = 128;

// An instance takes up to kActivatedThreads * chunks chunks of a row. With more tokens or chunks the registers would
// not do; two launches for 4 tokens each read hardly more rows than one for 8, whose zeros are elsewhere in each token.
struct ActivatedInstance {
    int tokens, chunks;
};
constexpr ActivatedInstance kActivatedInstances[] = {{1, 1}, {4, 1}, {1, 2}, {2, 2}, {1, 4}};

// Of a batch: so many chunks of up rows and of down rows are on their way to a thread, as its registers allow.
CATS_HOST_DEVICE constexpr int activated_rows(int tokens, int chunks) {
    return (tokens * chunks <= 2 ? 8 : 4) / chunks;
}

template <int kTokens> struct ActiveNeuron {
    uint32_t neuron;
    float values[kTokens]; // v
};

// Neurons whose v is not zero in some token. Dynamic shared memory: one byte for kScanNeurons neurons of a thread, then
// this CTA's list, then with a cutoff the gates.
CATS_HOST_DEVICE constexpr int scan_bytes(int64_t intermediate, int threads) {
    const int64_t tile = int64_t(threads) * kScanNeurons;
    return round_up(int((intermediate + tile - 1) / tile * threads), 16);
}
template <int kTokens> CATS_HOST_DEVICE constexpr int64_t list_bytes(int64_t intermediate, int ctas) {
    return ((intermediate / ctas + 1) * int64_t(sizeof(ActiveNeuron<kTokens>)) + 15) / 16 * 16;
}
// gates_bytes: of one token, 0 without a cutoff.
template <int kTokens>
constexpr int64_t activated_shared_bytes(int64_t intermediate, int threads, int ctas, int64_t gates_bytes) {
    return scan_bytes(intermediate, threads) + list_bytes<kTokens>(intermediate, ctas) + kTokens * gates_bytes;
}

// Bit e is set where value e is not zero; NaN is not.
__device__ __forceinline__ uint32_t nonzero_bits(const float (&values)[kScanNeurons]) {
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < kScanNeurons; e++) bits |= uint32_t(!(values[e] == 0.f)) << e;
    return bits;
}

// mean(g) + deviations * std(g), each operation rounded to T.
template <typename T>
__device__ __forceinline__ float cutoff_of(const ActivatedMlpParams &p, float mean, float squares) {
    const auto rounded = [](float value) { return to_float(round_to<T>(value)); };
    const float deviation = rounded(sqrtf(squares / float(p.intermediate_size)));
    return rounded(rounded(mean) + rounded(deviation * p.deviations));
}

// What a gate above its token's cutoff, or NaN, becomes.
template <typename T>
__device__ __forceinline__ float activate_above(const ActivatedMlpParams &p, float g, float cutoff) {
    return exact_activation<T>(to_float(round_to<T>(g - cutoff)), p.activation, p.squared);
}

// Sums each value over the CTA, in a fixed order: all threads of all CTAs get the same bits. partials: not used before.
template <int kValues>
__device__ __forceinline__ void cta_sum(float (&values)[kValues], float (&partials)[kValues][kActivatedThreads / 32]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
#pragma unroll
    for (int i = 0; i < kValues; i++) {
#pragma unroll
        for (int o = 16; o; o /= 2) values[i] += __shfl_xor_sync(0xffffffffu, values[i], o);
        if (lane == 0) partials[i][warp] = values[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kValues; i++) {
        values[i] = 0.f;
        for (int w = 0; w < warps; w++) values[i] += partials[i][w];
    }
}

// Copies the gates into shared memory, where each thread later reads what it has copied itself, and computes the
// tokens' cutoffs. The number of neurons is a multiple of kScanNeurons.
template <typename T, int kTokens>
__device__ __forceinline__ void find_cutoffs(const ActivatedMlpParams &p, T *gates, float (&cutoffs)[kTokens]) {
    using Gates = Values<T, kScanNeurons>;
    __shared__ float totals[kTokens][kActivatedThreads / 32], square_totals[kTokens][kActivatedThreads / 32];
    const int64_t intermediate = p.intermediate_size;
    constexpr int kAhead = 4 / kTokens ? 4 / kTokens : 1; // nothing hides the way to L2: so many loads at a time
    float sums[kTokens] = {}, squares[kTokens] = {};
    for (int64_t first = threadIdx.x; first * kScanNeurons < intermediate; first += kAhead * int64_t(blockDim.x)) {
        Gates loaded[kAhead][kTokens];
#pragma unroll
        for (int a = 0; a < kAhead; a++)
#pragma unroll
            for (int m = 0; m < kTokens; m++) {
                const int64_t j = (first + a * int64_t(blockDim.x)) * kScanNeurons;
                loaded[a][m] = {};
                if (j < intermediate && m < p.tokens)
                    loaded[a][m] = Gates::load(static_cast<const T *>(p.v) + m * intermediate + j);
            }
#pragma unroll
        for (int a = 0; a < kAhead; a++) {
            const int64_t j = (first + a * int64_t(blockDim.x)) * kScanNeurons;
            if (j >= intermediate) break;
#pragma unroll
            for (int m = 0; m < kTokens; m++) {
                if (m >= p.tokens) break;
                loaded[a][m].store(gates + m * intermediate + j);
                float g[kScanNeurons];
                loaded[a][m].decode(g);
#pragma unroll
                for (int e = 0; e < kScanNeurons; e++) sums[m] += g[e];
            }
        }
    }
    cta_sum(sums, totals);
    for (int64_t j = threadIdx.x * kScanNeurons; j < intermediate; j += int64_t(blockDim.x) * kScanNeurons)
#pragma unroll
        for (int m = 0; m < kTokens; m++) {
            if (m >= p.tokens) break;
            const float mean = sums[m] / float(intermediate);
            float g[kScanNeurons];
            Gates::load(gates + m * intermediate + j).decode(g);
#pragma unroll
            for (int e = 0; e < kScanNeurons; e++) squares[m] = fmaf(g[e] - mean, g[e] - mean, squares[m]);
        }
    cta_sum(squares, square_totals);
#pragma unroll
    for (int m = 0; m < kTokens; m++) cutoffs[m] = cutoff_of<T>(p, sums[m] / float(intermediate), squares[m]);
}

// Writes this CTA's part of the active neurons to `list` and returns how many there are. gates: shared memory for those
// of all tokens, with a cutoff.
template <typename T, int kTokens, bool kCutoff>
__device__ __forceinline__ int find_active(const ActivatedMlpParams &p, uint8_t *scan, ActiveNeuron<kTokens> *list,
                                           T *gates) {
    __shared__ uint32_t warp_counts[kActivatedThreads / 32];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, warps = blockDim.x / 32;
    const int64_t intermediate = p.intermediate_size;
    const T *v = static_cast<const T *>(p.v);
    const bool vectors = intermediate % kScanNeurons == 0 && reinterpret_cast<uintptr_t>(v) % 16 == 0;
    uint32_t count = 0;
    const auto note = [&](int64_t at, uint32_t bits) { scan[at] = uint8_t(bits), count += __popc(bits); };
    float cutoffs[kTokens] = {};
    if constexpr (kCutoff) {
        find_cutoffs<T, kTokens>(p, gates, cutoffs);
        for (int64_t at = tid; at * kScanNeurons < intermediate; at += blockDim.x) {
            uint32_t bits = 0;
#pragma unroll
            for (int m = 0; m < kTokens; m++) {
                if (m >= p.tokens) break;
                float g[kScanNeurons];
                Values<T, kScanNeurons>::load(gates + m * intermediate + at * kScanNeurons).decode(g);
#pragma unroll
                for (int e = 0; e < kScanNeurons; e++) bits |= uint32_t(!(g[e] <= cutoffs[m])) << e;
            }
            note(at, bits);
        }
    } else if (vectors) {
        constexpr int kAhead = 8 / kTokens; // nothing hides the way to L2: so many loads at a time
        for (int64_t first = tid; first * kScanNeurons < intermediate; first += kAhead * blockDim.x) {
            Values<T, kScanNeurons> loaded[kAhead][kTokens];
#pragma unroll
            for (int a = 0; a < kAhead; a++)
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    const int64_t j = (first + a * int64_t(blockDim.x)) * kScanNeurons;
                    loaded[a][m] = {};
                    if (j < intermediate && m < p.tokens)
                        loaded[a][m] = Values<T, kScanNeurons>::load(v + m * intermediate + j);
                }
#pragma unroll
            for (int a = 0; a < kAhead; a++) {
                const int64_t at = first + a * int64_t(blockDim.x);
                if (at * kScanNeurons >= intermediate) break;
                uint32_t bits = 0;
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    float values[kScanNeurons];
                    loaded[a][m].decode(values);
                    bits |= nonzero_bits(values);
                }
                note(at, bits);
            }
        }
    } else {
        for (int64_t at = tid; at * kScanNeurons < intermediate; at += blockDim.x) {
            uint32_t bits = 0;
            for (int m = 0; m < p.tokens; m++) {
                float values[kScanNeurons] = {};
#pragma unroll
                for (int e = 0; e < kScanNeurons; e++)
                    if (const int64_t j = at * kScanNeurons + e; j < intermediate)
                        values[e] = to_float(v[m * intermediate + j]);
                bits |= nonzero_bits(values);
            }
            note(at, bits);
        }
    }
    uint32_t up_to = count; // of the warp's threads up to this one, then of all
#pragma unroll
    for (int o = 1; o < 32; o *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffffu, up_to, o);
        if (lane >= o) up_to += other;
    }
    if (lane == 31) warp_counts[warp] = up_to;
    __syncthreads();
    uint32_t total = 0;
    for (int w = 0; w < warps; w++) {
        if (w == warp) up_to += total;
        total += warp_counts[w];
    }
    const uint32_t begin = uint64_t(total) * blockIdx.x / gridDim.x,
                   end = uint64_t(total) * (blockIdx.x + 1) / gridDim.x;
    uint32_t rank = up_to - count;
    if (rank < end && up_to > begin) {
        for (int64_t at = tid; at * kScanNeurons < intermediate; at += blockDim.x)
            for (uint32_t bits = scan[at]; bits; bits &= bits - 1, rank++) {
                if (rank < begin || rank >= end) continue;
                const int64_t neuron = at * kScanNeurons + __ffs(bits) - 1;
                ActiveNeuron<kTokens> &entry = list[rank - begin];
                entry.neuron = uint32_t(neuron);
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    float value = 0.f;
                    if (m < p.tokens) value = to_float((kCutoff ? gates : v)[m * intermediate + neuron]);
                    if constexpr (kCutoff)
                        value = m >= p.tokens || value <= cutoffs[m] ? 0.f : activate_above<T>(p, value, cutoffs[m]);
                    entry.values[m] = value;
                }
            }
    }
    __syncthreads();
    return int(end - begin);
}

template <typename T, int kTokens, int kChunks, bool kCutoff>
__global__ void __launch_bounds__(kActivatedThreads, 1)
    activated_mlp_kernel(const __grid_constant__ ActivatedMlpParams p, const Workspace workspace) {
    using Row = DenseRow<T>;
    constexpr int kPerChunk = Row::kPerChunk, kRows = activated_rows(kTokens, kChunks);
    constexpr int kMaxWarps = kActivatedThreads / 32, kLanesPerDot = 32 / kRows;
    // The warps' parts of the up rows' dot products, in turns: no warp is two batches ahead of another.
    __shared__ float partials[2][kTokens][kRows][kMaxWarps];
    extern __shared__ __align__(16) uint8_t smem[];
    uint8_t *after_scan = smem + scan_bytes(p.intermediate_size, blockDim.x);
    auto *list = reinterpret_cast<ActiveNeuron<kTokens> *>(after_scan);
    T *gates = reinterpret_cast<T *>(after_scan + list_bytes<kTokens>(p.intermediate_size, gridDim.x));
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, warps = blockDim.x / 32;
    const int hidden = int(p.hidden_size), row_chunks = hidden / kPerChunk;
    const auto chunk = [&](int c) { return c * int(blockDim.x) + tid; };
    const auto row = [](const void *base, int64_t stride, uint32_t neuron) {
        return static_cast<const uint8_t *>(base) + neuron * stride * int64_t(sizeof(T));
    };
    const auto load = [&](const uint8_t *from, int c) {
        return Row::load(from + int64_t(chunk(c) - lane) * kChunkBytes, lane);
    };
    const auto prefetch = [&](int i) { // row i / 2 of the list: up, or down where i is odd
        const uint32_t neuron = list[i / 2].neuron;
        if (i % 2) prefetch_l2(row(p.w_down_t, p.w_down_t_stride, neuron), uint32_t(hidden * sizeof(T)));
        else if (p.w_up) prefetch_l2(row(p.w_up, p.w_up_stride, neuron), uint32_t(hidden * sizeof(T)));
    };

    launch_dependents();
    wait_for_previous_kernel();
    const int active = find_active<T, kTokens, kCutoff>(p, smem, list, gates);

    float acc[kTokens][kChunks][kPerChunk] = {};
    int turn = 0;
    for (int first = 0; first < active; first += kRows, turn ^= 1) {
        const int count = min(kRows, active - first);
        // A batch is computed when all of it has arrived: the next one is brought into L2 meanwhile.
        if (const int i = 2 * (first + kRows) + tid; tid < 2 * kRows && i < 2 * active) prefetch(i);
        typename Row::Packed up[kRows][kChunks], down[kRows][kChunks];
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
            for (int c = 0; c < kChunks; c++) {
                up[r][c] = down[r][c] = {};
                if (r >= count || chunk(c) >= row_chunks) continue;
                const uint32_t neuron = list[first + r].neuron;
                if (p.w_up) up[r][c] = load(row(p.w_up, p.w_up_stride, neuron), c);
                down[r][c] = load(row(p.w_down_t, p.w_down_t_stride, neuron), c);
            }
        const auto value = [&](int r, int m) { return r < count ? list[first + r].values[m] : 0.f; }; // v
        if (p.w_up) {
#pragma unroll 1
            for (int m = 0; m < kTokens; m++) {
                if (m >= p.tokens) break;
                float dots[kRows] = {};
#pragma unroll
                for (int c = 0; c < kChunks; c++) {
                    if (chunk(c) >= row_chunks) continue;
                    float x[kPerChunk];
                    Values<T, kPerChunk>::load(static_cast<const T *>(p.x) + int64_t(m) * hidden + chunk(c) * kPerChunk)
                        .decode(x);
#pragma unroll
                    for (int r = 0; r < kRows; r++) {
                        if (value(r, m) == 0.f) continue; // the same for all threads
                        float w[kPerChunk];
                        Row::decode(up[r][c], w);
#pragma unroll
                        for (int e = 0; e < kPerChunk; e++) dots[r] = fmaf(w[e], x[e], dots[r]);
                    }
                }
                const float sum = warp_sum(dots);
                if (lane % kLanesPerDot == 0) partials[turn][m][lane / kLanesPerDot][warp] = sum;
            }
            __syncthreads();
        }
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
            for (int m = 0; m < kTokens; m++) {
                float h = value(r, m);
                if (h == 0.f) continue; // no 0 * inf
                if (p.w_up) {
                    float u = p.up_bias ? to_float(static_cast<const T *>(p.up_bias)[list[first + r].neuron]) : 0.f;
                    for (int w = 0; w < warps; w++) u += partials[turn][m][r][w];
                    h *= u;
                }
#pragma unroll
                for (int c = 0; c < kChunks; c++) {
                    float w[kPerChunk];
                    Row::decode(down[r][c], w);
#pragma unroll
                    for (int e = 0; e < kPerChunk; e++) acc[m][c][e] = fmaf(w[e], h, acc[m][c][e]);
                }
            }
    }

    const OutputOrder<0> order{int(p.tokens), hidden};
    if (active || workspace.partial_sums)
#pragma unroll
        for (int m = 0; m < kTokens; m++)
#pragma unroll
            for (int c = 0; c < kChunks; c++) {
                if (m >= p.tokens || chunk(c) >= row_chunks) continue;
#pragma unroll
                for (int e = 0; e < kPerChunk; e += 4)
                    add_to_output(workspace, order.size(), m * hidden + chunk(c) * kPerChunk + e,
                                  make_float4(acc[m][c][e], acc[m][c][e + 1], acc[m][c][e + 2], acc[m][c][e + 3]));
            }
    finish_output(workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

// For rows of any alignment and length. Column by column, one CTA a neuron: simple, not fast.
template <typename T>
__global__ void __launch_bounds__(kGenericThreads)
    activated_mlp_generic_kernel(const __grid_constant__ ActivatedMlpParams p, const Workspace workspace) {
    const int hidden = int(p.hidden_size);
    const OutputOrder<0> order{int(p.tokens), hidden};
    float *part = workspace.partial_sums ? workspace.partial_sums + blockIdx.x * int64_t(order.size()) : nullptr;
    if (part)
        for (int m = 0; m < p.tokens; m++)
            for (int c = threadIdx.x; c < hidden; c += kGenericThreads) part[m * hidden + c] = 0.f;
    __shared__ float cutoffs[kMaxTokensPerLaunch];
    if (p.cutoff)
        for (int m = 0; m < p.tokens; m++) {
            const T *gates = static_cast<const T *>(p.v) + m * p.intermediate_size;
            float sum = 0.f, squares = 0.f;
            for (int64_t j = threadIdx.x; j < p.intermediate_size; j += kGenericThreads) sum += to_float(gates[j]);
            const float mean = block_sum(sum) / float(p.intermediate_size);
            for (int64_t j = threadIdx.x; j < p.intermediate_size; j += kGenericThreads) {
                const float g = to_float(gates[j]);
                squares = fmaf(g - mean, g - mean, squares);
            }
            squares = block_sum(squares);
            if (threadIdx.x == 0) cutoffs[m] = cutoff_of<T>(p, mean, squares);
        }
    __syncthreads();
    for (int64_t j = blockIdx.x; j < p.intermediate_size; j += gridDim.x)
        for (int m = 0; m < p.tokens; m++) {
            float v = to_float(static_cast<const T *>(p.v)[m * p.intermediate_size + j]);
            if (p.cutoff) v = v <= cutoffs[m] ? 0.f : activate_above<T>(p, v, cutoffs[m]);
            if (v == 0.f) continue;
            float h = v;
            if (p.w_up) {
                const T *x = static_cast<const T *>(p.x) + int64_t(m) * hidden;
                const T *row = static_cast<const T *>(p.w_up) + j * p.w_up_stride;
                float sum = 0.f;
                for (int c = threadIdx.x; c < hidden; c += kGenericThreads)
                    sum = fmaf(to_float(row[c]), to_float(x[c]), sum);
                h *= block_sum(sum) + (p.up_bias ? to_float(static_cast<const T *>(p.up_bias)[j]) : 0.f);
            }
            const T *row = static_cast<const T *>(p.w_down_t) + j * p.w_down_t_stride;
            for (int c = threadIdx.x; c < hidden; c += kGenericThreads) {
                const float product = to_float(row[c]) * h;
                if (part) part[m * hidden + c] += product;
                else atomicAdd(workspace.y_sum + m * hidden + c, product);
            }
        }
    finish_output(workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
}

} // namespace cats
