// What the teams of warps of sparse_mlp_kernel.cuh keep in shared memory and tell each other.
#pragma once

#include "../sparse_mlp.h"
#include "finish.cuh"
#include "row_pipe.cuh"

namespace cats {

// What the launcher plans per shape; see sparse_mlp_dispatch.cuh.
struct SparseMlpPlan {
    int ctas;
    int slots;          // batches in flight per team, 2 to kMaxSlots
    int segment_chunks; // 16-byte chunks of a row per warp; the last warps of a team may have fewer or none
    int first_batches;  // gate batches that a team starts with: brought into L2 before the previous kernel ends
};

struct KernelArguments {
    SparseMlpParams mlp;
    SparseMlpPlan plan;
    Workspace workspace;
};

// A row on its way: neuron | value index << 24. So at most 2^24 neurons; the launcher checks.
constexpr uint32_t kMaxNeurons = 1 << 24, kNoRow = 0xffffffff;
enum RowKind : uint32_t { kGate = 0, kUp = 1, kDown = 2 };

// Values are act(g), later h, of neurons on their way from their gate row to their down row, one index each.
constexpr int kMaxValues = 32;

// What one warp remembers, its own copy. Rings of 32: no queue can hold more neurons than there are value indices.
template <int kTokens, int kRows> struct WarpState {
    uint32_t up_queue[kMaxValues], down_queue[kMaxValues]; // rows still to be requested
    uint32_t slot_rows[kMaxSlots][kRows];                  // what the slots hold
    float values[kMaxValues][kTokens];
    uint32_t value_tokens[kMaxValues]; // which tokens keep the neuron
};

// What the warps of a team tell each other at a gate or up batch: their partial dot products, and the leader the next
// gate batch. Two of them, used in turns: a warp may be one batch ahead of another, never two.
template <int kDots, int kTeamWarps> struct alignas(16) TeamState {
    struct alignas(16) Exchange {
        float dots[kDots][kTeamWarps];
        uint32_t next_batch;
    } exchanges[2];
#ifdef CATS_FOR_RACECHECK
    uint64_t barrier; // an mbarrier on which all threads of the team arrive; its phases have parity 0 and 1 in turns
#endif

    // Until all threads of the team have come here in this turn. Once teams have synchronised different numbers of
    // times, compute-sanitizer's racecheck takes no named barrier or __syncthreads() into account; compiled for it, an
    // mbarrier does the same, 0.2 to 0.3 us a launch slower at H 4096, I 14336.
    __device__ __forceinline__ void synchronise(int team, int turn) {
#ifdef CATS_FOR_RACECHECK
        arrive(&barrier);
        wait(&barrier, turn);
#else
        asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kTeamWarps * 32) : "memory");
#endif
    }
};

// Shared memory: rings | barriers | warp states | team states. At the end the teams are summed through the rings'
// space.
struct SharedLayout {
    uint32_t barriers, warp_states, team_states, total; // offsets in bytes; the rings start at 0

    __host__ __device__ SharedLayout(const SparseMlpPlan &plan, int64_t hidden_size, int warps, int teams, int rows,
                                     int barrier_bytes, int warp_state_bytes, int team_state_bytes) {
        const uint32_t rings = warps * plan.slots * rows * plan.segment_chunks * 16;
        const uint32_t team_sums = teams * uint32_t(hidden_size) * sizeof(float);
        barriers = rings > team_sums ? rings : team_sums;
        warp_states = barriers + warps * plan.slots * barrier_bytes;
        team_states = warp_states + warps * warp_state_bytes;
        total = team_states + teams * team_state_bytes;
    }
};

// Sums kValues values over the warp; lane l ends up with value l * kValues / 32, every lane of its group the same bits.
// Halving the number of values at each exchange takes kValues - 1 shuffles and a few more, instead of 5 * kValues.
template <int kValues> __device__ __forceinline__ float warp_sum(float (&values)[kValues]) {
    static_assert((kValues & (kValues - 1)) == 0 && kValues <= 32);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = kValues, o = 16; n > 1; n /= 2, o /= 2)
#pragma unroll
        for (int i = 0; i < n / 2; i++) {
            const bool upper = lane & o;
            const float sent = upper ? values[i] : values[i + n / 2], kept = upper ? values[i + n / 2] : values[i];
            values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, o);
        }
    float sum = values[0];
#pragma unroll
    for (int o = 16 / kValues; o; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    return sum;
}

// A batch of rows is up to 4 KiB a warp: what a batch costs beside its columns, some 1,000 cycles of latency, is then
// hidden by the other teams. Where a CTA has less shared memory, single rows.
__host__ __device__ constexpr int rows_per_batch(int tokens, int chunks, bool large_shared_memory) {
    const int rows = chunks <= 2 ? 4 : (chunks <= 4 ? 2 : 1), most = large_shared_memory ? 4 / tokens : 1;
    return rows < most ? rows : most;
}

} // namespace cats
