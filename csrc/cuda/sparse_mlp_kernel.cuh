// The one-pass sparse gated MLP: gate, threshold, and the up and down rows of kept neurons, in one persistent kernel.
//
// At a few tokens the MLP takes as long as its weights take to read, so the kernel is a queue of weight rows that never
// runs dry. kTeamWarps warps form a team; a team owns neurons team, team + teams, ... and treats one row at a time, each
// warp its own segment of the columns. Rows pass through the warps' rings (row_pipe.cuh) in the order of their requests:
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

// What the launcher plans per shape; see sparse_mlp_launch.cu.
struct SparseMlpPlan {
    int ctas;
    int slots;            // rows in flight per team, 2 to kMaxSlots
    int segment_chunks;   // 16-byte chunks of a row per warp; the last warps of a team may have fewer or none
    int neurons_per_team; // rounded up
    int prefetch_rows;    // gate rows of a team brought into L2 before the previous kernel ends
};

struct KernelArguments {
    SparseMlpParams mlp;
    SparseMlpPlan plan;
    float *y_sum;
    unsigned *done_ctas;
};

// A row on its way: neuron (index among the team's) | value index << 24 | kind << 29.
enum RowKind : uint32_t { kGateRow = 0, kUpRow = 1, kDownRow = 2 };
__device__ __forceinline__ uint32_t make_row(RowKind kind, uint32_t value, uint32_t neuron) {
    return kind << 29 | value << 24 | neuron;
}

// Shared memory: rings | barriers | per-neuron scalars | partial dot products. At the end the teams are summed through
// the space of the rings.
struct SharedLayout {
    uint32_t barriers, scalars, partial_dots, total; // offsets in bytes; the rings start at 0

