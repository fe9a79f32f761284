// The one-pass sparse gated MLP: gate, threshold, and the up and down rows of kept neurons, in one persistent kernel.
//
// At a few tokens the MLP takes as long as its weights take to read, so the kernel is a queue of weight rows that never
// runs dry. kTeamWarps warps form a team; a team treats one row at a time, each warp its own
// segment of the columns. Rows pass through the warps' rings (row_pipe.cuh) in the order of their requests:
// gate rows, and, as soon as a gate row's dot product passes the threshold, that neuron's up and down rows, which go
// before the next gate row. While a row is computed the following `slots` rows are on their way, so nothing waits for
// the decision. Down rows are accumulated in registers; y leaves the CTA once, at the end (finish.cuh).
//
// The warps of a team run the same control flow on the same values: the queue's state is spread over the lanes of every
// warp (lane s knows what slot s holds), and dot products are summed in the same order by all. The only thing they
// exchange is partial dot products, one named barrier a gate or up row.
//
// Weights do not depend on the previous kernel, x does. With programmatic dependent launch this kernel starts while the
// previous one still runs, and only prefetches its first rows into L2 before it waits. Everything it computes with is
// read after the wait, so a kernel that writes weights, x or thresholds just before is always seen.
#pragma once

#include "../sparse_mlp.h"
#include "activation.cuh"
#include "finish.cuh"
#include "row_format.cuh"
#include "row_pipe.cuh"

namespace cats {

// What the launcher plans per shape; see sparse_mlp_dispatch.cuh.
struct SparseMlpPlan {
    int ctas;
    int slots;          // rows in flight per team, 2 to kMaxSlots
    int segment_chunks; // 16-byte chunks of a row per warp; the last warps of a team may have fewer or none
    int prefetch_rows;  // gate rows of a team brought into L2 before the previous kernel ends
};

struct KernelArguments {
    SparseMlpParams mlp;
    SparseMlpPlan plan;
    Workspace workspace;
};

// A row on its way: neuron | value index << 24 | kind << 29. So at most 2^24 neurons; the launcher checks.
enum RowKind : uint32_t { kGateRow = 0, kUpRow = 1, kDownRow = 2 };
constexpr int64_t kMaxNeurons = 1 << 24;
__device__ __forceinline__ uint32_t make_row(RowKind kind, uint32_t value, uint32_t neuron) {
    return kind << 29 | value << 24 | neuron;
}

// What the warps of a team tell each other at a gate or up row: their partial dot products, and the leader the next
// neuron. Two of them, used in turns: a warp may be one row ahead of another, never two.
template <int kTokens, int kTeamWarps> struct Exchange {
    float dots[kTokens][kTeamWarps];
    uint32_t next_neuron;
};

// Shared memory: rings | barriers | exchanges. At the end the teams are summed through the space of the rings.
struct SharedLayout {
    uint32_t barriers, exchanges, total; // offsets in bytes; the rings start at 0

