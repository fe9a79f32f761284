// An MLP from its activations on: v is given and mostly zero, and only the up and down rows of the others are read.
//
// Nothing has to be decided on the way, so there is no queue: every CTA reads all of v, which L2 has, counts the
// neurons that some token needs, and takes an equal part of them. No CTA has more rows to read than another, at any
// sparsity. A thread has the same columns of every row. It asks for the up and down rows of a batch of neurons
// together: the down rows arrive while the up rows' dot products are summed over the CTA.
//
// With a cutoff (kCutoff), v is what sparse_mlp_kernel.cuh wrote of the gates just before. Every CTA computes the
// tokens' cutoffs from the sums that this kernel left, in the same order and so with the same bits. CTA b then takes
// groups b, b + CTAs, ... of 8 neurons and reads no other gates: the CTAs have unequal numbers of rows, but nothing to
// count first. Two launches, not one with a barrier of the grid, which needs all CTAs on the device at once: with
// several streams only a cooperative launch promises that.
#pragma once

#include "activation.cuh"
#include "gate_sums.cuh"
#include "rows/dense.cuh"
#include "sparse_mlp_generic.cuh"
#include "team.cuh"

namespace cats {

constexpr int kScanNeurons = 8; // neurons of a thread at a time in the scan
constexpr int kLeastScanThreads = 128;

// An instance takes up to threads * chunks chunks of a row. 512 threads have 128 registers each. With more tokens or
// chunks they would not do; two launches for 4 tokens each read hardly more rows than one for 8, whose zeros are
// elsewhere in each token.
struct ActivatedInstance {
    int tokens, chunks, threads;
};
constexpr ActivatedInstance kActivatedInstances[] = {{1, 1, 256}, {1, 1, 512}, {4, 1, 512},
                                                     {1, 2, 512}, {2, 2, 512}, {1, 4, 512}};

// Of a batch: so many chunks of up rows and of down rows are on their way to a thread, as its registers allow.
CATS_HOST_DEVICE constexpr int activated_rows(int tokens, int chunks, int threads) {
    return (tokens * chunks <= 2 ? 4096 / threads : 4) / chunks;
}

// Neurons whose v is not zero in some token. Dynamic shared memory: without a cutoff one byte for kScanNeurons neurons
// of a thread, then this CTA's list of such neurons, which has room for whole groups and whole batches.
CATS_HOST_DEVICE constexpr int scan_bytes(int64_t intermediate, int threads) {
    const int64_t tile = int64_t(threads) * kScanNeurons;
    return round_up(int((intermediate + tile - 1) / tile * threads), 16);
}
constexpr int64_t list_bytes(int64_t intermediate, int ctas) {
    const int64_t neurons = (intermediate / kScanNeurons / ctas + 1) * kScanNeurons;
    return (neurons + 15) / 16 * 16 * int64_t(sizeof(uint32_t));
}

// Bit e is set where value e is not zero; NaN is not.
__device__ __forceinline__ uint32_t nonzero_bits(const float (&values)[kScanNeurons]) {
    uint32_t bits = 0;
#pragma unroll
    for (int e = 0; e < kScanNeurons; e++) bits |= uint32_t(!(values[e] == 0.f)) << e;
    return bits;
}

// Writes this CTA's part of the active neurons to `list` and returns how many there are. Without a cutoff.
template <typename T, int kTokens, int kThreads>
__device__ __forceinline__ int find_active(const ActivatedMlpParams &p, uint8_t *scan, uint32_t *list) {
    __shared__ uint32_t warp_counts[kThreads / 32];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, warps = blockDim.x / 32;
    const int64_t intermediate = p.intermediate_size;
    const T *v = static_cast<const T *>(p.v);
    const bool vectors = intermediate % kScanNeurons == 0 && reinterpret_cast<uintptr_t>(v) % 16 == 0;
    uint32_t count = 0;
    const auto note = [&](int64_t at, uint32_t bits) { scan[at] = uint8_t(bits), count += __popc(bits); };
    if (vectors) {
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
    if (rank < end && up_to > begin)
        for (int64_t at = tid; at * kScanNeurons < intermediate; at += blockDim.x)
            for (uint32_t bits = scan[at]; bits; bits &= bits - 1, rank++)
                if (rank >= begin && rank < end) list[rank - begin] = uint32_t(at * kScanNeurons) + __ffs(bits) - 1;
    __syncthreads();
    return int(end - begin);
}

// With a cutoff: the neurons of this CTA's groups that are above it in some token. One warp finds them, whose lanes
// have a group each: the gates of 132 CTAs and 33,792 neurons are asked for at once, together with the sums.
template <typename T, int kTokens>
__device__ __forceinline__ int find_above(const ActivatedMlpParams &p, uint32_t *list, float (&cutoffs)[kTokens]) {
    using Gates = Values<T, kScanNeurons>;
    __shared__ int active;
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x, ctas = gridDim.x, groups = int(p.intermediate_size / kScanNeurons);
        Gates gates[kTokens];
        const auto load = [&](int group) {
#pragma unroll
            for (int m = 0; m < kTokens; m++) {
                gates[m] = {};
                if (group < groups && m < p.tokens)
                    gates[m] = Gates::load(static_cast<const T *>(p.v) + m * p.intermediate_size +
                                           int64_t(group) * kScanNeurons);
            }
        };
        load(blockIdx.x + lane * ctas);
        float found[kTokens];
#pragma unroll
        for (int m = 0; m < kTokens; m++) {
            found[m] = m < p.tokens ? find_cutoff<T>(p, m) : 0.f;
            if (lane == 0) cutoffs[m] = found[m];
        }
        int count = 0;
        for (int first = blockIdx.x; first < groups; first += 32 * ctas) {
            const int group = first + lane * ctas;
            uint32_t bits = 0;
#pragma unroll
            for (int m = 0; m < kTokens; m++) {
                float g[kScanNeurons];
                gates[m].decode(g);
#pragma unroll
                for (int e = 0; e < kScanNeurons; e++) bits |= uint32_t(m < p.tokens && !(g[e] <= found[m])) << e;
            }
            load(group + 32 * ctas);
            if (group >= groups) bits = 0;
            int before = 0, all = 0; // active neurons of the lanes before this one, and of all
#pragma unroll
            for (int b = 0; b < 4; b++) { // a lane has at most 8
                const uint32_t lanes = __ballot_sync(0xffffffffu, __popc(bits) >> b & 1);
                before += __popc(lanes & ((1u << lane) - 1)) << b, all += __popc(lanes) << b;
            }
            uint32_t *to = list + count + before;
#pragma unroll
            for (int e = 0; e < kScanNeurons; e++)
                if (bits >> e & 1) *to++ = uint32_t(group * kScanNeurons + e);
            count += all;
        }
        if (lane == 0) active = count;
    }
    __syncthreads();
    return active;
}

// In a neuron's row, what first_row points to in row 0. In assembly: otherwise the compiler takes more instructions for
// the address, and most of them again for every row.
__device__ __forceinline__ const uint8_t *in_row(const uint8_t *first_row, uint32_t neuron, uint32_t stride) {
    uint64_t address;
    asm("mad.wide.u32 %0, %1, %2, %3;"
        : "=l"(address)
        : "r"(neuron), "r"(stride), "l"(__cvta_generic_to_global(first_row)));
    return static_cast<const uint8_t *>(__cvta_global_to_generic(address));
}

template <typename T, int kTokens, int kChunks, int kThreads, bool kCutoff>
__global__ void __launch_bounds__(kThreads, 1)
    activated_mlp_kernel(const __grid_constant__ ActivatedMlpParams p, const Workspace workspace) {
    using Row = DenseRow<T>;
    using Columns = Values<T, Row::kPerChunk>; // of x
    constexpr int kPerChunk = Row::kPerChunk, kRows = activated_rows(kTokens, kChunks, kThreads);
    constexpr int kMaxWarps = kThreads / 32, kDots = kRows * kTokens;
    constexpr int kLanesPerDot = 32 / kDots; // lane l has row and token l / kLanesPerDot
    // The warps' parts of the up rows' dot products, in turns: no warp is two batches ahead of another.
    __shared__ float partials[2][kMaxWarps][kDots];
    extern __shared__ __align__(16) uint8_t smem[];
    const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, warps = blockDim.x / 32;
    const int my_dot = lane / kLanesPerDot, my_row = my_dot / kTokens, my_token = my_dot % kTokens;
    auto *list = reinterpret_cast<uint32_t *>(smem + (kCutoff ? 0 : scan_bytes(p.intermediate_size, blockDim.x)));
    const int hidden = int(p.hidden_size), row_chunks = hidden / kPerChunk;
    const uint32_t up_stride = uint32_t(p.w_up_stride * sizeof(T)),
                   down_stride = uint32_t(p.w_down_t_stride * sizeof(T));
    const auto *w_up = static_cast<const uint8_t *>(p.w_up), *w_down_t = static_cast<const uint8_t *>(p.w_down_t);
    struct alignas(kRows < 4 ? 4 * kRows : 16) Batch { // of the list; loaded 16 bytes at a time
        uint32_t neurons[kRows];
    };
    static_assert(kRows <= 16);
    const auto chunk = [&](int c) { return c * int(blockDim.x) + tid; };
    const auto loaded_chunk = [&](int c) { return min(chunk(c), row_chunks - 1); }; // surplus threads load the last
    const auto prefetch = [&](int i) { // row i / 2 of the list: up, or down where i is odd
        const uint64_t neuron = list[i / 2];
        if (i % 2) prefetch_l2(w_down_t + neuron * down_stride, uint32_t(hidden * sizeof(T)));
        else if (w_up) prefetch_l2(w_up + neuron * up_stride, uint32_t(hidden * sizeof(T)));
    };

    launch_dependents();
    wait_for_previous_kernel();
    const auto load_x = [&](int m, int c) {
        if (!w_up || m >= p.tokens || chunk(c) >= row_chunks) return Columns{};
        return Columns::load(static_cast<const T *>(p.x) + int64_t(m) * hidden + chunk(c) * kPerChunk);
    };
    constexpr bool kHoldsX = kTokens == 1 && kChunks <= 2; // otherwise it is loaded again for each batch
    Columns x[kChunks];
    if constexpr (kHoldsX)
#pragma unroll
        for (int c = 0; c < kChunks; c++) x[c] = load_x(0, c);
    __shared__ float cutoffs[kTokens];
    int active;
    if constexpr (kCutoff) active = find_above<T, kTokens>(p, list, cutoffs);
    else active = find_active<T, kTokens, kThreads>(p, smem, list);

    float acc[kTokens][kChunks][kPerChunk] = {};
    int turn = 0;
    for (int first = 0; first < active; first += kRows, turn ^= 1) {
        const int count = min(kRows, active - first);
        const Batch batch = *reinterpret_cast<const Batch *>(list + first);
        // This lane's row and token, or others: v, and the bias of u. Asked for now, without a branch, and used below.
        const uint32_t neuron = list[first + min(my_row, count - 1)];
        const int token = min(my_token, int(p.tokens) - 1);
        const T v = static_cast<const T *>(p.v)[token * p.intermediate_size + neuron];
        const T bias = static_cast<const T *>(p.up_bias ? p.up_bias : p.v)[neuron];
        typename Row::Packed up[kRows][kChunks], down[kRows][kChunks];
        const auto request = [&](auto &rows, const uint8_t *matrix, uint32_t stride, int present) {
#pragma unroll
            for (int few = 0; few < kRows; few += 4) { // most batches are not full
                if (few >= present) break;
#pragma unroll
                for (int r = few; r < few + 4 && r < kRows; r++)
#pragma unroll
                    for (int c = 0; c < kChunks; c++)
                        if (r < present)
                            rows[r][c] =
                                Row::load(in_row(matrix + loaded_chunk(c) * kChunkBytes, batch.neurons[r], stride), 0);
            }
        };
        request(up, w_up, up_stride, w_up ? count : 0);
        request(down, w_down_t, down_stride, count);
        // A batch is computed when all of it has arrived: the next one is brought into L2 meanwhile.
        if (const int i = 2 * (first + kRows) + tid; tid < 2 * kRows && i < 2 * active) prefetch(i);
        float h = to_float(v); // later times u
        if constexpr (kCutoff) h = exact_activation<T>(above_cutoff<T>(h, cutoffs[token]), p.activation, p.squared);
        if (my_row >= count || my_token >= p.tokens) h = 0.f;
        const uint32_t kept_lanes = __ballot_sync(0xffffffffu, !(h == 0.f)); // no 0 * inf
        const auto kept = [&](int r, int m) { return kept_lanes >> (r * kTokens + m) * kLanesPerDot & 1; };
        if (w_up) {
            float dots[kDots] = {};
#pragma unroll
            for (int m = 0; m < kTokens; m++)
#pragma unroll
                for (int c = 0; c < kChunks; c++) {
                    if (chunk(c) >= row_chunks) continue;
                    float columns[kPerChunk];
                    (kHoldsX ? x[c] : load_x(m, c)).decode(columns);
#pragma unroll
                    for (int r = 0; r < kRows; r++) {
                        if (!kept(r, m)) continue;
                        float w[kPerChunk];
                        Row::decode(up[r][c], w);
#pragma unroll
                        for (int e = 0; e < kPerChunk; e++)
                            dots[r * kTokens + m] = fmaf(w[e], columns[e], dots[r * kTokens + m]);
                    }
                }
            const float of_warp = warp_sum(dots);
            if (lane % kLanesPerDot == 0) partials[turn][warp][my_dot] = of_warp;
            __syncthreads();
            float sum = 0.f; // every warp sums all of them, each group of lanes one
#pragma unroll
            for (int w = 0; w < kMaxWarps; w += kLanesPerDot)
                if (const int other = w + lane % kLanesPerDot; other < warps) sum += partials[turn][other][my_dot];
#pragma unroll
            for (int o = kLanesPerDot / 2; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            h *= p.up_bias ? sum + to_float(bias) : sum;
        }
#pragma unroll
        for (int r = 0; r < kRows; r++)
#pragma unroll
            for (int m = 0; m < kTokens; m++) {
                if (!kept(r, m)) continue;
                const float of_row = __shfl_sync(0xffffffffu, h, (r * kTokens + m) * kLanesPerDot);
#pragma unroll
                for (int c = 0; c < kChunks; c++) {
                    float w[kPerChunk];
                    Row::decode(down[r][c], w);
#pragma unroll
                    for (int e = 0; e < kPerChunk; e++) acc[m][c][e] = fmaf(w[e], of_row, acc[m][c][e]);
                }
            }
    }

    constexpr int kCopies = kCutoff && kTokens == 1 ? kOutputCopies : 1;
    const OutputOrder<0> order{int(p.tokens), hidden};
    if (active || workspace.partial_sums)
#pragma unroll
        for (int m = 0; m < kTokens; m++)
#pragma unroll
            for (int c = 0; c < kChunks; c++) {
                if (m >= p.tokens || chunk(c) >= row_chunks) continue;
#pragma unroll
                for (int e = 0; e < kPerChunk; e += 4)
                    add_to_output<kCopies>(
                        workspace, order.size(), m * hidden + chunk(c) * kPerChunk + e,
                        make_float4(acc[m][c][e], acc[m][c][e + 1], acc[m][c][e + 2], acc[m][c][e + 3]));
            }
    finish_output<kCopies>(workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), order);
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
    static_assert(kMaxTokensPerLaunch <= kGenericThreads / 32);
    if (const int m = threadIdx.x / 32; p.cutoff && m < p.tokens) {
        const float cutoff = find_cutoff<T>(p, m);
        if (threadIdx.x % 32 == 0) cutoffs[m] = cutoff;
    }
    __syncthreads();
    for (int64_t j = blockIdx.x; j < p.intermediate_size; j += gridDim.x)
        for (int m = 0; m < p.tokens; m++) {
            float v = to_float(static_cast<const T *>(p.v)[m * p.intermediate_size + j]);
            if (p.cutoff) v = exact_activation<T>(above_cutoff<T>(v, cutoffs[m]), p.activation, p.squared);
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