    __host__ __device__ SharedLayout(const SparseMlpPlan &plan, int warps, int teams, int tokens, int barrier_bytes,
                                     int columns_per_thread) {
        const uint32_t rings = warps * plan.slots * plan.segment_chunks * 16;
        const uint32_t team_sums = warps / teams * 32 * (teams - 1) * columns_per_thread * sizeof(float);
        barriers = rings > team_sums ? rings : team_sums;
        scalars = barriers + warps * plan.slots * barrier_bytes;
        partial_dots = scalars + teams * plan.neurons_per_team * sizeof(float4);
        total = partial_dots + 2 * warps * tokens * sizeof(float);
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
    const SharedLayout layout(plan, kWarps, kTeams, kTokens, Pipe::kBarrierBytes, kChunks * kPerChunk);
    const uint32_t slot_bytes = plan.segment_chunks * 16;
    uint64_t *barriers = reinterpret_cast<uint64_t *>(smem + layout.barriers) + warp * plan.slots;
    float4 *scalars = // {threshold, down_threshold, gate_bias, up_bias} of the team's neurons
        reinterpret_cast<float4 *>(smem + layout.scalars) + team * plan.neurons_per_team;
    float *partial_dots = reinterpret_cast<float *>(smem + layout.partial_dots) + team * 2 * kTeamWarps * kTokens;

    // This warp's columns, and this team's neurons.
    const int row_chunks = hidden / kPerChunk;
    const int first_chunk = min(team_warp * plan.segment_chunks, row_chunks);
    const int chunks = min(plan.segment_chunks, row_chunks - first_chunk);
    const int first_neuron = blockIdx.x * kTeams + team, neuron_stride = gridDim.x * kTeams;
    const int neurons = (int(p.intermediate_size) - first_neuron + neuron_stride - 1) / neuron_stride;
    auto row_address = [&](uint32_t kind, int k) {
        const void *base = kind == kGateRow ? p.w_gate : (kind == kUpRow ? p.w_up : p.w_down_t);
        const int64_t stride = kind == kGateRow ? p.w_gate_stride : (kind == kUpRow ? p.w_up_stride : p.w_down_t_stride);
        return static_cast<const uint8_t *>(base) + (first_neuron + int64_t(k) * neuron_stride) * stride * sizeof(T) +
               first_chunk * 16;
    };

#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (lane == 0)
        for (int k = 0; k < min(plan.prefetch_rows, neurons); k++) prefetch_l2(row_address(kGateRow, k), chunks * 16);
#endif
    Pipe pipe(smem + warp * plan.slots * slot_bytes, barriers, plan.slots, slot_bytes, chunks * 16);
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif

    // The queue. Slots are filled and emptied in ring order, so head and tail say which are in use.
    uint32_t slot_row = 0;                                 // lane s: the row in slot s
    uint32_t pending_row = 0, pending_head = 0, pending = 0; // lane q: a ring of up and down rows still to be requested
    int head = 0, tail = 0, in_flight = 0, next_gate = 0;
    auto refill = [&] {
        while (in_flight < plan.slots && (pending || next_gate < neurons)) {
            uint32_t row;
            if (pending) {
                row = __shfl_sync(kAll, pending_row, pending_head);
                pending_head = (pending_head + 1) % 32, pending--;
            } else {
                row = make_row(kGateRow, 0, next_gate++);
            }
            pipe.request(tail, row_address(row >> 29, row & 0xffffff));
            if (lane == tail) slot_row = row;
            tail = tail + 1 == plan.slots ? 0 : tail + 1;
            in_flight++;
        }
    };
    auto push_pending = [&](uint32_t row) {
        if (lane == (pending_head + pending) % 32) pending_row = row;
        pending++;
    };
    refill();

    for (int k = team_warp * 32 + lane; k < neurons; k += kTeamWarps * 32) {
        const int64_t j = first_neuron + int64_t(k) * neuron_stride;
        scalars[k] = make_float4(p.threshold[j * p.threshold_stride],
                                 p.down_threshold ? p.down_threshold[j * p.down_threshold_stride] : 0.f,
                                 p.gate_bias ? to_float(static_cast<const T *>(p.gate_bias)[j]) : 0.f,
                                 p.up_bias ? to_float(static_cast<const T *>(p.up_bias)[j]) : 0.f);
    }
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
    __syncthreads(); // scalars are there

    // Lane v holds value v: act(g), later h, of a neuron on its way, and which tokens keep it. Between its gate row and
    // its down row a neuron has a row pending or in flight, at most two for each slot, so 32 values are enough.
    float value[kTokens] = {};
    uint32_t value_tokens = 0, values_used = 0;
    uint32_t kept = 0, kept_down = 0; // token-neuron pairs
    int parity = 0;

    while (in_flight) {
        const uint32_t row = __shfl_sync(kAll, slot_row, head);
        const uint32_t kind = row >> 29, k = row & 0xffffff, v = row >> 24 & 31;
        pipe.wait(head, in_flight);
        if (kind == kDownRow) {
            const uint32_t tokens = __shfl_sync(kAll, value_tokens, v);
            float h[kTokens];
#pragma unroll
            for (int m = 0; m < kTokens; m++) h[m] = __shfl_sync(kAll, value[m], v);
            values_used &= ~(1u << v);
#pragma unroll
            for (int i = 0; i < kChunks; i++) {
                if (i * 32 + lane >= chunks) break;
                float w[kPerChunk];
                Row::decode(pipe.chunk(head, i), w);
#pragma unroll
                for (int m = 0; m < kTokens; m++) { // a token that dropped the neuron must not see 0 * inf
                    if (kTokens > 1 && !(tokens >> m & 1)) continue;
#pragma unroll
                    for (int e = 0; e < kPerChunk; e++) acc[m][i][e] = fmaf(w[e], h[m], acc[m][i][e]);
                }
            }
        } else {
            float dot[kTokens];
#pragma unroll
            for (int m = 0; m < kTokens; m++) dot[m] = 0.f;
#pragma unroll
            for (int i = 0; i < kChunks; i++) {
                if (i * 32 + lane >= chunks) break;
                float w[kPerChunk];
                Row::decode(pipe.chunk(head, i), w);
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
            }
#pragma unroll
            for (int m = 0; m < kTokens; m++)
#pragma unroll
                for (int o = 16; o; o >>= 1) dot[m] += __shfl_xor_sync(kAll, dot[m], o);
            if (kTeamWarps > 1) { // two buffers: a warp may be one row ahead of another, never two
                float *partial = partial_dots + parity * kTeamWarps * kTokens;
                parity ^= 1;
                if (lane == 0)
#pragma unroll
                    for (int m = 0; m < kTokens; m++) partial[m * kTeamWarps + team_warp] = dot[m];
                asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeamWarps * 32) : "memory");
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    dot[m] = partial[m * kTeamWarps];
#pragma unroll
                    for (int w = 1; w < kTeamWarps; w++) dot[m] += partial[m * kTeamWarps + w];
                }
            }
            const float4 scalar = scalars[k];
            if (kind == kGateRow) {
                uint32_t tokens = 0;
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    dot[m] = activate(dot[m] + scalar.z, p.activation);
                    if (m < p.tokens && keep(dot[m], scalar.x)) tokens |= 1u << m;
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
                    push_pending(make_row(kUpRow, free, k));
                    if (!p.down_threshold) push_pending(make_row(kDownRow, free, k));
                }
            } else {
                uint32_t tokens = __shfl_sync(kAll, value_tokens, v);
#pragma unroll
                for (int m = 0; m < kTokens; m++) {
                    dot[m] = __shfl_sync(kAll, value[m], v) * (dot[m] + scalar.w);
                    if (p.down_threshold && !keep(dot[m], scalar.y)) tokens &= ~(1u << m);
                    if (lane == v) value[m] = dot[m];
                }
                kept_down += __popc(tokens);
                if (lane == v) value_tokens = tokens;
                if (p.down_threshold) {
                    if (tokens) push_pending(make_row(kDownRow, v, k));
                    else values_used &= ~(1u << v);
                }
            }
        }
        head = head + 1 == plan.slots ? 0 : head + 1;
        in_flight--;
        refill();
    }

    if (p.counts && team_warp == 0 && lane == 0) {
        auto *counts = reinterpret_cast<unsigned long long *>(p.counts);
        if (neurons > 0) atomicAdd(counts, (unsigned long long)(neurons * p.tokens));
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
                float *to = args.y_sum + m * hidden + (first_chunk + i * 32 + lane) * kPerChunk;
                const float *a = acc[m][i];
#pragma unroll
                for (int e = 0; e < kPerChunk; e += 4) add_to_global(to + e, a[e], a[e + 1], a[e + 2], a[e + 3]);
            }
        }
    }
    finish_output(args.y_sum, args.done_ctas, static_cast<const T *>(p.down_bias), static_cast<T *>(p.y),
                  int(p.tokens), hidden);
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