    __host__ __device__ SharedLayout(const SparseMlpPlan &plan, int warps, int teams, int barrier_bytes,
                                     int columns_per_thread, int exchange_bytes) {
        const uint32_t rings = warps * plan.slots * plan.segment_chunks * 16;
        const uint32_t team_sums = warps / teams * 32 * (teams - 1) * columns_per_thread * sizeof(float);
        barriers = rings > team_sums ? rings : team_sums;
        exchanges = barriers + warps * plan.slots * barrier_bytes;
        total = exchanges + teams * 2 * exchange_bytes;
    }
};

template <class Row, class Pipe, int kTokens, int kTeams, int kTeamWarps, int kChunks>
__device__ __forceinline__ void sparse_mlp_body(const KernelArguments &args) {
    using T = typename Row::Element;
    constexpr int kWarps = kTeams * kTeamWarps, kPerChunk = Row::kPerChunk;
    constexpr uint32_t kAll = 0xffffffffu;
    const SparseMlpParams &p = args.mlp;
    const SparseMlpPlan &plan = args.plan;
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
    const int team = warp / kTeamWarps, team_warp = warp % kTeamWarps;
    const int hidden = int(p.hidden_size);

    extern __shared__ __align__(128) uint8_t smem[];
    using TeamExchange = Exchange<kTokens, kTeamWarps>;
    const SharedLayout layout(plan, kWarps, kTeams, Pipe::kBarrierBytes, kChunks * kPerChunk, sizeof(TeamExchange));
    const uint32_t slot_bytes = plan.segment_chunks * 16;
    uint64_t *barriers = reinterpret_cast<uint64_t *>(smem + layout.barriers) + warp * plan.slots;
    TeamExchange *exchanges = reinterpret_cast<TeamExchange *>(smem + layout.exchanges) + team * 2;

    // This warp's columns.
    const int row_chunks = hidden / kPerChunk;
    const int first_chunk = min(team_warp * plan.segment_chunks, row_chunks);
    const int chunks = min(plan.segment_chunks, row_chunks - first_chunk);
    const auto row_address = [&](uint32_t row) { // one wide multiply-add: the launcher checks that strides fit 32 bits
        const uint32_t kind = row >> 29, j = row & (kMaxNeurons - 1);
        const void *base = kind == kGateRow ? p.w_gate : (kind == kUpRow ? p.w_up : p.w_down_t);
        const int64_t stride = kind == kGateRow ? p.w_gate_stride : (kind == kUpRow ? p.w_up_stride : p.w_down_t_stride);
        return static_cast<const uint8_t *>(base) + first_chunk * 16 + uint64_t(j) * uint32_t(stride * sizeof(T));
    };

    // Neurons. A team starts with neurons team, team + teams, ..., one for each slot; from then on it draws the next one
    // from a counter in global memory. How many rows a neuron has depends on the input, so with fixed shares the CTAs
    // would end up to a tenth of the whole time apart.
    const uint32_t intermediate = uint32_t(p.intermediate_size), teams = gridDim.x * kTeams;
    const uint32_t first_neuron = blockIdx.x * kTeams + team, first_drawn = teams * plan.slots;

#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (lane == 0)
        for (uint32_t i = 0, j = first_neuron; i < plan.prefetch_rows && j < intermediate; i++, j += teams)
            prefetch_l2(row_address(make_row(kGateRow, 0, j)), chunks * 16);
#endif
    Pipe pipe(smem + warp * plan.slots * slot_bytes, barriers, plan.slots, slot_bytes, chunks * 16);
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

    // The leader's next draw is always on its way, one row before it is needed.
    const bool leader = team_warp == 0 && lane == 0;
    uint32_t drawn = 0;
    auto draw = [&] {
        if (leader) drawn = first_drawn + atomicAdd(args.workspace.next_neuron, 1u);
    };
    draw();
    uint32_t next_neuron = 0;
    bool next_known = false; // by every warp of the team

    // The queue. Slots are filled and emptied in ring order, so head and tail say which are in use.
    uint32_t slot_row = 0;                                   // lane s: the row in slot s
    uint32_t pending_row = 0, pending_head = 0, pending = 0; // lane q: a ring of up and down rows still to be requested
    int head = 0, tail = 0, in_flight = 0;
    auto request = [&](uint32_t row) {
        pipe.request(tail, row_address(row));
        if (lane == tail) slot_row = row;
        tail = tail + 1 == plan.slots ? 0 : tail + 1;
        in_flight++;
    };
    auto refill = [&] {
        while (in_flight < plan.slots) {
            if (pending) {
                request(__shfl_sync(kAll, pending_row, pending_head));
                pending_head = (pending_head + 1) % 32, pending--;
            } else if (next_known && next_neuron < intermediate) {
                request(make_row(kGateRow, 0, next_neuron));
                next_known = false;
            } else {
                break;
            }
        }
    };
    auto push_pending = [&](uint32_t row) {
        if (lane == (pending_head + pending) % 32) pending_row = row;
        pending++;
    };
    for (uint32_t i = 0, j = first_neuron; i < plan.slots && j < intermediate; i++, j += teams)
        request(make_row(kGateRow, 0, j));

    float x[kTokens][kChunks][kPerChunk], acc[kTokens][kChunks][kPerChunk];
#pragma unroll
    for (int m = 0; m < kTokens; m++) {
#pragma unroll
        for (int i = 0; i < kChunks; i++) {
            const int chunk = i * 32 + lane;
            uint4 packed = make_uint4(0, 0, 0, 0);
            if (m < p.tokens && chunk < chunks)
                packed = reinterpret_cast<const uint4 *>(static_cast<const T *>(p.x) + m * hidden)[first_chunk + chunk];
            Row::decode(packed, x[m][i]);
#pragma unroll
            for (int e = 0; e < kPerChunk; e++) acc[m][i][e] = 0.f;
        }
    }
    // Lane v holds value v: act(g), later h, of a neuron on its way, and which tokens keep it. Between its gate row and
    // its down row a neuron has a row pending or in flight, at most two for each slot, so 32 values are enough.
    float value[kTokens] = {};
    uint32_t value_tokens = 0, values_used = 0;
    uint32_t kept = 0, kept_down = 0; // token-neuron pairs
    int turn = 0;
    // Sums values[m] over the team, and tells its warps the next neuron if they do not know it yet.
    auto sum_over_team = [&](float (&values)[kTokens]) {
#pragma unroll
        for (int m = 0; m < kTokens; m++)
#pragma unroll
            for (int o = 16; o; o >>= 1) values[m] += __shfl_xor_sync(kAll, values[m], o);
        if constexpr (kTeamWarps == 1) {
            if (!next_known) next_neuron = __shfl_sync(kAll, drawn, 0);
        } else {
            TeamExchange &exchange = exchanges[turn];
            turn ^= 1;
            if (lane == 0) {
#pragma unroll
                for (int m = 0; m < kTokens; m++) exchange.dots[m][team_warp] = values[m];
                if (leader && !next_known) exchange.next_neuron = drawn;
            }
            asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeamWarps * 32) : "memory");
#pragma unroll
            for (int m = 0; m < kTokens; m++) {
                values[m] = exchange.dots[m][0];
#pragma unroll
                for (int w = 1; w < kTeamWarps; w++) values[m] += exchange.dots[m][w];
            }
            if (!next_known) next_neuron = exchange.next_neuron;
        }
        if (!next_known && next_neuron < intermediate) draw();
        next_known = true;
    };

    while (true) {
        if (!in_flight) { // nothing on its way, and perhaps nothing left
            if (next_known && next_neuron >= intermediate) break;
            float none[kTokens] = {};
            sum_over_team(none);
            refill();
            continue;
        }
        const uint32_t row = __shfl_sync(kAll, slot_row, head);
        const uint32_t kind = row >> 29, j = row & (kMaxNeurons - 1), v = row >> 24 & 31;
        float bias = 0.f, threshold = 0.f; // asked for now, needed after the dot product
        if (kind == kGateRow) {
            threshold = p.threshold[j * p.threshold_stride];
            if (p.gate_bias) bias = to_float(static_cast<const T *>(p.gate_bias)[j]);
        } else if (kind == kUpRow) {
            if (p.down_threshold) threshold = p.down_threshold[j * p.down_threshold_stride];
            if (p.up_bias) bias = to_float(static_cast<const T *>(p.up_bias)[j]);
        }
        pipe.wait(head, in_flight);
        // use(i, columns of chunk i) for this lane's chunks, with several loads in flight before the first use.
        const auto for_each_chunk = [&](auto use) {
            constexpr int kBatch = kChunks % 3 == 0 ? 3 : (kChunks % 4 == 0 && kPerChunk == 8 ? 4 : (kChunks > 1 ? 2 : 1));
#pragma unroll
            for (int first = 0; first < kChunks; first += kBatch) {
                uint4 packed[kBatch];
#pragma unroll
                for (int b = 0; b < kBatch; b++) {
                    packed[b] = make_uint4(0, 0, 0, 0);
                    if ((first + b) * 32 + lane < chunks) packed[b] = pipe.chunk(head, first + b);
                }
#pragma unroll
                for (int b = 0; b < kBatch; b++) {
                    float w[kPerChunk];
                    Row::decode(packed[b], w);
                    use(first + b, w);
                }
            }
        };
        if (kind == kDownRow) {
            const uint32_t tokens = __shfl_sync(kAll, value_tokens, v);
            float h[kTokens];
#pragma unroll
            for (int m = 0; m < kTokens; m++) h[m] = __shfl_sync(kAll, value[m], v);
            values_used &= ~(1u << v);
            for_each_chunk([&](int i, const float (&w)[kPerChunk]) {
#pragma unroll
                for (int m = 0; m < kTokens; m++) { // a token that dropped the neuron must not see 0 * inf
                    if (kTokens > 1 && !(tokens >> m & 1)) continue;
#pragma unroll
                    for (int e = 0; e < kPerChunk; e++) acc[m][i][e] = fmaf(w[e], h[m], acc[m][i][e]);
                }
            });
        } else {
            float dot[kTokens];
#pragma unroll
            for (int m = 0; m < kTokens; m++) dot[m] = 0.f;
            for_each_chunk([&](int i, const float (&w)[kPerChunk]) {
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    float even = 0.f, odd = 0.f;
#pragma unroll
                    for (int e = 0; e < kPerChunk; e += 2) {
                        even = fmaf(w[e], x[m][i][e], even);
                        odd = fmaf(w[e + 1], x[m][i][e + 1], odd);
                    }
                    dot[m] += even + odd;
                }
            });
            sum_over_team(dot);
            if (kind == kGateRow) {
                uint32_t tokens = 0;
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    dot[m] = activate(dot[m] + bias, p.activation);
                    if (m < p.tokens && keep(dot[m], threshold)) tokens |= 1u << m;
                }
                if (tokens) {
                    const int free = __ffs(~values_used) - 1;
                    values_used |= 1u << free;
                    kept += __popc(tokens);
                    if (lane == free) {
                        value_tokens = tokens;
#pragma unroll
                        for (int m = 0; m < kTokens; m++) value[m] = dot[m];
                    }
                    push_pending(make_row(kUpRow, free, j));
                    if (!p.down_threshold) push_pending(make_row(kDownRow, free, j));
                }
            } else {
                uint32_t tokens = __shfl_sync(kAll, value_tokens, v);
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    dot[m] = __shfl_sync(kAll, value[m], v) * (dot[m] + bias);
                    if (p.down_threshold && !keep(dot[m], threshold)) tokens &= ~(1u << m);
                    if (lane == v) value[m] = dot[m];
                }
                kept_down += __popc(tokens);
                if (lane == v) value_tokens = tokens;
                if (p.down_threshold) {
                    if (tokens) push_pending(make_row(kDownRow, v, j));
                    else values_used &= ~(1u << v);
                }
            }
        }
        head = head + 1 == plan.slots ? 0 : head + 1;
        in_flight--;
        refill();
    }

    if (p.counts && leader) {
        auto *counts = reinterpret_cast<unsigned long long *>(p.counts);
        if (first_neuron == 0) atomicAdd(counts, (unsigned long long)(p.intermediate_size * p.tokens));
        atomicAdd(counts + 1, (unsigned long long)kept);
        atomicAdd(counts + 2, (unsigned long long)kept_down);
    }

    // Sum the teams through the rings, which nobody uses any more. Thread by thread the teams own the same columns.
    constexpr int kTeamThreads = kTeamWarps * 32, kColumns = kChunks * kPerChunk;
    if (kTeams > 1) {
        float *others = reinterpret_cast<float *>(smem);
        __syncthreads();
#pragma unroll
        for (int m = 0; m < kTokens; m++) {
            if (m >= p.tokens) break;
            if (team > 0)
#pragma unroll
                for (int c = 0; c < kColumns; c++)
                    others[((team - 1) * kColumns + c) * kTeamThreads + tid % kTeamThreads] =
                        acc[m][c / kPerChunk][c % kPerChunk];
            __syncthreads();
            if (team == 0)
#pragma unroll
                for (int c = 0; c < kColumns; c++)
#pragma unroll
                    for (int t = 0; t < kTeams - 1; t++)
                        acc[m][c / kPerChunk][c % kPerChunk] += others[(t * kColumns + c) * kTeamThreads + tid];
            __syncthreads();
        }
    }
    if (team == 0) {
#pragma unroll
        for (int m = 0; m < kTokens; m++) {
            if (m >= p.tokens) break;
#pragma unroll
            for (int i = 0; i < kChunks; i++) {
                if (i * 32 + lane >= chunks) break;
                float *to = args.workspace.y_sum + m * hidden + (first_chunk + i * 32 + lane) * kPerChunk;
                const float *a = acc[m][i];
#pragma unroll
                for (int e = 0; e < kPerChunk; e += 4) add_to_global(to + e, a[e], a[e + 1], a[e + 2], a[e + 3]);
            }
        }
    }
    finish_output(args.workspace, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y), int(p.tokens), hidden);
}

template <class Row, class Pipe, int kTokens, int kTeams, int kTeamWarps, int kChunks>
__global__ void __launch_bounds__(kTeams *kTeamWarps * 32, 1)
    sparse_mlp_kernel(const __grid_constant__ KernelArguments args) {
#ifdef __CUDA_ARCH__
    if constexpr (__CUDA_ARCH__ >= Pipe::kMinArch)
        sparse_mlp_body<Row, Pipe, kTokens, kTeams, kTeamWarps, kChunks>(args);
#endif
}

} // namespace cats
